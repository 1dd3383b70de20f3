"""Updates that must not reach the sum: each refusal by its message, and the round without it."""

import math
from dataclasses import replace

import pytest
import torch

from builders import random_adapter
from flexlora import Adapter
from flexlora.aggregation import METHODS, make_method
from flexlora.aggregation.engine.open_round import OpenRound
from flexlora.aggregation.engine.starts import LocalPlan, Start
from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.aggregation.engine.updates import LARGEST_NORM, Update, check_update
from flexlora.errors import UpdateRefused
from flexlora.lora.ranks import RankClass

RANK_4 = RankClass(name="rank_4", rank=4)


@pytest.fixture
def expected(shapes):
    """What the client was sent."""
    return random_adapter(shapes, 4, dtype=torch.float32)


@pytest.fixture
def update(shapes):
    """A good answer to it."""
    adapter = random_adapter(shapes, 4, seed=1, dtype=torch.float32)
    return Update(client_id="17", adapter=adapter, num_examples=30, digest="d" * 64)


def swapped(update, name, **fields):
    """The update with some fields of one module's factors replaced."""
    factors = replace(update.adapter[name], **fields)
    return replace(update, adapter=Adapter({**update.adapter, name: factors}))


def poisoned(update, label, value):
    tensor = getattr(update.adapter["attn.v"], label).clone()
    tensor[1, 1] = value
    return swapped(update, "attn.v", **{label: tensor})


def bad_updates(update, shapes):
    """``(cause, bad update, message)`` for every way an update can be wrong."""
    adapter = update.adapter
    wider = random_adapter({**shapes, "attn.q": (12, 13)}, 4, dtype=torch.float32)
    taller = random_adapter({**shapes, "attn.q": (13, 12)}, 4, dtype=torch.float32)
    another_rank = random_adapter(shapes, 5, dtype=torch.float32)
    lacking = Adapter({name: f for name, f in adapter.items() if name != "mlp.up"})
    extra = Adapter({**adapter, "mlp.upp": adapter["mlp.up"]})
    shape = r"client 17, module 'attn.q': lora_{} has shape {}, expected {} for rank 4"
    positive = "client 17: num_examples is {}, expected a positive whole number"
    rank = r"lora_A has shape \(5, 12\), expected \(4, 12\).*assigned another rank"
    cases = [
        ("rank", replace(update, adapter=another_rank), rank),
        (
            "in_features",
            replace(update, adapter=wider),
            shape.format("A", r"\(4, 13\)", r"\(4, 12\)"),
        ),
        (
            "out_features",
            replace(update, adapter=taller),
            shape.format("B", r"\(13, 4\)", r"\(12, 4\)"),
        ),
        ("missing", replace(update, adapter=lacking), "lacks module 'mlp.up'"),
        ("unknown", replace(update, adapter=extra), "has unknown module 'mlp.upp'.*'mlp.up'"),
        (
            "dtype",
            replace(update, adapter=adapter.to(torch.float64)),
            "lora_A is torch.float64, expected torch.float32",
        ),
        ("alpha", swapped(update, "attn.v", alpha=32.0), r"alpha 32.0 .*expected 16.0"),
        ("rslora", swapped(update, "attn.v", rslora=True), "rslora=True.*rslora=False"),
        ("digest", replace(update, digest="e" * 64), "started from eeeeeeeeeeee, this round sent"),
        ("no digest", replace(update, digest=""), "started from nothing, this round sent dddd"),
        (
            "a product beyond float32",
            replace(update, adapter=adapter.map(lambda t: torch.full_like(t, 1e30))),
            "client 17, module 'attn.q': the norms of lora_A and of .*must not exceed 1.15e.18",
        ),
        (
            "one factor beyond float32's squares",
            swapped(update, "attn.v", lora_A=adapter["attn.v"].lora_A * 1e25),
            "module 'attn.v': the norms of lora_A",
        ),
    ]
    for value in (math.nan, math.inf, -math.inf):
        for label in ("lora_A", "lora_B"):
            text = f"module 'attn.v': {label} holds NaN or infinity"
            cases.append((f"{label} {value}", poisoned(update, label, value), text))
    for n in (0, -5, True, 2.5, math.nan, "3", None):
        cases.append((f"n={n!r}", replace(update, num_examples=n), positive.format(repr(n))))
    return cases


def names_of_bad_updates():
    shapes = {"attn.q": (12, 12), "attn.v": (6, 12), "mlp.up": (20, 12)}
    adapter = random_adapter(shapes, 4, seed=1, dtype=torch.float32)
    update = Update(client_id="17", adapter=adapter, num_examples=30, digest="d" * 64)
    return {cause: (bad, message) for cause, bad, message in bad_updates(update, shapes)}


BAD = names_of_bad_updates()


