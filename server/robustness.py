"""``robust.rule`` of a configuration: what excludes it, and the rule of one round.

A rule withstands f hostile updates among n, so f must bound the hostile ones among those that are
summed. It is the assumed share of the clients that were *asked*, since honest clients may fail and
hostile ones always answer; and whatever lets a client decide that it is asked or summed more often
than others is refused.
"""

from __future__ import annotations

import math

from flexlora.aggregation import make_method
from flexlora.aggregation.engine.robust_rules import RobustMean
from flexlora.config.resolve import Config
from flexlora.config.sections import Robust
from flexlora.errors import UserError

__all__ = ["check_enough", "check_robust", "robust_mean"]

# Modes in which the server sees single updates: what a client sends is private by itself.
SEEN = ("none", "local", "example")
ALLOWED_POLICIES = ("uniform", "stratified", "poisson")


def robust_mean(config: Config, asked: int) -> RobustMean | None:
    """The rule of a round of ``asked`` clients; None without one."""
    if config.robust.rule == "none":
        return None
    hostile = math.ceil(config.robust.hostile_share * asked - 1e-9)
    return RobustMean(rule=config.robust.rule, hostile=hostile)


def check_robust(config: Config) -> None:
    """Refuse keys with which a robust rule would protect less than it says.

    Raises:
        UserError: names the key, and says why.
    """
    rule, share = config.robust.rule, config.robust.hostile_share
    if rule == "none":
        if share != Robust().hostile_share:
            raise UserError(
                f"robust.hostile-share is {share:g} with robust.rule=none, which withstands no "
                "hostile client; set robust.rule."
            )
        return
    if share >= 0.5:
        raise UserError(
            f"robust.hostile-share is {share:g}, expected below 0.5: where hostile clients are the "
            "majority, no rule can tell which side is honest."
        )
    if config.privacy.mode not in SEEN:
        raise UserError(
            f"robust.rule is {rule} with privacy.mode={config.privacy.mode}: the rule compares "
            "single updates, which that mode hides or must not act on; set one of the two to none."
        )
    needs = make_method(config.method.name, config.method).needs
    if needs.factors or needs.bands or needs.band_changes:
        raise UserError(
            f"robust.rule is {rule} with method.name={config.method.name}, which averages factors "
            "or bands of them: the rule weighs whole products, and says nothing of their parts."
        )
    _check_choice(config)


def _check_choice(config: Config) -> None:
    """Refuse what gives hostile clients a larger share of a round than of the clients."""
    rule = config.robust.rule
    if config.sampling.policy not in ALLOWED_POLICIES:
        raise UserError(
            f"sampling.policy is {config.sampling.policy} with robust.rule={rule}: a client that "
            "reports or appears as it likes would be asked more often than others; expected one of "
            f"{', '.join(ALLOWED_POLICIES)}."
        )
    reasons = {
        "server.late-rounds": (
            config.server.late_rounds,
            "hostile clients could hold their updates back and send those of several rounds to one",
        ),
        "server.over-selection": (
            config.server.over_selection,
            "the first replies count, and hostile clients need no time to train",
        ),
    }
    for key, (value, why) in reasons.items():
        if value:
            raise UserError(f"{key} is {value:g} with robust.rule={rule}: {why}; set it to 0.")


def check_enough(config: Config, num_clients: int) -> None:
    """Refuse a federation in which no round can have enough updates for the rule.

    Raises:
        UserError: the rule needs more than the clients of a round.
    """
    expected = round(config.fraction_train * num_clients)
    asked = min(num_clients, max(expected, config.min_train_clients, config.server.quorum))
    robust = robust_mean(config, asked)
    if robust is not None and asked < robust.least:
        raise UserError(
            f"robust.rule={robust.rule} with robust.hostile-share="
            f"{config.robust.hostile_share:g} needs {robust.least} updates where {robust.hostile} "
            f"may be hostile, and a round asks {asked} of {num_clients} clients; raise "
            "fraction-train or lower the share."
        )
