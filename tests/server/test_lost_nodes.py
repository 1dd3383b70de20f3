"""Nodes that are lost, and failures without a word: none ends the run."""

import torch
from flwr.app import Error, Message

from federation import TamperingGrid, client_rows, federation, rounds, small
from flexlora.errors import one_line

VICTIM = "client_02"


def from_the_superlink(reply, message):
    """What Flower 1.41 answers for a node that it has lost: the SuperLink is the sender."""
    lost = Message(Error(code=5, reason="node unavailable"), reply_to=message)
    lost.metadata.__dict__["_src_node_id"] = 1
    return [lost]


def test_an_error_that_the_superlink_sends_for_a_lost_node_is_that_nodes(worker, tmp_path):
    config = small()
    grid = TamperingGrid(worker, tamper=from_the_superlink, victims=[VICTIM])
    _, run = federation(grid, config, tmp_path / "run")
    rows = {row["client_id"]: row for row in client_rows(run.path, 1)}
    assert rows[VICTIM]["status"] == "failed" or rows[VICTIM]["status"] == "refused"
    assert "node unavailable" in rows[VICTIM]["cause"]
    assert sum(row["status"] == "ok" for row in rows.values()) == 3


def test_a_failure_without_a_message_is_a_cause_too(worker, tmp_path, monkeypatch):
    """Bare asserts have no text to quote."""
    assert (
        one_line(MemoryError()) == "MemoryError: "
        and one_line(AssertionError()) == "AssertionError: "
    )
    from flexlora.clients import worker as module

    original = module.train

    def broken(slots, jobs, *rest, **options):
        if any(job.client_id == VICTIM for job in jobs):
            raise AssertionError
        return original(slots, jobs, *rest, **options)

    monkeypatch.setattr(module, "train", broken)
    _, run = federation(TamperingGrid(worker), small(), tmp_path / "run")
    causes = {row["client_id"]: row["cause"] for row in client_rows(run.path, 1)}
    assert causes[VICTIM].startswith("AssertionError") and rounds(run.path)[1]["clients_ok"] == 3


def test_a_client_that_cannot_be_evaluated_costs_only_its_own_rows(worker, tmp_path, monkeypatch):
    from flexlora.clients import worker as module

    original = module.evaluate

    def broken(slots, base, jobs, *rest, **options):
        if any(job.client_id == VICTIM for job in jobs):
            raise IndexError("index out of range in self")
        return original(slots, base, jobs, *rest, **options)

    monkeypatch.setattr(module, "evaluate", broken)
    _, run = federation(TamperingGrid(worker), small(), tmp_path / "run")
    scored = (run.path / "evaluation.csv").read_text()
    assert VICTIM not in scored and "client_01" in scored
    assert rounds(run.path)[1]["eval_loss"] > 0


def test_a_prompt_that_fills_all_positions_gets_an_empty_answer():
    """Learned positions end: asking for more tokens than there are would be an index error."""
    from builders import random_examples, tiny_model
    from flexlora.evaluation.generation import generate_answers
    from flexlora.training.slots import SlotModel

    class Words:
        bos_token_id = eos_token_id = None

        def batch_decode(self, ids, skip_special_tokens):
            return [" ".join(map(str, row.tolist())) for row in ids]

    model = tiny_model("gpt2", dtype=torch.float32)
    rows = random_examples(2, seed=1)
    prompts = {row.prompt_length for row in rows}
    model.config.max_position_embeddings = max(prompts) + 2
    options = {"tokenizer": Words(), "batch_size": 4, "pad_token_id": 0}
    (answers,) = generate_answers(SlotModel(model), [rows], max_new_tokens=9, **options)
    assert [len(text.split()) for text in answers] == [2, 2]
    model.config.max_position_embeddings = max(prompts)
    assert generate_answers(SlotModel(model), [rows], max_new_tokens=9, **options) == [["", ""]]
