"""An open round: the same bits in any order of arrival, bounded memory, refusals without trace."""

import itertools
import math
import random
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import reference
from builders import random_adapter
from flexlora import Adapter, aggregate
from flexlora.aggregation import METHODS, make_method
from flexlora.aggregation.engine.open_round import OpenRound
from flexlora.aggregation.engine.product_sums import FOLD_RANK, ProductSums
from flexlora.aggregation.engine.updates import Update
from flexlora.errors import UpdateRefused
from one_round import SHAPES, OneRound, next_state, no_change, same_bits

SMALL = {"w": (8, 6)}


def class_of(updates):
    return {update.client_id: update.rank_class for update in updates}


def run(round_, updates, *, clients=None, skips=(), on_disk=False):
    """The state, with the skips among the arrivals, each after as many updates as its place."""
    opened = round_.open(clients)
    if on_disk:
        opened._waiting.limit_bytes = 0
    for at, update in enumerate(updates):
        for client_id in skips[at : at + 1]:
            opened.skip(client_id)
        opened.add(update)
    for client_id in skips[len(updates) :]:
        opened.skip(client_id)
    return opened.close()


def shuffled(items, seed):
    order = list(items)
    random.Random(seed).shuffle(order)
    return order


@pytest.mark.parametrize("name", sorted(METHODS))
def test_any_order_of_arrival_with_or_without_the_list_of_clients_gives_the_same_bits(name):
    """Ids that sort otherwise than the ranks do; 14 clients take sums of small modules dense."""
    round_ = OneRound(name, next_state(name))
    updates = [round_.update(k, 10 + 7 * k) for k in range(14)]
    asked = class_of(updates) | {"client_30": "rank_2", "client_05": "rank_7"}
    expected = run(round_, updates)
    for seed in range(3):
        order, skips = shuffled(updates, seed), shuffled(["client_30", "client_05"], seed)
        for on_disk in (False, True):
            for clients in (None, class_of(updates), asked):
                state = run(round_, order, clients=clients, skips=skips, on_disk=on_disk)
                assert same_bits(state, expected)
        assert same_bits(run(round_, order, clients=asked), expected)


def test_late_updates_come_last_whoever_else_is_missing():
    """Else the bits would depend on whether a silent client was given up in time."""
    method = make_method("residual")
    first = OneRound(method)
    round_ = OneRound(method, next_state(method))
    updates = [round_.update(k, 10 + 7 * k) for k in range(8)]
    round_.sent["late"] = first.sent["rank_2"]
    late = [first.update(k, 5 + k, rank_class="rank_2") for k in (20, 21)]
    late = [replace(u, client_id=f"{u.client_id}@0", rank_class="late") for u in late]
    asked = class_of(updates) | {"client_30": "rank_2"}
    expected = run(round_, updates + late)
    for seed in range(3):
        order = shuffled(updates + late, seed)
        for skips in ([], ["client_30"]):
            for on_disk in (False, True):
                assert same_bits(run(round_, order, clients=asked, skips=skips), expected)
                assert same_bits(run(round_, order, on_disk=on_disk), expected)


def test_every_order_of_arrival_survives_the_disk():
    """Files of updates that were folded meanwhile must not give their names to later ones."""
    round_ = OneRound("flexlora", next_state("flexlora"))
    updates = [round_.update(k, 3 + k, rank_class="rank_3") for k in range(5)]
    expected = run(round_, updates)
    for order in itertools.permutations(updates):
        state = run(round_, order, clients=class_of(updates), on_disk=True)
        assert same_bits(state, expected)


def test_the_order_matters_to_the_bits_so_it_has_to_be_kept():
    """The control: the same updates under other ids are another sum in its last bits."""
    round_ = OneRound("flexlora", next_state("flexlora"))
    updates = [round_.update(k, 10 + 7 * k) for k in range(14)]
    renamed = [replace(update, client_id=f"{99 - k}") for k, update in enumerate(updates)]
    assert not same_bits(run(round_, updates), run(round_, renamed))


