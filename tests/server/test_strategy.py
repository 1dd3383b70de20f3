"""One client misbehaves: its row says why, and the round is, bit for bit, the round without it."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from builders import random_adapter
from expected_rounds import VICTIM, expected_state
from federation import (
    TamperingGrid,
    client_rows,
    federation,
    rounds,
    same_bytes,
    small,
    state_delta,
)
from flexlora.aggregation.aggregate import aggregate
from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.aggregation.engine.updates import Update, check_update
from flexlora.clients.worker import worker_for
from flexlora.errors import UpdateRefused
from flexlora.simulations.engine.cohorts import CohortLimits
from flexlora.wire.packing import DATA, PACKED
from packed import as_array, tampered, update_of

MODULE = "model.layers.0.self_attn.q_proj"


def replace_array(reply, change, label="lora_A"):
    """The reply with one array of the update replaced by ``change(numpy array)``."""
    key = f"{MODULE}.{label}"
    with tampered(reply.content) as (arrays, _):
        old = arrays[key]
        values = change(np.frombuffer(old.data, dtype=np.float32).reshape(old.shape).copy())
        values = np.ascontiguousarray(values, dtype=np.float32)
        arrays[key] = replace(old, shape=values.shape, data=values.tobytes())
    return [reply]


def with_first(number):
    def change(values):
        values.flat[0] = number
        return values

    return lambda reply, message: replace_array(reply, change)


def report(**values):
    def tamper(reply, message):
        for name, value in values.items():
            reply.content["report"][name.replace("_", "-")] = value
        return [reply]

    return tamper


def array_fields(**fields):
    """Replace fields of one factor: its bytes stay what they were."""

    def tamper(reply, message):
        with tampered(reply.content) as (arrays, _):
            key = f"{MODULE}.lora_A"
            arrays[key] = replace(arrays[key], **fields)
        return [reply]

    return tamper


def without_data(reply):
    return ConfigRecord({k: v for k, v in reply.content["report"].items() if k != DATA})


def packed_fields(**fields):
    """Replace fields of the array that holds all factors."""

    def tamper(reply, message):
        as_array(reply.content)
        array = vars(reply.content[PACKED][PACKED])
        old = {name: array[name] for name in ("dtype", "shape", "stype", "data")}
        reply.content[PACKED] = ArrayRecord({PACKED: Array(**{**old, **fields})})
        return [reply]

    return tamper


def another_rank(reply, message):
    replace_array(reply, lambda A: A[:1])
    return replace_array(reply, lambda B: B[:, :1], "lora_B")


def missing_module(reply, message):
    with tampered(reply.content) as (arrays, values):
        for label in ("lora_A", "lora_B"):
            del arrays[f"{MODULE}.{label}"]
        at = values["modules"].index(MODULE)
        for name in ("modules", "alphas", "rslora"):
            del values[name][at]
    return [reply]


def other_scaling(reply, message):
    with tampered(reply.content) as (_, values):
        values["alphas"] = [2 * alpha for alpha in values["alphas"]]
    return [reply]


def answer(content):
    return lambda reply, message: [Message(content(reply), reply_to=message)]


def error_reply(reply, message):
    return [Message(Error(code=5, reason="the node went away"), reply_to=message)]


def negative_shape(reply, message):
    old = update_of(reply.content)[0][f"{MODULE}.lora_A"]
    return array_fields(shape=tuple(-n for n in old.shape))(reply, message)


MISDEEDS = {
    "NaN": (with_first(np.nan), "refused", "NaN or infinity"),
    "infinity": (with_first(np.inf), "refused", "NaN or infinity"),
    "another shape": (
        lambda reply, message: replace_array(reply, lambda A: A[:, :-1]),
        "refused",
        "lora_A has shape",
    ),
    "another rank": (another_rank, "refused", "expected .* for rank"),
    "factors of two ranks": (
        lambda reply, message: replace_array(reply, lambda A: A[:1]),
        "failed",
        "with one rank",
    ),
    "another start": (report(digest="0" * 32 + "+"), "refused", "older round"),
    "a digest that is a number": (report(digest=7), None, "digest"),
    "the id of another client": (report(client_id="client_02"), "refused", "replied as"),
    "no examples": (report(num_examples=0), "refused", "num_examples is 0"),
    "negative examples": (report(num_examples=-3), "refused", "num_examples is -3"),
    "examples that are text": (report(num_examples="12"), None, "num_examples|num-examples"),
    "a loss that is text": (report(train_loss="low"), None, "train_loss|train-loss"),
    "a missing module": (missing_module, "refused", "lacks module"),
    "another alpha": (other_scaling, "refused", "alpha"),
    "too few bytes": (array_fields(data=b"1234"), "failed", "bytes, the index is for"),
    "too many bytes": (array_fields(data=b"1" * 999), "failed", "bytes, the index is for"),
    "an array of another kind": (packed_fields(dtype="float32"), "failed", "flexlora.raw/uint8"),
    "a shape without bytes": (
        array_fields(shape=(2**62, 4), data=b""),
        "failed",
        "bytes, the index is for",
    ),
    "a side of none": (array_fields(shape=(2**62, 0), data=b""), "failed", "from 1 up"),
    "an unknown dtype": (array_fields(dtype="int8"), "failed", "int8"),
    "a pickle": (packed_fields(stype="pickle"), "failed", "pickle"),
    "a negative shape": (negative_shape, None, "shape"),
    "no records at all": (answer(lambda reply: RecordDict()), "failed", "unreadable reply"),
    "numbers for a report": (
        answer(lambda reply: RecordDict({"report": MetricRecord({"loss": 1.0})})),
        "failed",
        "unreadable reply",
    ),
    "no factors": (
        answer(lambda reply: RecordDict({"report": without_data(reply)})),
        "failed",
        "no factors",
    ),
    "settings for factors": (
        answer(
            lambda reply: RecordDict(
                {"report": without_data(reply), PACKED: ConfigRecord({"a": 1})}
            )
        ),
        "failed",
        "no factors",
    ),
    "an error of Flower's": (error_reply, "failed", "Flower error 5: the node went away"),
}


@pytest.mark.parametrize("misdeed", MISDEEDS)
def test_a_bad_reply_is_told_and_the_round_is_the_round_without_it(misdeed, worker, tmp_path):
    tamper, status, cause = MISDEEDS[misdeed]
    config = small()
    grid = TamperingGrid(worker, tamper=tamper, victims=[VICTIM])
    strategy, run = federation(grid, config, tmp_path / "run")
    rows = {row["client_id"]: row for row in client_rows(run.path, 1)}
    assert rows[VICTIM]["status"] in ((status,) if status else ("failed", "refused"))
    assert re.search(cause, rows[VICTIM]["cause"]), rows[VICTIM]["cause"]
    assert [row["status"] for name, row in rows.items() if name != VICTIM] == ["ok"] * 3
    assert same_bytes(strategy.state, expected_state(grid, config))
    counts = rounds(run.path)[1]
    assert (counts["clients_ok"], counts["clients_failed"]) == (3, 1)


def test_the_round_without_a_client_is_another_than_with_it(worker, tmp_path):
    """Negative control: the comparison above can tell the two apart."""
    grid = TamperingGrid(worker)
    strategy, _ = federation(grid, small(), tmp_path / "run")
    assert same_bytes(strategy.state, expected_state(grid, small(), without=()))
    assert not same_bytes(strategy.state, expected_state(grid, small()))


def test_a_client_that_never_answers_is_told_when_the_time_is_up(worker, tmp_path):
    config = small(server__round_timeout_seconds=0.3)
    grid = TamperingGrid(worker, tamper=lambda reply, message: [], victims=[VICTIM])
    strategy, run = federation(grid, config, tmp_path / "run")
    (row,) = [row for row in client_rows(run.path, 1) if row["client_id"] == VICTIM]
    assert row["status"] == "failed" and row["cause"].startswith("no reply within 0.3 s")
    assert same_bytes(strategy.state, expected_state(grid, config))


def test_a_second_copy_of_a_reply_changes_nothing(worker, tmp_path):
    """Flower may deliver twice, so the strategy counts a client once a round."""
    config = small()
    grid = TamperingGrid(worker, tamper=lambda reply, message: [reply, reply], victims=[VICTIM])
    strategy, run = federation(grid, config, tmp_path / "run")
    assert same_bytes(strategy.state, expected_state(grid, config, without=()))
    statuses = [r["status"] for r in client_rows(run.path, 1) if r["client_id"] == VICTIM]
    assert "ok" in statuses and statuses.count("ok") == 1
    assert rounds(run.path)[1]["clients_ok"] == 4


def test_a_reply_from_the_round_before_is_refused(worker, tmp_path):
    config, kept = small(num_server_rounds=2), []

    def late(reply, message):
        kept.append(reply.content)
        return [Message(kept[0], reply_to=message)]

    grid = TamperingGrid(worker, tamper=late, victims=[VICTIM])
    strategy, run = federation(grid, config, tmp_path / "run")
    first, second = (
        next(row for row in client_rows(run.path, at) if row["client_id"] == VICTIM)
        for at in (1, 2)
    )
    assert first["status"] == "ok"
    assert second["status"] == "refused" and "older round" in second["cause"]
    before = expected_state(grid, config, 1, without=())
    assert same_bytes(strategy.state, expected_state(grid, config, 2, state=before))


@pytest.mark.parametrize("kind", [RuntimeError, IndexError, OSError])
def test_a_client_whose_training_raises_takes_no_other_with_it(kind, worker, tmp_path, monkeypatch):
    """An index beyond the embedding is an ``IndexError``, a file that is gone an ``OSError``."""
    import flexlora.clients.worker as module

    honest = module.train

    def train(slots, jobs, examples, settings, **options):
        if any(job.client_id == VICTIM for job in jobs):
            raise kind("its disk is on fire")
        return honest(slots, jobs, examples, settings, **options)

    monkeypatch.setattr(module, "train", train)
    grid = TamperingGrid(worker)
    # The victim shares a cohort, which is trained again one by one.
    grid.limits = CohortLimits(clients=2)
    strategy, run = federation(grid, small(), tmp_path / "run")
    rows = {row["client_id"]: row for row in client_rows(run.path, 1)}
    assert rows[VICTIM]["status"] == "failed" and "its disk is on fire" in rows[VICTIM]["cause"]
    assert [row["status"] for name, row in rows.items() if name != VICTIM] == ["ok"] * 3
    assert same_bytes(strategy.state, expected_state(grid, small()))


def test_a_round_in_which_all_fail_leaves_the_state_and_the_run_goes_on(worker, tmp_path):
    config = small(num_server_rounds=2)

    def first_round_only(reply, message):
        return error_reply(reply, message) if message.metadata.group_id == "1" else [reply]

    grid = TamperingGrid(worker, tamper=first_round_only, victims=worker.client_ids)
    strategy, run = federation(grid, config, tmp_path / "run")
    base, failed, good = rounds(run.path)
    assert (failed["clients_ok"], failed["clients_failed"]) == (0, 4)
    assert failed["train_loss"] is None
    assert failed["eval_loss"] == pytest.approx(base["eval_loss"], rel=1e-6)
    assert good["clients_ok"] == 4 and strategy.state.round == 2
    untouched = State(round=1, change=GlobalChange.zero(worker.slots.shapes, torch.float32))
    expected = expected_state(grid, config, 2, without=(), state=untouched)
    assert same_bytes(strategy.state, expected)


def test_a_bad_reply_does_not_move_the_mean_training_loss(worker, tmp_path):
    grid = TamperingGrid(worker, tamper=with_first(np.nan), victims=[VICTIM])
    _, run = federation(grid, small(), tmp_path / "run")
    counted = [r for (_, name), r in grid.updates.items() if name != VICTIM]
    total = sum(result.num_examples for result in counted)
    mean = sum(result.train_loss * result.num_examples for result in counted) / total
    assert rounds(run.path)[1]["train_loss"] == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize("wire_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["residual", "flexlora"])
def test_zero_training_leaves_the_residual_form_unchanged_over_any_wire(
    method, wire_dtype, worker, tmp_path
):
    """What is subtracted is what the client decoded, so a 16-bit wire moves nothing either."""
    learned, _ = federation(TamperingGrid(worker), small(), tmp_path / "learned")
    idle = small(
        method__name=method,
        wire__dtype=wire_dtype,
        train__learning_rate=0.0,
        num_server_rounds=2,
    )
    lazy = worker_for(idle)
    grid = TamperingGrid(lazy, wire_dtype=wire_dtype)
    _, run = federation(grid, small(num_server_rounds=1), tmp_path / "made")
    run.save_checkpoint(run.checkpoint, learned.state, {})
    strategy, _ = federation(grid, idle, run.path, resume=True)
    before, after = state_delta(learned.state), state_delta(strategy.state)
    size = sum(float(delta.square().sum()) for delta in before.values()) ** 0.5
    gap = sum(float((after[n] - before[n]).square().sum()) for n in before) ** 0.5 / size
    assert strategy.state.round == 2 and size > 0
    if method == "residual":
        assert gap < 1e-6
    else:  # the published form forgets what the lower ranks do not hold
        assert gap > 1e-3


def test_stock_federated_averaging_adds_unequal_ranks_and_ours_refuses(tmp_path):
    """Trap T16: Flower's own average broadcasts ranks 4 and 1 into a wrong adapter, silently."""
    adapters = {4: np.ones((4, 8), np.float32), 1: np.full((1, 8), 3, np.float32)}
    replies = []
    for node, array in enumerate(adapters.values(), start=1):
        content = {
            "arrays": ArrayRecord({"q.lora_A": Array(array)}),
            "metrics": MetricRecord({"num-examples": 1}),
        }
        sent = Message(RecordDict(), dst_node_id=node, message_type="train")
        replies.append(Message(RecordDict(content), reply_to=sent))
    stock, _ = FedAvg(weighted_by_key="num-examples").aggregate_train(1, replies)
    assert stock["q.lora_A"].numpy().shape == (4, 8)  # rank 1 counted four times over
    wide, narrow = (random_adapter({"q": (6, 8)}, rank, seed=rank) for rank in (4, 1))
    with pytest.raises(UpdateRefused, match="another rank this round"):
        check_update(Update(client_id="c", adapter=narrow, num_examples=1), wide)
    total = aggregate([(wide, 1), (narrow, 1)]).delta_weight("q")
    exact = (wide["q"].delta_weight() + narrow["q"].delta_weight()) / 2
    assert torch.allclose(total, exact, atol=1e-12)
