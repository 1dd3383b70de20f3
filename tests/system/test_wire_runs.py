"""Whole runs over the int8 wire: bytes as sent, resume, cohorts, who is refused, what is kept."""

import pytest
import torch

from federation import (
    StopAt,
    Stopped,
    TamperingGrid,
    adapter_bytes,
    client_rows,
    federation,
    global_delta,
    relative_gap,
    rounds,
    small,
    state_delta,
    untimed,
)
from flexlora.clients.worker import worker_for
from flexlora.commands.cli import main
from flexlora.errors import UserError
from flexlora.server.settings import check_config
from flexlora.simulations.engine.cohorts import CohortLimits
from flexlora.simulations.engine.grid import InProcessGrid
from flexlora.simulations.simulate import resume, simulate
from flexlora.simulations.world.simulated_time import World

INT8 = small(wire__dtype="int8", method__name="residual", num_server_rounds=3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody stops."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    simulate(INT8, folder)
    return folder


def kept_files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in (folder / "personal").rglob("*.safetensors")
    }


def test_bytes_are_reported_as_sent_with_the_scales(whole):
    """Of every module, up and down: a byte a number and four a direction, in both factors."""
    shapes = worker_for(INT8).shapes.values()
    assert len(client_rows(whole)) == 12
    for row in client_rows(whole):
        rank = int(row["rank"])
        expected = sum(rank * (out + fan_in) + 2 * 4 * rank for out, fan_in in shapes)
        assert int(row["bytes_up"]) == int(row["bytes_down"]) == expected
        assert row["cause"] == ""
    for at in (1, 2, 3):
        sent = sum(int(row["bytes_up"]) for row in client_rows(whole, at))
        assert rounds(whole)[at]["bytes_up"] == rounds(whole)[at]["bytes_down"] == sent


def test_a_client_keeps_the_rounding_of_its_last_three_rounds_in_the_run_folder(whole):
    """``server.late-rounds`` + 2: of those that a resumed run may send again."""
    names = sorted(kept_files(whole))
    assert len(names) == 12 and all(name.startswith("personal/feedback/") for name in names)
    assert {name.rpartition("round-")[2] for name in names} == {
        "000001.safetensors",
        "000002.safetensors",
        "000003.safetensors",
    }


@pytest.mark.parametrize(("event", "server_round"), [("replied", 2), ("round_finished", 3)])
def test_a_resumed_run_is_the_unbroken_one_to_the_byte(whole, event, server_round, tmp_path):
    """Its clients have already kept what the round that is repeated rounded away."""
    with pytest.raises(Stopped):
        simulate(INT8, tmp_path / "run", observer=StopAt(event, server_round))
    kept = list((tmp_path / "run" / "personal").rglob(f"round-{server_round:06d}.safetensors"))
    assert kept, "nothing was kept in the round that is repeated, so nothing is tried"
    resume(tmp_path / "run")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(whole)
    assert kept_files(tmp_path / "run") == kept_files(whole)
    assert untimed(rounds(tmp_path / "run")) == untimed(rounds(whole))


def test_the_rounding_that_was_kept_is_what_makes_the_difference(whole, tmp_path):
    """The control of the test above: without its files a resumed run goes elsewhere."""
    with pytest.raises(Stopped):
        simulate(INT8, tmp_path / "run", observer=StopAt("round_started", 3))
    for path in (tmp_path / "run" / "personal").rglob("*.safetensors"):
        path.unlink()
    resume(tmp_path / "run")
    assert adapter_bytes(tmp_path / "run") != adapter_bytes(whole)


def test_a_run_over_another_one_takes_nothing_of_its_rounding(whole, tmp_path):
    simulate(INT8.with_values({"seed": 5}), tmp_path / "run")
    simulate(INT8, tmp_path / "run", overwrite=True)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(whole)
    assert kept_files(tmp_path / "run") == kept_files(whole)


@pytest.mark.parametrize("method", ["aligned", "rolora"])
def test_int8_ends_near_float32_at_a_quarter_of_the_bytes(method, tmp_path):
    """AdamW makes whole steps of small differences, so near is not within the rounding itself."""
    exact = INT8.with_values(
        {"method.name": method, "wire.dtype": "float32", "num-server-rounds": 2}
    )
    simulate(exact, tmp_path / "float32")
    simulate(exact.with_values({"wire.dtype": "int8"}), tmp_path / "int8")
    gap = relative_gap(global_delta(tmp_path / "int8"), global_delta(tmp_path / "float32"))
    assert 0 < gap < 0.2
    for less, more in zip(rounds(tmp_path / "int8"), rounds(tmp_path / "float32"), strict=True):
        for key in ("bytes_up", "bytes_down"):
            assert less["round"] == 0 or 3.7 < more[key] / less[key] < 4.0


