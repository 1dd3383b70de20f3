"""Every method through the engine: a run ends, its adapters load in PEFT, and it can be resumed.

What the methods compute is held against their papers elsewhere; here they meet the wire, the
checkpoint and the clients.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from federation import (
    StopAt,
    Stopped,
    TamperingGrid,
    adapter_bytes,
    client_rows,
    federation,
    rounds,
    small,
    untimed,
)
from flexlora.aggregation import METHODS
from flexlora.aggregation.engine.starts import LocalPlan
from flexlora.clients.messages import decode_train_job
from flexlora.clients.worker import worker_for
from flexlora.config.paths import EMBEDDED
from flexlora.lora.adapters import Adapter
from flexlora.runs.checkpoints import load_checkpoint
from flexlora.simulations.simulate import resume, simulate
from packed import tampered

MODULE = "model.layers.0.self_attn.q_proj"
PRUNING = small(
    method__name="hetlora",
    method__prune_factor=0.5,
    method__prune_penalty=50.0,
    num_server_rounds=3,
    train__max_steps=4,
    train__lr_scheduler_type="constant",
    population__examples="",
)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None]).logits


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_run_of_every_method_ends_and_its_adapters_load_in_peft(method, tmp_path):
    """All clients count, something is learned, and PEFT computes what the class was served."""
    strategy = simulate(small(method__name=method, num_server_rounds=2), tmp_path / "run")
    _, *trained = rounds(tmp_path / "run")
    assert [(row["round"], row["clients_ok"], row["clients_failed"]) for row in trained] == [
        (1, 4, 0),
        (2, 4, 0),
    ]
    for row in trained:
        assert row["bytes_carried"] >= 0
        assert set(row["modules"]) == set(strategy.state.change)
        assert all(report["rank"] >= 1 for report in row["modules"].values())
    names = sorted(path.name for path in (tmp_path / "run" / "adapters").iterdir())
    assert names == ["global", *sorted(strategy.roster.rank_classes)]
    served: Adapter = strategy.served(strategy.state)["rank_2"]
    bare = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float64)
    before = logits(bare)
    for name, factors in served.to(torch.float64).items():
        bare.get_submodule(name).weight.data += factors.delta_weight()
    ours = logits(bare)
    again = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float64)
    path = tmp_path / "run" / "adapters" / "rank_2"
    assert (ours - before).abs().max() > 1e-3
    peft = logits(PeftModel.from_pretrained(again, path).double().eval())
    assert (peft - ours).abs().max() < 1e-4


RESUMED = {
    "aligned": {
        "method__carried_dtype": "bfloat16",
        "method__carried_rank": 6,
        "train__proximal_mu": 0.1,
    },
    "slora": {"method__sparse_rounds": 2},
    "rolora": {},
    "basis": {"method__carried_rank": 6, "wire__dtype": "bfloat16"},
    "fed-plora": {"method__carried_rank": 6},
    "residual": {
        "method__server_optimizer": "momentum",
        "method__error_feedback": True,
        "method__server_max_rank": 3,
    },
    "flexlora": {"method__server_optimizer": "momentum"},
}


@pytest.mark.parametrize("method", RESUMED)
def test_what_a_method_remembers_survives_a_resume_to_the_byte(method, tmp_path):
    """Stopped within round 2 of 4, so that what round 1 left is needed."""
    config = small(method__name=method, num_server_rounds=4, **RESUMED[method])
    simulate(config, tmp_path / "whole")
    with pytest.raises(Stopped):
        simulate(config, tmp_path / "run", observer=StopAt("replied", 2))
    resume(tmp_path / "run")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    assert untimed(rounds(tmp_path / "run")) == untimed(rounds(tmp_path / "whole"))
    assert untimed(client_rows(tmp_path / "run")) == untimed(client_rows(tmp_path / "whole"))


def test_sparse_rounds_train_lora_b_and_the_rounds_after_both(tmp_path):
    """The switch shows in what travels back."""
    config = small(method__name="slora", method__sparse_rounds=2, num_server_rounds=3)
    simulate(config, tmp_path / "run")
    sparse, second, after = (row["bytes_up"] for row in rounds(tmp_path / "run")[1:])
    assert sparse == second < after


# --- what a client receives, and what it sends back------------------------------------------


@pytest.mark.parametrize("method", ["aligned", "fed-plora", "hetlora", "slora"])
@pytest.mark.parametrize("wire_dtype", ["float32", "bfloat16"])
def test_a_client_starts_from_what_the_server_thinks_it_does(method, wire_dtype, tmp_path):
    """Plan, draws and rounded factors: the server computes each client's start as it decodes it."""
    options = {"method__gradient_batches": 2, "method__carried_dtype": "bfloat16"}
    config = small(
        method__name=method,
        num_server_rounds=2,
        wire__dtype=wire_dtype,
        **(options if method == "aligned" else {}),
    )
    strategy, _, _, starts = sent_and_got(config, tmp_path / "run")
    for client_id, name in strategy._open.plan.asked.items():
        sent = strategy._open.plan.sent[name].for_client(client_id)
        got = starts[2, client_id]
        for label in ("rank_class", "base_round", "carried_dtype", "trainable", "local", "digest"):
            assert getattr(got, label) == getattr(sent, label), label
        assert got.trained.digest() == sent.trained.digest()
        assert (got.carried is None) == (sent.carried is None)
        assert got.carried is None or got.carried.digest() == sent.carried.digest()
    plans = {start.local for start in starts.values()}
    assert len(plans) == 1 and (plans == {LocalPlan()}) is False


