"""A plain PEFT loop: one client after the other, in one process or in several.

    python -m flexlora.simulations.benchmarks.cohort_peers.loop FOLDER REPORT
        [--processes P] [--threads T]

Each process reads the model once and keeps it. With several, a round's clients are dealt out as
processes become free; the round ends with its last client.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from flexlora.simulations.benchmarks.cohort_peers.peft_client import (
    load_model,
    mean_loss,
    train_client,
)
from flexlora.simulations.benchmarks.cohort_peers.work import (
    Stamps,
    Training,
    Work,
    what_came_back,
    write_report,
)

Task = tuple[str, int, str]  # folder, round, client
Reply = tuple[dict[str, Any], Training]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("report")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    work = Work.read(options.folder)
    torch.set_num_threads(options.threads)
    first: list[Reply] = []
    last: list[Reply] = []
    trainings: list[Training] = []
    stamps = Stamps()
    with crew(options.processes, options.threads) as train:
        stamps.mark()
        for server_round in range(1, work.num_rounds + 1):
            last = list(train((work.folder, server_round, name) for name in work.clients))
            stamps.mark()
            trainings += [training for _, training in last]
            first = first or last
    replies = {training.client_id: _tensors(state) for state, training in last}
    came_back = what_came_back(work, replies)
    began, losses = time.time(), {}
    if options.processes == 1:
        losses = {t.client_id: _loss_after(work, t.client_id, state) for state, t in first}
    control = {"loss_after": losses, "untimed_seconds": time.time() - began}
    write_report(options.report, stamps, trainings, **came_back, **control)


@contextmanager
def crew(processes: int, threads: int) -> Iterator[Callable[[Iterable[Task]], Iterable[Reply]]]:
    """A function that trains tasks, here or in processes of their own."""
    if processes == 1:
        yield lambda tasks: map(_train, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        processes, mp_context=context, initializer=torch.set_num_threads, initargs=(threads,)
    ) as pool:
        yield lambda tasks: pool.map(_train_as_arrays, tasks)


@cache
def _work(folder: str) -> Work:
    return Work.read(folder)


@cache
def _model(folder: str) -> Any:
    work = _work(folder)
    return load_model(work, work.ranks.values())


@cache
def _start(folder: str, rank: int) -> dict[str, torch.Tensor]:
    return _work(folder).start(rank)


def _train(task: Task) -> Reply:
    folder, server_round, client_id = task
    work = _work(folder)
    start = _start(folder, work.ranks[client_id])
    return train_client(_model(folder), work, server_round, client_id, start)


def _train_as_arrays(task: Task) -> Reply:
    """Arrays go through a pipe; tensors would each open a file of shared memory."""
    state, training = _train(task)
    return {key: tensor.numpy() for key, tensor in state.items()}, training


def _tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {key: torch.as_tensor(value) for key, value in state.items()}


def _loss_after(work: Work, client_id: str, state: dict[str, Any]) -> float:
    """The loss on the rows of round 1's first step after all of its steps."""
    rank, rows = work.ranks[client_id], work.batches(1, client_id)[0]
    return mean_loss(_model(work.folder), rank, _tensors(state), rows)


if __name__ == "__main__":
    main()
