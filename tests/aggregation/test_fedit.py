"""Methods that average factors: FedIT, and what each of its successors changes about it."""

import pytest
import torch

import equations
import reference
from builders import random_adapter
from flexlora.aggregation import METHODS, make_method
from flexlora.aggregation.aggregate import aggregate
from flexlora.aggregation.engine.factor_sums import FactorSums
from flexlora.aggregation.engine.held_factors import held_factors
from flexlora.aggregation.engine.open_round import OpenRound
from flexlora.aggregation.engine.starts import Factoring
from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.aggregation.engine.updates import Update
from flexlora.lora.adapters import Adapter, LoRAFactors
from flexlora.lora.ranks import RankClass
from one_round import CLASSES, OneRound, distance, next_state, noisy, same_bits
from one_round import SHAPES as THREE_SHAPES

SHAPES = {"attn.q": (10, 12), "mlp.up": (14, 9)}
FACTORING = Factoring(alpha=8.0, seed=3)


@pytest.fixture
def clients():
    ranks, alphas, examples = (2, 5, 3), (4.0, 16.0, 9.0), (10, 30, 25)
    return [
        (random_adapter(SHAPES, rank, alpha=alpha, seed=k, rslora=k == 2), count)
        for k, (rank, alpha, count) in enumerate(zip(ranks, alphas, examples, strict=True))
    ]


def one_round(clients, order=(0, 1, 2)):
    method = make_method("fedit")
    opened = OpenRound(method, State(round=0, change=GlobalChange.zero(SHAPES, torch.float64)), {})
    for k in order:
        adapter, count = clients[k]
        opened.add(Update(client_id=f"client_{k}", adapter=adapter, num_examples=count))
    return method, opened.close()


def test_the_product_of_the_padded_means_is_what_the_state_holds(clients):
    _, state = one_round(clients)
    for name in SHAPES:
        mean_A, mean_B = reference.zero_padded_factors(clients, name, rank=5)
        assert reference.relative_error(state.change.delta_weight(name), mean_B @ mean_A) < 1e-12


def test_averaging_factors_is_not_averaging_products(clients):
    """Trap T2, the negative control: with one client the two agree, with three they do not."""
    _, state = one_round(clients)
    products = aggregate(clients, method="flexlora")
    alone = aggregate(clients[:1], method="fedit")
    for name in SHAPES:
        gap = reference.relative_error(state.change.delta_weight(name), products.delta_weight(name))
        assert gap > 0.1
        own = clients[0][0].delta_weight(name)
        assert reference.relative_error(alone.delta_weight(name), own) < 1e-12


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_client_is_sent_the_first_rows_and_columns(clients, rank):
    method, state = one_round(clients)
    start = method.start(state, RankClass(name="c", rank=rank), FACTORING)
    for name in SHAPES:
        mean_A, mean_B = reference.zero_padded_factors(clients, name, rank=5)
        sent = start.trained[name].delta_weight()
        assert reference.relative_error(sent, mean_B[:, :rank] @ mean_A[:rank]) < 1e-12


def test_rows_that_nobody_has_yet_start_live_and_round_one_is_nested(clients):
    method, state = one_round(clients)
    wide = method.start(state, RankClass(name="c", rank=8), FACTORING).trained["attn.q"]
    assert bool((wide.lora_A[5:].abs().sum(dim=1) > 0).all()) and not wide.lora_B[:, 5:].any()
    zero = State(round=0, change=GlobalChange.zero(SHAPES, torch.float64))
    small, large = (
        method.start(zero, RankClass(name="c", rank=rank), FACTORING).trained["mlp.up"]
        for rank in (2, 6)
    )
    assert torch.equal(small.lora_A, large.lora_A[:2]) and not large.lora_B.any()


def test_the_same_clients_in_another_order_give_the_same_bits(clients):
    (_, other), (_, state) = one_round(clients, order=(2, 0, 1)), one_round(clients)
    for name in SHAPES:
        assert torch.equal(other.change.delta_weight(name), state.change.delta_weight(name))


@pytest.mark.parametrize("method", ["ffa-lora", "rolora", "rbla"])
def test_aggregate_of_shared_nested_rows_averages_the_columns_alone(method):
    """With ``lora_A`` shared, a row that only some have is not shrunk by those who lack it."""
    round_ = OneRound("ffa-lora")
    for start in round_.sent.values():
        for name, factors in start.trained.items():
            widest = round_.sent["rank_7"].trained[name].lora_A
            assert torch.equal(factors.lora_A, widest[: factors.rank])
    clients = [(round_.update(k).adapter, 10 + 7 * k) for k in range(5)]
    dense = {module: reference.flexlora_average(clients, module) for module in THREE_SHAPES}
    error = distance(aggregate(clients, method=method), dense)
    assert error > 0.1 if method == "rbla" else error < 1e-12


