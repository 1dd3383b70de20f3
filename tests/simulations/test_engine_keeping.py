"""What the engine keeps of trainings that nobody asks for: own factors by client, nothing else."""

import math

import pytest

from federation import StopAt, Stopped, adapter_bytes, client_rows, rounds, small, untimed
from flexlora.errors import RunFailed
from flexlora.server.observing.observer import Observer
from flexlora.simulations import simulate as simulation
from flexlora.simulations.engine.pool import LocalPool
from flexlora.simulations.simulate import resume, simulate
from flexlora.simulations.world.simulated_time import NOMINAL_SECONDS
from flexlora.training.personal_store import PersonalStore
from flexlora.wire.packing import DATA

# Eight are asked and four are enough; more than four are quick, and the rest is late.
RACE = small(
    clients__count=8,
    fraction_train=0.5,
    server__over_selection=1.0,
    personal__rank=2,
    personal__max_steps=2,
    population__straggler_share=0.4,
    eval__fraction=1.0,
    train__adam_epsilon=1e-3,  # a gradient at rounding level moves nothing by a whole step
)


def kept(folder, server_round, now=math.inf):
    """Own factors after ``server_round``, by client, of those who have them by ``now``."""
    store = PersonalStore(folder / "personal")
    names = [row["client_id"] for row in client_rows(folder, server_round)]
    found = {name: store.before(name, server_round + 1, now=now) for name in names}
    return {n: k.adapter for n, k in found.items() if k and k.server_round == server_round}


def same(first, second, tolerance):
    """Whether two adapters are the same change, module by module."""
    return first.keys() == second.keys() and all(
        float((first[name].delta_weight() - second[name].delta_weight()).abs().max()) <= tolerance
        for name in first
    )


@pytest.mark.parametrize("size", [1, 4, 16])
def test_all_that_had_ended_when_the_round_closed_keep_what_they_trained(size, tmp_path):
    """An oracle by time: who was slow, and not who shared its pass or whose answer was taken."""
    simulate(RACE.with_values({"engine.cohort-size": size}), tmp_path / "run")
    rows, metrics = client_rows(tmp_path / "run", 1), rounds(tmp_path / "run")[1]
    quick = {r["client_id"] for r in rows if float(r["simulated_seconds"]) <= NOMINAL_SECONDS}
    counted = {row["client_id"] for row in rows if row["status"] == "ok"}
    assert counted < quick < {row["client_id"] for row in rows}
    assert set(kept(tmp_path / "run", 1, metrics["simulated_seconds"])) == quick
    assert len(kept(tmp_path / "run", 1)) == len(rows), "the others when they have ended"
    assert metrics["personal_clients"] == len(quick)


def test_the_factors_do_not_depend_on_the_cohorts(tmp_path):
    """Two rounds, of which the second begins while the slow ones are busy with the first."""
    config = RACE.with_values({"num-server-rounds": 2})
    runs = []
    for size in (1, 16):
        simulate(config.with_values({"engine.cohort-size": size}), tmp_path / str(size))
        runs.append([kept(tmp_path / str(size), at) for at in (1, 2)])
    for alone, together in zip(*runs, strict=True):
        assert alone.keys() == together.keys() and alone
        assert all(same(alone[name], together[name], 1e-5) for name in alone)
    first = runs[0][0]
    assert len(first) == 8, "the slow ones of round 1 went on from what they trained in it"


@pytest.mark.parametrize("size", [1, 4])
def test_who_is_late_goes_on_from_what_it_trained(size, tmp_path, monkeypatch):
    attached, train = [], LocalPool.train

    def spy(pool, jobs):
        attached.extend(jobs)
        return train(pool, jobs)

    monkeypatch.setattr(LocalPool, "train", spy)
    config = RACE.with_values(
        {
            "num-server-rounds": 2,
            "fraction-train": 1.0,
            "server.over-selection": 0.0,
            "server.round-timeout-seconds": 1.5 * NOMINAL_SECONDS,
            "engine.cohort-size": size,
            "eval.every": 9,
        }
    )
    simulate(config, tmp_path / "run")
    late = {r["client_id"] for r in client_rows(tmp_path / "run", 1) if r["status"] == "failed"}
    assert 0 < len(late) < 8
    own = {job.client_id: job.personal for job in attached if job.server_round == 2}
    first = kept(tmp_path / "run", 1)
    assert len(own) == 8 and all(same(own[name], first[name], 0.0) for name in own)


