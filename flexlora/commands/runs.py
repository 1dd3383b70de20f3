"""Commands that train nothing: ``eval``, ``report``, ``watch``, ``compare``, ``export``,
``rollback`` and ``doctor``.
"""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from flexlora.commands.options import PATH
from flexlora.commands.train import ConfigFile, Sets

__all__ = ["compare", "doctor", "evaluate", "export", "report", "rollback", "watch"]

AllowChanged = Annotated[
    bool, Option("--allow-changed", help="although the base or the rows are others than the run's")
]


def evaluate(
    target: Annotated[
        str, Argument(metavar="ADAPTER_OR_RUN", click_type=PATH, help="a PEFT or a run folder")
    ],
    data: Annotated[
        str, Option(metavar="DIR", click_type=PATH, help="data folder (default: the run's)")
    ] = "",
    config_file: ConfigFile = None,
    sets: Sets = None,
    allow_changed: AllowChanged = False,
    json_file: Annotated[
        str, Option("--json", metavar="FILE", click_type=PATH, help="write all scores, by client")
    ] = "",
    tasks: Annotated[
        str, Option(metavar="lm_eval:TASK,...", help="score on these tasks instead")
    ] = "",
) -> int:
    from flexlora.simulations.inspection import evaluate_target

    return evaluate_target(
        target,
        data=data or None,
        file=config_file,
        sets=tuple(sets or ()),
        allow_changed=allow_changed,
        json_file=json_file,
        tasks=tasks or None,
    )


def report(
    target: Annotated[
        str, Argument(metavar="RUN", click_type=PATH, help="a run folder, finished or not")
    ],
    samples: Annotated[
        bool, Option("--samples", help="first generate answers to a few held-out rows")
    ] = False,
) -> None:
    from flexlora.report import write_report

    if samples:
        from flexlora.simulations.samples import sample_run  # loads the model

        sample_run(target)

    print(f"Report: {write_report(target)}")


def watch(
    target: Annotated[
        str, Argument(metavar="[RUN]", click_type=PATH, help="(default: the newest)")
    ] = "",
    once: Annotated[bool, Option("--once", help="print one picture and end")] = False,
) -> int:
    from flexlora.report.console import make_console
    from flexlora.report.watch import watch

    return watch(target or None, once=once, console=make_console())


def compare(
    targets: Annotated[
        list[str], Argument(metavar="RUN...", click_type=PATH, help="two run folders or more")
    ],
    out: Annotated[
        str, Option(metavar="FILE.html", click_type=PATH, help="write a page with the figures")
    ] = "",
) -> int:
    from flexlora.report import compare
    from flexlora.report.console import make_console

    return compare(targets, out=out or None, console=make_console())


def export(
    target: Annotated[
        str, Argument(metavar="ADAPTER_OR_RUN", click_type=PATH, help="a PEFT or a run folder")
    ],
    out: Annotated[str, Option(metavar="DIR", click_type=PATH, help="folder to write")],
    rank: Annotated[
        int | None, Option(help="rank of the adapter (default: all that there is)")
    ] = None,
    format: Annotated[str, Option(help="portable, peft, merged, gguf or gguf-lora")] = "portable",
    dtype: Annotated[
        str, Option(help="of --format gguf: f32, f16 or bf16 (default: the run's model.dtype)")
    ] = "",
    dequantize: Annotated[
        bool, Option("--dequantize", help="merge into the rounded base that the run trained on")
    ] = False,
    allow_changed: AllowChanged = False,
) -> None:
    from flexlora.simulations.exporting import export

    export(
        target,
        rank=rank,
        kind=format,
        out=out,
        allow_changed=allow_changed,
        dequantize=dequantize,
        dtype=dtype,
    )


def rollback(
    target: Annotated[str, Argument(metavar="RUN", click_type=PATH, help="a run folder, at rest")],
    server_round: Annotated[int, Argument(metavar="ROUND", help="a round whose state is kept")],
) -> None:
    from flexlora.server.results import roll_back
    from flexlora.server.resuming import how_to_resume

    run = roll_back(target, server_round)
    print(
        f"{target} is where it was after round {server_round}: rows, checkpoint and adapters; the "
        f"rounds after it are gone. `{how_to_resume(run.path)}` goes on from there."
    )


def doctor(
    superlink: Annotated[
        list[str] | None, Option(metavar="HOST:PORT", help="try to reach it (repeatable)")
    ] = None,
    root_certificates: Annotated[
        str, Option(click_type=PATH, help="who signed the SuperLink's certificate")
    ] = "",
    node_key: Annotated[
        str, Option(click_type=PATH, help="this node's private key: is it registered?")
    ] = "",
    trainer_socket: Annotated[
        str, Option(click_type=PATH, help="ask the resident trainer how it is")
    ] = "",
    adapter: Annotated[
        str, Option(metavar="DIR", click_type=PATH, help="judge this adapter, not the machine")
    ] = "",
    base: Annotated[
        str, Option(metavar="MODEL", help="of --adapter (default: the one that it names)")
    ] = "",
    format: Annotated[str, Option(help="text or json")] = "text",
) -> int:
    from flexlora.clients.setup.superlink_checks import node_checks
    from flexlora.deploy.doctor import CHECKS, check_format, diagnose, report
    from flexlora.simulations.flower_checks import check_flower

    check_format(format)
    if adapter:
        from flexlora.deploy.adapter_checks import adapter_checks  # loads torch

        return report(diagnose(adapter_checks(adapter, base)), format=format)
    asked = node_checks(superlink or (), root_certificates, node_key, trainer_socket)
    findings = diagnose([*CHECKS, ("flower", check_flower), *asked])
    return report(findings, format=format)
