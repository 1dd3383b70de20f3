"""What a message is said to ask of its client, against what a client then really does and sends."""

import pytest
import torch

import flexlora.training.local
from federation import client_rows, small
from flexlora.aggregation import METHODS, make_method
from flexlora.aggregation.engine.starts import Factoring, LocalPlan
from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.clients.worker import Worker
from flexlora.lora.ranks import RankClass
from flexlora.simulations.simulate import simulate
from flexlora.simulations.world.efforts import effort_of
from flexlora.simulations.world.simulated_time import World
from flexlora.training.slots import SlotModel
from flexlora.wire.jobs import TrainJob

CLIENT = "client_01"


def job_of(worker, local):
    change = GlobalChange.zero(worker.shapes, torch.float32)
    method = make_method("flexlora")
    start = method.start(State(round=0, change=change), RankClass.of(3), Factoring(alpha=8.0))
    start = type(start)(**{**vars(start), "local": local}).sealed()
    return TrainJob(client_id=CLIENT, server_round=1, num_server_rounds=1, start=start)


@pytest.mark.parametrize("personal_rank", [0, 2])
@pytest.mark.parametrize("batches", [0, 1, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_passes_and_tokens_are_those_of_the_training(
    accumulation, batches, personal_rank, workers, monkeypatch
):
    """Backward passes are counted where they happen, tokens where rows become a batch."""
    worker = workers(accumulation, personal_rank)
    passes, tokens = [], []
    backward, collate = SlotModel.accumulate_gradients, flexlora.training.local.collate

    def counted(slots, loss):
        passes.append(1)
        return backward(slots, loss)

    def measured(*arguments, **named):
        batch = collate(*arguments, **named)
        if torch.is_grad_enabled():  # a look at the loss is no training
            tokens.append(batch.input_ids.numel())
        return batch

    monkeypatch.setattr(SlotModel, "accumulate_gradients", counted)
    monkeypatch.setattr(flexlora.training.local, "collate", measured)
    job = job_of(worker, LocalPlan(gradient_batches=batches))
    effort = effort_of(job, worker, wire_dtype="float32", bytes_down=0)
    (result,) = worker.train([job])
    assert not result.cause and (result.personal is not None) == (personal_rank > 0)
    own = effort.own
    steps = effort.steps + effort.looks + (own.steps if own else 0)
    assert len(passes) == accumulation * steps
    assert sum(tokens) == effort.tokens + (own.tokens if own else 0)
    assert effort.looks == batches


@pytest.fixture(scope="module")
def workers():
    """Workers by what they were asked for: the base is loaded once for each."""
    made = {}

    def worker(accumulation, personal_rank):
        key = accumulation, personal_rank
        if key not in made:
            made[key] = Worker(
                small(
                    train__gradient_accumulation_steps=accumulation,
                    train__max_steps=3,
                    personal__rank=personal_rank,
                    personal__max_steps=5,
                )
            )
        return made[key]

    return worker


OTHERS = {
    "fresh factors in 8 bits": {"method__name": "aligned", "wire__dtype": "int8"},
    "half of the factors in 8 bits": {"method__name": "ffa-lora", "wire__dtype": "int8"},
    "drawn terms in 16 bits": {"method__name": "fed-plora", "wire__dtype": "bfloat16"},
}


@pytest.mark.parametrize("name", [*METHODS, *OTHERS])
def test_the_bytes_that_are_priced_are_those_that_are_sent(name, tmp_path, monkeypatch):
    priced, send = {}, World.send

    def spy(world, message_id, effort):
        priced[str(effort.server_round), effort.client_id] = effort
        return send(world, message_id, effort)

    monkeypatch.setattr(World, "send", spy)
    config = small(
        clients__count=2,
        num_server_rounds=2,
        train__max_steps=3,
        eval__every=9,
        population__straggler_share=0.5,
        population__examples="",  # with all rows HetLoRA prunes nobody: its bytes are known
        **OTHERS.get(name, {"method__name": name}),
    )
    simulate(config, tmp_path / "run")
    rows = client_rows(tmp_path / "run")
    assert len(rows) == len(priced) == 4
    for row in rows:
        effort = priced[row["round"], row["client_id"]]
        assert (row["status"], int(row["bytes_up"])) == ("ok", effort.bytes_up)
        assert int(row["bytes_down"]) == effort.bytes_down
