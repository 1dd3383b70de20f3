"""Aggregation methods keep exactly the laws they declare, and equal the dense reference."""

import itertools
from dataclasses import replace

import pytest
import reference
import torch
from builders import random_adapter, random_factors
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora import Adapter, aggregate
from flexlora.aggregation import METHODS, GlobalChange, Law, State, Update, make_method
from flexlora.aggregation.base import Factoring
from flexlora.errors import UpdateRefused, UserError
from flexlora.linalg import FactoredSVD
from flexlora.ranks import RankClass
from flexlora.wire import over_the_wire

SHAPES = {"attn.q": (12, 12), "attn.v": (6, 12), "mlp.up": (20, 12)}
LAWS = [text for name, text in vars(Law).items() if name.isupper()]
CLASSES = tuple(RankClass(name=f"rank_{rank}", rank=rank) for rank in (2, 3, 7))


def global_change(rank=5, *, seed=0, dtype=torch.float64, shapes=SHAPES):
    """A random G whose singular values fall by a third from one to the next."""
    modules = {}
    for i, (name, (m, n)) in enumerate(shapes.items()):
        generator = torch.Generator().manual_seed(seed * 100 + i)
        U, _ = torch.linalg.qr(torch.randn(m, rank, generator=generator, dtype=torch.float64))
        V, _ = torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64))
        S = 0.67 ** torch.arange(rank, dtype=torch.float64)
        modules[name] = FactoredSVD(U=U.to(dtype), S=S.to(dtype), Vh=V.T.contiguous().to(dtype))
    return GlobalChange(modules)


class Round:
    """One round of a method from a state, with the clients' ranks dealt from ``CLASSES``."""

    def __init__(self, name, change, *, wire="float64", classes=CLASSES, **factoring):
        self.method = make_method(name) if isinstance(name, str) else name
        self.state = State(round=3, change=change)
        factoring = Factoring(**{"alpha": 16.0, **factoring})
        starts = [self.method.start(self.state, c, factoring) for c in classes]
        decoded = [replace(s, trained=over_the_wire(s.trained, wire)).sealed() for s in starts]
        self.starts = {start.rank_class.name: start for start in decoded}

    def update(self, k, num_examples, *, rank_class=None, trained=True, seed=0):
        start = self.starts[rank_class or list(self.starts)[k % len(self.starts)]]
        adapter = start.trained
        if trained:
            generator = torch.Generator().manual_seed(1000 * seed + k)
            adapter = adapter.map(
                lambda t: t + 0.2 * torch.randn(t.shape, generator=generator).to(t.dtype)
            )
        return Update(
            client_id=f"client_{k}",
            adapter=adapter,
            num_examples=num_examples,
            rank_class=start.rank_class.name,
            base_round=3,
            digest=start.digest,
        )

    def finish(self, updates):
        self.method.begin(self.state, self.starts)
        for update in updates:
            self.method.add(update)
        return self.method.finish()


def same_bits(first, second):
    return all(
        torch.equal(getattr(first[name], part), getattr(second[name], part))
        for name in first
        for part in ("U", "S", "Vh")
    )


def distance(change, dense):
    """Largest relative error of any module against ``{module: dense matrix}``."""
    return max(reference.relative_error(change.delta_weight(n), dense[n]) for n in change)


def check_order(name):
    round_ = Round(name, global_change())
    updates = [round_.update(k, 10 + 7 * k) for k in range(4)]
    results = [round_.finish(order).change for order in itertools.permutations(updates)]
    assert all(same_bits(results[0], other) for other in results[1:])


def check_scale_of_weights(name):
    round_ = Round(name, global_change())
    plain = round_.finish([round_.update(k, 3 + 5 * k) for k in range(4)])
    scaled = round_.finish([round_.update(k, 1000 * (3 + 5 * k)) for k in range(4)])
    assert same_bits(plain.change, scaled.change)


