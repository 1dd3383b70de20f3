"""What the documents' tests ask of the command line and of the configuration, in one place."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import click
import typer

from flexlora.config import resolve
from flexlora.errors import UserError


def parse(arguments: Sequence[str]) -> str:
    """Parse ``flexlora ARGUMENTS`` without running it: what is wrong, or nothing."""
    from flexlora.commands import cli

    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            cli._parser().parse_args(list(arguments))
    except SystemExit as ended:
        return printed.getvalue() if ended.code else ""
    return ""


def commands() -> dict[str, set[str]]:
    """``{"client init": its flags}`` of every command of ``flexlora``, groups among them."""
    from flexlora.commands import cli

    found: dict[str, set[str]] = {}

    def walk(parser, path: str) -> None:
        flags = {flag for action in parser._actions for flag in action.option_strings}
        found[path] = flags
        for action in parser._actions:
            if isinstance(action.choices, dict):
                for name, below in action.choices.items():
                    walk(below, f"{path} {name}".strip())

    walk(cli._parser(), "")
    return found


def parse_flwr(arguments: Sequence[str]) -> str:
    """Parse ``flwr ARGUMENTS`` without running it: what is wrong, or nothing."""
    from flwr.cli.app import app

    return parse_click(typer.main.get_command(app), list(arguments))


def parse_click(command: click.Command, arguments: list[str]) -> str:
    """Parse through all groups of a click command, the last one's arguments too."""
    context = None
    try:
        while True:
            context = command.make_context(command.name, list(arguments), parent=context)
            if not isinstance(command, click.Group):
                return ""
            rest = [*context._protected_args, *context.args]
            _, found, arguments = command.resolve_command(context, rest)
            assert found is not None
            command = found
    except click.exceptions.Exit:  # --help
        return ""
    except click.ClickException as error:
        return error.format_message()


def known_keys() -> set[str]:
    """Every key of the configuration."""
    return set(resolve.all_keys())


def resolve_settings(file: str | None, sets: Sequence[str]) -> str:
    """What is wrong with ``--config FILE --set KEY=VALUE ...``, or nothing."""
    try:
        resolve.Config.resolve(file=file, sets=tuple(sets))
    except UserError as error:
        return str(error)
    return ""