@pytest.mark.parametrize("cause", BAD)
def test_a_bad_update_is_refused_by_its_cause(expected, cause):
    bad, message = BAD[cause]
    with pytest.raises(UpdateRefused, match=message):
        check_update(bad, expected, digest="d" * 64)


def test_a_good_update_passes(update, expected):
    check_update(update, expected, digest="d" * 64)
    check_update(update, expected)


def test_factors_up_to_the_largest_norm_pass_and_none_above(update, expected):
    """The law is in the norms: half of them is no reason, twice is."""
    half = swapped(update, "attn.v", lora_B=filled(update.adapter["attn.v"], 0.5 * LARGEST_NORM))
    check_update(half, expected)
    twice = swapped(update, "attn.v", lora_B=filled(update.adapter["attn.v"], 2.0 * LARGEST_NORM))
    with pytest.raises(UpdateRefused, match="must not exceed"):
        check_update(twice, expected)


def filled(factors, bound):
    """A ``lora_B`` of equal entries for which ``max(|sB|, |A| |sB|)`` is ``bound``."""
    largest = max(1.0, float(factors.lora_A.double().norm())) * factors.scaling
    entry = bound / largest / factors.lora_B.numel() ** 0.5
    return torch.full_like(factors.lora_B, entry)


def run_round(name, shapes, expected, updates):
    """The server's loop: check, add, and drop what is refused. Returns the change and refusals."""
    method = make_method(name)
    start = Start(rank_class=RANK_4, base_round=0, trained=expected, digest="d" * 64)
    opened = OpenRound(method, State(round=0, change=GlobalChange.zero(shapes)), {"rank_4": start})
    refused = []
    for update in updates:
        try:
            check_update(update, expected, digest="d" * 64)
            opened.add(update)
        except UpdateRefused as error:
            refused.append(str(error))
    return opened.close().change, refused


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("cause", BAD)
def test_a_refused_update_leaves_the_round_as_if_it_had_not_come(
    shapes, update, expected, name, cause
):
    others = [
        replace(
            update,
            client_id=str(k),
            rank_class="rank_4",
            adapter=trained(name, expected, shapes, k + 5),
        )
        for k in range(2)
    ]
    bad = replace(BAD[cause][0], rank_class="rank_4")
    without, none = run_round(name, shapes, expected, others)
    result, refused = run_round(name, shapes, expected, [others[0], bad, others[1]])
    assert not none and len(refused) == 1
    for module in shapes:
        assert torch.equal(result[module].U, without[module].U)
        assert torch.equal(result[module].S, without[module].S)
        assert torch.equal(result[module].Vh, without[module].Vh)


def trained(name, sent, shapes, seed):
    """What a good client of the method returns: a linear sum needs the lora_A that was sent."""
    adapter = random_adapter(shapes, 4, seed=seed, dtype=torch.float32)
    if not make_method(name).needs.linear:
        return adapter
    return Adapter({m: replace(f, lora_A=sent[m].lora_A) for m, f in adapter.items()})


PRUNED = LocalPlan(prune_factor=0.5)


def resized(adapter, rank, *, rslora=False):
    """Terms repeated or cut to ``rank``, each at the scaling that was sent."""
    modules = {}
    for name, factors in replace_rslora(adapter, rslora).items():
        terms = [term % factors.rank for term in range(rank)]
        modules[name] = factors.terms(terms)
    return Adapter(modules)


def replace_rslora(adapter, rslora):
    return Adapter({name: replace(factors, rslora=rslora) for name, factors in adapter.items()})


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("local", "good", "bad"),
    [(LocalPlan(), [4], [1, 3, 5, 8]), (PRUNED, [1, 3, 4], [5, 8])],
    ids=["plain", "pruning"],
)
def test_the_local_plan_says_at_which_ranks_a_reply_may_come(
    update, expected, local, good, bad, rslora
):
    """That of the start; with pruning fewer, never more."""
    sent = replace_rslora(expected, rslora)
    for rank in good:
        reply = replace(update, adapter=resized(update.adapter, rank, rslora=rslora))
        check_update(reply, sent, local=local)
        for factors in reply.adapter.values():
            assert factors.scaling == pytest.approx(16.0 / (2 if rslora else 4), rel=1e-12)
    for rank in bad:
        reply = replace(update, adapter=resized(update.adapter, rank, rslora=rslora))
        with pytest.raises(UpdateRefused, match=rf"lora_A has shape \({rank}, 12\), expected"):
            check_update(reply, sent, local=local)


def test_another_number_of_terms_is_no_way_to_another_scaling(update, expected):
    """An alpha kept while the rank changed would count for more, or less, than was trained."""
    terms = resized(update.adapter, 2)
    kept = Adapter({name: replace(factors, alpha=16.0) for name, factors in terms.items()})
    with pytest.raises(UpdateRefused, match=r"alpha 16\.0 .*expected 8.0"):
        check_update(replace(update, adapter=kept), expected, local=PRUNED)
