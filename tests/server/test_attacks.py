"""One admitted node attacks: the run completes, and the others' sum is the one without it.

Every attack goes against the real strategy. The round without the attacker is the same federation
in which its messages are lost.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from flwr.app import Message, MessageType

from faulty_grid import FaultyGrid, Told, capability, lost, people, run, settings
from federation import TamperingGrid, federation, rounds, small
from flexlora.aggregation.engine.weight_cap import largest_share
from flexlora.clients.messages import encode_evaluate_result
from flexlora.errors import UserError
from flexlora.runs.outcomes import Outcome
from flexlora.wire.jobs import EvalResult, Score
from one_round import SHAPES, distance, same_bits
from packed import tampered

EVIL = "client_0"  # the first by name


class AttackedGrid(FaultyGrid):
    """A grid on which one client's replies are what ``attack`` makes of them."""

    def __init__(self, attack, clients=None, **options):
        super().__init__(clients or people(4), **options)
        self.attack = attack

    def answer(self, message):
        reply = super().answer(message)
        client_id = self.clients[message.metadata.dst_node_id]
        return self.attack(reply, message) or reply if client_id == EVIL else reply


def of_training(change):
    """An attack on the content of train replies."""

    def attack(reply, message):
        if message.metadata.message_type == MessageType.TRAIN:
            change(reply.content)

    return attack


def scaled(**factors):
    """Every ``lora_A`` and ``lora_B`` times a number, in float64."""

    def change(content):
        import numpy as np

        with tampered(content) as (arrays, _):
            for key, array in arrays.items():
                factor = factors.get(key.rpartition(".")[2], 1.0)
                values = factor * np.frombuffer(array.data, dtype=np.float64)
                arrays[key] = replace(array, data=values.tobytes())

    return of_training(change)


def saying(**values):
    def change(content):
        for key, value in values.items():
            content["report"][key.replace("_", "-")] = value

    return of_training(change)