def test_ffa_lora_never_moves_the_rows():
    state, rows = None, None
    for _ in range(3):
        round_ = OneRound("ffa-lora", state)
        assert {start.trainable for start in round_.sent.values()} == {("lora_B",)}
        rows = rows or {n: f.lora_A for n, f in round_.sent["rank_7"].trained.items()}
        state = round_.finish([round_.update(k, 3 + k) for k in range(5)])
        for name, first in rows.items():
            assert torch.equal(held_factors(state, name)[0], first)
            for start in OneRound("ffa-lora", state).sent.values():
                assert torch.equal(start.trained[name].lora_A, first[: start.trained[name].rank])


def test_rolora_trains_the_two_factors_in_turn_and_leaves_the_other_alone():
    state = next_state("rolora")
    for trainable in ("lora_A", "lora_B", "lora_A"):
        round_ = OneRound("rolora", state)
        assert {start.trainable for start in round_.sent.values()} == {(trainable,)}
        after = round_.finish([round_.update(k, 3 + k) for k in range(5)])
        for name in THREE_SHAPES:
            for label, before, now in zip(
                ("lora_A", "lora_B"),
                held_factors(state, name),
                held_factors(after, name),
                strict=True,
            ):
                assert torch.equal(before, now) == (label != trainable)
        state = after


def test_hetlora_weighs_by_the_norm_of_the_update_and_not_by_examples():
    """The second client sends twice the product of the first, so it counts 2 to 1."""
    adapter = random_adapter(THREE_SHAPES, 3, seed=4)
    doubled = Adapter({n: f.map(lambda t: t * 2**0.5) for n, f in adapter.items()})
    total = aggregate([(adapter, 900), (doubled, 1)], method="hetlora")
    for name, factors in adapter.items():
        mean_of_roots = (1 + 2 * 2**0.5) / 3
        expected = mean_of_roots**2 * reference.delta_weight(factors)
        assert reference.relative_error(total.delta_weight(name), expected) < 1e-12


def test_a_pruned_reply_counts_as_zeros_in_the_rows_it_dropped():
    method = make_method("hetlora", prune_factor=0.5, prune_penalty=0.1)
    round_ = OneRound(method)
    pruned, whole = round_.update(2, pruned=3), round_.update(5)
    state = round_.finish([pruned, whole])
    replies = [
        equations.Reply(adapter=u.adapter, num_examples=1, start=None) for u in (pruned, whole)
    ]
    A, B = equations.hetlora_round(replies, "attn.q", 7)
    assert pruned.adapter["attn.q"].rank == 4
    got = state.change.delta_weight("attn.q")
    assert reference.relative_error(got, torch.from_numpy(B @ A)) < 1e-12


def test_hetlora_without_any_change_to_weigh_by_is_the_same_state_one_round_later():
    round_ = OneRound("hetlora")
    state = round_.finish([round_.update(k, trained=False) for k in range(3)])
    assert state.round == 1 and not state.extra
    assert all(svd.rank == 0 for svd in state.change.values())


def test_rows_that_nobody_of_a_round_has_stay_as_they_were_in_rbla():
    state = next_state("rbla")
    round_ = OneRound("rbla", state)
    after = round_.finish([round_.update(0, 5), round_.update(3, 9)])
    for name in THREE_SHAPES:
        for before, now in zip(held_factors(state, name), held_factors(after, name), strict=True):
            rows, kept = (before, now) if before.shape[1] == 12 else (before.T, now.T)
            assert torch.equal(rows[2:], kept[2:]) and not torch.equal(rows[:2], kept[:2])


def test_slora_trains_whole_columns_that_change_by_round_and_are_nested_across_ranks():
    method = make_method("slora", sparse_rounds=3)
    seen, state = [], None
    for _ in range(3):
        round_ = OneRound(method, state, rslora=True)
        columns = {}
        for name, factors in round_.sent["rank_7"].trained.items():
            rows = factors.lora_A
            assert torch.equal(rows.sum(dim=1), torch.ones(factors.rank).double())
            assert torch.equal(rows @ rows.T, torch.eye(factors.rank).double())
            assert factors.scaling == 1.0 and not factors.lora_B.any()
            for start in round_.sent.values():
                weak = start.trained[name]
                assert torch.equal(weak.lora_A, rows[: weak.rank])
            columns[name] = rows.argmax(dim=1).tolist()
        assert columns["attn.q"] != columns["mlp.up"] and columns not in seen
        seen.append(columns)
        update = round_.update(0, 5)
        change = update.adapter["attn.q"].delta_weight()
        assert int((change.norm(dim=0) > 0).sum()) == 2
        state = round_.finish([update])
    assert {start.trainable for start in OneRound(method, state).sent.values()} == {
        ("lora_A", "lora_B")
    }


