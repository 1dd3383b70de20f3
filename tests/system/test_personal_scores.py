"""What own factors are worth: scored beside the global adapter, on the same clients' rows."""

import io
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from builders import random_adapter
from flexlora.aggregation import make_method
from flexlora.aggregation.engine.open_round import OpenRound
from flexlora.aggregation.engine.starts import Factoring
from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.aggregation.engine.updates import Update
from flexlora.clients.messages import encode_evaluate_result
from flexlora.clients.worker import Worker
from flexlora.config.resolve import Config
from flexlora.data.tasks import generate_rows
from flexlora.evaluation.evaluate import BASE, PERSONAL
from flexlora.lora.ranks import RankClass
from flexlora.server.members.bases import Base
from flexlora.server.members.roster import Member, Roster
from flexlora.server.rounds.evaluation import eval_metrics, evaluation_rows
from flexlora.server.transport.messages import decode_eval_result
from flexlora.simulations.terminal import TerminalObserver
from flexlora.training.personal import PersonalStore
from flexlora.wire.jobs import Capability, EvalJob, EvalResult, Score, TrainJob

FAMILIES = ("date", "past_tense", "plural", "reverse_word")
CLASS = RankClass.of(4)


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    """Four clients of one family each, few steps: an average of four tasks helps each little."""
    folder = tmp_path_factory.mktemp("skewed")
    for split, count in (("train", 40), ("validation", 12)):
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for family in FAMILIES:
                for row in generate_rows(family, split, count, seed=0):
                    shown = {"instruction": row.instruction, "input": row.input}
                    file.write(json.dumps({**shown, "output": row.output, "client": family}) + "\n")
    config = {
        "data.path": str(folder),
        "train.max-steps": 5,
        "personal.rank": 4,
        "personal.max-steps": 8,
        "personal.learning-rate": 5e-3,
        "eval.max-examples": 12,
        "engine.threads": 1,
    }
    return Worker(Config.of(config))


def federate(worker, store, rounds=2):
    """Rounds of published FlexLoRA with own factors beside; the evaluation jobs after the last."""
    method, factoring = make_method("flexlora"), Factoring(alpha=16.0)
    state = State(round=0, change=GlobalChange.zero(worker.shapes))
    for server_round in range(1, rounds + 1):
        start = method.start(state, CLASS, factoring).sealed()
        shown = {"server_round": server_round, "num_server_rounds": rounds, "start": start}
        jobs = store.attach([TrainJob(client_id=name, **shown) for name in worker.client_ids])
        results = worker.train(jobs)
        store.keep(results, jobs)
        opened = OpenRound(method, state, {CLASS.name: start})
        for result in results:
            kind = {"rank_class": CLASS.name, "base_round": state.round, "digest": start.digest}
            update = {"client_id": result.client_id, "adapter": result.adapter}
            opened.add(Update(**update, num_examples=result.num_examples, **kind))
        state = opened.close()
    served = {CLASS.name: method.start(state, CLASS, factoring).served()}
    return store.attach_eval(
        [
            EvalJob(client_id=name, server_round=rounds, adapters=served)
            for name in worker.client_ids
        ]
    )


@pytest.fixture(scope="module")
def evaluations(worker, tmp_path_factory):
    return federate(worker, PersonalStore(tmp_path_factory.mktemp("store")))


def losses(results, name):
    return {r.client_id: r.scores[name].loss / r.scores[name].tokens for r in results}


def test_on_skewed_clients_own_factors_beat_the_global_adapter(worker, evaluations):
    """On held-out rows, each client by half at least. The control: a neighbour's do not help."""
    results = worker.evaluate(evaluations)
    served, own = losses(results, CLASS.name), losses(results, PERSONAL)
    assert sorted(own) == sorted(FAMILIES)
    for client_id in FAMILIES:
        assert own[client_id] < 0.5 * served[client_id], client_id
    turned = [*evaluations[1:], evaluations[0]]
    strange = [
        replace(job, personal=other.personal)
        for job, other in zip(evaluations, turned, strict=True)
    ]
    others = losses(worker.evaluate(strange), PERSONAL)
    assert all(others[client_id] > 1.5 * own[client_id] for client_id in FAMILIES)


def test_from_memory_and_from_disk_come_the_same_factors(worker, evaluations):
    again = federate(worker, PersonalStore())
    digests = [[job.personal.digest() for job in jobs] for jobs in (evaluations, again)]
    assert digests[0] == digests[1] and len(set(digests[0])) == len(FAMILIES)


def test_own_factors_that_cannot_be_used_cost_only_their_own_score(worker, evaluations):
    """The others' scores, and this client's under the global adapter, are as they were."""
    honest = {result.client_id: result for result in worker.evaluate(evaluations)}
    elsewhere = random_adapter({"other.module": (4, 4)}, 2, dtype=torch.float32)
    broken = [
        replace(job, personal=elsewhere) if job.client_id == "plural" else job
        for job in evaluations
    ]
    for result in worker.evaluate(broken):
        expected = dict(honest[result.client_id].scores)
        if result.client_id == "plural":
            assert result.cause.startswith("personal factors: ValueError: module '")
            del expected[PERSONAL]
        else:
            assert result.cause == ""
        assert list(result.scores) == list(expected)
        for name, score in result.scores.items():
            assert score.loss == pytest.approx(expected[name].loss, rel=1e-5)


