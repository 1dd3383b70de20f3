"""A page in headless Chromium: its figures are there, nothing goes out, nothing is cut off.

Two starts for all tests: of the page itself, and of a copy with a script that measures it, a
request and a console error, which are the negative controls.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import socket
import subprocess
import threading
from itertools import pairwise

import pytest

from flexlora.report import write_report
from flexlora.simulations.benchmarks.report_page import made_up_run

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
PHONE = 500  # the narrowest window of headless Chromium
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync")
QUIET += ("--disable-features=NetworkTimeServiceQuerying,OptimizationHints,MediaRouter",)
QUIET += ("--no-first-run", "--no-pings", "--disable-domain-reliability", "--hide-scrollbars")
# What Chromium asks for by itself, whatever the page; of these only fonts are for pages.
ITS_OWN = re.compile(r"\w+ (https?://)?(?!fonts)[\w-]+\.(google|googleapis|gvt1)\.com[:/]")
MEASURE = """<script>
const box = e => e.getBoundingClientRect();
const cut = [...document.querySelectorAll('svg text')].filter(t => {
  const inner = box(t), outer = box(t.ownerSVGElement);
  return inner.left < outer.left - 1 || inner.right > outer.right + 1 ||
         inner.top < outer.top - 2 || inner.bottom > outer.bottom + 2;
}).map(t => t.ownerSVGElement.querySelector('title').textContent + ': ' + t.textContent);
const over = [];
for (const svg of document.querySelectorAll('figure > svg')) {
  const labels = [...svg.querySelectorAll('text')].map(t => [t.textContent, box(t)]);
  labels.forEach(([a, p], i) => labels.slice(i + 1).forEach(([b, q]) => {
    const x = Math.min(p.right, q.right) - Math.max(p.left, q.left);
    const y = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
    if (x > 1 && y > 5) over.push(svg.querySelector('title').textContent + ': ' + a + ' / ' + b);
  }));
}
const found = {
  figures: [...document.querySelectorAll('figure > svg')].map(s => Math.round(box(s).height)),
  wide: document.documentElement.scrollWidth - innerWidth,
  ground: getComputedStyle(document.body).backgroundColor,
  levels: [...document.querySelectorAll('h1,h2,h3')].map(h => Number(h.tagName[1])),
  unnamed: [...document.querySelectorAll('table')].filter(t => !t.caption.textContent).length,
  cut, over,
};
console.error('a control');
document.body.setAttribute('data-found', JSON.stringify(found));
</script><img src="http://leaked.example/x.png" alt="">
<img src="http://fonts.googleapis.com/x.png" alt="">"""


class CountingProxy:
    """A proxy that notes what is asked for and answers nothing."""

    def __init__(self):
        self.asked, self._server = [], socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def port(self):
        return self._server.getsockname()[1]

    def _listen(self):
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            with connection:
                line = connection.recv(4096).split(b"\r\n")[0].decode(errors="replace")
                self.asked.append(line)

    def close(self):
        self._server.close()


def opened(page, place, *flags):
    """``(DOM, console messages, requests)`` of a page after it has been loaded."""
    proxy = CountingProxy()
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *QUIET, *flags]
    command += [f"--user-data-dir={place / 'profile'}", "--enable-logging=stderr", "--dump-dom"]
    command += [f"--proxy-server=127.0.0.1:{proxy.port}", f"--window-size={PHONE},900"]
    try:
        done = subprocess.run(
            [*command, page.as_uri()], capture_output=True, text=True, timeout=120
        )
    finally:
        proxy.close()
    assert done.returncode == 0, done.stderr[-2000:]
    asked = [line for line in proxy.asked if not ITS_OWN.match(line)]
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr), asked


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page with every section that there is, of a run of few rounds."""
    place = tmp_path_factory.mktemp("browser")
    return write_report(made_up_run(place / "run", rounds=3, clients=14, layers=3))


@pytest.fixture(scope="module")
def plain(page, tmp_path_factory):
    return opened(page, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def measured(page, tmp_path_factory):
    """The same of the copy, in the dark."""
    place = tmp_path_factory.mktemp("measured")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    copy = place / "copy.html"
    copy.write_text(text.replace("</body>", f"{MEASURE}</body>"))
    dom, *rest = opened(copy, place, "--blink-settings=preferredColorScheme=0")
    found = re.search(r'data-found="([^"]*)"', dom)
    return json.loads(html.unescape(found[1])), *rest


def test_nothing_goes_out_and_the_console_is_empty(plain):
    dom, console, asked = plain
    assert "</main>" in dom and console == [] and asked == []


def test_a_request_and_an_error_would_be_seen(measured):
    _, console, asked = measured
    assert any("a control" in message for message in console)
    assert {"http://leaked.example/x.png", "http://fonts.googleapis.com/x.png"} == {
        line.split()[1] for line in asked
    }


def test_every_figure_is_drawn_and_no_label_is_cut_or_covered(measured, page):
    found, *_ = measured
    assert len(found["figures"]) == page.read_text().count("<figure>") > 14
    assert min(found["figures"]) > 100
    assert found["cut"] == [] and found["over"] == []


def test_a_phone_scrolls_down_only_and_the_dark_is_dark(measured):
    found, *_ = measured
    assert found["wide"] <= 0
    assert found["ground"] == "rgb(20, 23, 26)"


def test_headings_are_in_order_and_tables_have_captions(measured):
    found, *_ = measured
    levels = found["levels"]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    assert found["unnamed"] == 0