def check_one_client(name):
    cases = itertools.product(CLASSES, (16.0, 3.5), (False, True), ("float32", "float64"))
    for rank_class, alpha, rslora, wire in cases:
        change = global_change(dtype=getattr(torch, wire))
        round_ = Round(name, change, wire=wire, alpha=alpha, rslora=rslora)
        update = round_.update(0, 17, rank_class=rank_class.name)
        result = round_.finish([update]).change
        own = {module: reference.delta_weight(f) for module, f in update.adapter.items()}
        assert distance(result, own) < (1e-6 if wire == "float32" else 1e-12)


def check_zero_training(name):
    for wire, dtype, bound in (
        ("float64", torch.float64, 1e-12),
        ("float32", torch.float32, 1e-6),
        ("bfloat16", torch.float64, 1e-12),
    ):
        change = global_change(dtype=dtype)
        round_ = Round(name, change, wire=wire)
        updates = [round_.update(k, 10 + k, trained=False) for k in range(5)]
        result = round_.finish(updates).change
        assert distance(result, {n: change.delta_weight(n) for n in change}) < bound


def check_average_of_products(name):
    round_ = Round(name, GlobalChange.zero(SHAPES, torch.float64), alpha=5.0)
    updates = [round_.update(k, 10 + 7 * k) for k in range(6)]
    result = round_.finish(updates).change
    clients = [(update.adapter, update.num_examples) for update in updates]
    dense = {module: reference.flexlora_average(clients, module) for module in SHAPES}
    assert distance(result, dense) < 1e-12


CHECKS = {
    Law.ORDER: check_order,
    Law.SCALE_OF_WEIGHTS: check_scale_of_weights,
    Law.ONE_CLIENT: check_one_client,
    Law.ZERO_TRAINING: check_zero_training,
    Law.AVERAGE_OF_PRODUCTS: check_average_of_products,
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_keeps_the_laws_it_declares_and_breaks_the_others(name, law):
    """The second half shows that every check can fail; a method that keeps a law declares it."""
    if law in make_method(name).laws:
        CHECKS[law](name)
    else:
        with pytest.raises(AssertionError):
            CHECKS[law](name)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_answers_to_its_name_and_declares_known_laws(name):
    method = make_method(name)
    assert method.name == name
    assert method.laws <= set(LAWS) and method.laws


@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.floats(0.5, 64), st.booleans(), st.integers(1, 10**5)),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 10**6),
)
@settings(max_examples=40, deadline=None)
def test_aggregate_equals_the_dense_average_at_any_ranks_alphas_and_scalings(specs, seed):
    """Traps T1 and T3: unequal scalings, and every client counts by its share."""
    clients = [
        (random_adapter(SHAPES, rank, alpha=alpha, rslora=rslora, seed=seed % 1000 + k), n)
        for k, (rank, alpha, rslora, n) in enumerate(specs)
    ]
    dense = {module: reference.flexlora_average(clients, module) for module in SHAPES}
    for method in ("flexlora", "residual"):
        assert distance(aggregate(clients, method=method), dense) < 1e-12


def test_every_client_counts():
    """Trap T3: leaving out any one of them moves the result."""
    clients = [(random_adapter(SHAPES, 2 + k, seed=k), 10) for k in range(4)]
    whole = aggregate(clients)
    for k in range(4):
        without = aggregate(clients[:k] + clients[k + 1 :])
        assert distance(without, {n: whole.delta_weight(n) for n in SHAPES}) > 0.1


def test_a_client_that_failed_is_in_no_denominator():
    """Trap T6: two of three replies weigh 1/4 and 3/4, whatever the third would have had."""
    round_ = Round("flexlora", global_change())
    updates = [round_.update(k, n) for k, n in enumerate((10, 30, 1000))]
    result = round_.finish(updates[:2]).change
    dense = {
        n: 0.25 * reference.delta_weight(updates[0].adapter[n])
        + 0.75 * reference.delta_weight(updates[1].adapter[n])
        for n in SHAPES
    }
    assert distance(result, dense) < 1e-12


