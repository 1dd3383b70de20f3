"""The owner's limits: what a request may ask of a node, whatever the run's configuration says."""

from __future__ import annotations

import json
import re

import pytest

from federation import adapter_bytes, federation
from flexlora.clients.trainer import memory_limit
from flexlora.clients.trainer.limits import OwnerLimits, keys, limits_text
from flexlora.clients.trainer.owner_config import OwnerConfig, is_owner_key
from flexlora.clients.worker import Worker
from flexlora.commands.cli import main
from flexlora.config.resolve import KEYS
from trainers import (
    NodesGrid,
    allowed_by,
    cause_of,
    evaluate_message,
    query_message,
    resident,
    run_config,
    train_message,
    write_rows,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "data")


# The file


def test_the_file_that_init_writes_says_every_limit_at_its_default(tmp_path):
    path = tmp_path / "limits.toml"
    path.write_text(limits_text())
    assert OwnerLimits.read(path) == OwnerLimits()
    path.write_text(re.sub("^# ([a-z-]+ = )", r"\1", limits_text(), flags=re.MULTILINE))
    assert OwnerLimits.read(path) == OwnerLimits()
    for key in keys():
        assert re.search(rf"^{key.rpartition('.')[2]} = .* # \w", path.read_text(), re.MULTILINE)
    path.write_text(limits_text(memory="6GiB"))
    assert OwnerLimits.read(path).request.memory == "6GiB"
    assert max(map(len, limits_text().splitlines())) < 120


def test_a_limit_of_a_key_of_the_run_has_that_keys_name():
    for section in ("train", "eval", "personal"):
        ours = [key for key in keys() if key.startswith(f"{section}.")]
        assert ours and all(key in KEYS and not is_owner_key(key) for key in ours)


MISTYPED = {
    "an unknown key": (
        "[train]\nmax-stepz = 3",
        "unknown key 'train.max-stepz'.*'train.max-steps'",
    ),
    "an unknown section": ("[days]\nrows = 3", "unknown key 'days.rows'.*'day.rows'"),
    "a text": ("[train]\nmax-steps = 'many'", "train.max-steps is 'many', expected a whole number"),
    "below": ("[train]\nmax-steps = 0", "train.max-steps is 0, expected at least 1"),
    "no number": ("[day]\nseconds = inf", "day.seconds is inf, expected a finite number"),
    "a share": ("[data]\nshare = 2.0", "data.share is 2.0, expected at most 1"),
    "bytes": ("[request]\nmemory = '6'", "request.memory is '6', expected a number and a unit"),
    "more bytes": (
        "[files]\nmax-bytes = '1'",
        "files.max-bytes is '1', expected a number and a unit",
    ),
    "hours": ("[request]\nhours = '22-6'", "request.hours is '22-6', expected spans of local time"),
    "not TOML": ("[request", "cannot be read"),
}


