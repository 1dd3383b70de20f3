"""A secure sum over real nodes: TLS, node keys, resident trainers; one node killed between phases.

Four nodes, of which one has no trainer: its ClientApp is a new process for every message and has
its secrets in Flower's run state. In round 2 a trainer is killed for good once its client has
shared its secrets and trains, so that the others' shares have to take its masks away.
"""

import re

import pytest

from deployment import Federation, Processes, once, until, write_clients
from federation import client_rows, global_delta, relative_gap, rounds, small
from flexlora.simulations.simulate import simulate

pytestmark = [pytest.mark.slow, pytest.mark.nightly]

NAMES = ("north", "south", "west", "app")
SERVED = NAMES[:3]
PATIENCE = 900  # seconds for a run on a machine with other work
GROUP = 3


def run_of(**changes):
    return small(
        method__name="basis",
        method__server_learning_rate=1.0,
        num_server_rounds=2,
        clients__count=0,
        ranks__policy="fixed",
        ranks__fixed=4,
        train__max_steps=60,
        train__learning_rate=0.02,
        eval__max_examples=2,
        eval__every=0,
        server__late_rounds=0,
        server__max_norm_ratio=0.0,
        server__round_timeout_seconds=240.0,
        server__wait_seconds=120.0,
        server__resends=0,
        **changes,
    )


SECURE = {"privacy__mode": "secure", "privacy__clip": 60.0, "privacy__min_group": GROUP}


def federate(folder):
    data = write_clients(folder / "data", SERVED)
    write_clients(data, ("app",), rows=(9,))
    with Processes(folder) as processes:
        federation = Federation(processes, "secure", isolation="process")
        trainers = {name: processes.trainer(name, data / name) for name in SERVED}
        federation.ready().register(*NAMES)
        for name in SERVED:
            federation.start(name, trainer_socket=trainers[name].ready().path)
        federation.start("app", data_path=data / "app")
        run = federation.run("run", run_of(server__min_nodes=4, **SECURE))
        run.closed(1, PATIENCE, federation.logs)
        kill_in_training(trainers["west"], federation, run)
        simulate(run_of(data__path=str(data / "all"), engine__cohort_size=1), folder / "plain")
        run.finished(2, PATIENCE, federation.logs)
        federation.until_over(run)
    logs = {name: trainer.log.read_text() for name, trainer in trainers.items()}
    return {"run": str(run.folder), "plain": str(folder / "plain"), "logs": logs}


def kill_in_training(trainer, federation, run):
    """SIGKILL between the shares and the masked update of round 2."""
    until(lambda: trainer.doing(f"train, run {run.id}, round 2"), PATIENCE, federation.logs)
    trainer.process.kill()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return once(tmp_path_factory, "secure_federation", federate)


def test_both_rounds_have_a_sum_and_the_killed_node_is_missing_from_the_second(made):
    base, first, second = rounds(made["run"])
    assert base["round"] == 0
    assert (first["summed_clients"], second["summed_clients"]) == (4, 3)
    assert "skipped" not in first and "skipped" not in second
    statuses = {row["client_id"]: row["status"] for row in client_rows(made["run"], 2)}
    assert statuses.pop("west") == "failed" and set(statuses.values()) == {"ok"}


def test_it_has_learned_and_no_row_has_a_loss(made):
    assert rounds(made["run"])[-1]["eval_loss"] < rounds(made["run"])[0]["eval_loss"]
    for row in client_rows(made["run"]):
        assert row["loss_before"] == row["loss_after"] == ""
    assert all(row["loss_after"] for row in client_rows(made["plain"]))


def test_its_first_round_is_that_of_the_plain_run_and_its_second_differs(made):
    """The killed node's rows are in the plain run's second round alone."""
    first, plain = rounds(made["run"])[1], rounds(made["plain"])[1]
    assert first["train_loss"] == pytest.approx(plain["train_loss"], rel=0.01)
    assert 0.0 < relative_gap(global_delta(made["run"]), global_delta(made["plain"])) < 1.0


def test_every_phase_reached_every_trainer(made):
    for name in SERVED:
        log = made["logs"][name]
        for phase in ("keys", "shares"):
            assert len(re.findall(rf"secure sum, {phase}, run \d+, round [12]: answered", log)) == 2
        unmasked = len(re.findall(r"secure sum, unmask, run \d+, round [12]: answered", log))
        assert unmasked == (1 if name == "west" else 2)
        assert re.search(r"train, run \d+, round 1: rank_4, \d+ examples, masked", log)
