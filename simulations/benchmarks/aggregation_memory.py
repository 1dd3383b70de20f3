"""The memory of one round, measured in a process of its own: how far its peak grows.

    python -m flexlora.simulations.benchmarks.aggregation_memory CLIENTS [SIDE]

Two modules of SIDE x SIDE, clients of FlexLoRA's light heavy tail, updates made on the fly and
added one by one in the order of their ids. Prints megabytes. The peak is ``VmHWM``: ``ru_maxrss``
is inherited from the process that starts this one, and a large parent hides all growth.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from flexlora.aggregation import make_method
from flexlora.aggregation.engine.open_round import OpenRound
from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.aggregation.engine.updates import Update
from flexlora.lora.adapters import Adapter, LoRAFactors
from flexlora.simulations.benchmarks.aggregation_cases import LIGHT

__all__ = ["peak_megabytes"]


def peak_megabytes(clients: int, side: int) -> float:
    """Growth of this process's peak while a round of FlexLoRA adds that many clients one by one."""
    shapes = {"attention": (side, side), "mlp": (side, side)}
    fresh = State(round=0, change=GlobalChange.zero(shapes))
    ids = [f"{i:06d}" for i in range(clients)]
    types = [i * 80 // clients for i in range(clients)]
    ranks = {name: LIGHT.ranks(mlp=name == "mlp", scale=2048 // side) for name in shapes}
    torch.randn(64, 64) @ torch.randn(64, 64)
    before = _peak_kilobytes()
    method = make_method("flexlora", server_max_rank=max(1, 200 * side // 2048))
    opened = OpenRound(method, fresh, {}, clients=dict.fromkeys(ids, "any"))
    for index, client_id in enumerate(ids):
        adapter = _client(shapes, {name: ranks[name][types[index]] for name in shapes}, index)
        opened.add(Update(client_id=client_id, adapter=adapter, num_examples=10 + index % 7))
    opened.close()
    return (_peak_kilobytes() - before) / 1000.0


def _peak_kilobytes() -> int:
    """The largest resident set of this process so far (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise RuntimeError("/proc/self/status has no VmHWM, expected a Linux kernel that counts it.")


def _client(shapes: dict[str, tuple[int, int]], ranks: dict[str, int], seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            name: LoRAFactors(
                lora_A=torch.randn(ranks[name], n, generator=generator),
                lora_B=torch.randn(m, ranks[name], generator=generator),
                alpha=16.0,
            )
            for name, (m, n) in shapes.items()
        }
    )


if __name__ == "__main__":
    print(peak_megabytes(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2048))
