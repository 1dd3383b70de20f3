"""A round under a robust rule: its Gram matrix, its sum, its order, at unequal ranks."""

from __future__ import annotations

import pytest
import torch

import reference
from flexlora.aggregation.engine import change_gram as module
from flexlora.aggregation.engine.change_gram import change_gram
from flexlora.aggregation.engine.robust_rules import RULES, RobustMean
from flexlora.aggregation.engine.state import State
from flexlora.aggregation.engine.waiting import StoredAdapter, WaitingUpdates
from one_round import SHAPES, OneRound, distance, global_change, same_bits

METHODS = ("carried", "residual", "aligned", "basis", "flora", "ffa-lora", "rolora")
N, F = 8, 2


def begun(method, seed=0):
    state = State(round=3, change=global_change(seed=seed))
    if method in ("ffa-lora", "rolora"):
        state = None
    return OneRound(method, state)


def sent_back(round_, *, hostile=(), size=20.0):
    """Updates of clients of three ranks; the hostile ones' changes are turned and enlarged."""
    from dataclasses import replace

    from flexlora.lora.adapters import Adapter

    updates = []
    for k in range(N):
        update, start = round_.update(k, 10 + 7 * k), round_.start(k)
        if k in hostile:
            modules = {
                name: replace(
                    factors,
                    lora_B=start.trained[name].lora_B
                    - size * (factors.lora_B - start.trained[name].lora_B),
                )
                for name, factors in update.adapter.items()
            }
            update = replace(update, adapter=Adapter(modules))
        updates.append(update)
    return updates


def dense_changes(round_, updates):
    starts = [round_.start(k).trained for k in range(len(updates))]
    return reference.flat_changes([update.adapter for update in updates], starts)


def gram_of(round_, updates, **options):
    names = list(round_.sent)
    return change_gram(
        [StoredAdapter(adapter=update.adapter) for update in updates],
        [StoredAdapter(adapter=round_.sent[name].trained) for name in names],
        [names.index(update.rank_class) for update in updates],
        list(SHAPES),
        **options,
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_gram_matrix_is_that_of_the_dense_changes(method):
    round_ = begun(method)
    updates = sent_back(round_)
    rows = dense_changes(round_, updates)
    assert reference.relative_error(gram_of(round_, updates), rows @ rows.T) < 1e-12


def test_blocks_of_one_update_make_the_same_matrix(monkeypatch):
    round_ = begun("carried")
    updates = sent_back(round_)
    whole = gram_of(round_, updates)
    assert reference.relative_error(gram_of(round_, updates, block_bytes=1), whole) < 1e-13
    monkeypatch.setattr(module, "BLOCK_RANK", 5)
    assert reference.relative_error(gram_of(round_, updates), whole) < 1e-13


def test_an_update_without_a_start_counts_whole():
    round_ = begun("flora")
    updates = sent_back(round_)
    gram = change_gram(
        [StoredAdapter(adapter=update.adapter) for update in updates], [], [None] * N, list(SHAPES)
    )
    products = [
        torch.cat([reference.delta_weight(u.adapter[n]).flatten() for n in SHAPES]) for u in updates
    ]
    rows = torch.stack(products)
    assert reference.relative_error(gram, rows @ rows.T) < 1e-12


def test_infinite_products_are_an_error_and_no_weights():
    round_ = begun("flora")
    update = round_.update(0)
    factors = {n: f.map(lambda t: t * 1e200) for n, f in update.adapter.items()}
    huge = StoredAdapter(adapter=type(update.adapter)(factors))
    with pytest.raises(ValueError, match="are not finite; check_update was left out"):
        change_gram([huge, huge], [], [None, None], list(SHAPES))


@pytest.mark.parametrize(
    ("method", "rule"),
    [("carried", rule) for rule in RULES]
    + [(method, "nearest-trimmed-mean") for method in METHODS[1:]],
)
def test_the_round_adds_the_dense_robust_mean(rule, method):
    """G moves by the rule's mean of the changes, whatever examples the clients claim."""
    options = {} if method in ("ffa-lora", "rolora") else {"server_learning_rate": 1.0}
    from flexlora.aggregation import make_method

    round_ = OneRound(make_method(method, **options), begun(method).state)
    updates = sent_back(round_, hostile=(0, 4))
    rows = dense_changes(round_, updates)
    flat = reference.ROBUST[rule](rows, F)
    state = round_.finish(updates, robust=RobustMean(rule=rule, hostile=F))
    sizes = [SHAPES[name][0] * SHAPES[name][1] for name in sorted(SHAPES)]
    parts = dict(zip(sorted(SHAPES), flat.split(sizes), strict=True))
    before = round_.state.change
    expected = {n: before.delta_weight(n) + parts[n].reshape(SHAPES[n]) for n in SHAPES}
    assert distance(state.change, expected) < 1e-6
    plain = round_.finish(updates)
    assert distance(plain.change, expected) > 0.1, "the plain mean is another"


@pytest.mark.parametrize("rule", RULES)
def test_neither_order_nor_disk_nor_claims_change_the_bits(rule):
    round_, robust = begun("carried"), RobustMean(rule=rule, hostile=F)
    updates = sent_back(round_, hostile=(1,))
    asked = {update.client_id: update.rank_class for update in updates}
    first = round_.finish(updates, asked, robust=robust)
    for options in ({"waiting_bytes": 0}, {"waiting_bytes": 4000}, {"most_updates": N}):
        again = round_.finish(updates[::-1], asked, robust=robust, **options)
        assert same_bits(first, again), options
    claimed = [round_.update(k, 1) for k in range(N)]
    claimed[1] = updates[1]
    assert same_bits(first, round_.finish(claimed, asked, robust=robust))


def test_settle_tells_the_weight_of_every_update():
    round_ = begun("carried")
    opened = round_.open(robust=RobustMean(rule="multi-krum", hostile=F))
    for update in sent_back(round_, hostile=(0, 4)):
        opened.add(update)
    weights = opened.settle().weights
    left_out = [key for key, weight in weights.items() if weight == 0.0]
    assert left_out == ["client_0", "client_4"]
    assert sum(weights.values()) == pytest.approx(N) and opened.settle().shares == {}


def test_too_few_updates_change_nothing():
    round_ = begun("carried")
    robust = RobustMean(rule="multi-krum", hostile=F)
    updates = sent_back(round_)[: robust.least - 1]
    opened = round_.open(robust=robust)
    for update in updates:
        opened.add(update)
    assert opened.least_updates == 7 and opened.settle().weights == {}
    assert same_bits(opened.close().change, round_.state.change)


def test_a_waiting_update_is_read_by_module_from_memory_and_disk():
    round_ = begun("carried")
    update = round_.update(0)
    for limit in (0, 1 << 20):
        waiting = WaitingUpdates(limit)
        waiting.put(update)
        stored = waiting.stored(update.key)
        assert (stored.path is None) == (limit > 0)
        for name, factors in update.adapter.items():
            read = stored.read(name)
            assert torch.equal(read.lora_A, factors.lora_A)
            assert torch.equal(read.lora_B, factors.lora_B) and read.alpha == factors.alpha
        assert update.key in waiting, "it goes on waiting"
        waiting.close()