def sent_and_got(config, folder, **options):
    """The grid after a run, with the start of every client of every round, as it decoded it."""
    starts = {}

    class Grid(TamperingGrid):
        def push_messages(self, messages):
            messages = list(messages)
            for message in messages:
                if message.metadata.message_type == "train":
                    client_id = self._client(message)
                    start = decode_train_job(message.content, client_id).start.for_client(client_id)
                    starts[int(message.metadata.group_id), client_id] = start
            return super().push_messages(messages)

    worker = worker_for(config)
    grid = Grid(worker, wire_dtype=config.wire.dtype, **options)
    strategy, run = federation(grid, config, folder)
    return strategy, run, grid, starts


@pytest.mark.parametrize("wire_dtype", ["float32", "bfloat16"])
def test_a_factor_that_was_not_trained_does_not_travel_back(wire_dtype, tmp_path):
    """ffa-lora: ``lora_B`` alone on the wire; the server has the sent ``lora_A`` to the bit."""
    config = small(method__name="ffa-lora", num_server_rounds=2, wire__dtype=wire_dtype)
    strategy, run, grid, starts = sent_and_got(config, tmp_path / "run")
    itemsize = {"float32": 4, "bfloat16": 2}[wire_dtype]
    shapes = strategy.state.change.shapes
    for row in client_rows(run.path):
        rank = int(row["rank"])
        lora_B = sum(rank * out for out, _ in shapes.values())
        lora_A = sum(rank * fan_in for _, fan_in in shapes.values())
        assert int(row["bytes_up"]) == itemsize * lora_B
        assert int(row["bytes_down"]) == itemsize * (lora_A + lora_B)
    assert len(grid.updates) == 8
    for key, result in grid.updates.items():
        for name, factors in result.adapter.items():
            sent = starts[key].trained[name]
            assert torch.equal(factors.lora_A, sent.lora_A)
            assert not torch.equal(factors.lora_B, sent.lora_B)


def test_rolora_sends_one_factor_and_then_the_other(tmp_path):
    config = small(method__name="rolora", num_server_rounds=2)
    _, _, grid, starts = sent_and_got(config, tmp_path / "run")
    for (server_round, client_id), result in grid.updates.items():
        kept, moved = ("lora_A", "lora_B") if server_round == 1 else ("lora_B", "lora_A")
        for name, factors in result.adapter.items():
            sent = starts[server_round, client_id].trained[name]
            assert torch.equal(getattr(factors, kept), getattr(sent, kept))
            assert not torch.equal(getattr(factors, moved), getattr(sent, moved))


def extra_array(reply, message):
    with tampered(reply.content) as (arrays, _):
        old = arrays[f"{MODULE}.lora_B"]
        arrays[f"{MODULE}.lora_A"] = replace(old, shape=(1, 2), data=b"\0" * 8)
    return [reply]


def missing_array(reply, message):
    with tampered(reply.content) as (arrays, _):
        del arrays[f"{MODULE}.lora_B"]
    return [reply]


def unknown_module(reply, message):
    with tampered(reply.content) as (arrays, values):
        arrays["other.lora_B"] = arrays[f"{MODULE}.lora_B"]
        for name, last in (("modules", "other"), ("alphas", 16.0), ("rslora", False)):
            values[name].append(last)
    return [reply]


