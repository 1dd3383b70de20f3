"""The documents of the repository, taken apart: commands, code spans, fenced blocks, links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from paths import ROOT

PROGRAMS = ("flexlora", "flwr", "make", "python")
NOT_OURS = {".venv", ".git", "build", "dist", "node_modules", ".pytest_cache"}
FENCE = re.compile(r"^( *)```([\w-]*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:[^\s`]*/)?({'|'.join(PROGRAMS)})(?: (.*))?")


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document; ``name`` is its path in the repository."""

    name: str
    text: str

    @property
    def folder(self) -> Path:
        return (ROOT / self.name).parent

    @property
    def is_template(self) -> bool:
        """Whether ``init`` fills it in: paths in it are those of the folder that it writes."""
        return "templates" in Path(self.name).parts

    @property
    def fences(self) -> list[tuple[str, str]]:
        """``(language, text)`` of the fenced blocks."""
        return [(found[2], found[3]) for found in FENCE.finditer(self.text)]

    @property
    def spans(self) -> list[str]:
        """The code spans outside of fenced blocks, each in one line."""
        prose = FENCE.sub("", self.text)
        return [" ".join(span.split()) for span in SPAN.findall(prose)]

    @property
    def links(self) -> list[str]:
        """The targets of links outside of fenced blocks."""
        return LINK.findall(FENCE.sub("", self.text))

    @property
    def anchors(self) -> set[str]:
        """The anchors that a page on the web makes of the headings."""
        headings = re.findall(r"^#+ +(.*)$", FENCE.sub("", self.text), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command as a document shows it. ``whole``: a line to type, not a mention in a text."""

    document: str
    program: str
    arguments: tuple[str, ...]
    text: str
    whole: bool

    @property
    def sets(self) -> list[str]:
        """What follows ``--set``, but for ``key=value`` and ``method.name=NAME``."""
        pairs = zip(self.arguments, self.arguments[1:], strict=False)
        given = [value for flag, value in pairs if flag == "--set"]
        return [value for value in given if value != "key=value" and not value.endswith("=NAME")]

    @property
    def is_synopsis(self) -> bool:
        """Whether parts are left out or optional: ``[--seeds N]``, ``...``."""
        return any(mark in self.text for mark in ("...", "[", "…"))

    def option(self, flag: str) -> str | None:
        """What follows a flag."""
        pairs = zip(self.arguments, self.arguments[1:], strict=False)
        return next((value for given, value in pairs if given == flag), None)


def documents() -> list[Document]:
    """Every Markdown file of the repository, and the docstrings of the examples."""
    found = []
    for file in sorted([*ROOT.rglob("*.md"), *ROOT.glob("examples/*.py")]):
        parts = file.relative_to(ROOT).parts
        linked = any(parent.is_symlink() for parent in file.parents)
        if not linked and not NOT_OURS & set(parts) and parts[0] != "runs":
            text = file.read_text(encoding="utf-8")
            if file.suffix == ".py":
                text = [*text.split('"""'), "", ""][1]
            found.append(Document(name="/".join(parts), text=text))
    return found


def commands_of(document: Document) -> Iterator[Command]:
    """The commands in fenced blocks line by line, those in code spans, those of a docstring."""
    docstring = [("", document.text)] if document.name.endswith(".py") else []
    for language, text in [*document.fences, *docstring]:
        if language in ("", "bash", "sh", "text", "console"):
            for line in re.sub(r"\\\n\s*", " ", text).splitlines():
                line = re.split(r" {3,}| +#", line.strip().removeprefix("$ "))[0]
                yield from _command(document, line.removeprefix("sudo "), whole=True)
    for span in document.spans:
        yield from _command(document, span, whole=False)


def _command(document: Document, text: str, *, whole: bool) -> Iterator[Command]:
    found = COMMAND.fullmatch(text.strip())
    if found is None:
        return
    try:
        arguments = tuple(shlex.split(found[2] or ""))
    except ValueError:
        return
    yield Command(
        document=document.name,
        program=found[1],
        arguments=arguments,
        text=text.strip(),
        whole=whole,
    )
