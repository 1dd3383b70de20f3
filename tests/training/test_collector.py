"""What is loaded stays, what comes later is collected as ever, others' processes are theirs."""

from __future__ import annotations

import gc
import json
import subprocess
import sys

import pytest

from flexlora.commands import cli
from flexlora.training import collector

MEASURED = """
import gc, json, sys, weakref
from flexlora.commands import cli
from flexlora.training import collector

class Loop:
    def __init__(self):
        self.me = self

def dies():
    loop = Loop()
    seen = weakref.ref(loop)
    del loop
    gc.collect()
    return seen() is None

usual = gc.get_threshold()
{begin}
during = gc.get_threshold()
old = Loop()
seen = weakref.ref(old)
{load}
frozen = gc.get_freeze_count()
del old
gc.collect()
as_before = gc.get_threshold() == usual
print(json.dumps([usual == during, as_before, frozen > 0, seen() is None, dies()]))
"""

WORKER = """
from flexlora.clients.worker import worker_for
from flexlora.config.resolve import Config
worker_for(Config())
"""


def measured(begin: str, load: str) -> list[bool]:
    """Same at first, as before at the end, something kept, the old loop gone, a new one too."""
    script = MEASURED.format(begin=begin, load=load)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_is_loaded_is_kept_and_what_comes_later_is_collected():
    kept = [False, True, True, False, True]
    assert measured("collector.loading()", "collector.loaded()") == kept


def test_loading_twice_goes_back_to_the_usual_thresholds():
    begin = "collector.loading(); collector.loading()"
    assert measured(begin, "collector.loaded()")[:3] == [False, True, True]


def test_a_process_that_answers_again_with_what_it_has_loaded_keeps_its_thresholds():
    again = "collector.loaded(); collector.loading()"
    assert measured("collector.loading()", again) == [False, True, True, False, True]


def test_a_process_that_never_said_that_it_loads_is_left_alone():
    assert measured("", "collector.loaded()") == [True, True, False, True, True]


def test_a_worker_ends_the_loading_of_its_process():
    assert measured("collector.loading()", WORKER)[:3] == [False, True, True]
    assert measured("", WORKER)[:3] == [True, True, False]


def test_the_command_says_that_it_loads():
    begin = "sys.argv = ['flexlora', 'simulate', '--help-config']; cli.main()"
    assert measured(begin, "")[:2] == [False, False]


def test_a_caller_of_the_command_keeps_its_collector(capsys: pytest.CaptureFixture[str]):
    before = gc.get_threshold(), gc.get_freeze_count()
    assert cli.main(["simulate", "--help-config"]) == 0
    assert (gc.get_threshold(), gc.get_freeze_count()) == before
    assert not collector._usual and not collector._begun
    assert capsys.readouterr().out