def test_the_reply_holds_the_score_and_the_server_reads_it(worker, evaluations):
    (result,) = worker.evaluate(evaluations[:1])
    reply = SimpleNamespace(has_error=lambda: False, content=encode_evaluate_result(result))
    assert result.by_task and decode_eval_result(reply) == replace(result, by_task={})
    shown = replace(result, cause="personal factors: no room")
    reply = SimpleNamespace(has_error=lambda: False, content=encode_evaluate_result(shown))
    assert decode_eval_result(reply) == replace(shown, by_task={})


# --- on the server ---------------------------------------------------------------------------


def roster(**classes):
    return Roster(
        members={
            name: Member(
                node_id=k,
                capability=Capability(client_id=name, num_examples=9),
                rank_class=RankClass.of(rank),
            )
            for k, (name, rank) in enumerate(classes.items())
        },
        base=Base(modules=("q", "v"), out_features=(8, 4), in_features=(8, 8)),
    )


def score(loss, right=0.0):
    return Score(loss=loss, tokens=10, rows=2, exact_match=right, rouge_l=right, generated=2)


RESULTS = [
    EvalResult(
        client_id="a",
        scores={"rank_2": score(30.0, 1), "rank_4": score(20.0, 1), PERSONAL: score(5.0, 2)},
    ),
    EvalResult(client_id="b", scores={"rank_2": score(50.0), "rank_4": score(70.0)}),
    EvalResult(
        client_id="c",
        scores={"rank_2": score(11.0), "rank_4": score(40.0, 1), PERSONAL: score(15.0, 1)},
    ),
]


def test_global_and_personal_are_compared_over_the_same_clients():
    """b has nothing of its own: it counts in eval_loss, and in neither side of the comparison."""
    metrics = eval_metrics(RESULTS, roster(a=2, b=2, c=4))
    assert metrics["eval_loss"] == pytest.approx((30 + 50 + 40) / 30)
    assert metrics["eval_loss/personal"] == pytest.approx((5 + 15) / 20)
    assert metrics["eval_loss/global_of_personal"] == pytest.approx((30 + 40) / 20)
    assert metrics["eval_exact_match/personal"] == pytest.approx(3 / 4)
    assert metrics["eval_exact_match/global_of_personal"] == pytest.approx(2 / 4)
    assert metrics["eval_rouge_l/personal"] == pytest.approx(3 / 4)
    assert metrics["personal_clients"] == 2
    assert metrics["eval_loss/rank_2"] == pytest.approx((30 + 50 + 11) / 30)


def test_without_own_factors_there_is_nothing_to_compare():
    members = roster(a=2, b=2, c=4)
    plain = [replace(RESULTS[1], client_id=name) for name in "abc"]
    assert not [key for key in eval_metrics(plain, members) if "personal" in key]
    base = [EvalResult(client_id="a", scores={BASE: score(9.0)})]
    assert not [key for key in eval_metrics(base, members) if "personal" in key]


def test_a_client_without_a_score_at_its_own_rank_is_on_neither_side():
    lost = EvalResult(client_id="a", scores={"rank_2": score(30.0), PERSONAL: score(5.0)})
    metrics = eval_metrics([lost, RESULTS[2]], roster(a=8, c=4))
    assert metrics["personal_clients"] == 1
    assert metrics["eval_loss/personal"] == pytest.approx(15 / 10)
    assert metrics["eval_loss/global_of_personal"] == pytest.approx(40 / 10)


def test_the_table_of_evaluations_has_their_rows():
    rows = evaluation_rows(3, RESULTS)
    own = [row for row in rows if row["rank_class"] == PERSONAL]
    assert [(row["client_id"], row["eval_loss"], row["rows"]) for row in own] == [
        ("a", 0.5, 2),
        ("c", 1.5, 2),
    ]


def printed(personal_rank, rows):
    text = io.StringIO()
    observer = TerminalObserver(Console(file=text, width=120), personal_rank=personal_rank)
    observer.met(roster(a=2, b=2, c=4))
    observer.summary(rows)
    return text.getvalue()


def test_a_person_reads_global_against_personal_and_the_rank_that_was_possible():
    metrics = eval_metrics(RESULTS, roster(a=2, b=2, c=4))
    base = {"round": 0, "eval_loss": 4.0, "eval_exact_match": 0.0}
    text = printed(6, [base, {"round": 1, **metrics}])
    assert "With the factors that never leave their 2 clients, on their own rows" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["global", "3.500", "0.500"] in lines
    assert ["with", "its", "own", "factors", "1.000", "0.750"] in lines
    assert ["personal", "3", "27", "4", "(1),", "6", "(1)"] in lines, "capped at 4 x 8"
    without = {key: value for key, value in metrics.items() if "personal" not in key}
    assert "personal" not in printed(0, [base, {"round": 1, **without}])