@pytest.mark.parametrize("eta", [1.0, 0.3])
@pytest.mark.parametrize("wire", ["float64", "bfloat16"])
def test_residual_equals_its_equation_with_the_decoded_starts(eta, wire):
    change = global_change()
    method = make_method("residual", server_learning_rate=eta)
    round_ = Round(method, change, wire=wire, rslora=True)
    updates = [round_.update(k, 10 + 9 * k) for k in range(5)]
    result = round_.finish(updates).change
    clients = [(update.adapter, update.num_examples) for update in updates]
    starts = [round_.starts[update.rank_class].trained for update in updates]
    dense = {
        n: reference.residual_form(change.delta_weight(n), clients, starts, n, eta) for n in SHAPES
    }
    assert distance(result, dense) < 1e-12


def test_a_16_bit_start_differs_from_the_truncation_so_it_must_be_what_is_subtracted():
    """The control of the bfloat16 case above: subtracting T_r(G) itself would be far off."""
    change = global_change()
    start = Round("residual", change, wire="bfloat16").starts["rank_3"].trained
    truncated = reference.truncate(change.delta_weight("attn.q"), 3)
    error = reference.relative_error(reference.delta_weight(start["attn.q"]), truncated)
    assert 1e-4 < error < 1e-2


@pytest.mark.parametrize("wire", ["float64", "float32", "bfloat16"])
def test_rounds_without_training_do_not_grow_the_rank_of_the_residual(wire):
    """Rounding noise must not become directions that are stored and sent."""
    change = global_change(dtype=torch.float64 if wire == "float64" else torch.float32)
    for _ in range(3):
        round_ = Round("residual", change, wire=wire, alpha=7.0)
        updates = [round_.update(k, 10 + k, trained=False) for k in range(5)]
        change = round_.finish(updates).change
    assert {name: svd.rank for name, svd in change.items()} == dict.fromkeys(SHAPES, 5)


def test_flexlora_shrinks_each_direction_by_the_share_of_clients_that_hold_it():
    """Trap T10, rank collapse: sigma_j keeps c_j = sum of p_k over r_k >= j, every round."""
    shapes = {"w": (40, 30)}
    change = global_change(24, shapes=shapes)
    classes = (RankClass(name="rank_8", rank=8), RankClass(name="rank_24", rank=24))
    S0 = change["w"].S.clone()
    held = torch.tensor([1.0] * 8 + [0.2] * 16, dtype=torch.float64)
    for t in (1, 2, 3):
        round_ = Round("flexlora", change, classes=classes)
        updates = [round_.update(k, 1, rank_class="rank_8", trained=False) for k in range(8)]
        updates += [round_.update(k, 1, rank_class="rank_24", trained=False) for k in (8, 9)]
        change = round_.finish(updates).change
        torch.testing.assert_close(change["w"].S, S0 * held**t, rtol=1e-9, atol=0)
    assert float(change["w"].S[19] / S0[19]) == pytest.approx(0.008, rel=1e-9)


def test_residual_keeps_every_direction_where_flexlora_loses_it():
    shapes = {"w": (40, 30)}
    change = global_change(24, shapes=shapes)
    classes = (RankClass(name="rank_8", rank=8), RankClass(name="rank_24", rank=24))
    S0 = change["w"].S.clone()
    for _ in range(3):
        round_ = Round("residual", change, classes=classes)
        updates = [round_.update(k, 1, trained=False) for k in range(10)]
        change = round_.finish(updates).change
    torch.testing.assert_close(change["w"].S, S0, rtol=1e-10, atol=0)


def test_averaging_factors_is_not_averaging_products():
    """Trap T2, the negative control: mean(B) mean(A) is another matrix than mean(B A)."""
    clients = [(random_adapter(SHAPES, 4, seed=k), 10) for k in range(3)]
    ours = aggregate(clients)
    for name in SHAPES:
        mean_A = sum(adapter[name].lora_A for adapter, _ in clients) / 3
        mean_B = sum(adapter[name].lora_B for adapter, _ in clients) / 3
        of_factors = clients[0][0][name].scaling * (mean_B @ mean_A)
        assert reference.relative_error(of_factors, ours.delta_weight(name)) > 0.3


