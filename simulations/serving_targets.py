"""What `flexlora serve` and `flexlora chat` are given: runs, PEFT folders, and their one base.

The base, its number format and the prompt template are those of the runs, so that the served model
sees what it saw in training; a PEFT folder names its base, and says nothing of a template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flexlora.config.cores import allowed_cores
from flexlora.config.paths import expanded, resolve_name
from flexlora.config.resolve import Config
from flexlora.errors import UserError
from flexlora.lora.peft_config import PeftConfig, read_config
from flexlora.planning.probing import require
from flexlora.runs.folder import RunFolder
from flexlora.serving.adapter_store import AdapterStore
from flexlora.serving.prompts import Prompts
from flexlora.simulations.served_adapters import FollowedRun, add_run
from flexlora.training.base_model import BaseModel
from flexlora.training.models import load_base, pick_device

__all__ = ["Served", "Target", "check_names", "open_served", "serving_config", "target_of"]

SETTABLE = ("model.", "data.template", "engine.device", "engine.threads")
SHARED = ("model.name", "model.quantization", "data.template", "data.template-date")


@dataclass(frozen=True, kw_only=True)
class Target:
    """A run or a PEFT folder; ``name`` where ``NAME=DIR`` gives one.

    A run's adapters are ``NAME/rank_8`` where it has a name, else ``rank_8``.
    """

    path: Path
    name: str = ""

    @property
    def is_run(self) -> bool:
        return RunFolder.is_run(self.path)

    @property
    def prefix(self) -> str:
        """Of a run's adapters."""
        return f"{self.name}/" if self.name else ""

    @property
    def adapter_name(self) -> str:
        """Of a PEFT folder."""
        return self.name or self.path.resolve().name


def target_of(text: str) -> Target:
    """``DIR`` or ``NAME=DIR``; a path with ``=`` that exists is a path.

    Raises:
        UserError: neither a run nor a PEFT folder.
    """
    name, equals, path = text.partition("=")
    named = bool(equals) and not Path(expanded(text)).exists()
    found = Target(path=Path(expanded(path if named else text)), name=name if named else "")
    if named and not name:
        raise UserError(f"'{text}' has no name before '=', expected NAME=DIR.")
    if not found.is_run and not (found.path / "adapter_config.json").is_file():
        raise UserError(
            f"'{found.path}' is no run folder and no PEFT folder, expected a folder with "
            "config.toml or adapter_config.json."
        )
    return found


def serving_config(
    targets: Sequence[Target], *, base: str = "", sets: Sequence[str] = ()
) -> Config:
    """The keys of the base and of the prompts.

    Raises:
        UserError: runs that differ in them, a base that only the hub has and nobody asked for, a
            key that does not matter here.
    """
    given = Config.given(sets=sets)
    for key in given:
        if not key.startswith(SETTABLE):
            listed = ", ".join(name.rstrip(".") for name in SETTABLE)
            raise UserError(f"--set {key}: serving reads the keys of {listed} only.")
    if base:
        given["model.name"] = base
    runs = {str(t.path): config for t in targets if (config := _run_config(t.path)) is not None}
    for key in SHARED:
        if key not in given:
            _check_shared(key, {path: config.flat()[key] for path, config in runs.items()})
    values: dict[str, Any] = {}
    if runs:
        first = next(iter(runs.values())).flat()
        values = {key: value for key, value in first.items() if key.startswith(("model.", "data."))}
        values = {key: values[key] for key in values if key.startswith(SETTABLE)}
    elif "model.name" not in given and targets:
        values["model.name"] = _named_base(targets[0].path)
    # Attention as in training may need what this machine lacks, and serving brings another.
    return Config.of({**values, "model.attn-implementation": "auto", **given})


def _check_shared(key: str, values: dict[str, Any]) -> None:
    if len(set(values.values())) > 1:
        listed = ", ".join(f"'{value}' in {path}" for path, value in values.items())
        raise UserError(f"the runs differ in {key}: {listed}; serve them apart, or give --set.")


def _run_config(path: Path) -> Config | None:
    """The configuration of a run, or of the run that a folder of ``adapters/`` lies in."""
    home = path.resolve().parent.parent
    if RunFolder.is_run(path):
        return RunFolder.open(path)[1]
    inside = path.resolve().parent.name == "adapters" and RunFolder.is_run(home)
    return RunFolder.open(home)[1] if inside else None


def _named_base(path: Path) -> str:
    """The base that a PEFT folder names; a hub name is fetched only where a person gives it.

    Raises:
        UserError: it names none that is on this machine.
    """
    stored: PeftConfig = read_config(path / "adapter_config.json")
    try:
        if stored.base and Path(resolve_name(stored.base)).is_dir():
            return stored.base
    except UserError:
        pass  # a folder of another machine
    raise UserError(
        f"'{path}' names the base '{stored.base}', which is no folder on this machine; give the "
        "base that it was trained on as --base MODEL."
    )


@dataclass(frozen=True, kw_only=True)
class Served:
    """A base with adapters in ``store``; ``base_name`` is its name as a model."""

    base: BaseModel
    base_name: str
    store: AdapterStore
    prompts: Prompts
    followed: FollowedRun | None = None


def open_served(
    targets: Sequence[Target],
    *,
    base: str = "",
    sets: Sequence[str] = (),
    follow: Target | None = None,
    adapter_bytes: int = 2**30,
) -> Served:
    """Load the base and put all adapters into a store.

    Raises:
        UserError: as ``serving_config``, ``load_base`` and ``AdapterStore.add``; two adapters of
            one name.
    """
    config = serving_config([*targets, *([follow] if follow else [])], base=base, sets=sets)
    torch.set_num_threads(config.engine.threads or min(torch.get_num_threads(), allowed_cores()))
    device, kind = pick_device(config.engine.device), config.model.quantization
    require(kind, device, key="model.quantization")
    loaded = load_base(
        config.model.name,
        dtype=config.model.dtype,
        quantization=kind,
        outlier_threshold=config.model.outlier_threshold,
        device=config.engine.device,
        fresh=True,
    )
    store = AdapterStore(loaded, device_bytes=adapter_bytes)
    for target in targets:
        if target.is_run:
            add_run(store, target.path, prefix=target.prefix)
        else:
            store.add(target.adapter_name, target.path)
    followed = FollowedRun(store, follow.path, prefix=follow.prefix) if follow else None
    if followed is not None:
        followed.poll()
    found = Served(
        base=loaded,
        base_name=_base_name(config.model.name),
        store=store,
        prompts=Prompts(
            loaded.tokenizer, template=config.data.template, date=config.data.template_date
        ),
        followed=followed,
    )
    check_names(found)
    return found


def _base_name(name: str) -> str:
    """``embedded``, the last part of a folder's path, or the hub name."""
    if resolve_name(name) == resolve_name("embedded"):
        return "embedded"
    return Path(name).resolve().name if Path(name).is_dir() else name


def check_names(served: Served) -> None:
    """Refuse an adapter with the base's name: a client could not ask for it.

    Raises:
        UserError: there is one.
    """
    if served.base_name in served.store.names():
        raise UserError(
            f"an adapter has the base's name '{served.base_name}'; give it another as NAME=DIR."
        )