def test_updates_are_folded_as_soon_as_those_before_them_are_in():
    round_ = OneRound("residual")
    updates = [round_.update(k, 1, rank_class="rank_2") for k in range(6)]
    opened = round_.open(class_of(updates) | {"client_9": "rank_2"})
    waiting = []
    for k in (1, 0, 3, 4, 2):
        opened.add(updates[k])
        waiting.append(len(list(opened._waiting)))
        held = {update.client_id: update.adapter.num_bytes for update in updates}
        assert opened._waiting.held_bytes == sum(held[c] for c in opened._waiting)
    assert waiting == [1, 0, 1, 2, 0]
    opened.skip("client_5")
    assert opened._next == 6
    with pytest.raises(UpdateRefused, match="client client_5: this round went on without it"):
        opened.add(updates[5])
    assert same_bits(opened.close(), run(round_, updates[:5]))


def test_the_folder_of_waiting_updates_is_gone_when_the_round_is_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    round_ = OneRound("fedit")
    opened = round_.open()
    opened._waiting.limit_bytes = 0
    for k in range(3):
        opened.add(round_.update(k))
    files = list(tmp_path.rglob("*.safetensors"))
    assert len(files) == 3 and opened._waiting.held_bytes == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        opened.close()
        assert list(tmp_path.iterdir()) == []
        del opened


def test_only_what_exceeds_the_limit_waits_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    round_ = OneRound("flora")
    updates = [round_.update(k) for k in range(4)]
    opened = round_.open()
    opened._waiting.limit_bytes = updates[0].adapter.num_bytes + updates[1].adapter.num_bytes
    for update in updates:
        opened.add(update)
    assert len(list(Path(tmp_path).rglob("*.safetensors"))) == 2
    assert same_bits(opened.close(), run(round_, updates))


def numbers_held(sums):
    terms = sum(left.numel() + right.numel() for _, left, right in sums._terms["w"])
    return terms + sum(dense.numel() for dense in sums._dense.values())


def test_the_sum_of_a_round_does_not_grow_with_its_clients():
    """Factors while they are smaller than the matrix; then the matrix and one unfolded block."""
    m, n = SMALL["w"]
    sums, clients, largest = ProductSums(SMALL), [], 0
    for k in range(600):
        adapter = random_adapter(SMALL, 2, seed=k)
        clients.append((adapter, 1 + k))
        sums.add(adapter, 1 + k)
        largest = max(largest, numbers_held(sums))
        if 2 * (k + 1) * (m + n) <= m * n:
            assert not sums._dense
    assert largest <= m * n + FOLD_RANK * (m + n) < 600 * 2 * (m + n)
    mean, probes = sums.mean("w"), torch.eye(n, dtype=torch.float64)
    expected = reference.flexlora_average(clients, "w")
    assert reference.relative_error(mean.apply(probes), expected) < 1e-12
    assert reference.relative_error(mean.to_dense(), expected) < 1e-12


def refusals(round_):
    """``(what, update, message)``: updates that no method may take in this round."""
    first, other = round_.update(0, 50, seed=9), round_.update(1, 9)
    cases = [("a second one", first, "client client_0: a second update in the same round")]
    if round_.method.needs.known_start:
        unknown = r"client client_1: .*which this round did not send"
        cases += [
            ("another start", replace(other, digest="0" * 64), unknown),
            ("another class", replace(other, rank_class="rank_99"), unknown),
        ]
    return cases


NEEDS_THE_START = (
    "basis",
    "carried",
    "fed-plora",
    "fedex-lora",
    "ffa-lora",
    "residual",
    "rolora",
    ("flexlora", {"error_feedback": True}),
    ("raflora", {"error_feedback": True}),
)


@pytest.mark.parametrize("chosen", [*sorted(METHODS), *NEEDS_THE_START[-2:]], ids=str)
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_refused_update_leaves_the_round_as_it_was(chosen, on_disk):
    name, options = (chosen, {}) if isinstance(chosen, str) else chosen
    method = make_method(name, **options)
    round_ = OneRound(method, next_state(method))
    good = [round_.update(0, 5), round_.update(2, 9)]
    expected = run(round_, good)
    cases = refusals(round_)
    assert (len(cases) == 3) == (chosen in NEEDS_THE_START)
    for _, bad, message in cases:
        opened = round_.open()
        opened._waiting.limit_bytes = 0 if on_disk else 1 << 30
        opened.add(good[0])
        with pytest.raises(UpdateRefused, match=message):
            opened.add(bad)
        opened.add(good[1])
        assert same_bits(opened.close(), expected)


