"""Pages read back, and run folders written for them: what a page shows against what is on disk."""

from __future__ import annotations

import csv
import json
import re
import tomllib
from html.parser import HTMLParser

from flexlora.config.resolve import Config, flatten
from flexlora.runs.folder import RunFolder
from spelled import of_names

VOID = {"meta", "br", "hr", "img", "input", "link"}
SCALES = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
UNITS = {"": 1.0, "%": 0.01, "B": 1.0, "J": 1.0, "s": 1.0, "min": 60.0, "h": 3600.0}
UNITS["days"] = 86400.0


class Page(HTMLParser):
    """The elements of a page; unbalanced tags are an error, as they are to a strict reader.

    ``texts`` are ``(path of tags, text)``; ``data`` are ``(exact value, what is shown, kind)``;
    ``elements`` are ``(tag, attributes)``; ``captions`` are the titles of parts of a picture, each
    with the attributes of its part.
    """

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.texts, self.data, self.elements = [], [], [], []
        self.tables, self.captions, self._heading = {}, [], ""
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert len(attributes) == len(attrs), f"an attribute twice in {tag}"
        self.elements.append((tag, attributes))
        rows = self.tables.get(self._heading)
        if tag == "table":
            self.tables[self._heading] = []
        elif tag == "tr" and rows is not None:
            rows.append([])
        elif tag in ("td", "th") and rows is not None:
            rows[-1].append("")
        if tag not in VOID:
            self.open.append((tag, attributes))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if not self.open or not data.strip():
            return
        tag, attributes = self.open[-1]
        path = [name for name, _ in self.open]
        if tag in ("h2", "summary"):
            self._heading = data
        elif "td" in path or "th" in path:
            self.tables[self._heading][-1][-1] += data
        if tag == "title" and len(self.open) > 1:
            self.captions.append((self.open[-2][1], data))
        if tag == "data":
            kind = attributes.get("class", "")
            self.data.append((float(attributes["value"]), data, kind))
        else:
            self.texts.append((tuple(path), data))

    def said(self, tag=None):
        """All text, or that directly in elements of one name."""
        return [text for path, text in self.texts if tag is None or path[-1] == tag]

    def table(self, title):
        """The rows of the table under a heading, header first, every cell as its text."""
        return self.tables[title]

    def ids(self):
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]


def read_page(file):
    return Page(file.read_text(encoding="utf-8"))


def asked_for(page):
    """Whatever in a page would run, load something or lead elsewhere."""
    active = {"script", "img", "iframe", "object", "embed", "link", "a", "form", "base", "use"}
    found = [tag for tag, _ in page.elements if tag in active]
    for tag, attributes in page.elements:
        for key, value in attributes.items():
            leads = key in ("src", "href", "xlink:href", "action") or key.startswith("on")
            loads = re.search(r"https?:|url\(|javascript:", value or "")
            found += [f"{tag} {key}"] if leads or loads else []
    sheets = page.said("style")
    return found + [rule for sheet in sheets for rule in re.findall(r"@import|url\(|//", sheet)]


def rounded(shown, value):
    """Whether ``shown`` is ``value``, rounded to the digits it has."""
    number, unit = r"(-?)([\d,]*\.?\d*)(?:e([+-]\d+))?", r"([kMGT]?)(B|J|s|min|h|days|%|)"
    found = re.fullmatch(f"{number} ?{unit}", shown)
    assert found, shown
    sign, digits, exponent, prefix, unit = found.groups()
    scale = SCALES.get(prefix, 1.0) * UNITS[unit] * 10.0 ** int(exponent or 0)
    number = float(digits.replace(",", "")) * (-1 if sign else 1)
    half = 0.5 * 10.0 ** -len(digits.partition(".")[2])
    return abs(number * scale - value) <= half * scale * (1 + 1e-9)


def numbers_in(value):
    """Every number inside a JSON value."""
    if isinstance(value, dict):
        return {n for own in value.values() for n in numbers_in(own)}
    if isinstance(value, list):
        return {n for own in value for n in numbers_in(own)}
    return {float(value)} if isinstance(value, int | float) else set()


def numbers_on_disk(folder):
    """Every number that any file of a run folder holds."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = {n for line in lines for n in numbers_in(json.loads(line))}
    found |= numbers_in(flatten(tomllib.loads((folder / "config.toml").read_text())))
    found |= numbers_in(json.loads((folder / "environment.json").read_text()))
    for name in ("clients.csv", "evaluation.csv"):
        for row in rows_of(folder / name):
            found |= {float(c) for c in row.values() if re.fullmatch(r"-?\d+(\.\d+)?(e-\d+)?", c)}
    return found


def rows_of(file):
    with file.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def client_row(client_id, **changes):
    """A row of ``clients.csv`` of a client that did well."""
    row = {
        "round": 1,
        "client_id": client_id,
        "rank_class": "rank_2",
        "rank": 2,
        "quantization": "none",
        "device": "cpu",
        "num_examples": 10,
        "loss_before": 3.0,
        "loss_after": 2.0,
        "bytes_down": 100,
        "bytes_up": 100,
        "seconds": 0.5,
        "status": "ok",
        "cause": "",
    }
    return row | changes


def written_run(
    path, losses=(3.0, 2.0, 1.5), *, classes=("rank_2", "rank_4"), extra=None, **config
):
    """A run folder written by ``RunFolder`` itself, its numbers chosen: a loss per round.

    ``extra`` maps a round to more of its metrics; rank classes differ by a tenth of the loss.
    """
    config = {"num_server_rounds": max(len(losses) - 1, 1), "engine__threads": 1, **config}
    run = RunFolder.create(path, Config().with_values(of_names(**config)))
    for at, loss in enumerate(losses):
        metrics = {"round": at, "eval_loss": loss}
        for place, name in enumerate(classes):
            metrics[f"eval_loss/{name}"] = loss * (1 - 0.1 * place)
            if at:
                metrics[f"energy_kept/{name}"] = 0.9 + 0.05 * place
        trained = {"bytes_down": 1_500_000, "bytes_up": 500_000, "clients_ok": 2}
        metrics |= {**trained, "clients_failed": 0} if at else {}
        metrics |= {"seconds": 1.25, **(extra or {}).get(at, {})}
        clients = [
            client_row(f"client_{place}", round=at, rank_class=name, rank=name[5:])
            for place, name in enumerate(classes)
        ]
        scored = [
            {"round": at, "client_id": f"client_{k}", "rank_class": c, "eval_loss": loss, "rows": 4}
            for k, own in enumerate(classes)
            for c in (["base"] if at == 0 else [own])
        ]
        run.append_round(metrics, clients if at else [], scored)
    return run.path