ATTACKS = {
    "lora_B times a million": (scaled(lora_B=1e6), "refused", "the norm of its change is"),
    "a large A in a small product": (
        scaled(lora_A=1e5, lora_B=1e-5),
        "refused",
        "the norm of its lora_A is",
    ),
    "a product beyond float32": (
        scaled(lora_A=1e20, lora_B=1e20),
        "refused",
        "must not exceed 1.15e.18",
    ),
    "a billion examples": (saying(num_examples=10**9), "refused", "it reported 10 when it joined"),
    "2**62 examples": (saying(num_examples=2**62), "failed", "'num-examples' is 46116860184"),
    "a loss of 1e300": (saying(train_loss=1e300), "failed", "'train-loss' is 1e.300"),
    "a negative loss": (saying(train_loss=-5.0), "failed", "expected 0 to 100"),
    "an infinite loss before": (saying(loss_before=float("inf")), "failed", "'loss-before'"),
    "2**63 steps": (saying(steps=2**63), "failed", "'steps' is 9223"),
    "negative seconds": (saying(train_seconds=-1.0), "failed", "'train-seconds' is -1.0"),
    "seconds that are no number": (saying(train_seconds=float("nan")), "failed", "is nan"),
    "losses that are withheld": (
        saying(withheld=True, train_loss=float("nan")),
        "refused",
        "withholds its losses, which clients do under privacy.mode=local",
    ),
    "another round": (saying(base_round=7), "refused", "of round 7 by its word"),
    "another class": (saying(rank_class="rank_99"), "refused", "trained 'rank_99'"),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("method", ["residual", "fedit"])
def test_an_attack_is_that_nodes_row_and_the_sum_is_the_others(attack, method):
    import re

    change, status, cause = ATTACKS[attack]
    config, rows = settings(method__name=method), []
    strategy = run(AttackedGrid(change), config, rows=rows)
    without = run(FaultyGrid(people(4), {(r, EVIL): [lost(5)] * 9 for r in (1, 2)}), config)
    assert strategy.state.round == 2 and same_bits(strategy.state, without.state)
    evil = [row for row in rows if row["client_id"] == EVIL]
    assert {row["status"] for row in evil} == {status} and len(evil) == 2
    assert all(re.search(cause, row["cause"]) for row in evil), evil
    assert {row["status"] for row in rows if row["client_id"] != EVIL} == {"ok"}


def test_an_honest_fourth_client_makes_another_sum():
    """Negative control: the comparison above can tell the two apart."""
    config = settings()
    whole = run(FaultyGrid(people(4)), config)
    without = run(FaultyGrid(people(4), {(r, EVIL): [lost(5)] * 9 for r in (1, 2)}), config)
    assert not same_bits(whole.state, without.state)


def test_without_the_bound_the_same_attack_makes_the_sum_its_own():
    config = settings(server__max_norm_ratio=0.0)
    strategy = run(AttackedGrid(scaled(lora_B=1e6)), config)
    norms = [float(svd.S[0]) for svd in strategy.state.change.values()]
    assert min(norms) > 1e4


def test_observers_hear_once_of_everybody_also_where_the_round_decides():
    shown = Told()
    run(AttackedGrid(scaled(lora_B=1e6)), observer=shown)
    replied = [(client_id, outcome) for client_id, outcome, _, _ in shown.of("replied")]
    assert len(replied) == 8 and replied.count((EVIL, Outcome.REFUSED)) == 2
    assert sum(outcome is Outcome.OK for _, outcome in replied) == 6


def test_what_the_bound_remembers_is_in_the_checkpoints_notes():
    strategy = run(FaultyGrid(people(4)))
    assert {at: len(norms) for at, norms in strategy.norms.rounds.items()} == {1: 4, 2: 4}
    resumed = type(strategy)(settings(), state=strategy.state)
    resumed.restore({"norms": strategy.norms.to_dict()}, FaultyGrid(people(4)))
    assert resumed.norms == strategy.norms


# --- the share of a round's weight ------------------------------------------------------------


def test_a_claim_of_a_billion_examples_has_the_largest_share_and_no_more():
    def claim(content):
        content["report"]["num-examples"] = 10**9

    reports = {EVIL: capability(EVIL, num_examples=10**9)}
    rows: list = []
    grid = AttackedGrid(of_training(claim), reports=reports)
    config = settings(num_server_rounds=1, method__server_learning_rate=1.0)
    strategy = run(grid, config, rows=rows)
    shares = {row["client_id"]: row["discount"] * row["num_examples"] for row in rows}
    total = sum(shares.values())
    assert shares[EVIL] / total == pytest.approx(largest_share(4))
    dense = dict.fromkeys(SHAPES, 0.0)
    for (_, client_id), result in grid.results.items():
        for name, factors in result.adapter.items():
            dense[name] = dense[name] + shares[client_id] / total * factors.delta_weight()
    assert distance(strategy.state.change, dense) < 1e-9
    (row,) = [row for row in rows if row["client_id"] == EVIL]
    assert row["status"] == "ok" and "the largest share of a round's weight" in row["cause"]


@pytest.mark.parametrize("claim", [2**62, 2**63, 10**9 + 1])
def test_a_claim_beyond_any_count_leaves_the_node_out(claim):
    rows: list = []
    reports = {EVIL: capability(EVIL, num_examples=claim)}
    strategy = run(FaultyGrid(people(4), reports=reports), rows=rows)
    assert sorted(strategy.roster.members) == ["client_1", "client_2", "client_3"]
    (cause,) = strategy.roster.left_out.values()
    assert f"'num-examples' is {claim}, expected" in cause and strategy.state.round == 2


# --- the base ---------------------------------------------------------------------------------

LIES = {
    "2**40 features": ({"out_features": (2**40, 6, 20)}, "expected 1 to 1.04858e"),
    "negative features": ({"in_features": (-12, 12, 12)}, "is -12, expected 1 to"),
    "one feature more": ({"out_features": (12, 6, 21)}, "[out, in] is [21, 12], expected [20, 12]"),
    "another orientation": ({"fan_in_fan_out": True}, "fan_in_fan_out is True, expected False"),
    "a module less": (
        {"modules": ("attn.q", "attn.v"), "out_features": (12, 6), "in_features": (12, 12)},
        "lacks module 'mlp.up'",
    ),
    "a module twice": ({"modules": ("attn.q", "attn.q", "mlp.up")}, "a module is named twice"),
    "sizes for fewer modules": ({"out_features": (12, 6)}, "have [2, 3] entries"),
    "features of no model": ({"out_features": (2**20,) * 3}, "[out, in] is [1048576, 12]"),
    "a name with a newline": ({"client_id": "client_0\nclient_1"}, "expected 1 to 128 characters"),
    "a name of 10,000 letters": ({"client_id": "x" * 10_000}, "(10000 characters)"),
    "no name": ({"client_id": ""}, "the client's name is ''"),
    "a version of 10,000 letters": ({"version": "9" * 10_000}, "expected at most 64 characters"),
    "20 million bytes free twice over": ({"free_bytes": 2**60}, "'free-bytes' is 11529"),
    "a thousand kernels": ({"runs": ("matmul",) * 1000}, "'runs' has 1000 entries"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_about_the_base_leaves_its_node_out_and_nobody_else(lie):
    """The liar is the first by name, by node and in the order of arrival."""
    change, cause = LIES[lie]
    reports = {EVIL: replace(capability(EVIL), **change)}
    strategy = run(FaultyGrid(people(4), reports=reports))
    assert sorted(strategy.roster.members) == ["client_1", "client_2", "client_3"]
    assert strategy.roster.shapes == SHAPES and not strategy.roster.fan_in_fan_out
    (said,) = strategy.roster.left_out.values()
    assert cause in said and len(said) < 300 and said.isprintable()
    assert strategy.state.round == 2 and strategy.state.change.shapes == SHAPES


def test_words_of_a_node_are_cut_and_printable():
    said = {"coverage": "\x1b[31m" + "x" * 10_000, "device": "=cmd()|\x00", "cause": ""}
    strategy = run(FaultyGrid(people(4), reports={EVIL: replace(capability(EVIL), **said)}))
    member = strategy.roster.members[EVIL].capability
    assert member.coverage.startswith("\\x1b[31mxxx") and len(member.coverage) < 2100
    assert member.device == "=cmd()|\\x00"
    assert strategy.roster.coverage == "", "what most say, not the first"


class LyingGrid(TamperingGrid):
    """All but the last client report ``change`` of their base."""

    change: dict

    def _on_the_way(self, message, reply):
        if message.metadata.message_type == MessageType.QUERY:
            if self._client(message) != "client_03":
                reply.content["capability"].update(self.change)
            return [reply]
        return super()._on_the_way(message, reply)


def test_the_servers_own_config_json_tells_three_liars_from_the_one_who_holds_the_base(
    worker, tmp_path
):
    grid = LyingGrid(worker)
    sizes = [129, *(out for out, _ in worker.slots.shapes.values())]
    del sizes[1]
    grid.change = {"out-features": sizes}
    strategy, _ = federation(grid, small(), tmp_path / "run")
    assert list(strategy.roster.members) == ["client_03"] and strategy.state.round == 1
    assert strategy.roster.shapes == worker.slots.shapes
    causes = set(strategy.roster.left_out.values())
    assert len(causes) == 1 and "is [129, 128], expected [128, 128]" in causes.pop()


# --- evaluation -------------------------------------------------------------------------------

GOOD = Score(loss=20.0, tokens=10, rows=4, exact_match=1.0, rouge_l=1.5, generated=4)
FALSE_SCORES = {
    "a loss of 1e300": ({"loss": 1e300}, "'loss' is 1e+300"),
    "a loss of 1e6": ({"loss": 1e6}, "1e+06 over 10 tokens, expected at most 100 for each"),
    "a loss without tokens": ({"tokens": 0}, "over 0 tokens"),
    "more rows than are asked": ({"rows": 10**6}, "1000000 rows under 'rank_2', eval.max-examples"),
    "more tokens than rows hold": ({"tokens": 10**6}, "1000000 tokens in 4 rows"),
    "more matches than answers": ({"exact_match": 5.0}, "5 matches"),
    "more answers than rows": ({"generated": 5}, "in 5 generated of 4 rows"),
    "a negative sum": ({"rouge_l": -1.0}, "'rouge-l' is -1.0, expected 0"),
    "no number": ({"loss": float("nan")}, "'loss' is nan"),
    "2**63 rows": ({"rows": 2**63}, "'rows' is 92233"),
    "more text than tokens hold": (
        {"answer_bytes": 10**6},
        "1000000 bytes of answers in 10",
    ),
    "more right than asked": (
        {"choice_rows": 2, "correct": 3.0},
        "3 right of 2 multiple-choice rows among 4",
    ),
    "more choices than rows": ({"choice_rows": 5}, "5 multiple-choice rows among 4"),
    "more passed than asked": ({"pattern_rows": 1, "passed": 2.0}, "2 passed of 1 answers"),
}


def evaluated(score, name="rank_2"):
    """The eval metrics of a run in which the evil client reports this; and its reported causes."""

    def attack(reply, message):
        return None

    class Grid(AttackedGrid):
        def answer(self, message):
            if message.metadata.message_type != MessageType.EVALUATE:
                return super().answer(message)
            client_id = self.clients[message.metadata.dst_node_id]
            scores = {"rank_2": GOOD, "rank_4": GOOD}
            if client_id == EVIL and score is not None:
                scores[name] = score
            if client_id == EVIL and score is None:
                scores = {}
            result = EvalResult(client_id=client_id, scores=scores)
            return Message(encode_evaluate_result(result), reply_to=message)

    shown = Told()
    config = settings(eval__every=1, eval__max_examples=4, num_server_rounds=1)
    run(Grid(attack), config, observer=shown)
    metrics = shown.of("round_finished")[-1][0]
    causes = dict(shown.of("evaluated"))
    return {k: v for k, v in metrics.items() if k.startswith("eval_")}, causes


@pytest.mark.parametrize("lie", FALSE_SCORES)
def test_false_scores_are_that_clients_failed_evaluation_and_move_no_mean(lie):
    change, cause = FALSE_SCORES[lie]
    metrics, causes = evaluated(replace(GOOD, **change))
    without, _ = evaluated(None)
    assert metrics == without and metrics["eval_loss"] == 2.0
    assert cause in causes.pop(EVIL) and set(causes.values()) == {""}


def test_scores_of_a_class_that_was_not_sent_are_refused():
    _, causes = evaluated(GOOD, name="rank_777\x1b")
    assert "scores of 'rank_777\\x1b', which was not sent" in causes[EVIL]


def test_the_worst_that_a_liar_can_report_moves_the_mean_no_further_than_its_bound():
    worst = replace(GOOD, loss=1000.0)
    metrics, causes = evaluated(worst)
    assert causes[EVIL] == "" and 2.0 < metrics["eval_loss"] <= 100.0


# --- what is written --------------------------------------------------------------------------


def test_tables_logs_and_the_live_file_hold_no_escapes_and_no_formulas(worker, tmp_path, caplog):
    evil_words = "=HYPERLINK(1)\x1b[2J\nclient_02: ok\x00" + "y" * 5000

    def tamper(reply, message):
        reply.content["report"]["note"] = evil_words
        return [reply]

    grid = TamperingGrid(worker, tamper=tamper, victims=["client_01"])
    _, run_folder = federation(grid, small(), tmp_path / "run")
    table = (tmp_path / "run" / "clients.csv").read_text(encoding="utf-8")
    assert all(line.isprintable() for line in table.splitlines()) and len(table) < 4000
    assert ",'=HYPERLINK(1)\\x1b[2J client_02: ok" in table and len(table.splitlines()) == 5
    (row,) = [r for r in run_folder.client_rows() if r["client_id"] == "client_01"]
    assert row["cause"].startswith("=HYPERLINK(1)\\x1b[2J client_02: ok"), "read back as it was"
    for name in ("live.json", "metrics.jsonl"):
        text = (tmp_path / "run" / name).read_text(encoding="utf-8")
        assert "\x1b" not in text and "\\u001b" not in text
    assert all(line.isprintable() for r in caplog.records for line in r.getMessage().split("\n"))
    assert rounds(tmp_path / "run")[1]["clients_ok"] == 4


def test_a_federation_of_liars_alone_is_told_so():
    reports = {name: capability(name, num_examples=2**62) for name in people(2).values()}
    with pytest.raises(UserError, match=r"no client can train.*'num-examples' is 4611686"):
        run(FaultyGrid(people(2), reports=reports))
