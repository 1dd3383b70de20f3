"""CPU seconds and memory of the inner products that a robust rule needs, all updates on disk.

    python -m flexlora.simulations.benchmarks.robust_gram --clients 10 30 100

Four modules of 2048 x 2048, three clients in four at rank 8 and the others at 32. ``sum`` is the
time of the plain sum of the same updates, its decomposition not included. Memory is what the
process grew by at most while it computed the inner products.
"""

from __future__ import annotations

import argparse
import time

import torch

from flexlora.aggregation.engine.change_gram import gram_of_waiting
from flexlora.aggregation.engine.product_sums import ProductSums
from flexlora.aggregation.engine.updates import Update
from flexlora.aggregation.engine.waiting import WaitingUpdates
from flexlora.lora.adapters import Adapter, LoRAFactors
from flexlora.seeds import generator
from flexlora.simulations.benchmarks.process_memory import peak_bytes, reset_peak, settled_bytes

__all__ = ["measured"]

SIZE, MODULES, RANKS = 2048, 4, (8, 8, 8, 32)


def random_adapter(client: int) -> Adapter:
    """Factors of one client, of the entries' size that training leaves."""
    draws, rank = generator(0, "gram", client), RANKS[client % len(RANKS)]
    modules = {}
    for index in range(MODULES):
        A = torch.randn(rank, SIZE, generator=draws) / SIZE**0.5
        B = 0.1 * torch.randn(SIZE, rank, generator=draws)
        modules[f"module_{index}"] = LoRAFactors(lora_A=A, lora_B=B, alpha=16.0)
    return Adapter(modules)


def measured(clients: int) -> dict[str, float]:
    """Seconds of the Gram matrix and of the sum, and bytes by which the peak grew for the first."""
    waiting = WaitingUpdates(0)
    keys = [f"client_{k:04d}" for k in range(clients)]
    for k, key in enumerate(keys):
        waiting.put(Update(client_id=key, adapter=random_adapter(k), num_examples=1))
    reset_peak()
    before, began = settled_bytes(), time.process_time()
    gram_of_waiting(waiting, keys, {})
    gram, grown, began = time.process_time() - began, peak_bytes() - before, time.process_time()
    sums = ProductSums({f"module_{index}": (SIZE, SIZE) for index in range(MODULES)})
    for key in keys:
        sums.add(waiting.take(key).adapter, 1.0)
    waiting.close()
    return {"gram": gram, "sum": time.process_time() - began, "grown": grown}


def main() -> None:
    parser = argparse.ArgumentParser(description="Inner products of a round's updates.")
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 30, 100])
    print("| clients | inner products, CPU | plain sum, CPU | memory |")
    print("|---:|---:|---:|---:|")
    for clients in sorted(parser.parse_args().clients):
        found = measured(clients)
        grown = f"{found['grown'] / 2**20:.0f} MiB"
        print(f"| {clients} | {found['gram']:.2f} s | {found['sum']:.2f} s | {grown} |", flush=True)


if __name__ == "__main__":
    main()
