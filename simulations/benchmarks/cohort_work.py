"""Deals the work of the cohort benchmark: clients with enough rows, their ranks, every batch.

The folder that it leaves has a configuration for ``flexlora simulate`` (``config.toml``, a data
folder, a rank table) and the same as tokens, indices and PEFT folders for everybody else
(``work.json``, ``rank_R/``). Batches are those that our training draws, so that one start gives one
result; if training drew others, the losses of the programs would tell.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch

from flexlora.aggregation import make_method
from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.config.resolve import Config
from flexlora.data.clients import ClientData, client_rows
from flexlora.data.collation import Example, batch_plan
from flexlora.data.rows import Row
from flexlora.errors import UserError
from flexlora.lora.peft_folder import save_adapter
from flexlora.lora.ranks import RankClass
from flexlora.server.settings import factoring_of
from flexlora.simulations.benchmarks.cohort_peers.work import Work
from flexlora.training.models import BaseModel, load_base, resolve_name
from flexlora.training.slots import slot_model

__all__ = ["Size", "prepare"]


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much every program does: ``steps`` of ``batch_size`` rows a client and round."""

    model: str = "embedded"
    data: str = ""
    clients: int = 16
    rounds: int = 6
    steps: int = 8
    batch_size: int = 4
    max_length: int = 128
    ranks: tuple[int, ...] = (2, 4, 8, 16)
    method: str = "flexlora"
    seed: int = 0


def prepare(size: Size, folder: Path) -> Work:
    """Write the work into ``folder``.

    Raises:
        UserError: a model or data that cannot be loaded, or too few clients with enough rows.
    """
    config = _config(size, folder)
    base = load_base(size.model, device="cpu")
    _write_data(size, config, base, folder / "data")
    examples = _examples(config, base, folder / "data")
    ranks = {name: size.ranks[i % len(size.ranks)] for i, name in enumerate(sorted(examples))}
    table = "\n".join(["client_id,rank", *(f'"{name}",{rank}' for name, rank in ranks.items())])
    (folder / "ranks.csv").write_text(table + "\n", encoding="utf-8")
    (folder / "config.toml").write_text(tomli_w.dumps(config.nested()), encoding="utf-8")
    _write_starts(config, base, size.ranks, folder)
    work = Work(
        folder=str(folder.resolve()),
        model=resolve_name(size.model),
        ranks=ranks,
        rows={k: [(list(e.input_ids), e.prompt_length) for e in v] for k, v in examples.items()},
        plan=[_round_plan(config, examples, r) for r in range(1, size.rounds + 1)],
        alpha=config.lora.alpha,
        learning_rate=config.train.learning_rate,
        adam_epsilon=config.train.adam_epsilon,
        max_grad_norm=config.train.max_grad_norm,
    )
    work.write()
    return work


def _config(size: Size, folder: Path) -> Config:
    """Everybody trains in every round, nothing is evaluated: the rows hold no validation split."""
    return Config.of(
        {
            "seed": size.seed,
            "num-server-rounds": size.rounds,
            "fraction-train": 1.0,
            "method.name": size.method,
            "ranks.policy": "file",
            "ranks.file": str(folder.resolve() / "ranks.csv"),
            "model.name": resolve_name(size.model),
            "data.path": str(folder.resolve() / "data"),
            "train.per-device-train-batch-size": size.batch_size,
            "train.max-steps": size.steps,
            "train.max-length": size.max_length,
            "train.lr-scheduler-type": "constant",
            "eval.every": 0,
            "eval.fraction": 0.0,
            "eval.max-examples": 1,
            "eval.generate": "never",
            "engine.device": "cpu",
        }
    )


def _encoded(rows: Mapping, config: Config, base: BaseModel) -> ClientData:
    longest = base.max_positions or config.train.max_length
    return ClientData(
        rows,
        tokenizer=base.tokenizer,
        template=config.data.template,
        max_length=min(config.train.max_length, longest),
    )


def _rows_of(path: str, seed: int) -> dict[str, dict[str, list[Row]]]:
    return client_rows(
        path=path, name="", kind="client", num_clients=0, dirichlet_alpha=1.0, seed=seed
    )


def _write_data(size: Size, config: Config, base: BaseModel, folder: Path) -> None:
    """The train rows of the first clients that can fill every batch of a round."""
    rows = _rows_of(size.data, size.seed)
    data, wanted = _encoded(rows, config, base), size.steps * size.batch_size
    able = [name for name in data.client_ids if len(data.examples(name, "train")) >= wanted]
    if len(able) < size.clients:
        raise UserError(
            f"the data has {len(able)} clients with {wanted} rows of at most {size.max_length} "
            f"tokens, expected {size.clients}; lower --clients, --steps or --batch-size."
        )
    chosen = [row for name in able[: size.clients] for row in rows[name]["train"]]
    folder.mkdir()
    lines = [json.dumps(_as_object(row)) for row in chosen]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _as_object(row: Row) -> dict[str, Any]:
    """The row as a line of a data folder has it."""
    labels = {k: v for k in ("client", "task", "category") if (v := getattr(row, k)) is not None}
    if row.messages is not None:
        return {"messages": [{"role": r, "content": c} for r, c in row.messages], **labels}
    return {"instruction": row.instruction, "input": row.input, "output": row.output, **labels}


def _examples(config: Config, base: BaseModel, folder: Path) -> dict[str, list[Example]]:
    """What our own worker makes of the folder that was written."""
    data = _encoded(_rows_of(str(folder), config.seed), config, base)
    return {name: data.examples(name, "train") for name in data.client_ids}


def _round_plan(
    config: Config, examples: Mapping[str, Sequence[Example]], server_round: int
) -> dict[str, list[list[int]]]:
    return {
        name: batch_plan(
            len(rows),
            batch_size=config.train.per_device_train_batch_size,
            steps=config.train.max_steps,
            seed_parts=(config.seed, "batches", server_round, name),
        )
        for name, rows in examples.items()
    }


def _write_starts(config: Config, base: BaseModel, ranks: Sequence[int], folder: Path) -> None:
    """What our server sends each rank in round 1, as PEFT folders."""
    shapes = slot_model(base.model, config.lora.target_modules).shapes
    state = State(round=0, change=GlobalChange.zero(shapes, torch.float32))
    method = make_method(config.method.name, config.method)
    for rank in sorted(set(ranks)):
        start = method.start(state, RankClass.of(rank), factoring_of(config))
        save_adapter(start.trained, folder / f"rank_{rank}", base=config.model.name)
