"""The commands. A person's mistake is one sentence on standard error and exit status 2."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from flexlora.aggregation.engine.options import choices
from flexlora.commands.nodes import add_node_commands
from flexlora.config.resolve import Config, all_keys
from flexlora.errors import UserError, nearest

__all__ = ["main"]

INTERRUPTED = 130

# Flower and Ray report home unless told not to; nothing here asked for that.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 2 for a person's mistake, 130 after Ctrl-C.

    1 is a command's own: the machine or a reproduced figure is not as expected.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.run is None:
        parser.print_help()
        return 2
    try:
        return options.run(options)
    except UserError as error:
        print(f"flexlora: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("flexlora: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has closed (`| head`); what is left to write has nobody to read it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


class _Parser(argparse.ArgumentParser):
    """Argument errors in the house's words: one sentence, and the nearest known name."""

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '([^']*)'|unrecognized arguments: (\S*)", message)
        word = (wrong[1] or wrong[2] or "") if wrong else ""
        message = message.split(" (choose from")[0]
        extra = message.startswith("unrecognized") and not word.startswith("-")
        known = [name for name in self._known() if name.startswith("-") == word.startswith("-")]
        hint = nearest(word, known) if word and word not in known and not extra else ""
        if "invalid choice" in message and not hint:
            hint = f" Expected one of {', '.join(self._commands())}."
        raise UserError(f"{message}.{hint} `{self.prog} --help` shows what there is.")

    def _commands(self) -> list[str]:
        choices = [a.choices for a in self._actions if isinstance(a.choices, dict)]
        return [name for found in choices for name in found]

    def _known(self) -> list[str]:
        """Commands and flags, those of the commands too."""
        known = self._commands()
        for action in self._actions:
            known += action.option_strings
            if isinstance(action.choices, dict):
                known += [flag for parser in action.choices.values() for flag in parser._known()]
        return known

    def parse_args(self, arguments=None, namespace=None):
        try:
            return super().parse_args(arguments, namespace)
        except UserError as error:
            print(f"flexlora: {error}", file=sys.stderr)
            raise SystemExit(2) from None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="flexlora", description="Federated LoRA at every client's own rank.")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    simulate = commands.add_parser("simulate", help="run a federation of many clients here")
    _configuration(simulate)
    simulate.add_argument("--out", metavar="DIR", help="run folder (default: runs/DATE-TIME)")
    simulate.add_argument("--resume", metavar="DIR", help="go on with the run in DIR")
    simulate.add_argument("--overwrite", action="store_true", help="replace a run in --out")
    simulate.add_argument("--seeds", type=int, metavar="N", help="N seeds: mean and deviation")
    simulate.add_argument("--help-config", action="store_true", help="list all keys and defaults")
    simulate.set_defaults(run=_simulate)

    evaluate = commands.add_parser("eval", help="evaluate an adapter or a run on held-out rows")
    evaluate.add_argument("target", metavar="ADAPTER_OR_RUN", help="a PEFT folder or a run folder")
    evaluate.add_argument("--data", metavar="DIR", help="data folder (default: the run's)")
    _configuration(evaluate)
    evaluate.set_defaults(run=_evaluate)

    report = commands.add_parser("report", help="write a run's page, RUN/report.html")
    report.add_argument("target", metavar="RUN", help="a run folder, finished or not")
    report.set_defaults(run=_report)

    watch = commands.add_parser("watch", help="follow a run in progress, from its folder")
    watch.add_argument("target", metavar="RUN", nargs="?", help="run folder (default: the newest)")
    watch.add_argument("--once", action="store_true", help="print one picture and end")
    watch.set_defaults(run=_watch)

    compare = commands.add_parser("compare", help="runs side by side, and what differs in them")
    compare.add_argument("targets", metavar="RUN", nargs="+", help="two run folders or more")
    compare.add_argument("--out", metavar="FILE.html", help="write a page with the figures too")
    compare.set_defaults(run=_compare)

    export = commands.add_parser("export", help="write a run's adapter at any rank, or merged")
    export.add_argument("target", metavar="RUN", help="a run folder")
    export.add_argument("--rank", type=int, required=True, help="rank of the adapter")
    export.add_argument("--format", default="peft", help="peft or merged (default: peft)")
    export.add_argument("--out", metavar="DIR", required=True, help="folder to write")
    export.set_defaults(run=_export)

    plan = commands.add_parser("plan", help="rank, quantization and batch that a device can train")
    plan.add_argument("--model", metavar="MODEL", required=True, help="folder, hub name, embedded")
    plan.add_argument("--memory", metavar="SIZE", default="", help="bytes to use, like 8GiB")
    plan.add_argument("--device", metavar="NAME", default="", help="a known card or board")
    plan.add_argument("--table", action="store_true", help="the plan of every known device")
    plan.add_argument("--examples", type=int, metavar="N", help="rows that the client has")
    plan.add_argument("--max-length", type=int, metavar="TOKENS", help="tokens of a row")
    plan.add_argument("--batch", type=int, metavar="ROWS", help="rows of an optimizer step")
    plan.add_argument("--rank", type=int, default=0, help="this trained rank and no other")
    plan.add_argument("--carried-rank", type=int, metavar="RANK", help="0: a method without one")
    for name, told in (
        ("--quantization", "this one and no other: none, 8bit or nf4"),
        ("--optim", "this one and no other (default: adamw_torch, or adamw_8bit where it must be)"),
        ("--attn-implementation", "auto, eager, sdpa or flash_attention_2 (default: auto)"),
    ):
        plan.add_argument(name, metavar="NAME", default="", help=told)
    plan.add_argument("--target-modules", default="all-linear", help="all-linear, or names")
    plan.add_argument("--format", default="text", help="text or json (default: text)")
    plan.set_defaults(run=_plan)

    tune = commands.add_parser("tune", help="measure how many clients in one pass are fastest here")
    _configuration(tune)
    tune.add_argument("--out", metavar="FILE.toml", help="write the configuration with the choice")
    tune.set_defaults(run=_tune)

    doctor = commands.add_parser("doctor", help="whether this machine can do the job, by doing")
    doctor.add_argument(
        "--superlink", metavar="HOST:PORT", action="append", default=[], help="try to reach it"
    )
    for name, metavar, told in (
        ("--root-certificates", "CA", "who signed the SuperLink's certificate"),
        ("--node-key", "KEY", "this node's private key: is it registered?"),
        ("--trainer-socket", "PATH", "ask the resident trainer how it is"),
    ):
        doctor.add_argument(name, metavar=metavar, default="", help=told)
    doctor.add_argument("--format", default="text", help="text or json (default: text)")
    doctor.set_defaults(run=_doctor)

    add_node_commands(commands)

    reproduce = commands.add_parser("reproduce", help="run a named experiment, several seeds")
    reproduce.add_argument("name", metavar="NAME", nargs="?", help="none: list the experiments")
    reproduce.add_argument("--scale", type=float, default=1.0, help="times the documented size")
    reproduce.add_argument("--seeds", type=int, help="how many seeds (default: 3 times --scale)")
    reproduce.add_argument("--first-seed", type=int, default=0, help="the first (default: 0)")
    reproduce.add_argument("--out", metavar="DIR", help="folder (default: runs/NAME)")
    reproduce.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="set one key (repeatable)"
    )
    reproduce.set_defaults(run=_reproduce)
    return parser


