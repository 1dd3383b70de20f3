"""The command line and the configuration, as tests ask them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import click
import typer

from flexlora.config import resolve
from flexlora.errors import UserError


def parse(arguments: Sequence[str]) -> str:
    """Parse ``flexlora ARGUMENTS`` without running it: what is wrong, or nothing."""
    from flexlora.commands import cli

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            cli.parse(arguments)
    except click.exceptions.Exit:  # --help
        return ""
    except UserError as error:
        return str(error)
    return ""


def refusal(arguments: Sequence[object], capture: Any, status: int = 2) -> str:
    """The one line that ``flexlora ARGUMENTS`` writes, to either stream; ``status`` is its status.

    ``capture`` is pytest's ``capsys``, or ``capfd`` for the lines of other libraries too.
    """
    from flexlora.commands import cli

    capture.readouterr()
    try:
        found: object = cli.main([str(argument) for argument in arguments])
    except SystemExit as ended:
        found = ended.code
    out, err = capture.readouterr()
    assert (found, out, err.count("\n")) == (status, "", 1), out + err
    assert err.startswith("flexlora: ") and len(err) < 500
    return err.rstrip("\n")


def commands() -> dict[str, set[str]]:
    """``{"client init": its flags}`` of every command of ``flexlora``, groups among them."""
    from flexlora.commands import cli

    found: dict[str, set[str]] = {}

    def walk(command: click.Command, path: str) -> None:
        context = click.Context(command)
        params = command.get_params(context)
        found[path] = {
            flag
            for param in params
            for flag in [*param.opts, *param.secondary_opts]
            if flag.startswith("-")
        }
        for name in getattr(command, "table", ()):
            below = command.get_command(context, name)
            walk(below, f"{path} {name}".strip())

    walk(cli.FLEXLORA, "")
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
