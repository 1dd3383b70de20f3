"""Updates that come after their round has closed: what they started from is what is subtracted."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from flwr.app import MessageType

import reference
from builders import random_adapter
from faulty_grid import SILENT, Fate, FaultyGrid, people, settings
from faulty_grid import run as faulty_run
from federation import client_rows, federation, same_bytes, small
from flexlora.aggregation import make_method
from flexlora.aggregation.engine.open_round import OpenRound
from flexlora.aggregation.engine.starts import Factoring
from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.aggregation.engine.updates import Update
from flexlora.lora.ranks import RankClass
from flexlora.runs.outcomes import Outcome
from flexlora.server.rounds.client_rows import ClientRow
from flexlora.server.rounds.round_metrics import RoundMetrics
from flexlora.simulations.engine.cohorts import CohortLimits
from flexlora.simulations.engine.grid import InProcessGrid
from packed import trained

VICTIM = "client_02"
SHAPES = {"attn.q": (12, 12), "mlp.up": (20, 12)}
LATE = Fate(seconds=105.0)  # the round lasts 100


class SlowGrid(InProcessGrid):
    """Keeps one client's reply of round ``slow_round`` back until ``until`` rounds have begun."""

    def __init__(self, worker, *, slow_round=1, until=2):
        super().__init__(worker, limits=CohortLimits(clients=1), wire_dtype="float32")
        self.slow_round, self.until, self.now = slow_round, until, 0
        self.kept, self.updates = set(), Counter()

    def push_messages(self, messages):
        messages = list(messages)
        ids = super().push_messages(messages)
        for message_id, message in zip(ids, messages, strict=True):
            if message.metadata.message_type == MessageType.TRAIN:
                self.now = int(message.metadata.group_id)
                if self._client(message) == VICTIM and self.now == self.slow_round:
                    self.kept.add(message_id)
        return ids

    def pull_messages(self, message_ids):
        back = [m for m in message_ids if m not in self.kept or self.now >= self.until]
        replies = list(super().pull_messages(back))
        self.updates[self.now] += sum(trained(reply.content) for reply in replies)
        return replies


CONFIG = {"num_server_rounds": 3, "server__round_timeout_seconds": 0.3}


def run(worker, tmp_path, *, until=2, **changes):
    grid = SlowGrid(worker, until=until)
    config = small(method__name="residual", **CONFIG, **changes)
    strategy, folder = federation(grid, config, tmp_path / "run")
    return grid, strategy, folder


def test_a_late_update_counts_in_the_next_round_and_says_so(worker, tmp_path):
    _, _, folder = run(worker, tmp_path)
    first = {row["client_id"]: row for row in client_rows(folder.path, 1)}
    assert first[VICTIM]["status"] == "failed" and "no reply within" in first[VICTIM]["cause"]
    second = [row for row in client_rows(folder.path, 2) if row["client_id"] == VICTIM]
    assert sorted(row["cause"] for row in second) == ["", "late: trained from round 0"]
    assert all(row["status"] == "ok" for row in second)


def test_without_late_rounds_it_is_never_asked_for_again(worker, tmp_path):
    grid, _, folder = run(worker, tmp_path, server__late_rounds=0)
    assert len([row for row in client_rows(folder.path, 2) if row["client_id"] == VICTIM]) == 1
    assert grid.updates[2] == 4


def test_one_that_comes_too_late_is_not_counted(worker, tmp_path):
    grid, _, _ = run(worker, tmp_path, until=3)
    assert [grid.updates[k] for k in (1, 2, 3)] == [3, 4, 4]


def test_the_same_delay_gives_the_same_bytes(worker, tmp_path):
    first, second = run(worker, tmp_path / "a")[1], run(worker, tmp_path / "b")[1]
    assert same_bytes(first.state, second.state)
    prompt = federation(
        InProcessGrid(worker, limits=CohortLimits(clients=1), wire_dtype="float32"),
        small(method__name="residual", num_server_rounds=3),
        tmp_path / "c",
    )[0]
    assert not same_bytes(first.state, prompt.state)


