"""Secure sums: masking on one client, a round of a hundred clients, bytes on the wire.

python -m flexlora.simulations.benchmarks.secure [--numbers 10000000] [--clients 100]
    [--parts masking,round,wire] [--json FILE]

masking  one client, one core: clip, rotate, round, one mask for every neighbour, pack
round    a round of the embedded base in simulation, secure over plain, both in 16 bits
wire     bytes up and down beside plain ``basis`` in 16 bits, by class; keys, shares, unmasking
         in them. The embedded base is tiny; SmolLM2-135M's shapes show what a model costs
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flexlora.clients.secure.request_checks import Agreed
from flexlora.clients.secure.session import ClientSession
from flexlora.config.resolve import Config
from flexlora.lora.ranks import RankClass
from flexlora.privacy.secure.bands import Band
from flexlora.privacy.secure.graph import degree
from flexlora.privacy.secure.masks import add_mask, derived
from flexlora.privacy.secure.packing import pack_bits
from flexlora.privacy.secure.sum_plan import SumPlan
from flexlora.report.console import make_console
from flexlora.server.observing.observer import Observer
from flexlora.server.rounds.secure_sum import SecureSum, Terms
from flexlora.simulations.simulate import simulate
from flexlora.wire.secure_messages import to_values, value_bytes

__all__ = ["main", "masking_row", "round_rows", "wire_rows"]

ROWS, COLUMNS = 1000, 10  # of each module of the masked vector
LAYER = {"q": 128, "k": 128, "v": 128, "o": 128, "gate": 384, "up": 384, "down": 128}
EMBEDDED = {f"{k}.{name}": out for k in range(4) for name, out in LAYER.items()}
SMOLLM2_LAYER = {"q": 576, "k": 192, "v": 192, "o": 576, "gate": 1536, "up": 1536, "down": 576}
SMOLLM2 = {f"{k}.{name}": out for k in range(30) for name, out in SMOLLM2_LAYER.items()}
SHARES = {2: 0.5, 4: 0.25, 8: 0.15, 16: 0.1}
RUN = {
    "method.name": "basis",
    "num-server-rounds": 1,
    "train.max-steps": 4,
    "fraction-train": 1.0,
    "wire.dtype": "bfloat16",
    "eval.every": 0,
    "eval.generate": "never",
    "eval.fraction": 0.02,
    "server.late-rounds": 0,
    "engine.threads": 1,
}


def masking_row(numbers: int, clients: int) -> dict[str, Any]:
    """CPU seconds of one client with one thread, and of its steps."""
    torch.set_num_threads(1)
    modules = numbers // (ROWS * COLUMNS)
    names = [f"m{k:05d}" for k in range(modules)]
    plan = SumPlan(
        rows=dict.fromkeys(names, ROWS),
        bands={0: Band(classes=frozenset({"a"}), columns=dict.fromkeys(names, (0, COLUMNS)))},
        sizes={0: clients},
        seed=1,
        clip=1.0,
        largest=100,
    )
    noise = torch.Generator().manual_seed(0)
    matrices = {name: torch.randn(ROWS, COLUMNS, generator=noise) for name in names}
    began = time.process_time()
    made = plan.numbers(matrices, weight=50, loss=1.0, generator=np.random.default_rng(0))[0]
    encoded = time.process_time()
    for place in range(1 + degree(clients)):
        add_mask(made, derived(b"k" * 32, "pair", place))
    masked = time.process_time()
    pack_bits(made, plan.grids[0].bits)
    packed = time.process_time()
    return {
        "name": f"masking {numbers:,} numbers, {degree(clients)} neighbours",
        "seconds": packed - began,
        "encode": encoded - began,
        "masks": masked - encoded,
        "pack": packed - masked,
        "target": 3.0,
    }


class _RoundSeconds(Observer):
    """CPU seconds of this process in round 1, evaluation included."""

    def __init__(self) -> None:
        self.began = self.seconds = 0.0

    def round_started(self, server_round: int, num_rounds: int, num_clients: int) -> None:
        self.began = time.process_time()

    def round_finished(self, metrics: Mapping[str, object]) -> None:
        self.seconds = time.process_time() - self.began


def round_rows(clients: int) -> list[dict[str, Any]]:
    """CPU seconds of a plain and of a secure round, and their quotient."""
    seconds = {}
    for mode, more in (("none", {}), ("secure", {"privacy.mode": "secure", "privacy.clip": 20.0})):
        with tempfile.TemporaryDirectory() as folder:
            config, watch = Config.of({**RUN, "clients.count": clients, **more}), _RoundSeconds()
            simulate(config, Path(folder) / "run", observer=watch)
            seconds[mode] = watch.seconds
    ratio = seconds["secure"] / seconds["none"]
    name = f"{clients} clients a round, secure over plain"
    return [
        {
            "name": name,
            "secure": seconds["secure"],
            "plain": seconds["none"],
            "ratio": ratio,
            "target": 2.0,
        }
    ]


def wire_rows(rows: dict[str, int], clients: int, label: str) -> list[dict[str, Any]]:
    """Bytes of one client of each class in a round of so many, over plain 16-bit ``basis``."""
    shapes = {name: (out, 4096) for name, out in rows.items()}
    ranks = [rank for rank, share in SHARES.items() for _ in range(round(share * clients))]
    classes = {place: RankClass.of(rank) for place, rank in enumerate(ranks, start=1)}
    terms = Terms(server_round=1, seed=1, clip=1.0, largest=1000, min_group=3)
    secure = SecureSum(terms, classes, shapes)
    up, down = small_phases(secure)
    found = []
    for rank in SHARES:
        place, plain = ranks.index(rank) + 1, 2 * rank * sum(rows.values())
        masked = secure.most_bytes(place)
        found.append(
            {
                "name": f"{label}, {clients} clients, rank {rank}",
                "plain": plain,
                "masked": masked,
                "keys and shares up": up[place],
                "down": down[place],
                "ratio": (masked + up[place]) / plain,
                "target": 1.15,
            }
        )
    return found


def small_phases(secure: SecureSum) -> tuple[Counter[int], Counter[int]]:
    """Bytes up and down by place, but for the masked numbers, of a round in which all answer."""
    up, down, sessions = Counter[int](), Counter[int](), {}
    agreed = Agreed(seed=secure.terms.seed, clip=secure.terms.clip, min_group=3)

    def answered(place: int, request: object, reply: object) -> None:
        down[place] += value_bytes(to_values(request))
        up[place] += value_bytes(to_values(reply))

    for place, begin in secure.keys_requests().items():
        sessions[place] = ClientSession.begun(begin)
        keys = sessions[place].keys(begin)
        secure.add_keys(place, keys)
        answered(place, begin, keys)
    for place, graph in secure.shares_requests().items():
        shares = sessions[place].shares(graph, agreed)
        secure.add_shares(place, shares)
        answered(place, graph, shares)
    for place, mask in secure.mask_requests().items():
        down[place] += value_bytes(to_values(mask))
        sessions[place].masked(mask, lambda *_, bands=mask.bands: _empty(bands))
        secure.alive.append(place)
    for place, unmask in secure.unmask_requests().items():
        answered(place, unmask, sessions[place].unmask(unmask))
    return up, down


def _empty(bands: tuple[int, ...]) -> dict[int, np.ndarray]:
    return {band: np.zeros(1, np.uint32) for band in bands}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and weigh secure sums.")
    parser.add_argument("--numbers", type=int, default=10_000_000)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--parts", default="masking,wire,round")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    parts, console, rows = options.parts.split(","), make_console(), []
    if "masking" in parts:
        rows.append(masking_row(options.numbers, options.clients))
    if "wire" in parts:
        for clients in (20, options.clients):
            rows += wire_rows(EMBEDDED, clients, "embedded")
            rows += wire_rows(SMOLLM2, clients, "SmolLM2-135M")
    if "round" in parts:
        rows += round_rows(options.clients)
    for row in rows:
        console.print("  ".join(f"{k} {_shown(v)}" for k, v in row.items()))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    main()
