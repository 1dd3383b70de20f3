"""The base of a run: votes on all that is reported, and what the server knows before any."""

from dataclasses import replace

import pytest

from faulty_grid import capability
from flexlora.planning.base_modules import BaseModules
from flexlora.server.members.bases import Base, KnownBase, choose_base, most_common

HONEST = capability("zoe")
LIES = {
    "fingerprint": {"fingerprint": "0" * 32},
    "modules": {"modules": ("attn.a", "attn.v", "mlp.up")},
    "out_features": {"out_features": (12, 6, 21)},
    "in_features": {"in_features": (12, 12, 13)},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "the order of modules": {
        "modules": HONEST.modules[::-1],
        "out_features": HONEST.out_features[::-1],
        "in_features": HONEST.in_features[::-1],
    },
}
LINEARS = {"attn.q": (12, 12), "attn.v": (6, 12)}
KNOWN = BaseModules(
    linears=LINEARS, num_layers=2, fan_in_fan_out=False, chosen=frozenset({"attn.q"})
)


def reports(honest, liars, change):
    liar = replace(HONEST, client_id="aaa", **change)
    return [liar] * liars + [HONEST] * honest


@pytest.mark.parametrize("lie", LIES)
def test_most_nodes_decide_on_each_part_of_the_base(lie):
    true, false = Base.of(HONEST), Base.of(replace(HONEST, **LIES[lie]))
    assert choose_base(reports(2, 1, LIES[lie]), KnownBase()) == true
    assert choose_base(reports(1, 2, LIES[lie]), KnownBase()) == false, "and nothing else does"
    assert true.difference(HONEST) == "" and true.difference(replace(HONEST, **LIES[lie]))


@pytest.mark.parametrize("lie", ["modules", "out_features", "in_features"])
@pytest.mark.parametrize("liars", [1, 5])
def test_a_checkpoints_shapes_go_before_any_majority(lie, liars):
    known = KnownBase(resumed=Base.of(HONEST).shapes)
    assert choose_base(reports(1, liars, LIES[lie]), known) == Base.of(HONEST)


def test_of_two_nodes_the_config_json_tells_which_one_lies():
    modules = ("l.0.attn.q", "l.1.attn.q")
    honest = replace(HONEST, modules=modules, out_features=(12, 12), in_features=(12, 12))
    for change in ({"out_features": (2, 2)}, {"fan_in_fan_out": True}, {"modules": ("a", "b")}):
        liar = replace(honest, fingerprint="0" * 32, **change)
        for pair in ([honest, liar], [liar, honest]):
            assert choose_base(pair, KnownBase(modules=KNOWN)) == Base.of(honest)
        assert choose_base([liar], KnownBase(modules=KNOWN)) == Base.of(liar), "nobody else is here"


def test_nodes_that_cannot_train_have_no_vote():
    failed = [replace(HONEST, fingerprint="0" * 32, cause="no rows")] * 3
    assert choose_base([*failed, HONEST], KnownBase()) == Base.of(HONEST)
    assert choose_base([], KnownBase()) == Base() and Base().shapes == {}


@pytest.mark.parametrize(
    ("shapes", "difference"),
    [
        ({"l.0.attn.q": (12, 12), "l.1.attn.q": (12, 12)}, ""),
        ({"l.0.attn.q": (12, 12)}, "the report lacks '1.attn.q'"),
        ({"l.0.attn.q": (12, 13)}, "module 'l.0.attn.q' is [12, 13], expected [12, 12]"),
        ({"l.2.attn.q": (12, 12)}, "it has no module 'l.2.attn.q'"),
        ({"attn.q": (12, 12)}, "it has no module 'attn.q'"),
        ({"l.0.attn.q": (12, 12), "m.1.attn.q": (12, 12)}, "the names of its modules begin"),
    ],
)
def test_what_differs_from_the_config_json_is_named(shapes, difference):
    assert KNOWN.difference(shapes, fan_in_fan_out=False).startswith(difference)
    assert bool(KNOWN.difference(shapes, fan_in_fan_out=False)) == bool(difference)


def test_the_most_common_text():
    assert most_common(["b", "a", "b"]) == "b" and most_common(["b", "a"]) == "a"
    assert most_common([]) == ""
