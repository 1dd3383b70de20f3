"""``~`` is a home folder in every key and every option that takes a path; files of any editor."""

from __future__ import annotations

import ast
import os
import re

import click
import pytest

from flexlora.commands import cli
from flexlora.commands.options import PATH
from flexlora.config.paths import expanded, read_text
from flexlora.config.resolve import KEYS, Config, all_keys, read_toml
from flexlora.config.sections import PathKey
from flexlora.errors import UserError
from flexlora.planning.rank_tables import read_rank_table
from flexlora.runs.folder import RunFolder
from flexlora.simulations.world.traces import read_trace
from paths import ROOT

MARK = PathKey.__metadata__[0]
PATH_KEYS = [key for key, info in KEYS.items() if MARK in info.metadata]
ABOUT_PATHS = re.compile(r"\b(folder|file|files|path|CSV|\.toml|\.csv|certificate|socket)\b|'s key")
NO_PATHS = {"client serve --group"}  # who may open the socket


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def parameters():
    """``(command, parameter)`` of every command of ``flexlora``."""

    def walk(command, path):
        for param in command.params:
            yield path, param
        for name in getattr(command, "table", ()):
            yield from walk(command.get_command(click.Context(command), name), [*path, name])

    return list(walk(cli.FLEXLORA, []))


PARAMETERS = [(path, param) for path, param in parameters() if param.type is PATH]


def test_the_marks_are_found():
    assert {"data.path", "ranks.file", "population.trace", "population.clock-model"} < set(
        PATH_KEYS
    )
    assert {"model.name", "out", "resume"} < set(PATH_KEYS)
    named = {" ".join([*path, str(param.name)]) for path, param in PARAMETERS}
    wanted = {"simulate out", "simulate resume", "simulate config_file", "eval target", "eval data"}
    wanted |= {"export target", "export out", "report target", "compare targets", "watch target"}
    wanted |= {"client init folder", "client init root_certificates", "client init data"}
    assert "text" in {param.type.name for _, param in parameters()}  # what the next test looks for
    wanted |= {"server init folder", "client serve socket", "client serve state", "doctor node_key"}
    assert wanted < named


@pytest.mark.parametrize("key", all_keys())
def test_a_key_whose_help_speaks_of_a_file_has_the_mark(key):
    """A new key that takes a path cannot forget it."""
    info = all_keys()[key]
    speaks = info.annotation is str and ABOUT_PATHS.search(info.description or "")
    assert not speaks or key in PATH_KEYS


@pytest.mark.parametrize(
    ("path", "param"), parameters(), ids=lambda value: getattr(value, "name", "") or ""
)
def test_an_option_whose_help_speaks_of_a_file_has_the_type(path, param):
    about = f"{getattr(param, 'help', '')} {param.metavar or ''} {param.name}"
    speaks = ABOUT_PATHS.search(about) or re.search(r"\b(DIR|FILE|PATH|RUN)\b", about)
    name = " ".join([*path, param.opts[0]])
    is_text = param.type is not PATH and param.type.name in ("text", "str")
    assert not (speaks and is_text) or name in NO_PATHS, f"flexlora {name} needs click_type=PATH"


@pytest.mark.parametrize("key", PATH_KEYS)
@pytest.mark.parametrize(("given", "below"), [("~", ""), ("~/a b/c", "/a b/c")])
def test_every_key_is_expanded_wherever_it_is_given(key, given, below, home, tmp_path):
    wanted = f"{home}{below}"
    section, _, leaf = key.rpartition(".")
    table = f"[{section}]\n" if section else ""
    (tmp_path / "c.toml").write_text(f'{table}{leaf} = "{given}"\n')
    by_set = Config.resolve(sets=[f"{key}={given}"])
    for config in (
        by_set,
        Config.resolve(file=tmp_path / "c.toml"),
        Config.of({key: given}),
        Config().with_values({key: given}),
    ):
        assert config.flat()[key] == wanted
    assert by_set.with_values({}) == by_set


@pytest.mark.parametrize(("path", "param"), PARAMETERS, ids=lambda v: getattr(v, "name", "") or "")
def test_every_option_is_expanded(path, param, home):
    context = click.Context(click.Command("any"))
    assert param.type_cast_value(context, ["~/x"] if param.nargs == -1 else "~/x") in (
        f"{home}/x",
        [f"{home}/x"],
        (f"{home}/x",),
    )


