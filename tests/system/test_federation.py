"""Three SuperNodes over TLS with node keys are the federation that the engine runs in one process.

Each has a resident trainer and a rank of its own, one of them an NF4 base. Two runs share the
SuperLink and the nodes at the same time: one with float32 on the wire, one with bfloat16.
"""

import re
import shutil
import ssl
from pathlib import Path

import psutil
import pytest

from deployment import Federation, Processes, once, write_clients
from federation import StopAt, Stopped, client_rows, global_delta, largest_gap, rounds, small
from flexlora.planning.shares import deal_quantizations
from flexlora.runs.folder import RunFolder
from flexlora.simulations.simulate import simulate

pytestmark = pytest.mark.slow

NAMES = ("north", "south", "west")
SHARES = "nf4:0.34"
BASES = deal_quantizations(NAMES, shares=SHARES, default="none", seed=0)
DTYPES = ("float32", "bfloat16")
PATIENCE = 900  # seconds for a run on a machine with other work


def run_of(dtype, **changes):
    """What a run says of itself; base and data are each node's own."""
    return small(
        method__name="carried",
        num_server_rounds=2,
        clients__count=0,
        ranks__tiers="2,4,8",
        train__max_steps=6,
        eval__max_examples=4,
        eval__every=0,
        wire__dtype=dtype,
        server__min_nodes=3,
        server__quorum=3,
        server__silence_seconds=float(PATIENCE),
        **changes,
    )


def in_one_process(folder, data, *, shares=SHARES, **options):
    """The same run in the engine: clients by the rows' names, bases dealt by the seed."""
    here = {"data__path": str(data / "all"), "clients__quantization": shares}
    simulate(run_of("float32", **here, engine__cohort_size=1), folder, **options)


def until_round_1(folder, data, **changes):
    with pytest.raises(Stopped):
        in_one_process(folder, data, observer=StopAt("round_finished", 1), **changes)


def federate(folder):
    """The runs over Flower and in the engine, and what can only be seen while they go."""
    data = write_clients(folder / "data", NAMES)
    with Processes(folder) as processes:
        federation = Federation(processes, "tls", isolation="process")
        trainers = {
            name: processes.trainer(name, data / name, "--quantization", BASES[name])
            for name in NAMES
        }
        federation.ready().register(*NAMES)
        for name in NAMES:
            federation.start(name, trainer_socket=trainers[name].ready().path)
        runs = {dtype: federation.run(dtype, run_of(dtype)) for dtype in DTYPES}
        runs["float32"].closed(1, PATIENCE, federation.logs)
        shutil.copytree(runs["float32"].folder / "checkpoint", folder / "after 1" / "checkpoint")
        certificate = ssl.get_server_certificate(
            ("127.0.0.1", federation.port), ca_certs=str(federation.ca)
        )
        addresses = listening(processes.marked())
        in_one_process(folder / "engine", data)
        until_round_1(folder / "engine 1", data)
        until_round_1(folder / "float base 1", data, shares="")
        for run in runs.values():
            run.finished(2, PATIENCE, federation.logs)
        federation.until_over(*runs.values())
        listed = federation.flwr("list")["runs"]
    return {
        "runs": {dtype: str(run.folder) for dtype, run in runs.items()},
        "statuses": [run["status"] for run in listed],
        "trainers": {name: trainer.log.read_text() for name, trainer in trainers.items()},
        "addresses": sorted(addresses),
        "certificate": certificate == (federation.folder / "server.pem").read_text(),
        "folder": str(folder),
    }


def listening(processes):
    """The addresses on which any of the processes accepts connections."""
    found = set()
    for process in processes:
        try:
            connections = process.net_connections(kind="inet")
        except psutil.Error:
            continue
        found |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return once(tmp_path_factory, "federation", federate)


def test_both_runs_complete_with_every_client_in_every_round(made):
    assert made["statuses"] == ["finished:completed"] * 2
    for folder in made["runs"].values():
        assert [row["round"] for row in rounds(folder)] == [0, 1, 2]
        rows = client_rows(folder)
        assert {(row["status"], row["cause"]) for row in rows} == {("ok", "")}
        for server_round in (1, 2):
            assert [row["client_id"] for row in client_rows(folder, server_round)] == [*NAMES]


def test_the_ranks_differ_and_one_base_is_nf4(made):
    assert sorted(BASES.values()) == ["nf4", "none", "none"]
    rows = client_rows(made["runs"]["float32"], 1)
    assert {row["client_id"]: row["quantization"] for row in rows} == BASES
    assert sorted(int(row["rank"]) for row in rows) == [2, 4, 8]
    assert [int(row["num_examples"]) for row in rows] == [12, 10, 8]


def after_1(folder):
    """The dense global change in a folder that stands at round 1."""
    state, _ = RunFolder(folder).load_checkpoint()
    assert state.round == 1
    return {name: state.change.delta_weight(name).double() for name in state.change}


def test_after_one_round_it_has_learned_what_the_engine_has(made):
    """Other processes, the same numbers."""
    folder = Path(made["folder"])
    flower = after_1(folder / "after 1")
    assert largest_gap(flower, after_1(folder / "engine 1")) < 1e-5
    assert largest_gap(flower, after_1(folder / "float base 1")) > 1e-4, "one client's base differs"


def test_after_two_rounds_it_has_learned_what_the_engine_has(made):
    flower, engine = Path(made["runs"]["float32"]), Path(made["folder"]) / "engine"
    assert largest_gap(global_delta(flower), global_delta(engine)) < 1e-3
    for theirs, ours in zip(rounds(flower), rounds(engine), strict=True):
        for key in ("clients_ok", "bytes_up", "bytes_down"):
            assert theirs.get(key) == ours.get(key)
        if "eval_loss" in ours:
            assert theirs["eval_loss"] == pytest.approx(ours["eval_loss"], rel=1e-4)


def test_bfloat16_on_the_wire_halves_the_bytes_and_keeps_the_loss(made):
    base, *_, full = rounds(made["runs"]["float32"])
    half = rounds(made["runs"]["bfloat16"])[-1]
    assert full["eval_loss"] < base["eval_loss"] - 0.1
    assert half["eval_loss"] == pytest.approx(full["eval_loss"], rel=0.01)
    assert half["eval_loss"] != full["eval_loss"]
    assert half["bytes_up"] * 2 == full["bytes_up"]


def test_a_trainer_loads_its_base_once_for_all_runs(made):
    assert len(made["trainers"]) == 3
    for log in made["trainers"].values():
        assert log.count("loading embedded") == 1
        assert len(re.findall(r"train, run \d+, round [12]: rank_", log)) == 2 * 2


def test_everything_listens_on_loopback_and_speaks_tls(made):
    assert made["addresses"] == ["127.0.0.1"] and made["certificate"]
