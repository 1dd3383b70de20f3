"""``flexlora simulate``, ``tune`` and ``reproduce``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from flexlora.aggregation.engine.options import choices
from flexlora.commands.options import PATH
from flexlora.config.resolve import Config, all_keys
from flexlora.errors import UserError

__all__ = ["ConfigFile", "Sets", "reproduce", "simulate", "tune"]

ConfigFile = Annotated[
    str | None,
    Option("--config", metavar="FILE", click_type=PATH, help="TOML file of configuration keys"),
]
Sets = Annotated[
    list[str] | None, Option("--set", metavar="KEY=VALUE", help="set one key (repeatable)")
]


def simulate(
    config_file: ConfigFile = None,
    sets: Sets = None,
    out: Annotated[
        str, Option(metavar="DIR", click_type=PATH, help="run folder (default: runs/DATE-TIME)")
    ] = "",
    resume: Annotated[
        str, Option(metavar="DIR", click_type=PATH, help="go on with the run in DIR")
    ] = "",
    overwrite: Annotated[bool, Option("--overwrite", help="replace a run in --out")] = False,
    seeds: Annotated[int | None, Option(metavar="N", help="N seeds: mean and deviation")] = None,
    allow_changed: Annotated[
        bool, Option("--allow-changed", help="resume on another base or other rows")
    ] = False,
    keys: Annotated[bool, Option("--help-config", help="list all keys and defaults")] = False,
) -> int:
    if keys:
        _print_keys()
        return 0
    if resume and (config_file or sets or out or overwrite or seeds is not None):
        raise UserError(
            "--resume goes on with the run's own configuration; "
            "it takes no --config, --set, --out, --overwrite or --seeds."
        )
    if allow_changed and not resume:
        raise UserError("--allow-changed is for a run that goes on; give --resume DIR too.")
    config = Config.resolve(file=config_file, sets=sets or ())
    folder = Path(resume or out or config.out or time.strftime("runs/%Y%m%d-%H%M%S"))
    if seeds is not None or (resume and (folder / "seeds.json").is_file()):
        return _simulate_seeds(config, folder, None if resume else seeds, overwrite, allow_changed)
    from flexlora.runs.folder import RunFolder

    if not resume:
        RunFolder.check_free(folder, overwrite=overwrite)  # before anything heavy is loaded

    from flexlora.report.console import make_console
    from flexlora.simulations.simulate import run_in_terminal

    console = make_console()
    try:
        run_in_terminal(
            config,
            folder,
            console=console,
            overwrite=overwrite,
            go_on=bool(resume),
            allow_changed=allow_changed,
        )
    except KeyboardInterrupt:
        done = [row["round"] for row in RunFolder(folder).metrics()]
        if not done:
            raise
        raise KeyboardInterrupt(
            f"interrupted after round {done[-1]}; the adapters of that round are in "
            f"{folder}/adapters, and `flexlora simulate --resume {folder}` goes on."
        ) from None
    text = f"Run folder: {folder} (adapters/CLASS load in PEFT; metrics.jsonl, clients.csv)"
    console.print(text, soft_wrap=True)
    return 0


def _simulate_seeds(
    config: Config, folder: Path, seeds: int | None, overwrite: bool, allow_changed: bool
) -> int:
    """Run ``seeds`` seeds, or go on with the series in ``folder`` where it is None."""
    from flexlora.report.console import make_console
    from flexlora.simulations.experiments.seed_series import is_series, resume_series, run_series

    console = make_console()
    try:
        if seeds is None:
            return resume_series(folder, console=console, allow_changed=allow_changed)
        return run_series(config, folder, seeds=seeds, console=console, overwrite=overwrite)
    except KeyboardInterrupt:
        if not is_series(folder):
            raise
        again = f"`flexlora simulate --resume {folder}` goes on with the series"
        raise KeyboardInterrupt(f"interrupted; {again}.") from None


def _print_keys() -> None:
    keys = all_keys()
    width = max(len(key) for key in keys)
    for key, info in keys.items():
        known = choices(info.annotation)
        listed = f" [{', '.join(known)}]" if known else ""
        default = str(info.default).lower() if info.annotation is bool else info.default
        print(f"{key:<{width}}  {default!s:<18}  {info.description}{listed}")


def tune(
    config_file: ConfigFile = None,
    sets: Sets = None,
    out: Annotated[
        str, Option(metavar="FILE.toml", click_type=PATH, help="write the configuration chosen")
    ] = "",
) -> int:
    from flexlora.simulations.tune import tune

    return tune(Config.resolve(file=config_file, sets=sets or ()), out=out or None)


def reproduce(
    name: Annotated[str, Argument(metavar="[NAME]", help="none: list the experiments")] = "",
    scale: Annotated[float, Option(help="times the documented size")] = 1.0,
    seeds: Annotated[int | None, Option(help="how many seeds (default: 3 times --scale)")] = None,
    first_seed: Annotated[int, Option(help="the first")] = 0,
    out: Annotated[
        str, Option(metavar="DIR", click_type=PATH, help="folder (default: runs/NAME)")
    ] = "",
    sets: Sets = None,
) -> int:
    from flexlora.simulations.experiments.reproduce import list_experiments, reproduce

    if not name:
        return list_experiments()
    folder = Path(out or f"runs/{name}")
    return reproduce(
        name, seeds=seeds, first_seed=first_seed, out=folder, sets=sets or (), scale=scale
    )