def test_who_leaves_in_the_middle_keeps_nothing(tmp_path):
    with pytest.raises(RunFailed, match="the client left after"):
        simulate(RACE.with_values({"population.dropout": 1.0}), tmp_path / "run")
    assert not (tmp_path / "run" / "personal").exists()


@pytest.mark.parametrize(
    ("event", "at"), [("round_started", 2), ("replied", 2), ("round_started", 3)]
)
@pytest.mark.parametrize("slow", [0.0, 0.4])
def test_a_resumed_run_finds_what_nobody_asked_for(slow, event, at, whole, tmp_path):
    """Round 1 is not evaluated: what its clients kept must be there when it closes."""
    with pytest.raises(Stopped):
        simulate(resumed(slow), tmp_path / "run", observer=StopAt(event, at))
    resume(tmp_path / "run")
    expected = whole(slow)
    for read in (rounds, client_rows):
        assert untimed(read(tmp_path / "run")) == untimed(read(expected))
    files = [
        {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}
        for folder in (tmp_path / "run" / "personal", expected / "personal")
    ]
    assert files[0] == files[1] and files[0]


def resumed(slow):
    """With slow clients on a simulated clock, without any on none."""
    config = RACE.with_values({"num-server-rounds": 3, "eval.every": 2, "engine.cohort-size": 1})
    return config.with_values({"population.straggler-share": slow})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same runs without a break."""
    made = {}

    def run(slow):
        if slow not in made:
            made[slow] = tmp_path_factory.mktemp("whole") / "run"
            simulate(resumed(slow), made[slow])
        return made[slow]

    return run


@pytest.mark.slow
def test_two_workers_keep_the_bytes_that_one_keeps(tmp_path):
    config = RACE.with_values({"num-server-rounds": 2, "engine.cohort-size": 4})
    files = []
    for workers in (1, 2):
        simulate(config.with_values({"engine.workers": workers}), tmp_path / str(workers))
        root = tmp_path / str(workers) / "personal"
        found = sorted(root.rglob("*.safetensors"))
        files.append({str(path.relative_to(root)): path.read_bytes() for path in found})
    assert files[0] == files[1] and files[0]
    one, two = tmp_path / "1", tmp_path / "2"
    assert adapter_bytes(one) == adapter_bytes(two)
    for read in (rounds, client_rows):
        assert untimed(read(one)) == untimed(read(two))


class Held(Observer):
    """An observer that counts what the engine and its world hold after every round."""

    def __init__(self, grids):
        self.grids, self.messages, self.payloads, self.trips = grids, [], [], []

    def round_finished(self, metrics):
        held = self.grids[-1]._unanswered.values()
        self.messages.append(len(held))
        records = [h.message.content["job"] for h in held if DATA in h.message.content["job"]]
        self.payloads.append(len({id(record) for record in records}))
        self.trips.append(len(self.grids[-1].clock._trips))


@pytest.mark.parametrize("personal_rank", [0, 2])
@pytest.mark.parametrize("late_rounds", [0, 1, 2])
def test_what_is_held_does_not_grow_with_the_rounds(
    personal_rank, late_rounds, tmp_path, monkeypatch
):
    """Half of the clients drop out and more are asked than needed: many answers are never taken."""
    grids, make = [], simulation.make_grid
    monkeypatch.setattr(
        simulation, "make_grid", lambda *args: grids.append(make(*args)) or grids[-1]
    )
    seen = Held(grids)
    config = small(
        clients__count=8,
        num_server_rounds=8,
        fraction_train=0.5,
        server__over_selection=1.0,
        server__late_rounds=late_rounds,
        population__dropout=0.4,
        personal__rank=personal_rank,
        personal__max_steps=1,
        train__max_steps=1,
        eval__every=9,
    )
    simulate(config, tmp_path / "run", observer=seen)
    asked, alive = 8, late_rounds + 1
    assert max(seen.messages) <= asked * alive and max(seen.trips) <= asked * alive
    assert max(seen.payloads) <= 2 * alive, "one payload for each of two rank classes and round"
    assert max(seen.messages) > 0, "all answers were taken, so nothing was tried"
