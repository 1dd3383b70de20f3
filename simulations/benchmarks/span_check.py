"""What an upload shows of its client's tokens: DAGER's span check, by method and rank.

    python -m flexlora.simulations.benchmarks.span_check --json span_check.json

A client of the built-in tasks trains in round 1 as the method lets it. The attacker has what the
server has in plain mode: what was sent, what came back, and the base. The table has the two checks
of ``flexlora/privacy/span_check.py`` (found in A: the input space, in B: the factor space): the
area under the ROC curve of the distance, and precision and recall of the tokens within the
tolerance, means over the clients. ``span`` is the dimension of the span and that of its space.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from flexlora.aggregation import make_method
from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.clients.worker import Worker
from flexlora.config.resolve import Config, resolved
from flexlora.errors import UserError
from flexlora.lora.ranks import RankClass
from flexlora.privacy.membership import auc
from flexlora.privacy.span_check import (
    TOLERANCE,
    factor_space_distances,
    input_space_distances,
)
from flexlora.report.console import make_console
from flexlora.server.settings import factoring_of
from flexlora.training.schedule import planned_rows
from flexlora.wire.jobs import TrainJob

__all__ = ["CASES", "Check", "first_layer_inputs", "main", "span_checks"]

# flexlora and residual send and receive in round 1 what carried does; ffa-lora what basis does.
METHODS = ("aligned", "carried", "basis")
RANKS = (2, 8, 16)
SGD = {
    "train.optim": "sgd",
    "train.learning-rate": 0.1,
    "train.per-device-train-batch-size": 1,
}
CASES: Mapping[str, Mapping[str, object]] = {
    "1 step, 1 row": {"train.max-steps": 1, "train.per-device-train-batch-size": 1},
    "1 step, 8 rows": {"train.max-steps": 1},
    "20 steps, 8 rows": {},
    "1 step of SGD, 1 row": {**SGD, "train.max-steps": 1},
    "20 steps of SGD, 1 row": SGD,
}
INPUT_OF_LAYER_0 = re.compile(r"(^|\.)layers\.0\.self_attn\.(q|k|v)_proj$")
TOKENS_AT_ONCE = 4096


class _Seen(Exception):
    """The first layer's input is known, and the rest of the pass is not needed."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One factor of one client's upload, whose rows had ``tokens`` different tokens.

    ``dimension`` is that of the span in a ``space``.
    """

    auc: float
    precision: float
    recall: float
    tokens: int
    dimension: int
    space: int


def span_checks(worker: Worker, rank: int, client_id: str) -> dict[str, Check]:
    """Train one client in round 1, and check every token of the vocabulary, by factor."""
    config = worker.config
    method = make_method(config.method.name, config.method)
    state = State(round=0, change=GlobalChange.zero(worker.shapes))
    start = method.start(state, RankClass.of(rank), factoring_of(config)).sealed()
    job = TrainJob(client_id=client_id, server_round=1, num_server_rounds=1, start=start)
    (result,) = worker.train([job])
    if result.adapter is None:
        raise UserError(f"client '{client_id}' could not train: {result.cause}.")
    present = _present(worker, job)
    found, inputs = {}, first_layer_inputs(worker)
    if "lora_A" in start.trainable:
        distances, dimension = input_space_distances(
            start.trained, result.adapter, inputs, replaced=start.local.gradient_batches > 0
        )
        width = next(iter(inputs.values())).shape[1]
        found["A"] = _check(distances, present, dimension, width)
    distances, dimension = factor_space_distances(start.trained, result.adapter, inputs)
    found["B"] = _check(distances, present, dimension, rank)
    return found


def _present(worker: Worker, job: TrainJob) -> set[int]:
    """The tokens at all positions but the last of the rows of the round: inputs with a gradient."""
    rows = worker.train_rows(job)
    steps = planned_rows(job, len(rows), worker.settings)
    return {token for step in steps for i in step for token in rows[i].input_ids[:-1]}


def _check(distances: Tensor, present: set[int], dimension: int, space: int) -> Check:
    inside = torch.zeros(len(distances), dtype=torch.bool)
    inside[list(present)] = True
    if dimension == space:  # it holds every token, up to rounding
        distances = torch.zeros_like(distances)
    close = distances <= TOLERANCE
    right = int((close & inside).sum())
    return Check(
        auc=auc((-distances[inside]).tolist(), (-distances[~inside]).tolist()),
        precision=right / max(1, int(close.sum())),
        recall=right / len(present),
        tokens=len(present),
        dimension=dimension,
        space=space,
    )


@torch.no_grad()
def first_layer_inputs(worker: Worker) -> dict[str, Tensor]:
    """By module: the input ``[V, in]`` that each token of the vocabulary gives the first layer.

    Raises:
        UserError: a model without rotary positions, or whose first layer has other names.
    """
    slots = worker.slots
    slots.clear()
    names = [name for name in slots.shapes if INPUT_OF_LAYER_0.search(name)]
    if not names or not hasattr(worker.base.model.config, "rope_parameters"):
        raise UserError(
            f"model '{worker.config.model.name}' has no layers.0.self_attn.q_proj, k_proj or "
            "v_proj under rotary positions, where a layer's input is a function of one token."
        )
    seen: list[Tensor] = []

    def stop(module: object, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0][:, 0].float().cpu())
        raise _Seen

    hook = slots.layers[names[0]].register_forward_pre_hook(stop)
    try:
        tokens = torch.arange(worker.base.vocab_size, device=slots.device)[:, None]
        for part in tokens.split(TOKENS_AT_ONCE):
            with suppress(_Seen):
                slots.model(input_ids=part, use_cache=False)
    finally:
        hook.remove()
    return dict.fromkeys(names, torch.cat(seen))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="embedded", help="a folder, a hub name, embedded")
    parser.add_argument("--ranks", type=int, nargs="*", default=RANKS)
    parser.add_argument("--clients", type=int, default=8, help="clients to check, one by one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", nargs="*", choices=[*CASES], default=[*CASES])
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    given = parser.parse_args(arguments)
    rows = [row for case in given.case for method in METHODS for row in _rows(given, case, method)]
    _print(rows)
    if given.json:
        Path(given.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _rows(given: argparse.Namespace, case: str, method: str) -> list[dict[str, Any]]:
    """One row per rank and factor: means over the clients."""
    keys = {"model.name": given.model, "seed": given.seed, "method.name": method, **CASES[case]}
    worker = Worker(resolved(Config.of(keys)))
    rows = []
    for rank in given.ranks:
        checks = [span_checks(worker, rank, c) for c in worker.client_ids[: given.clients]]
        for factor in checks[0]:
            found = [asdict(check[factor]) for check in checks]
            means = {name: fmean(one[name] for one in found) for name in found[0]}
            rows.append({"case": case, "method": method, "rank": rank, "factor": factor, **means})
    return rows


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("case", "method", "rank", "found in", "tokens", "span", "AUC"):
        table.add_column(column, justify="left" if column in ("case", "method") else "right")
    for column in ("precision", "recall"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["case"],
            row["method"],
            str(row["rank"]),
            row["factor"],
            f"{row['tokens']:.0f}",
            f"{row['dimension']:.0f}/{row['space']:.0f}",
            *(f"{row[name]:.2f}" for name in ("auc", "precision", "recall")),
        )
    make_console().print(table)


if __name__ == "__main__":
    main()