def late_round(name):
    """A round 4 with one prompt update and one that was trained from the start of round 3."""
    method = make_method(name, server_learning_rate=1.0)
    rank_class = RankClass(name="rank_3", rank=3)
    old = random_state(seed=1, server_round=3)
    new = random_state(seed=2, server_round=4)
    factoring = Factoring(alpha=8.0)
    starts = {
        "rank_3@3": method.start(old, rank_class, factoring).sealed(),
        "rank_3": method.start(new, rank_class, factoring).sealed(),
    }
    updates = []
    for k, (key, start) in enumerate(starts.items()):
        trained = random_adapter(SHAPES, 3, alpha=8.0, seed=10 + k)
        updates.append(
            Update(
                client_id=f"c{k}",
                adapter=trained,
                num_examples=10 + 20 * k,
                rank_class=key,
                digest=start.digest,
            )
        )
    return method, new, starts, updates


def random_state(*, seed, server_round):
    adapter = random_adapter(SHAPES, 5, seed=seed)
    change = GlobalChange.zero(SHAPES, torch.float64)
    opened = OpenRound(make_method("flexlora"), State(round=server_round - 1, change=change), {})
    opened.add(Update(client_id="x", adapter=adapter, num_examples=1))
    return opened.close()


def test_residual_subtracts_the_start_that_the_late_update_was_trained_from():
    method, state, starts, updates = late_round("residual")
    opened = OpenRound(method, state, starts, {"c1": "rank_3"})
    for update in updates:
        opened.add(update)
    result = opened.close().change
    clients = [(update.adapter, update.num_examples) for update in updates]
    sent = [starts[update.rank_class].trained for update in updates]
    for name in SHAPES:
        G = state.change.delta_weight(name)
        expected = reference.residual_form(G, clients, sent, name)
        assert reference.relative_error(result.delta_weight(name), expected) < 1e-12
        wrong = reference.residual_form(G, clients, [sent[1], sent[1]], name)
        assert reference.relative_error(result.delta_weight(name), wrong) > 0.05


@pytest.mark.parametrize("name", ["residual", "flexlora", "carried"])
def test_a_discount_scales_the_late_updates_share_and_nothing_else(name):
    """``p_k = d_k n_k / sum_j d_j n_j``, against the dense equations in float64."""
    method, state, starts, (late, prompt) = late_round(name)
    late = replace(late, late=True, discount=0.25)
    opened = OpenRound(method, state, starts, {"c1": "rank_3"})
    for update in (late, prompt):
        opened.add(update)
    result = opened.close().change

    def dense(weight, module):
        clients = [(late.adapter, weight * late.num_examples), (prompt.adapter, 30)]
        if name == "flexlora":
            return reference.flexlora_average(clients, module)
        sent = [starts[update.rank_class].trained for update in (late, prompt)]
        return reference.residual_form(state.change.delta_weight(module), clients, sent, module)

    for module in SHAPES:
        got = result.delta_weight(module)
        assert reference.relative_error(got, dense(0.25, module)) < 1e-12
        assert reference.relative_error(got, dense(1.0, module)) > 0.01


def late_run(weight, *, fate=LATE, rounds_late=1, **options):
    """Three clients, one of which answers round 1 in a later round."""
    slow = {(t, "client_0"): [Fate(seconds=20.0)] for t in range(2, rounds_late + 1)}
    slow[rounds_late + 1, "client_0"] = [Fate(seconds=30.0)]
    grid, rows = FaultyGrid(people(3), {(1, "client_1"): [fate], **slow}), []
    changes = {"num_server_rounds": rounds_late + 1, "server__late_rounds": rounds_late}
    config = settings(**changes, server__resends=0, server__late_weight=weight, **options)
    strategy = faulty_run(grid, config, rows=rows)
    late = [row for row in rows if row["cause"].startswith("late")]
    return strategy.state, late[0] if late else None


@pytest.mark.parametrize(
    ("weight", "rounds_late", "seconds", "note"),
    [
        (0.5, 1, 105.0, "; it counts 0.5 times"),
        (1.0, 1, 105.0, ""),
        (0.5, 2, 125.0, "; it counts 0.25 times"),
    ],
)
def test_a_late_updates_row_says_what_it_counts(weight, rounds_late, seconds, note):
    _, row = late_run(weight, fate=Fate(seconds=seconds), rounds_late=rounds_late)
    assert (row["status"], row["round"]) == ("ok", rounds_late + 1)
    assert row["cause"] == f"late: trained from round 0{note}"