def both_factors(reply, message):
    with tampered(reply.content) as (arrays, values):
        for module in values["modules"]:
            factor = arrays.pop(f"{module}.lora_B")
            first = replace(factor, shape=(factor.shape[1], factor.shape[0]))
            arrays |= {f"{module}.lora_A": first, f"{module}.lora_B": factor}
    return [reply]


def narrower(reply, message):
    with tampered(reply.content) as (arrays, _):
        old = arrays[f"{MODULE}.lora_B"]
        shape = (old.shape[0], 1)
        arrays[f"{MODULE}.lora_B"] = replace(old, shape=shape, data=old.data[: 4 * shape[0]])
    return [reply]


@pytest.mark.parametrize(
    ("tamper", "cause"),
    [
        (extra_array, "kinds, expected"),
        (missing_array, "the factors are [], expected lora_A and lora_B"),
        (both_factors, f"differ in ['{MODULE}.lora_A']"),
        (unknown_module, "module 'other' has no lora_A, and nothing is held for it"),
        (narrower, "with one rank"),
    ],
)
def test_a_reply_with_other_factors_than_were_trained_is_told(tamper, cause, tmp_path):
    config = small(method__name="ffa-lora")
    _, run, _, _ = sent_and_got(config, tmp_path / "run", tamper=tamper, victims=["client_01"])
    rows = {row["client_id"]: row for row in client_rows(run.path, 1)}
    assert rows["client_01"]["status"] == "failed" and cause in rows["client_01"]["cause"]
    assert [rows[name]["status"] for name in sorted(rows)].count("ok") == 3


# --- HetLoRA: a rank that was lowered stays lowered --------------------------------------------


def test_a_pruned_client_comes_back_at_the_lower_rank_and_stays_there(tmp_path):
    """Round 1 starts from zero, so no tail can shrink; the regulariser does it in round 2."""
    strategy, run, grid, starts = sent_and_got(PRUNING, tmp_path / "run")
    ranks = {
        at: {row["client_id"]: int(row["rank"]) for row in client_rows(run.path, at)}
        for at in (1, 2, 3)
    }
    assert ranks[1] == ranks[2] and sorted(ranks[1].values()) == [2, 2, 4, 4]
    ranks[4] = {k: member.rank_class.rank for k, member in strategy.roster.members.items()}
    assert {row["status"] for row in client_rows(run.path)} == {"ok"}
    for (at, client_id), result in grid.updates.items():
        halved = max(1, ranks[at][client_id] // 2)
        assert ranks[at + 1][client_id] == (ranks[1][client_id] if at == 1 else halved)
        for name, factors in result.adapter.items():
            sent = starts[at, client_id].trained[name]
            assert sent.rank == ranks[at][client_id]
            assert factors.rank == ranks[at + 1][client_id]
            assert factors.scaling == pytest.approx(sent.scaling, rel=1e-12)
    for row in client_rows(run.path, 2):
        assert int(row["bytes_up"]) == int(row["bytes_down"]) // 2
        assert row["rank_class"] == f"rank_{ranks[2][row['client_id']]}"
    for row in client_rows(run.path, 3):
        assert row["rank_class"] == f"rank_{ranks[3][row['client_id']]}"
    assert set(strategy.roster.rank_classes) == {"rank_1"}


@pytest.mark.parametrize(("event", "server_round"), [("replied", 2), ("round_started", 3)])
def test_a_lowered_rank_survives_a_resume(event, server_round, tmp_path):
    """Before and after the checkpoint that holds the new classes; a class that emptied is gone."""
    simulate(PRUNING, tmp_path / "whole")
    with pytest.raises(Stopped):
        simulate(PRUNING, tmp_path / "run", observer=StopAt(event, server_round))
    _, classes = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert ({c.rank for c in classes.values()} == {2, 4}) == (server_round == 2)
    resume(tmp_path / "run")
    assert untimed(client_rows(tmp_path / "run")) == untimed(client_rows(tmp_path / "whole"))
    assert untimed(rounds(tmp_path / "run")) == untimed(rounds(tmp_path / "whole"))
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")


def test_a_client_that_pruned_nothing_stays_in_its_class(tmp_path):
    """Also where its rank is above what the modules have, so that it came back at a lower one."""
    strategy = simulate(small(method__name="hetlora", ranks__tiers="2,500"), tmp_path / "run")
    assert set(strategy.roster.rank_classes) == {"rank_2", "rank_500"}
    assert {row["rank"] for row in client_rows(tmp_path / "run", 1)} == {"2", "500"}
