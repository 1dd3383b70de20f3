"""The page of a large run: seconds to write it, its bytes, and the memory of the process.

    python -m flexlora.simulations.benchmarks.report_page --rounds 100 --clients 1613

The run folder is made up: every file is written by ``RunFolder`` in the form of a real one, its
numbers are drawn. 224 modules are those of a 7B model; every client evaluates in every round, each
class under the class's adapter, which is the most that a run can record.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from flexlora.config.resolve import Config
from flexlora.report import write_report
from flexlora.runs.folder import RunFolder
from flexlora.runs.samples_file import Sample, Samples, TruncatedLoss, write_samples
from flexlora.seeds import numpy_generator

__all__ = ["made_up_run"]

SECONDS, BYTES = 20.0, 10_000_000
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj")
PARTS = {"self_attn": KINDS, "mlp": ("gate_proj", "up_proj", "down_proj")}
CLASSES = {"rank_2": 0.5, "rank_4": 0.25, "rank_8": 0.15, "rank_16": 0.1}
DEVICES = ("cpu (Jetson Orin Nano 8GB)", "NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 4090")
DIRECTIONS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def made_up_run(
    path: Path, *, rounds: int, clients: int, layers: int = 32, evaluated: int = 4
) -> Path:
    """A run folder of this size; each client evaluates under ``evaluated`` classes a round."""
    config = Config().with_values({"num-server-rounds": rounds, "engine.threads": 1})
    run, random = RunFolder.create(path, config), numpy_generator(0, "made-up")
    classes = random.choice(list(CLASSES), size=clients, p=list(CLASSES.values()))
    devices = random.integers(len(DEVICES), size=clients)
    examples = np.maximum(4, random.lognormal(4.0, 1.0, size=clients)).astype(int)
    people = [(str(c), int(d), int(e)) for c, d, e in zip(classes, devices, examples, strict=True)]
    modules = [
        f"model.layers.{layer}.{part}.{kind}"
        for layer in range(layers)
        for part, kinds in PARTS.items()
        for kind in kinds
    ]
    for at in range(rounds + 1):
        order = random.permutation(clients).tolist() if at else []
        rows = [_client(at, k, people[k], random) for k in order[: max(1, clients // 3)]]
        metrics = _metrics(at, rounds, rows, random)
        if at:
            metrics["modules"] = {name: _module(at, random) for name in modules}
        run.append_round(metrics, rows, list(_scores(at, people, evaluated, random)))
    index = {"rank_classes": {f"client_{k:05d}": {"name": str(c)} for k, c in enumerate(classes)}}
    run.checkpoint.mkdir()
    (run.checkpoint / "current.json").write_text(json.dumps(index))
    _answers(run.path, rounds)
    return run.path


def _client(
    at: int, k: int, person: tuple[str, int, int], random: np.random.Generator
) -> dict[str, object]:
    rank_class, device, examples = person
    failed = random.random() < 0.04
    rank = int(rank_class.removeprefix("rank_"))
    cause = ("no reply in time", "out of memory at rank 16", "lora_A holds NaN")[k % 3]
    return {
        "round": at,
        "client_id": f"client_{k:05d}",
        "rank_class": rank_class,
        "rank": rank,
        "quantization": "nf4",
        "device": DEVICES[device],
        "num_examples": examples,
        "loss_before": 2.0 + random.random(),
        "loss_after": 1.0 + random.random(),
        "bytes_down": 40_000_000,
        "bytes_up": 5_000_000 * rank,
        "seconds": 10 * random.random(),
        "status": "failed" if failed else "ok",
        "cause": cause if failed else "",
    }


def _metrics(
    at: int, rounds: int, rows: list[dict[str, object]], random: np.random.Generator
) -> dict[str, object]:
    loss = 1.0 + 2.5 * np.exp(-4.0 * at / rounds) + 0.02 * random.random()
    metrics: dict[str, object] = {"round": at, "eval_loss": loss, "seconds": 60.0 * random.random()}
    for place, name in enumerate(CLASSES):
        metrics[f"eval_loss/{name}"] = loss * (1 - 0.02 * place)
        if at:
            kept = 0.7 + 0.08 * place
            metrics |= {f"energy_kept/{name}": 1.0, f"truncated_energy/{name}": kept}
            metrics[f"memory_bytes/{name}"] = 80_000_000 * (place + 1)
    if at:
        ok = sum(row["status"] == "ok" for row in rows)
        metrics |= {"train_loss": loss, "effective_rank": 8 + 4 * at / rounds}
        metrics |= {"clients_ok": ok, "clients_failed": len(rows) - ok}
        metrics |= {"bytes_down": 40_000_000 * len(rows), "bytes_up": 20_000_000 * len(rows)}
        metrics |= {"simulated_seconds": 3600 * random.random(), "joules": 1e6 * random.random()}
    return metrics


def _module(at: int, random: np.random.Generator) -> dict[str, object]:
    kept = 0.5 + 0.4 * random.random()
    values = {str(k): 0.1 * at**0.5 / k * random.random() for k in DIRECTIONS}
    return {
        "route": "factored",
        "seconds": 0.01,
        "error": 0.0,
        "rank": 64,
        "effective_rank": 8 + 8 * random.random(),
        "tail_energy": 1 - kept,
        **{f"energy_kept/{name}": kept for name in CLASSES},
        "spectrum": values,
    }


def _scores(
    at: int,
    people: list[tuple[str, int, int]],
    evaluated: int,
    random: np.random.Generator,
) -> Iterator[dict[str, object]]:
    for k in range(len(people)):
        for name in ["base"] if at == 0 else [*CLASSES][:evaluated]:
            loss = float(1.0 + random.random())
            row = {"round": at, "client_id": f"client_{k:05d}", "rank_class": name, "rows": 8}
            yield row | {"eval_loss": loss}


def _answers(folder: Path, rounds: int) -> None:
    sample = Sample(
        client_id="client_00000",
        rank_class="rank_2",
        task="task042",
        prompt="Name the capital of France. " * 20,
        reference="Paris",
        answers={"base": "Lyon " * 80, "global": "Paris", "personal": "Paris"},
    )
    losses = {name: TruncatedLoss(served=1.0, truncated=1.2) for name in CLASSES}
    samples = Samples(
        round=rounds, split="validation", samples=(sample,) * 6, rows=256, losses=losses
    )
    write_samples(folder, samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--clients", type=int, default=1613)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--out", help="keep the run folder here")
    parser.add_argument("--json", help="write the rows to this file")
    given = parser.parse_args()
    size = {"rounds": given.rounds, "clients": given.clients, "layers": given.layers}
    with tempfile.TemporaryDirectory() as place:
        folder = made_up_run(Path(given.out or place) / "run", **size)
        files = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        before = time.perf_counter()
        page = write_report(folder)
        seconds, size_of_page = time.perf_counter() - before, page.stat().st_size
    memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = [
        {"name": "seconds", "value": seconds, "ratio": seconds / SECONDS, "target": 1.0},
        {"name": "bytes", "value": size_of_page, "ratio": size_of_page / BYTES, "target": 1.0},
    ]
    print(f"{given.clients} clients, {given.rounds} rounds, {7 * given.layers} modules")
    print(f"run folder {files / 1e6:.1f} MB, process {memory / 1e6:.0f} MB at most")
    for row in rows:
        print(f"{row['name']:<8} {row['value']:>12,.2f}   {row['ratio']:.2f} of what is allowed")
    if given.json:
        Path(given.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