def bad_pairs(shapes):
    """What ``aggregate`` may be called with by mistake, and the message."""
    first = random_adapter(shapes, 4)
    other = Adapter({name: f for name, f in first.items() if name != "mlp.up"})
    tall = random_adapter({**shapes, "attn.q": (13, 12)}, 4)
    wide = random_adapter({**shapes, "attn.q": (12, 13)}, 4)
    nan = first.map(lambda tensor: tensor * math.nan)
    infinite = first.map(lambda tensor: tensor / 0.0)
    return [
        ([], "there is no update to aggregate, expected at least one"),
        ([(first, 10), (other, 10)], "client 000000001: the update lacks module 'mlp.up'"),
        ([(other, 10), (first, 10)], "client 000000001: the update has unknown module 'mlp.up'"),
        ([(first, 10), (tall, 10)], r"'attn.q': \[out, in\] is \[13, 12\], expected \[12, 12\]"),
        ([(first, 10), (wide, 10)], r"'attn.q': \[out, in\] is \[12, 13\], expected \[12, 12\]"),
        ([(first, 0)], "num_examples is 0, expected a positive whole number"),
        ([(first, 10), (first, -3)], "client 000000001: num_examples is -3"),
        ([(first, 1.5)], "num_examples is 1.5, expected a positive whole number"),
        ([(first, 10), (nan, 5)], "lora_A holds NaN or infinity"),
        ([(infinite, 5)], "lora_A holds NaN or infinity"),
    ]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_aggregate_refuses_by_name_what_does_not_belong_together(name):
    for updates, message in bad_pairs(SHAPES):
        with pytest.raises(UpdateRefused, match=message):
            aggregate(updates, method=name)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"florist"}))
def test_aggregate_takes_a_rank_above_both_sides_of_a_module_without_cutting_it(name):
    """Trap T15: a rank-15 product of a 6 x 12 module is as good a matrix as any other."""
    adapter = random_adapter(SHAPES, 4)
    generator = torch.Generator().manual_seed(1)
    modules = {}
    for module, factors in adapter.items():
        A = torch.randn(15, factors.in_features, generator=generator, dtype=torch.float64)
        B = torch.randn(factors.out_features, 15, generator=generator, dtype=torch.float64)
        modules[module] = replace(factors, lora_A=A, lora_B=B)
    total = aggregate([(Adapter(modules), 3)], method=name)
    for module, factors in modules.items():
        assert total[module].rank == min(SHAPES[module])
        expected = reference.delta_weight(factors)
        assert reference.relative_error(total.delta_weight(module), expected) < 1e-12


@pytest.mark.parametrize("name", ["residual", "fedex-lora", "ffa-lora"])
def test_a_late_update_counts_as_what_it_changed_of_the_start_it_really_had(name):
    """A start of the round before stands in ``sent`` under another name."""
    method = make_method(name)
    first = OneRound(method)
    state = first.finish([first.update(k, 10 + k) for k in range(5)])
    round_ = OneRound(method, state)
    round_.sent["late"] = first.sent["rank_3"]
    late = replace(first.update(7, 50, rank_class="rank_3"), rank_class="late")
    after = round_.finish([round_.update(0, 30), late])
    result, eta = after.change, after.server_learning_rate
    starts = [round_.sent["rank_2"].trained, first.sent["rank_3"].trained]
    clients = [(round_.update(0, 30).adapter, 30), (late.adapter, 50)]
    for module in SHAPES:
        G = state.change.delta_weight(module)
        expected = reference.residual_form(G, clients, starts, module, eta)
        assert reference.relative_error(result.delta_weight(module), expected) < 1e-12


def test_a_round_opened_without_starts_takes_any_class():
    """What ``aggregate`` does: nobody was sent anything, so there is nothing to compare with."""
    opened = OpenRound(make_method("residual"), no_change(), {})
    adapter = random_adapter(SHAPES, 3)
    opened.add(Update(client_id="a", adapter=adapter, num_examples=1, rank_class="any"))
    assert opened.close().round == 1
