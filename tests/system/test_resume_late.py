"""A simulation that breaks off with updates on their way goes on to the run that did not."""

from __future__ import annotations

import json

import pytest

from faulty_grid import SILENT, FaultyGrid, people, settings
from faulty_grid import run as faulty_run
from federation import StopAt, Stopped, adapter_bytes, client_rows, rounds, small, untimed
from flexlora.config.resolve import Config
from flexlora.runs.folder import RunFolder
from flexlora.simulations.simulate import resume, simulate
from spelled import of_names

SLOW = small(
    clients__count=8,
    num_server_rounds=4,
    method__name="residual",
    train__max_steps=1,
    lora__target_modules="q_proj",
    lora__dropout=0.1,
    eval__every=0,
    engine__cohort_size=4,
    population__straggler_share=0.4,
    population__straggler_slowdown=2.0,
    server__round_timeout_seconds=90.0,
    server__keep_checkpoints=1,
)
VARIANTS = {
    "a round late": {},
    "one by one": {"engine__cohort_size": 1},
    "two rounds late": {"population__straggler_slowdown": 3.5, "server__late_rounds": 2},
    "utility": {"sampling__policy": "utility", "fraction_train": 0.5},
    "carried": {"method__name": "aligned"},
    "leaving": {"population__dropout": 0.3},
    "over-selection": {"fraction_train": 0.25, "server__over_selection": 1.0},
}


def stopped(config, folder, event="round_started", server_round=3):
    with pytest.raises(Stopped):
        simulate(config, folder, observer=StopAt(event, server_round, Stopped))
    return folder


def late_rows(folder):
    return [row for row in client_rows(folder) if row["cause"].startswith("late: ")]


def assert_same_run(folder, whole):
    assert untimed(client_rows(folder)) == untimed(client_rows(whole))
    assert untimed(rounds(folder)) == untimed(rounds(whole))
    assert adapter_bytes(folder) == adapter_bytes(whole)


@pytest.mark.parametrize("variant", VARIANTS)
def test_late_updates_come_after_a_resume_as_they_would_have(variant, tmp_path):
    config = SLOW.with_values(of_names(**VARIANTS[variant]))
    simulate(config, tmp_path / "whole")
    assert late_rows(tmp_path / "whole") or variant == "over-selection"
    folder = stopped(config, tmp_path / "run", "replied")
    resume(folder)
    assert_same_run(folder, tmp_path / "whole")


def test_a_run_that_breaks_off_twice_goes_on_too(tmp_path):
    simulate(SLOW, tmp_path / "whole")
    folder = stopped(SLOW, tmp_path / "run", "replied", 2)
    with pytest.raises(Stopped):
        resume(folder, observer=StopAt("replied", 4, Stopped))
    resume(folder)
    assert_same_run(folder, tmp_path / "whole")


def test_without_the_notes_the_late_updates_are_lost(tmp_path):
    """The control: what was on its way is what makes the difference."""
    simulate(SLOW, tmp_path / "whole")
    folder = stopped(SLOW, tmp_path / "run")
    index = folder / "checkpoint" / "current.json"
    observed = json.loads(index.read_text())
    assert list(observed["notes"]["under_way"]) == ["2"]
    observed["notes"]["under_way"] = {}
    index.write_text(json.dumps(observed))
    resume(folder)
    assert len(late_rows(folder)) < len(late_rows(tmp_path / "whole"))
    assert adapter_bytes(folder) != adapter_bytes(tmp_path / "whole")


def sent_rounds(folder):
    return sorted(path.name for path in (folder / "checkpoint").glob("sent-*"))


def test_only_rounds_that_are_waited_for_lie_beside_the_checkpoint(tmp_path):
    waited = SLOW.with_values({"population.straggler-slowdown": 3.5, "server.late-rounds": 2})
    assert sent_rounds(stopped(waited, tmp_path / "two", server_round=4)) == [
        "sent-000002",
        "sent-000003",
    ]
    assert sent_rounds(stopped(SLOW, tmp_path / "one", server_round=4)) == ["sent-000003"]
    dropped = SLOW.with_values({"server.late-rounds": 0})
    assert sent_rounds(stopped(dropped, tmp_path / "none", server_round=4)) == []


KEEPING = {
    "personal factors": {"personal__rank": 2, "personal__max_steps": 1, "eval__every": 1},
    "error feedback": {"wire__dtype": "int8"},
    "both, two rounds late": {
        "wire__dtype": "int8",
        "personal__rank": 2,
        "personal__max_steps": 1,
        "population__straggler_slowdown": 3.5,
        "server__late_rounds": 2,
    },
    "busy": {  # asked again while still training: late replies of two rounds on their way
        "wire__dtype": "int8",
        "personal__rank": 2,
        "personal__max_steps": 1,
        "population__straggler_slowdown": 5.0,
        "server__late_rounds": 3,
        "num_server_rounds": 5,
    },
}


def stored(folder):
    """The bytes of everything that the clients keep to themselves."""
    files = (path for path in (folder / "personal").rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("keeping", KEEPING)
def test_nor_is_anything_lost_where_clients_keep_something(keeping, tmp_path):
    """Personal factors and rounding errors are those of the round that is sent again."""
    config = SLOW.with_values(of_names(**KEEPING[keeping]))
    simulate(config, tmp_path / "whole")
    late = [int(row["round"]) for row in late_rows(tmp_path / "whole")]
    assert max(late) >= 3
    event = "round_finished" if keeping == "error feedback" else "replied"
    folder = stopped(config, tmp_path / "run", event, 2 if event == "round_finished" else 3)
    assert sent_rounds(folder)
    resume(folder)
    assert_same_run(folder, tmp_path / "whole")
    assert stored(folder) == stored(tmp_path / "whole") != {}


def test_a_store_of_two_rounds_would_forget_what_a_late_client_had(tmp_path, monkeypatch):
    """The control: one round too few in the stores, and the resumed run is another one."""
    config = SLOW.with_values(of_names(**KEEPING["both, two rounds late"]))
    simulate(config, tmp_path / "whole")
    monkeypatch.setattr("flexlora.simulations.simulate.rounds_kept", lambda *rounds: 1)
    folder = stopped(config, tmp_path / "run", "replied", 4)
    resume(folder)
    assert adapter_bytes(folder) != adapter_bytes(tmp_path / "whole")


def test_a_deployment_writes_nothing_of_what_is_on_its_way(tmp_path):
    grid = FaultyGrid(people(3), {(1, "client_1"): [SILENT]})
    folder = RunFolder.create(tmp_path / "run", Config())
    faulty_run(grid, settings(server__resends=0), run=folder)
    notes = folder.load_notes()
    assert notes["under_way"] == {} and "simulated_now" not in notes
    assert sent_rounds(folder.path) == []