def test_other_paths_stay_as_they_are(home):
    for path in ("", ".", "a/~/b", "/~", "./~", "owner/model", "embedded", "C:~x"):
        assert expanded(path) == path


def test_a_named_user_is_looked_up(home):
    pwd = pytest.importorskip("pwd")
    user = pwd.getpwuid(os.getuid())
    assert expanded(f"~{user.pw_name}/rows") == f"{user.pw_dir.rstrip('/')}/rows"
    with pytest.raises(
        UserError, match=r"'~nobody-here/d' begins with '~nobody-here', .*'./~nobody"
    ):
        expanded("~nobody-here/d")
    with pytest.raises(UserError, match=r"^data\.path '~nobody-here/d' begins with"):
        Config.of({"data.path": "~nobody-here/d"})
    with pytest.raises(UserError, match=r"^--out '~nobody-here/d' begins with"):
        cli.parse(["simulate", "--out", "~nobody-here/d"])


def test_no_folder_is_named_by_the_sign(home, tmp_path):
    RunFolder.create("~/run", Config())
    assert (home / "run" / "config.toml").is_file() and not (tmp_path / "~").exists()


def test_one_function_knows_home_folders():
    """Elsewhere a path is used as it was read: no second place to expand it, and none to forget."""
    found = set()
    for folder in ("flexlora", "clients", "server", "simulations"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and node.attr == "expanduser":
                    found.add(str(file.relative_to(ROOT)))
    assert found == {"flexlora/config/paths.py"}


# Files as editors save them.
CONFIGURATION = 'seed = 7\n[data]\ntemplate = "plain"\n'
SAVED = {
    "Notepad": b"\xef\xbb\xbf" + CONFIGURATION.replace("\n", "\r\n").encode(),
    "a mark alone": b"\xef\xbb\xbf" + CONFIGURATION.encode(),
    "old line ends": CONFIGURATION.replace("\n", "\r").encode(),
    "plain": CONFIGURATION.encode(),
}
REFUSED = {
    "UTF-16": (CONFIGURATION.encode("utf-16"), "is UTF-16, expected UTF-8"),
    "UTF-16 the other way": (b"\xfe\xff" + CONFIGURATION.encode("utf-16-be"), "is UTF-16, exp"),
    "UTF-32": (CONFIGURATION.encode("utf-32"), "is UTF-32, expected UTF-8"),
    "UTF-16 without a mark": (CONFIGURATION.encode("utf-16-le"), "is not text, or UTF-16, exp"),
    "Latin-1": (b"seed = 7\n# caf\xe9\n", r"is not UTF-8 in line 2 \(byte 0xe9\), expected UTF-8"),
}


@pytest.mark.parametrize("editor", SAVED)
def test_a_configuration_is_read_whoever_saved_it(editor, tmp_path):
    (tmp_path / "c.toml").write_bytes(SAVED[editor])
    assert read_toml(tmp_path / "c.toml") == {"seed": 7, "data.template": "plain"}


@pytest.mark.parametrize("encoding", REFUSED)
def test_another_encoding_is_refused_in_a_sentence(encoding, tmp_path):
    data, sentence = REFUSED[encoding]
    (tmp_path / "c.toml").write_bytes(data)
    with pytest.raises(
        UserError, match=f"configuration file '.*c.toml' cannot be read: it {sentence}"
    ):
        read_toml(tmp_path / "c.toml")


@pytest.mark.parametrize("name", ["ranks.csv", "ranks.toml"])
def test_a_table_of_ranks_is_read_with_a_mark(name, tmp_path):
    text = "client_id,rank\r\na,4\r\n" if name.endswith("csv") else "a = 4\r\n"
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_rank_table(str(tmp_path / name))["a"].rank == 4
    (tmp_path / name).write_bytes(text.encode("utf-16"))
    with pytest.raises(
        UserError, match=r"^ranks.file '.*' cannot be read: it is UTF-16, expected UTF-8"
    ):
        read_rank_table(str(tmp_path / name))


def test_a_trace_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "t.csv").write_bytes(
        "client_id,start_seconds,end_seconds\na,0,9\n".encode("utf-16")
    )
    with pytest.raises(UserError, match=r"^population.trace '.*' cannot be read: it is UTF-16"):
        read_trace(str(tmp_path / "t.csv"))


def test_a_file_that_is_a_folder_is_told(tmp_path):
    with pytest.raises(UserError, match=r"^the table '.*' cannot be read: Is a directory"):
        read_text(tmp_path, "the table")