@pytest.mark.parametrize("what", MISTYPED)
def test_a_mistyped_file_is_refused_before_the_base_is_loaded(what, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, words = MISTYPED[what]
    (tmp_path / "limits.toml").write_text(text)
    serve = ["client", "serve", "--model", "nowhere", "--data", ".", "--socket", "s", "--limits"]
    assert main([*serve, "limits.toml"]) == 2
    printed = capsys.readouterr().err
    assert re.search(f"'limits.toml'.*{words}", printed) and len(printed.splitlines()) == 1, printed


def test_memory_is_said_once(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "limits.toml").write_text("request.memory = '6GiB'")
    serve = ["client", "serve", "--model", "embedded", "--data", ".", "--socket", "s"]
    assert main([*serve, "--limits", "limits.toml", "--memory-limit", "5GiB"]) == 2
    assert "--memory-limit is 5GiB and request.memory" in capsys.readouterr().err


# What is refused

TRAINING = {
    "train.max-steps": (3, {"train__max_steps": 4}, "train.max-steps is 4, and"),
    "epochs": (
        {"train.max-steps": 3},
        {"train__max_steps": 0, "train__num_train_epochs": 5},
        r"train.max-steps is 30 .train.num-train-epochs=5., and",
    ),
    "train.per-device-train-batch-size": (
        2,
        {"train__per_device_train_batch_size": 3},
        "train.per-device-train-batch-size is 3, and",
    ),
    "train.gradient-accumulation-steps": (
        1,
        {"train__gradient_accumulation_steps": 2},
        "train.gradient-accumulation-steps is 2, and",
    ),
    "train.max-length": (31, {"train__max_length": 32}, "train.max-length is 32, and"),
    "personal.rank": (1, {"personal__rank": 2}, "personal.rank is 2, and"),
    "personal.max-steps": (
        1,
        {"personal__rank": 2, "personal__max_steps": 2},
        "personal.max-steps is 2, and",
    ),
}
EVALUATION = {
    "eval.max-examples": (1, {"eval__max_examples": 0}, r"eval.max-examples is \d+, and"),
    "eval.max-new-tokens": (3, {}, "eval.max-new-tokens is 4, and"),
    "eval.batch-size": (7, {"eval__batch_size": 8}, "eval.batch-size is 8, and"),
}


def named(what, allowed):
    return allowed if isinstance(allowed, dict) else {what: allowed}


@pytest.fixture(scope="module")
def trainers(data, tmp_path_factory):
    """A trainer that has these limits; the base is loaded once."""
    with resident(data, tmp_path_factory.mktemp("kept")) as made:

        def limited(allowed):
            made.trainer.limits = made.trainer.rules.limits = allowed_by(**allowed)
            return made

        yield limited


@pytest.mark.parametrize("what", [*TRAINING, *EVALUATION])
def test_a_request_beyond_a_limit_is_refused_by_name_before_a_byte_comes(
    what, trainers, monkeypatch
):
    allowed, asks, words = {**TRAINING, **EVALUATION}[what]
    made, config = trainers(named(what, allowed)), run_config(**asks)
    for name in ("_parts", "lock"):
        monkeypatch.setattr(made.service, name, None)  # nothing is received, nobody waits
    before = dict(vars(made.trainer.totals)), made.trainer.rules.quotas()
    message = train_message(config) if what in TRAINING else evaluate_message(config)
    cause = cause_of(made.ask(message, config))
    (limit,) = named(what, allowed).values()
    assert re.match(words + f" this node's owner allows {limit} at most.$", cause), cause
    assert (dict(vars(made.trainer.totals)), made.trainer.rules.quotas()) == before


@pytest.mark.parametrize("what", [*TRAINING, *EVALUATION])
def test_at_its_limit_a_request_passes(what, trainers):
    """The refusals above are of what is beyond, and not of everything."""
    allowed, asks, _ = {**TRAINING, **EVALUATION}[what]
    more = {key: value + 30 for key, value in named(what, allowed).items()}
    made, config = trainers(more), run_config(**asks, seed=1)
    message = train_message(config) if what in TRAINING else evaluate_message(config)
    assert cause_of(made.ask(message, config)) == ""


def test_a_node_that_could_not_train_says_so_when_it_is_met(trainers):
    made, config = trainers({"train.max-steps": 3}), run_config(train__max_steps=4)
    assert "train.max-steps is 4" in cause_of(made.ask(query_message(), config))
    made = trainers({"eval.max-new-tokens": 1})  # it can train
    assert cause_of(made.ask(query_message(), config)) == ""
    assert cause_of(made.ask(train_message(config), config)) == ""


JOBS = {
    "request.rank": (3, lambda config: train_message(config, rank=4), "rank is 4"),
    "request.carried-rank": (3, lambda config: evaluate_message(config, ranks=(4,)), "rank is 4"),
    "request.adapters": (1, evaluate_message, "adapters is 2"),
    "request.gradient-batches": (
        2,
        lambda config: train_message(config, local=json.dumps({"gradient_batches": 3})),
        "batches is 3",
    ),
}


@pytest.mark.parametrize("what", JOBS)
def test_the_factors_that_come_are_measured_whatever_they_are_called(what, trainers, monkeypatch):
    allowed, message_of, words = JOBS[what]
    config, made = run_config(), trainers({what: allowed})
    for name in ("train", "evaluate"):
        monkeypatch.setattr(Worker, name, pytest.fail)
    cause = cause_of(made.ask(message_of(config), config))
    assert cause.startswith("request.") and f"{words}, and this node's owner allows" in cause


def test_a_class_that_is_called_smaller_than_its_factors(trainers):
    config, made = run_config(), trainers({"request.rank": 3})
    message = train_message(config, rank=4)
    honest = message.content["job"]["rank-class"]
    message.content["job"]["rank-class"] = honest.replace("4", "2")
    assert "request.rank is 4" in cause_of(made.ask(message, config))


def test_a_refusal_is_the_nodes_row_and_the_round_is_that_of_the_others(data, tmp_path):
    """As if the node had failed; it is not asked twice."""
    config = run_config(num_server_rounds=1, eval__every=0, train__max_steps=2)
    other = {"data_path": str(write_rows(tmp_path / "south", client=1)), "client_id": "south"}
    with resident(data, tmp_path / "kept", client_id="north", allowed={"request.rank": 1}) as made:
        nodes = [{"trainer_socket": str(made.path)}, other]
        federation(NodesGrid(config, nodes), config, tmp_path / "both")
        assert made.trainer.totals.trained == 0
    federation(NodesGrid(config, [other]), config, tmp_path / "alone")
    rows = (tmp_path / "both" / "clients.csv").read_text().splitlines()
    north = [row for row in rows if "north" in row]
    assert len(north) == 1 and "failed" in north[0] and "request.rank is" in north[0], north
    assert "sent" not in north[0]
    both, alone = (
        {k: v for k, v in adapter_bytes(tmp_path / name).items() if k.startswith("global/")}
        for name in ("both", "alone")
    )
    assert both and both == alone


# Memory on the CPU, where nothing enforces a limit


def test_on_the_cpu_a_training_gets_the_rows_that_its_plan_has_room_for(data, tmp_path):
    node = OwnerConfig.of(model="embedded", data=str(data)).config
    least = memory_limit.smallest_plan(node, 6 * 2**30).terms
    config = run_config(train__per_device_train_batch_size=64, train__max_length=256)
    limit = least.runtime + 40 * 10**6
    with resident(data, tmp_path / "kept", limit_bytes=limit) as made:
        reply = made.ask(train_message(config), config)
        assert cause_of(reply) == ""
        made.trainer.limit_bytes = least.runtime
        refused = cause_of(made.ask(train_message(config, server_round=2), config))
    assert "at rank 2 with one row of" in refused and "owner allows" in refused
    assert "(request.memory)" in refused and refused.startswith("a training at rank")