@pytest.mark.parametrize("name", ["flexlora", "residual"])
def test_the_cap_keeps_the_best_directions_and_reports_what_it_drops(name):
    """Trap T9: the energy that truncation loses is a number, not silence."""
    method = make_method(name, max_rank=4)
    round_ = Round(method, GlobalChange.zero(SHAPES, torch.float64))
    updates = [round_.update(k, 10 + k) for k in range(4)]
    state = round_.finish(updates)
    clients = [(update.adapter, update.num_examples) for update in updates]
    dense = {n: reference.flexlora_average(clients, n) for n in SHAPES}
    assert distance(state.change, {n: reference.truncate(dense[n], 4) for n in SHAPES}) < 1e-10
    tail = sum(float((dense[n] - reference.truncate(dense[n], 4)).square().sum()) for n in SHAPES)
    total = sum(float(dense[n].square().sum()) for n in SHAPES)
    assert state.dropped_energy == pytest.approx(tail / total, rel=1e-9)
    assert all(svd.rank == 4 for svd in state.change.values())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_round_without_updates_is_the_same_state_one_round_later(name):
    change = global_change()
    state = Round(name, change).finish([])
    assert state.round == 4 and same_bits(state.change, change)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_forgets_the_last_round(name):
    round_ = Round(name, global_change())
    first, second = [round_.update(0, 5)], [round_.update(1, 9), round_.update(2, 2)]
    alone = round_.finish(second).change
    round_.finish(first)
    assert same_bits(round_.finish(second).change, alone)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_second_update_of_a_client_is_refused_and_the_first_stays(name):
    round_ = Round(name, global_change())
    first, other = round_.update(0, 5), round_.update(1, 9)
    expected = round_.finish([first, other]).change
    round_.method.begin(round_.state, round_.starts)
    round_.method.add(first)
    with pytest.raises(UpdateRefused, match="client client_0: a second update in the same round"):
        round_.method.add(round_.update(0, 50, seed=9))
    round_.method.add(other)
    assert same_bits(round_.method.finish().change, expected)


def test_residual_refuses_a_start_that_it_cannot_subtract():
    round_ = Round("residual", global_change())
    good, other = round_.update(0, 5), round_.update(1, 9)
    expected = round_.finish([good]).change
    for bad in (replace(other, digest="0" * 64), replace(other, rank_class="rank_99")):
        round_.method.begin(round_.state, round_.starts)
        round_.method.add(good)
        with pytest.raises(
            UpdateRefused, match=r"client client_1: .*which this round did not send"
        ):
            round_.method.add(bad)
        assert same_bits(round_.method.finish().change, expected)


@pytest.mark.parametrize("call", [make_method, lambda name: aggregate([], method=name)])
def test_an_unknown_method_is_an_error_that_names_the_nearest(call):
    """Trap T20: a misspelt method that silently runs FedAvg."""
    with pytest.raises(UserError, match=r"'flexlore' is unknown.*Did you mean 'flexlora'"):
        call("flexlore")


def test_aggregate_keeps_the_dtype_of_the_first_adapter():
    for dtype in (torch.float32, torch.float64):
        total = aggregate([(random_adapter(SHAPES, dtype=dtype), 3)])
        assert total.delta_weight("attn.q").dtype == dtype


def test_the_python_interface_of_the_readme():
    """DESIGN.md, section 3: one client at rank 3 comes back at rank 3, 8 and 2."""
    factors = random_factors(12, 12, 3, alpha=16.0)
    adapter = Adapter({"q": factors})
    total = aggregate([(adapter, 120), (adapter, 80)], method="flexlora")
    own = reference.delta_weight(factors)
    assert reference.relative_error(total.delta_weight("q"), own) < 1e-12
    for rank in (2, 3, 8):
        sent = total.adapter(rank=rank, alpha=16.0)["q"]
        assert sent.rank == rank
        truncated = reference.truncate(own, rank)
        assert reference.relative_error(sent.delta_weight(), truncated) < 1e-10
    assert total.energy_kept(rank=3)["q"] == pytest.approx(1.0, abs=1e-12)