def test_cohorts_of_one_and_of_two_send_as_many_bytes_and_learn_the_same(tmp_path):
    """Between plans a last bit may differ, and with it a code: a step of some numbers in many."""
    config, runs = INT8.with_values({"num-server-rounds": 2}), {}
    for clients in (1, 2):
        grid = InProcessGrid(
            worker_for(config), limits=CohortLimits(clients=clients), wire_dtype="int8"
        )
        strategy, run = federation(grid, config, tmp_path / str(clients))
        sent = [row["bytes_up"] for row in client_rows(run.path)]
        runs[clients] = state_delta(strategy.state), sent
    assert runs[1][1] == runs[2][1]
    assert relative_gap(runs[1][0], runs[2][0]) < 0.05


@pytest.mark.parametrize("method", ["residual", "carried", "aligned"])
def test_zero_training_changes_nothing_over_int8(method, tmp_path):
    """From a state that was learned: what is subtracted is what was decoded, to the bit."""
    worker = worker_for(small())
    learned, _ = federation(TamperingGrid(worker), small(), tmp_path / "learned")
    idle = small(
        method__name=method, wire__dtype="int8", train__learning_rate=0.0, num_server_rounds=3
    )
    grid = TamperingGrid(worker_for(idle), wire_dtype="int8")
    _, run = federation(grid, small(num_server_rounds=1), tmp_path / "made")
    run.save_checkpoint(run.checkpoint, learned.state, {})
    strategy, _ = federation(grid, idle, run.path, resume=True)
    before, after = state_delta(learned.state), state_delta(strategy.state)
    assert strategy.state.round == 3
    assert relative_gap(after, before) < 1e-6
    rows = [row for row in client_rows(run.path) if int(row["round"]) > 1]
    assert len(rows) == 8 and all(row["status"] == "ok" for row in rows)


def test_a_diverged_client_is_refused_with_its_cause(tmp_path):
    """NaN has no code: the row's scale says so, and the server takes nothing of it."""
    worker = worker_for(INT8)
    grid = InProcessGrid(worker, limits=CohortLimits(clients=1), wire_dtype="int8")
    honest = grid.pool.train

    class Broken:
        def __init__(self, pending, jobs):
            self.pending, self.jobs = pending, jobs

        def result(self):
            results = self.pending.result()
            for result in results:
                if result.client_id == "client_01" and result.adapter is not None:
                    next(iter(result.adapter.values())).lora_B[0, 0] = torch.nan
            return results

    grid.pool.train = lambda jobs: Broken(honest(jobs), jobs)
    _, run = federation(grid, INT8.with_values({"num-server-rounds": 2}), tmp_path / "run")
    rows = [row for row in client_rows(run.path) if row["client_id"] == "client_01"]
    assert len(rows) == 2
    for row in rows:
        assert row["status"] == "failed" and "has a scale of nan" in row["cause"]
    assert all(row["clients_ok"] == 3 for row in rounds(run.path)[1:])


@pytest.mark.parametrize("method", ["fedit", "hetlora", "rbla", "fed-plora", "slora", "raflora"])
def test_a_method_that_loses_by_int8_is_refused_before_anything_starts(method, tmp_path, capsys):
    config = small(method__name=method, wire__dtype="int8")
    with pytest.raises(UserError, match=f"wire.dtype is int8, which method.name={method} cannot"):
        check_config(config)
    sets = ["--set", f"method.name={method}", "--set", "wire.dtype=int8"]
    status = main(["simulate", *sets, "--out", str(tmp_path / "run")])
    printed = capsys.readouterr().err
    assert status == 2 and "use wire.dtype=bfloat16" in printed and "Traceback" not in printed
    assert not (tmp_path / "run").exists()


def test_the_clock_counts_the_bytes_that_travel(monkeypatch, tmp_path):
    """Before a client has trained: what its upload will be, the scales among it."""
    efforts, honest = {}, World.send

    def send(self, message_id, effort):
        efforts[effort.client_id] = effort
        return honest(self, message_id, effort)

    monkeypatch.setattr(World, "send", send)
    simulate(
        INT8.with_values({"num-server-rounds": 1, "population.straggler-share": 0.5}),
        tmp_path / "run",
    )
    rows = client_rows(tmp_path / "run")
    assert len(rows) == len(efforts) == 4
    for row in rows:
        effort = efforts[row["client_id"]]
        assert (effort.bytes_down, effort.bytes_up) == (
            int(row["bytes_down"]),
            int(row["bytes_up"]),
        )