def test_at_weight_zero_it_is_dropped_with_its_cause_and_the_round_is_the_round_without_it():
    dropped, row = late_run(0.0)
    assert row["status"] == "refused"
    assert row["cause"] == "late: trained from round 0; dropped, as server.late-weight is 0"
    without, _ = late_run(1.0, fate=SILENT)
    assert same_bytes(dropped, without)
    assert not same_bytes(dropped, late_run(0.5)[0])
    assert not same_bytes(late_run(0.5)[0], late_run(1.0)[0])


@pytest.mark.parametrize("method", ["hetlora", "rbla", "raflora", "fedit"])
def test_the_weight_reaches_the_sum_of_methods_that_weigh_in_ways_of_their_own(method):
    """HetLoRA, which weighs by norms, once wrote the note and summed as if it were 1."""
    runs = [late_run(weight, method__name=method)[0] for weight in (1.0, 0.01, 0.0)]
    assert not any(same_bytes(*pair) for pair in itertools.combinations(runs, 2))


def test_the_training_loss_of_a_round_discounts_a_late_update_as_its_sum_does():
    rows = [
        ClientRow(round=2, client_id="a", outcome=Outcome.OK, num_examples=30, train_loss=1.0),
        ClientRow(
            round=2,
            client_id="b",
            outcome=Outcome.OK,
            num_examples=40,
            train_loss=3.0,
            late=True,
            discount=0.25,
        ),
    ]
    metrics = RoundMetrics(server_round=2, measured=True)
    metrics.rows.extend(rows)
    assert metrics.totals()["train_loss"] == pytest.approx((30 * 1.0 + 10 * 3.0) / 40)


@pytest.mark.parametrize("method", ["rolora", "slora"])
def test_what_was_trained_for_another_kind_of_round_is_refused(worker, tmp_path, method):
    """RoLoRA's other factor, SLoRA's sparse columns after the switch."""
    changes = {"method__sparse_rounds": 1} if method == "slora" else {}
    grid = SlowGrid(worker)
    config = small(method__name=method, **CONFIG, **changes)
    _, folder = federation(grid, config, tmp_path / "run")
    rows = [row for row in client_rows(folder.path, 2) if row["client_id"] == VICTIM]
    assert sorted(row["status"] for row in rows) == ["ok", "refused"]
    (late,) = (row for row in rows if row["status"] == "refused")
    assert late["cause"].startswith("late: trained from round 0; client client_02: trained lora_B")


def test_a_late_update_of_drawn_terms_goes_to_the_terms_that_were_drawn(worker, tmp_path):
    """Fed-PLoRA draws by client and round: not by the name that a late update is counted under."""
    config = small(method__name="fed-plora", **CONFIG, method__carried_rank=6)
    strategy, folder = federation(SlowGrid(worker), config, tmp_path / "run")
    rows = [row for row in client_rows(folder.path, 2) if row["client_id"] == VICTIM]
    assert [row["status"] for row in rows] == ["ok", "ok"]
    method = make_method("fed-plora", carried_rank=6)
    shapes = strategy.state.change.shapes
    state = State(round=0, change=GlobalChange.zero(shapes))
    start = method.start(state, RankClass(name="rank_2", rank=2), Factoring(alpha=16.0)).sealed()
    own = start.for_client(VICTIM)
    changed = own.trained.map(lambda t: t + 1.0)
    update = Update(
        client_id=VICTIM,
        adapter=changed,
        num_examples=1,
        rank_class="rank_2@1",
        digest=start.digest,
        late=True,
    )
    opened = OpenRound(method, State(round=1, change=state.change), {"rank_2@1": start})
    opened.add(update)
    held = opened.close().extra
    for name in shapes:
        moved = held[f"lora_B/{name}"].abs().sum(0) > 0
        assert moved.nonzero().flatten().tolist() == start.drawn_terms(VICTIM)[name]
