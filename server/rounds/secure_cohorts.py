"""Whether noise on a secure sum still covers one client where small groups are not opened.

A group below ``privacy.min-group`` is left out, and so whether one more client came may decide
whether the others' columns are in the sum: a difference of more than C. Under ``secure+central``
that must not happen but with a chance far below delta:

    P(Binomial(N, q) < min-group) <= SHARE * delta     for all registered clients, or no run begins
                                                       for every band, or all columns are one band

N, q and the bands are those of the registered clients, which are public, not of the sample.
"""

from __future__ import annotations

from collections import Counter
from math import comb

from flexlora.config.resolve import Config
from flexlora.errors import UserError
from flexlora.privacy.secure.bands import bands_of
from flexlora.server.members.roster import Roster

__all__ = ["check_cohort", "has_small_band"]

SHARE = 0.01


def check_cohort(roster: Roster, config: Config) -> None:
    """Refuse a run in which too few clients may come for a sum that noise has to cover.

    Raises:
        UserError: as said.
    """
    privacy, count = config.privacy, len(roster.members)
    if not (privacy.secure and privacy.noisy) or not _may_be_small(count, config):
        return
    chance = _fewer(privacy.min_group, count, config.fraction_train)
    raise UserError(
        f"of {count} clients sampled with probability {config.fraction_train:g}, fewer than "
        f"{privacy.min_group} (privacy.min-group) come with probability {chance:.2g}, expected at "
        f"most {SHARE * privacy.delta:.2g} with privacy.mode={privacy.mode}: whether the round has "
        "a sum would tell who came. Raise fraction-train."
    )


def has_small_band(roster: Roster, config: Config) -> bool:
    """Whether a band of the registered clients may have fewer than the group."""
    classes = {name: c.ranks(roster.shapes) for name, c in roster.rank_classes.items()}
    members = Counter(member.rank_class.name for member in roster.members.values())
    counts = (sum(members[name] for name in band.classes) for band in bands_of(classes))
    return any(_may_be_small(count, config) for count in counts)


def _may_be_small(count: int, config: Config) -> bool:
    chance = _fewer(config.privacy.min_group, count, config.fraction_train)
    return chance > SHARE * config.privacy.delta


def _fewer(least: int, count: int, share: float) -> float:
    """``P(Binomial(count, share) < least)``."""
    ways = range(min(least, count + 1))
    return sum(comb(count, k) * share**k * (1.0 - share) ** (count - k) for k in ways)