def test_slora_reports_what_its_cut_drops():
    """Trap T9: three rounds of at most seven columns have more than seven directions."""
    first = next_state(make_method("slora", sparse_rounds=3))
    second = next_state(make_method("slora", sparse_rounds=3), first)
    assert second.dropped_energy == 0.0
    cut = next_state(make_method("slora", sparse_rounds=2), first)
    lost, total = 0.0, 0.0
    for name, shape in THREE_SHAPES.items():
        dense = second.change.delta_weight(name)
        kept = reference.truncate(dense, min(7, *shape))
        assert reference.relative_error(cut.change.delta_weight(name), kept) < 1e-10
        lost, total = (
            lost + float((dense - kept).square().sum()),
            total + float(dense.square().sum()),
        )
    assert lost > 0 and cut.dropped_energy == pytest.approx(lost / total, rel=1e-9)


def test_slora_keeps_what_it_learned_where_the_last_sparse_round_is_empty():
    """The SVD start came with the close of that round; without one, FedIT began from nothing."""
    method = make_method("slora", sparse_rounds=2)
    learned = next_state(method)
    empty = OneRound(method, learned).finish([])
    assert empty.round == 2
    round_ = OneRound(method, empty)
    for name, factors in round_.sent["rank_7"].trained.items():
        expected = reference.truncate(learned.change.delta_weight(name), factors.rank)
        assert reference.relative_error(factors.delta_weight(), expected) < 1e-10
    strong = [round_.update(k, 5, rank_class="rank_7", trained=False) for k in range(3)]
    kept = {n: reference.truncate(learned.change.delta_weight(n), 7) for n in THREE_SHAPES}
    assert distance(round_.finish(strong).change, kept) < 1e-10


def test_fed_plora_draws_terms_by_client_and_round_and_everybody_has_the_same_model():
    method = make_method("fed-plora", carried_rank=9)
    state = next_state(method)
    drawn = []
    for current in (state, next_state(method, state)):
        round_ = OneRound(method, current)
        for k, rank_class in enumerate(CLASSES * 2):
            shared, start = round_.sent[rank_class.name], round_.start(k)
            terms = shared.drawn_terms(f"client_{k}")["mlp.up"]
            assert len(terms) == rank_class.rank and terms == sorted(set(terms))
            drawn.append(tuple(terms))
            for name in THREE_SHAPES:
                assert start.trained[name].rank == rank_class.rank_of(name, *THREE_SHAPES[name])
            assert distance(current.change, start.served()) < 1e-12
    first, second = drawn[:6], drawn[6:]
    assert sum(now != before for now, before in zip(second, first, strict=True)) >= 4, "by round"
    assert sum(first[k] != first[k + 3] for k in range(3)) >= 2, "by client"


def test_terms_that_nobody_drew_stay_as_they_were_sent_and_can_still_train():
    """Trap T8: before there was anything to hold, they became zeros in both factors."""
    method = make_method("fed-plora", carried_rank=12)
    state = None
    for _ in range(2):
        round_ = OneRound(method, state)
        state = round_.finish([round_.update(0, 5), round_.update(3, 9)])
        sent = round_.sent["rank_2"]
        for name, factors in sent.trained.items():
            A, B = held_factors(state, name)
            drawn = {t for k in (0, 3) for t in sent.drawn_terms(f"client_{k}")[name]}
            for term in set(range(factors.rank)) - drawn:
                assert torch.equal(A[term], factors.lora_A[term]) and bool(A[term].any())
                torch.testing.assert_close(
                    B[:, term], factors.scaling * factors.lora_B[:, term], rtol=1e-14, atol=0
                )


@pytest.mark.parametrize("wire", ["float64", "float32"])
def test_fedex_lora_sends_no_residual_where_there_is_none(wire):
    """The rounding of two equal matrices must not become directions that are stored and sent."""
    start = State(round=0, change=GlobalChange.zero(THREE_SHAPES, getattr(torch, wire)))
    round_ = OneRound("fedex-lora", start, wire=wire)
    alone = OneRound("fedex-lora", round_.finish([round_.update(2, 5)]), wire=wire)
    assert alone.sent["rank_7"].carried is None
    assert alone.sent["rank_3"].carried["attn.q"].rank == 4
    several = round_.finish([round_.update(k, 5) for k in range(3)])
    assert OneRound("fedex-lora", several, wire=wire).sent["rank_7"].carried is not None


