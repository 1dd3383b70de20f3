"""``flexlora``: a table of commands; each is a function whose parameters are its options.

A person's mistake is one sentence on standard error and exit status 2.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import get_type_hints

import click
import typer

from flexlora.config.cores import wait_passively
from flexlora.errors import RunFailed, UserError, nearest

__all__ = ["main", "parse"]

INTERRUPTED = 130

# Flower, Ray and Hugging Face report home unless these are set.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

# By name: the module and function below ``flexlora`` ("" for a group), and one line of help.
Table = dict[str, tuple[str, str]]
COMMANDS: Table = {
    "simulate": ("commands.train:simulate", "run a federation of many clients here"),
    "eval": ("commands.runs:evaluate", "evaluate an adapter or a run on held-out rows"),
    "report": ("commands.runs:report", "write a run's page, RUN/report.html"),
    "watch": ("commands.runs:watch", "follow a run in progress, from its folder"),
    "compare": ("commands.runs:compare", "runs side by side, and what differs in them"),
    "export": ("commands.runs:export", "write an adapter at any rank, for any runtime, or merged"),
    "serve": ("commands.serving:serve", "an OpenAI-compatible endpoint of many adapters"),
    "chat": ("commands.serving:chat", "talk to an adapter, and compare it with the base"),
    "rollback": ("commands.runs:rollback", "go back to an earlier round of a run"),
    "audit": ("commands.audit:audit", "verify a run's log; measure what its changes leak"),
    "plan": ("commands.plan:plan", "rank, quantization and batch that a device can train"),
    "privacy": ("commands.privacy:privacy", "epsilon of rounds with noise, or the noise for it"),
    "tune": ("commands.train:tune", "measure how many clients in one pass are fastest here"),
    "doctor": ("commands.runs:doctor", "whether this machine can do the job, by doing"),
    "client": ("", "what runs on an edge node"),
    "server": ("", "what runs where the nodes meet"),
    "fleet": ("", "the nodes of a server: who is in, who is out"),
    "reproduce": ("commands.train:reproduce", "run a named experiment, several seeds"),
}
CLIENT: Table = {
    "init": ("clients.setup.init:client_init", "write a ready folder: keys, scripts, units, steps"),
    "enroll": (
        "clients.setup.enroll:client_enroll",
        "join with a token: folder, key, approval, start",
    ),
    "serve": ("clients.trainer.command:serve", "keep the base loaded and train for ClientApps"),
    "trust": ("clients.setup.trust:trust", "fetch the server's authorities, old and new"),
    "clock": ("clients.setup.clock:clock", "whether the server takes this machine's clock"),
    "health": ("clients.trainer.command:health", "how the trainer on this machine is"),
    "supervise": ("clients.supervise:supervise", "keep a SuperNode or its SuperExec running"),
}
SERVER: Table = {
    "init": (
        "server.init:server_init",
        "write a ready folder: certificates, scripts, units, steps",
    ),
    "supervise": ("server.supervise:supervise", "keep a SuperLink or its SuperExec running"),
    "run": ("server.following.command:server_run", "start runs, follow and resume them"),
}
FLEET: Table = {
    "list": ("server.fleet.commands:fleet_list", "every node, its state and why"),
    "add": ("server.fleet.commands:fleet_add", "let nodes in by their public keys"),
    "revoke": ("server.fleet.commands:fleet_revoke", "refuse nodes from now on"),
    "rotate": ("server.fleet.commands:fleet_rotate", "replace a node's key, with an overlap"),
    "invite": ("server.fleet.invite:fleet_invite", "a token by which nodes join"),
    "serve": ("server.fleet.enrolment_service:fleet_serve", "answer nodes that join with a token"),
}
GROUPS = {"client": CLIENT, "server": SERVER, "fleet": FLEET}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 2 for a person's mistake, 130 after Ctrl-C.

    1 means that the command ran and failed: no client was trained, a check of the machine or of a
    reproduced figure did not pass.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    given = sys.argv[1:] if arguments is None else arguments
    if arguments is None:  # The process is this command's alone.
        wait_passively()
        # Loading torch and transformers makes 700,000 objects that live as long as the process:
        # collect rarely, and do not walk them once more at exit.
        gc.set_threshold(100_000)
        atexit.register(gc.freeze)
    try:
        context = parse(given)
        with context:
            return context.command.invoke(context) or 0
    except click.exceptions.Exit:  # the help is printed
        return 0 if given else 2
    except UserError as error:
        print(f"flexlora: {error}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"flexlora: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        text = f"\nflexlora: {error}" if str(error) else "flexlora: interrupted."
        print(text, file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has closed (`| head`): drop what is still buffered.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parse(arguments: Sequence[str]) -> click.Context:
    """The context of the command that ``arguments`` name, its options read; it has not run.

    Raises:
        UserError: an unknown command or flag (with the nearest known one), a value of the wrong
            type, something missing or too many.
        click.exceptions.Exit: the help was asked for, or nothing at all; it is printed.
    """
    rest, group = list(arguments) or ["--help"], FLEXLORA
    context = None
    try:
        while True:
            context = group.make_context(group.name, rest[:1], parent=context)
            name, rest = rest[0] if rest else "", rest[1:]
            command = group.get_command(context, name)
            if command is None:
                hint = nearest(name, group.table) or f" Expected one of {', '.join(group.table)}."
                raise click.UsageError(f"unknown command '{name}'.{hint}", context)
            if not isinstance(command, _Group):
                return command.make_context(name, rest, parent=context)
            group = command
    except click.UsageError as error:
        text, where = error.format_message(), error.ctx.command_path if error.ctx else "flexlora"
        if isinstance(error, click.NoSuchOption):  # click lists several names
            text = error.message + nearest(error.option_name, error.possibilities or ())
        raise UserError(f"{text} `{where} --help` shows what there is.") from None


class _Command(typer.core.TyperCommand):
    """Plain help: typer escapes brackets for rich even where rich is off."""

    def get_help(self, ctx: click.Context) -> str:
        return super().get_help(ctx).replace("\\[", "[")

    def format_arguments(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Typer lists them with the options."""


class _Group(click.Group):
    """Imports a command's module, and reads its options, when the command is looked up."""

    def __init__(self, name: str, table: Table, help: str = "LoRA at every client's own rank."):
        super().__init__(name, help=help, no_args_is_help=False, subcommand_metavar="COMMAND ...")
        self.table = table

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        place, help = self.table.get(cmd_name, ("", ""))
        if not place:
            return _Group(cmd_name, GROUPS[cmd_name], help) if help else None
        module, _, function = place.partition(":")
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        run = getattr(import_module(f"flexlora.{module}"), function)
        app.command(cmd_name, cls=_Command, help=help)(run)
        command = typer.main.get_command(app)
        hints = get_type_hints(run, include_extras=True)
        for parameter in command.params:  # click 8.5 loses the help that typer gives to arguments
            if isinstance(parameter, typer.core.TyperArgument):
                parameter.help = hints[str(parameter.name)].__metadata__[0].help
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help) for name, (_, help) in self.table.items()])


FLEXLORA = _Group("flexlora", COMMANDS)

if __name__ == "__main__":
    raise SystemExit(main())