def _configuration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="TOML file of configuration keys")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="set one key (repeatable)"
    )


def _simulate(options: argparse.Namespace) -> int:
    if options.help_config:
        _print_keys()
        return 0
    given = (options.config, options.set, options.out, options.overwrite)
    if options.resume and (any(given) or options.seeds is not None):
        raise UserError(
            "--resume goes on with the run's own configuration; "
            "it takes no --config, --set, --out, --overwrite or --seeds."
        )
    config = Config.resolve(file=options.config, sets=tuple(options.set))
    out = Path(options.resume or options.out or config.out or time.strftime("runs/%Y%m%d-%H%M%S"))
    if options.seeds is not None or (options.resume and (out / "seeds.json").is_file()):
        return _simulate_seeds(config, out, options)
    from flexlora.runs.folder import RunFolder

    if not options.resume:
        RunFolder.check_free(out, overwrite=options.overwrite)  # before anything heavy is loaded

    from flexlora.simulations.terminal import make_console
    from flexlora.simulations.watched_run import watched_run

    console, go_on = make_console(), bool(options.resume)
    try:
        watched_run(config, out, console=console, overwrite=options.overwrite, go_on=go_on)
    except KeyboardInterrupt:
        done = [row["round"] for row in RunFolder(out).metrics()]
        if not done:
            raise
        print(
            f"\nflexlora: interrupted after round {done[-1]}; the adapters of that round are in "
            f"{out}/adapters, and `flexlora simulate --resume {out}` goes on.",
            file=sys.stderr,
        )
        return INTERRUPTED
    text = f"Run folder: {out} (adapters/CLASS load in PEFT; metrics.jsonl, clients.csv)"
    console.print(text, soft_wrap=True)
    return 0


