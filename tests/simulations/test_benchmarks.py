"""The aggregation benchmark runs at small shapes: every row, its errors, its table and its file."""

import json
from types import SimpleNamespace

import pytest
import torch

from flexlora.algebra.decompose import MatrixSum
from flexlora.simulations.benchmarks import aggregation, aggregation_cases


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("benchmark") / "rows.json"
    made = aggregation.main(
        [
            "--smoke",
            "--repeats",
            "1",
            "--threads",
            str(torch.get_num_threads()),
            "--json",
            str(file),
        ]
    )
    return made, json.loads(file.read_text())


@pytest.mark.slow
def test_every_row_is_there_with_what_a_reader_of_the_file_needs(rows):
    made, written = rows
    kinds = [row.name.split()[0] for row in made]
    assert kinds == ["sum"] * 4 + ["round"] * 8 + ["rate", "memory"]
    assert len(written) == len(made)
    for row in written:
        assert {"name", "ratio", "target", "error"} <= row.keys()
        assert row["ratio"] > 0


@pytest.mark.slow
def test_every_error_is_within_what_is_allowed(rows):
    for row in rows[0]:
        assert row.error <= row.allowed_error, row.name


def test_a_row_is_met_only_if_both_its_ratio_and_its_error_are():
    good = {"name": "x", "ratio": 2.0, "target": 1.5, "error": 0.0, "allowed_error": 0.1}
    assert aggregation.AggregationRow(**good).met
    assert not aggregation.AggregationRow(**{**good, "ratio": 1.0}).met
    assert not aggregation.AggregationRow(**{**good, "error": 0.2}).met
    assert not aggregation.AggregationRow(**good, at_most=True).met


def test_a_peak_that_cannot_have_been_measured_is_refused(monkeypatch):
    """A process that inherits its parent's peak sees no growth at all: no row comes of that."""
    done = SimpleNamespace(stdout="0.0")
    monkeypatch.setattr(aggregation.subprocess, "run", lambda *args, **kwargs: done)
    with pytest.raises(RuntimeError, match=r"grew by 0\.0 MB over 10 clients, expected at least"):
        aggregation._memory_row(16, 1)


def test_the_ways_of_others_are_what_they_say():
    """All of them approximate the same sum, so a faster one that is wrong would show."""
    ranks = aggregation_cases.LIGHT.ranks(mlp=True, scale=40)
    assert len(ranks) == 80 and set(ranks) == {1, 5}
    for kind in ("noisy", "gaussian"):
        matrix = aggregation_cases.client_terms((40, 60), ranks[-10:], kind, seed=0)
        assert isinstance(matrix, MatrixSum) and matrix.rank_bound == sum(ranks[-10:])
        M = matrix.to_dense(torch.float64)
        for way in (aggregation_cases.dense_way, aggregation_cases.stack_qr_way):
            U, S, Vh = (part.double() for part in way(matrix, 40))
            assert float((M - (U * S) @ Vh).norm() / M.norm()) < 1e-5
