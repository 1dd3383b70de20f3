"""The documents hold: commands parse, keys, links, files and modules exist, figures are current."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import runpy
import tomllib
from functools import cache
from pathlib import Path

import pytest

from command_line import commands, known_keys, parse, parse_flwr, resolve_settings
from documents import NOT_OURS, Command, commands_of, documents
from flexlora.commands.cli import main
from flexlora.data.rows import parse_row
from paths import ROOT
from test_house import ROOMS

DOCUMENTS = {document.name: document for document in documents()}
COMMANDS = [command for document in DOCUMENTS.values() for command in commands_of(document)]
# Cheap enough to run: each is shown in a document, which the test checks too.
CHEAP = (
    "flexlora simulate --help-config",
    "flexlora reproduce",
    "flexlora plan --model MODEL --memory 8GiB",
)
# What a run or an `init` folder holds, and what a person's own folder is called in the documents.
NOT_IN_THE_TREE = (
    *("config.toml", "metrics.jsonl", "clients.csv", "evaluation.csv", "environment.json"),
    *(
        "report.html",
        "live.json",
        "resume.toml",
        "results.json",
        "findings.json",
        "limits.toml",
        "quotas.json",
        "privacy.json",
        "tuned.toml",
    ),
    *("train.jsonl", "validation.jsonl", "test.jsonl", "ca.crt", "adapter_config.json"),
    *("adapters/", "adapters/CLASS/", "adapters/global/", "checkpoint/", "checkpoint/sent-ROUND/"),
    *("audit.jsonl", "latest.json", "federations/", "DIR/federations/NAME"),
    *("app/pyproject.toml", "private/ca.key", "config.json", "nodes/", "seeds.json"),
    *("nodes/fleet.json", "members.json", "canaries.json", "samples.json", "trackers.json"),
    *("tensorboard/", "RUN/tensorboard/", "RUN/wandb/"),
)
PLACEHOLDERS = {"NAME", "DIR", "RUN", "CLASS", "FILE", "FOLDER"}
FILE = re.compile(r"[\w.-]*[\w-](?:/[\w.-]+)*(?:\.(?:py|md|toml|jsonl?|csv|svg|proto|html)|/)")
MODULE = re.compile(r"flexlora(?:\.\w+)+")
KEY = re.compile(r"([a-z]+(?:\.[a-z0-9]+(?:-[a-z0-9]+)*)+)(?:=.*)?")
# Options that the log and the changelog still name.
REMOVED = {
    *("method.inherited", "method.realign", "method.restarts", "method.server-optimizer"),
    *("method.singular-values", "method.max-update-norm"),
}
HISTORY = ("CHANGELOG.md", "docs/log.md")
SUFFIXES = (
    ".py",
    ".md",
    ".toml",
    ".json",
    ".jsonl",
    ".csv",
    ".crt",
    ".key",
    ".pub",
    ".html",
    ".gguf",
)


def labels(command: Command) -> str:
    return f"{command.document}: {command.text}"


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.program == "flexlora"], ids=labels)
def test_every_flexlora_command_parses_and_its_keys_exist(command):
    """Trap T13: flags, commands and keys that a document has and the program never had."""
    if command.is_synopsis or not command.whole:
        check_synopsis(command)
    else:
        assert parse(command.arguments) == ""
    if "--config" in command.arguments or command.sets:
        file = command.option("--config")
        assert file is None or (ROOT / file).is_file() or file in NOT_IN_THE_TREE or file.isupper()
        there = str(ROOT / file) if file and (ROOT / file).is_file() else None
        assert resolve_settings(there, command.sets) == ""


def check_synopsis(command):
    """A mention, or a line that leaves parts out: the command and the flags shown exist."""
    words = [word for word in command.arguments if re.fullmatch("[a-z]+", word)]
    name = next(n for k in (2, 1, 0) if (n := " ".join(words[:k])) in commands())
    assert set(re.findall(r"--[a-z-]+", command.text)) <= commands()[name]
    assert name or not words


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.program == "flwr"], ids=labels)
def test_every_flwr_command_parses(command):
    if command.whole or len(command.arguments) > 2:
        assert parse_flwr(command.arguments) == ""


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.program == "make"], ids=labels)
def test_every_make_target_exists(command):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(command.arguments) <= set(targets)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.program == "python"], ids=labels)
def test_every_program_run_by_python_exists_and_has_the_flags_shown(command):
    if len(command.arguments) < 2 and command.arguments[:1] in ((), ("-m",)):
        return
    if command.arguments[0] == "-m":
        name = command.arguments[1]
        ours = name.startswith("flexlora") and not name.split(".")[-1].isupper()
        sources = source_of(name) if ours else None
    else:
        sources = (ROOT / command.arguments[0]).read_text()
    if sources is not None:  # neither another project's module nor a NAME to fill in
        flags = [word for word in command.arguments[2:] if word.startswith("--")]
        assert [flag for flag in flags if f'"{flag}"' not in sources] == []


def source_of(name):
    """The text of a module and of the modules beside it, where its options may be declared."""
    (_, *parts) = name.split(".")
    file = ROOT.joinpath(*parts)
    assert file.is_dir() or file.with_suffix(".py").is_file()
    folder = file if file.is_dir() else file.parent
    return "\n".join(path.read_text() for path in folder.glob("*.py"))


@pytest.mark.parametrize("text", CHEAP)
def test_cheap_commands_run(text, capsys):
    assert text in {command.text for command in COMMANDS}
    arguments = [word.replace("MODEL", "embedded") for word in text.split()[1:]]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) > 5 and captured.err == ""


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_key_that_is_mentioned_exists(name):
    """`server.quorum` and `--set personal.rank=4`, where the first word is a section."""
    sections = {key.split(".")[0] for key in known_keys() if "." in key}
    spans = [span.removeprefix("--set ").strip() for span in DOCUMENTS[name].spans]
    found = [match[1] for span in spans if (match := KEY.fullmatch(span))]
    keys = {key for key in found if key.split(".")[0] in sections and not key.endswith(SUFFIXES)}
    keys = {key for key in keys if not is_module_or_name(f"flexlora.{key}")}
    assert keys - known_keys() - (REMOVED if name in HISTORY else set()) == set()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_leads_somewhere(name):
    document, broken = DOCUMENTS[name], []
    for link in document.links:
        if not re.match(r"[a-z]+:", link):
            path, _, anchor = link.partition("#")
            target = (document.folder / path).resolve() if path else ROOT / name
            if not target.exists() or (anchor and anchor not in anchors_of(target)):
                broken.append(link)
    assert broken == []


def anchors_of(file):
    return DOCUMENTS[file.relative_to(ROOT).as_posix()].anchors


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if not DOCUMENTS[name].is_template])
def test_every_file_and_module_that_is_mentioned_exists(name):
    document = DOCUMENTS[name]
    missing = [span for span in document.spans if is_missing(document, span)]
    assert missing == []


def is_missing(document, span):
    if MODULE.fullmatch(span) and not span.endswith("toml"):
        return not is_module_or_name(span) and name_is_current(document)
    if not FILE.fullmatch(span) or span in NOT_IN_THE_TREE:
        return False
    if PLACEHOLDERS & set(re.split(r"[/.]", span)) or not name_is_current(document):
        return False
    places = (document.folder, ROOT, ROOT / "flexlora", *ROOT.glob("*/"))
    if any((place / span).exists() for place in places):
        return False
    bare = span.rstrip("/")
    near = ROOT if "/" not in bare else document.folder
    below = (path.as_posix() for path in tree() if near in path.parents)
    return not any(path.endswith(f"/{bare}") for path in below)


@cache
def tree():
    """Every file and folder of the repository."""
    found, folders = [], [ROOT]
    while folders:
        for path in folders.pop().iterdir():
            if path.name not in NOT_OURS and path != ROOT / "runs" and not path.is_symlink():
                found.append(path)
                folders += [path] if path.is_dir() else []
    return found


def name_is_current(document):
    """The changelog also names what was there before."""
    return document.name != "CHANGELOG.md"


@cache
def is_module_or_name(dotted):
    """``flexlora.seeds``, or ``flexlora.server.strategy.FlexLoRAStrategy``."""
    module, _, name = dotted.rpartition(".")
    try:
        if importlib.util.find_spec(dotted) is not None:
            return True
    except ModuleNotFoundError:
        pass
    try:
        return hasattr(importlib.import_module(module), name)
    except ImportError:
        return False


def blocks(language):
    """``(document, text)`` of every fenced block of a language."""
    return [
        (name, text)
        for name, document in DOCUMENTS.items()
        for found, text in document.fences
        if found == language
    ]


@pytest.mark.parametrize(("name", "text"), blocks("python"))
def test_python_in_documents_compiles_and_imports_what_exists(name, text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flexlora"):
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize(("name", "text"), blocks("jsonl"))
def test_rows_in_documents_are_rows(name, text):
    for number, line in enumerate(text.splitlines(), start=1):
        assert parse_row(json.loads(line), f"{name} line {number}").output


def test_documents_show_something_of_each_kind():
    """None of the tests above is empty."""
    assert {command.program for command in COMMANDS} == {"flexlora", "flwr", "make", "python"}
    assert len(COMMANDS) > 60 and blocks("python") and blocks("jsonl")
    shown = {" ".join(command.arguments) for command in COMMANDS}
    for name in commands():
        assert name in ("", "client", "server", "fleet") or any(
            text.startswith(name) for text in shown
        )


def test_the_readme_is_one_page():
    assert len(DOCUMENTS["README.md"].text.splitlines()) <= 130


def test_nothing_refers_to_files_outside_the_repository():
    outside = re.compile("(DESIGN|FIELD|STYLE)" + r"\.md|/work/")
    kinds = (".py", ".md", ".toml", ".proto", ".service", ".yaml", ".conf")
    found = []
    for file in tree():
        if file.suffix in kinds and file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines()
            found += [f"{file}:{n}" for n, line in enumerate(lines, 1) if outside.search(line)]
    assert [place for place in found if "test_documents.py" not in place] == []


def test_the_table_of_rooms_is_the_one_that_the_imports_are_held_to():
    text = DOCUMENTS["docs/architecture.md"].text.split("## The rooms of")[1].split("\n## ")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == ROOMS
    (listed,) = re.findall(r"^ +(lora algebra .*)$", DOCUMENTS["README.md"].text, re.MULTILINE)
    assert ("root", *listed.split()) == ROOMS


def test_every_trap_that_a_test_cites_is_explained_and_the_files_named_there_cite_it():
    rows = dict(re.findall(r"^\| (T\d+) \|(.*)$", DOCUMENTS["docs/traps.md"].text, re.MULTILINE))
    assert list(rows) == [f"T{number}" for number in range(1, 28)]
    cited = {}
    for file in (ROOT / "tests").rglob("*.py"):
        for group in re.findall(r"\bTraps? (T\d+(?:(?:, | and )T\d+)*)", file.read_text()):
            for trap in re.findall(r"T\d+", group):
                cited.setdefault(trap, set()).add(file.relative_to(ROOT).as_posix())
    assert cited.keys() <= rows.keys()
    for trap, files in cited.items():
        assert files <= set(re.findall(r"`(tests/[\w/]+\.py)`", rows[trap])), trap


def test_the_figure_is_the_one_of_the_results():
    """docs/methods.svg is what ``python docs/figures.py`` draws."""
    drawn = runpy.run_path(str(ROOT / "docs" / "figures.py"))
    rows = json.loads(Path(drawn["RESULTS"]).read_text())["rows"]
    assert drawn["figure"](rows) == (ROOT / "docs" / "methods.svg").read_text()


def test_figure_and_table_of_the_methods_are_the_same_numbers():
    """The gap closed in docs/methods.md, computed anew from the results."""
    drawn = runpy.run_path(str(ROOT / "docs" / "figures.py"))
    rows = json.loads(Path(drawn["RESULTS"]).read_text())["rows"]
    text = DOCUMENTS["docs/methods.md"].text
    for title, mean, deviation, _ in drawn["gap_closed"](rows):
        assert re.search(rf"^{re.escape(title)} .* {mean:.2f}±{deviation:.2f} ", text, re.MULTILINE)


def test_the_version_stands_in_one_place():
    import flexlora

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert flexlora.__version__ == project["version"]
    assert project["version"] not in (ROOT / "flexlora" / "__init__.py").read_text()
    assert f"## {project['version']}" in DOCUMENTS["CHANGELOG.md"].text