def _simulate_seeds(config: Config, out: Path, options: argparse.Namespace) -> int:
    from flexlora.simulations.experiments.seeds import is_series, resume_series, run_series
    from flexlora.simulations.terminal import make_console

    console = make_console()
    try:
        if options.resume:
            return resume_series(out, console=console)
        return run_series(
            config, out, seeds=options.seeds, console=console, overwrite=options.overwrite
        )
    except KeyboardInterrupt:
        if not is_series(out):
            raise
        again = f"`flexlora simulate --resume {out}` goes on with the series"
        print(f"\nflexlora: interrupted; {again}.", file=sys.stderr)
        return INTERRUPTED


def _report(options: argparse.Namespace) -> int:
    from flexlora.report import write_report

    print(f"Report: {write_report(options.target)}")
    return 0


def _watch(options: argparse.Namespace) -> int:
    from flexlora.report.watch import watch
    from flexlora.simulations.terminal import make_console

    return watch(options.target, once=options.once, console=make_console())


def _compare(options: argparse.Namespace) -> int:
    from flexlora.report import compare
    from flexlora.simulations.terminal import make_console

    return compare(options.targets, out=options.out, console=make_console())


def _print_keys() -> None:
    keys = all_keys()
    width = max(len(key) for key in keys)
    for key, info in keys.items():
        known = choices(info.annotation)
        listed = f" [{', '.join(known)}]" if known else ""
        default = str(info.default).lower() if info.annotation is bool else info.default
        print(f"{key:<{width}}  {default!s:<18}  {info.description}{listed}")


def _evaluate(options: argparse.Namespace) -> int:
    from flexlora.simulations.inspection import evaluate_target

    return evaluate_target(
        options.target, data=options.data, file=options.config, sets=tuple(options.set)
    )


def _export(options: argparse.Namespace) -> int:
    from flexlora.simulations.inspection import export_run

    export_run(options.target, rank=options.rank, kind=options.format, out=options.out)
    return 0


def _plan(options: argparse.Namespace) -> int:
    from flexlora.commands.plan import Question, plan_command

    values = {key: value for key, value in vars(options).items() if key != "run"}
    return plan_command(Question(**values))


def _tune(options: argparse.Namespace) -> int:
    from flexlora.simulations.tune import tune

    config = Config.resolve(file=options.config, sets=tuple(options.set))
    return tune(config, out=options.out)


def _doctor(options: argparse.Namespace) -> int:
    from flexlora.clients.setup.superlink_checks import node_checks
    from flexlora.deploy.doctor import CHECKS, check_format, diagnose, report
    from flexlora.simulations.flower_checks import check_flower

    check_format(options.format)
    asked = node_checks(
        options.superlink, options.root_certificates, options.node_key, options.trainer_socket
    )
    findings = diagnose([*CHECKS, ("flower", check_flower), *asked])
    return report(findings, format=options.format)


def _reproduce(options: argparse.Namespace) -> int:
    from flexlora.simulations.experiments.reproduce import list_experiments, reproduce

    if options.name is None:
        return list_experiments()
    return reproduce(
        options.name,
        seeds=options.seeds,
        first_seed=options.first_seed,
        out=Path(options.out or f"runs/{options.name}"),
        sets=options.set,
        scale=options.scale,
    )


if __name__ == "__main__":
    raise SystemExit(main())
