"""Thousands of damaged replies: none escapes the decoders, and what passes them is whole.

``FLEXLORA_FUZZED_REPLIES=100000`` is the size for a night.
"""

import os

import pytest

from flexlora.aggregation.engine import updates
from flexlora.privacy.secure.shamir import combine
from flexlora.server.rounds import secure_secrets
from flexlora.server.transport import fields, messages
from flexlora.simulations.benchmarks import reply_fuzz

COUNT = int(os.environ.get("FLEXLORA_FUZZED_REPLIES", "5000"))


def test_every_reply_as_it_is_sent_is_accepted():
    """Else the fuzz would see nothing but refusals."""
    for case in reply_fuzz.cases():
        assert reply_fuzz.judged(case, case.content) == ("accepted", ""), case.kind


def test_no_damaged_reply_escapes():
    outcomes = reply_fuzz.run(COUNT)
    assert outcomes.escapes == []
    kinds = {case.kind for case in reply_fuzz.cases()}
    for outcome in ("accepted", "failed"):  # both sides are reached, of every kind
        assert {kind for kind, o in outcomes.counts if o == outcome} == kinds
    print(f"{COUNT} replies decoded in {outcomes.seconds:.1f} CPU seconds")


def nothing(*args, **options):
    return None


def first_shares(shares, threshold, is_secret):
    """Whatever the first shares give."""
    chosen = dict(list(shares.items())[:threshold])
    return combine(chosen) if len(chosen) == threshold else None


CHECKS = {
    "the checks of an update": (reply_fuzz, "check_update", nothing),
    "the bounds of fields": (fields, "_bounded", lambda key, name, value: value),
    "the sums of scores": (messages, "check_score", nothing),
    "the names and sizes of a capability": (messages, "check_capability", nothing),
    "the catch of what cannot be read": (messages, "reason", lambda error: error.no_such_word),
    "the shapes and numbers of factors": (updates, "_check_factors", nothing),
    "the sizes of products": (updates, "_check_sizes", nothing),
    "the check of a secret put together": (secure_secrets, "verified", first_shares),
}


@pytest.mark.parametrize("check", CHECKS)
def test_a_decoder_without_a_check_is_found(check, monkeypatch):
    """Negative control: the fuzz bites on each."""
    module, name, weak = CHECKS[check]
    monkeypatch.setattr(module, name, weak)
    assert reply_fuzz.run(COUNT, until_escape=True).escapes