# --- the gap between the mean of the products and the product of the means --------------------

WIDE = {"q": (40, 60), "up": (90, 50)}


def gaps(adapters, examples):
    round_ = OneRound("residual", State(round=0, change=GlobalChange.zero(WIDE, torch.float64)))
    opened = OpenRound(round_.method, round_.state, {}, factor_gap=True)
    for k, (adapter, n) in enumerate(zip(adapters, examples, strict=True)):
        opened.add(Update(client_id=f"c{k}", adapter=adapter, num_examples=n))
    return {name: report["factor_gap"] for name, report in opened.close().modules.items()}


def test_the_factor_gap_is_the_dense_one_within_its_sampling_error():
    adapters = [random_adapter(WIDE, rank, alpha=4.0 * rank, seed=rank) for rank in (3, 5, 8, 2)]
    examples = (10, 40, 25, 60)
    clients = list(zip(adapters, examples, strict=True))
    for name, got in gaps(adapters, examples).items():
        mean_A, mean_B = reference.zero_padded_factors(clients, name, rank=8)
        mean = reference.flexlora_average(clients, name)
        exact = float((mean_B @ mean_A - mean).norm() / mean.norm())
        assert exact > 0.5 and abs(got - exact) < 0.4 * exact


def test_the_factor_gap_is_not_led_astray_by_rows_that_all_point_one_way():
    """``mean(sB) mean(A)`` holds the part along the ones, the gap the other half: 1 / sqrt(2)."""
    ones = torch.ones(1, 60, dtype=torch.float64)
    other = ones * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(30)
    b, c = torch.eye(40, dtype=torch.float64)[:, :2].split(1, dim=1)
    pairs = [
        LoRAFactors(lora_A=ones + sign * other, lora_B=b + sign * c, alpha=1.0) for sign in (1, -1)
    ]
    state = State(round=0, change=GlobalChange.zero({"q": (40, 60)}, torch.float64))
    opened = OpenRound(make_method("residual"), state, {}, factor_gap=True)
    for k, factors in enumerate(pairs):
        opened.add(Update(client_id=f"c{k}", adapter=Adapter({"q": factors}), num_examples=1))
    assert opened.close().modules["q"]["factor_gap"] == pytest.approx(0.5**0.5, rel=0.25)


def test_the_factor_gap_puts_drawn_terms_where_they_belong():
    round_ = OneRound(make_method("fed-plora", carried_rank=12))
    updates = [round_.update(k, 5) for k in (0, 3)]
    got = round_.finish(updates, factor_gap=True).modules["mlp.up"]["factor_gap"]
    exact = {}
    for placed in (True, False):
        factors = [update.adapter["mlp.up"] for update in updates]
        terms = [
            round_.sent["rank_2"].drawn_terms(update.client_id)["mlp.up"] if placed else None
            for update in updates
        ]
        padded = [equations.padded(f, 12, t) for f, t in zip(factors, terms, strict=True)]
        A, B = ((one + two) / 2 for one, two in zip(*padded, strict=True))
        mean = sum(reference.delta_weight(f) for f in factors) / 2
        exact[placed] = float((torch.from_numpy(B @ A) - mean).norm() / mean.norm())
    assert got == pytest.approx(exact[True], rel=0.1)
    assert got != pytest.approx(exact[False], rel=0.25)


def test_there_is_no_factor_gap_for_one_client_nor_where_one_factor_is_shared():
    first = random_adapter(WIDE, 4, seed=1)
    others = [noisy(first, ("lora_B",), seed=k) for k in range(3)]
    for adapters in ([first], [first, *others]):
        found = gaps(adapters, [3 + k for k in range(len(adapters))])
        assert max(found.values()) < 1e-14
    assert min(gaps([first, noisy(first, ("lora_A", "lora_B"), seed=9)], [1, 2]).values()) > 0.05


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_gap_is_reported_for_every_module_where_it_is_asked_for_and_moves_no_bit(name):
    round_ = OneRound(name, next_state(name))
    updates = [round_.update(k, 10 + 7 * k) for k in range(5)]
    without, state = round_.finish(updates), round_.finish(updates, factor_gap=True)
    assert set(state.modules) == set(THREE_SHAPES) and same_bits(state, without)
    assert all(report["factor_gap"] >= 0.0 for report in state.modules.values())
    assert not any("factor_gap" in report for report in without.modules.values())


def test_without_being_asked_nothing_of_the_gap_is_computed(monkeypatch):
    """Its sums would cost every round a second pass over every update."""
    added = []
    monkeypatch.setattr(FactorSums, "add", lambda *a, **k: added.append(1))
    next_state("flexlora")
    assert not added
