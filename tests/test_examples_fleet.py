"""``examples/enroll_fleet.py``: its inventory, and what it says when a node fails.

``tests/system/test_fleet.py`` enrols fifty nodes by it.
"""

from __future__ import annotations

import importlib.util

import pytest

from paths import ROOT

EXAMPLES = ROOT / "examples"
GOOD = '[defaults]\nflexlora = "f"\nfolder = "/n"\ndata = "/d"\n'


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("enroll_fleet", EXAMPLES / "enroll_fleet.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_inventory_beside_it_is_read_with_its_defaults(script):
    first, second = script.read_inventory(EXAMPLES / "fleet.toml")
    assert (first["name"], first["host"], first["data"]) == ("site-01", "10.0.0.11", "/srv/rows")
    assert second["data"] == "/data/rows" and second["folder"] == first["folder"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no [[node]]"),
        (GOOD + '[[node]]\nname = "a"\n[[node]]\nname = "a"\n', "a: twice in the file"),
        (GOOD + '[[node]]\nname = "a"\ndatta = "/x"\n', "a: unknown key 'datta'"),
        (GOOD + '[[node]]\nhost = "10.0.0.1"\n', "node 1: 'name' is missing"),
        ('[[node]]\nname = "a"\n', "a: 'flexlora' is missing; a: 'folder' is missing"),
    ],
)
def test_every_mistake_of_an_inventory_is_named(script, tmp_path, text, words):
    file = tmp_path / "fleet.toml"
    file.write_text(text)
    with pytest.raises(SystemExit) as printed:
        script.read_inventory(file)
    assert words in str(printed.value)


def test_the_token_goes_through_standard_input_and_words_are_quoted(script, tmp_path):
    node = {"name": "a", "host": "h", "ssh": "me@{host}", "flexlora": str(tmp_path / "flexlora")}
    node |= {
        "folder": "/srv/node",
        "data": "/rows; exit 9",
        "model": "m",
        "options": "--device cpu",
    }
    (tmp_path / "flexlora").write_text('#!/bin/sh\nread token; echo "$# $5 $token"; exit 3\n')
    (tmp_path / "flexlora").chmod(0o755)
    done, said = script.enroll(node, "secret", "sh -c", 60.0)
    assert not done and said == "12 --data secret"
    shown = script.enroll(node, "secret", "echo {ssh}", 60.0)[1]
    assert shown.startswith("me@h ") and "'/rows; exit 9'" in shown and "secret" not in shown
