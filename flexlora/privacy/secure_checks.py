"""Refuse configurations in which the server needs what ``privacy.mode=secure`` hides from it."""

from __future__ import annotations

from flexlora.config.resolve import Config
from flexlora.errors import UserError

__all__ = ["LINEAR_METHODS", "check_secure"]

LINEAR_METHODS = (
    "basis",
    "ffa-lora",
)  # over rows that all clients share


def check_secure(config: Config) -> None:
    """Refuse keys that a secure sum needs and are missing, and keys that see single updates.

    Raises:
        UserError: names the key, and says why.
    """
    privacy, mode = config.privacy, config.privacy.mode
    if config.method.name not in LINEAR_METHODS:
        raise UserError(
            f"method.name is {config.method.name} with privacy.mode={mode}: its sum is not linear "
            f"in what clients send; expected one of {', '.join(LINEAR_METHODS)}."
        )
    if privacy.clip == 0.0:
        raise UserError(
            f"privacy.clip is 0 with privacy.mode={mode}: numbers are sent as whole ones in a "
            "fixed range, that of updates of this norm; set it above what most clients reach "
            "(`clipped_share` in metrics.jsonl shows how it fits)."
        )
    for name in ("clip_quantile", "noise_multiplier", "epsilon", "as_if_clients"):
        if getattr(privacy, name) and not privacy.noisy:
            raise UserError(
                f"privacy.{name.replace('_', '-')} is {getattr(privacy, name):g} with "
                f"privacy.mode={mode}, which adds no noise; set privacy.mode=secure+central."
            )
    _check_single_updates(config)


def _check_single_updates(config: Config) -> None:
    """Refuse what the server can only do with each client's own update, loss or norm."""
    server, mode = config.server, config.privacy.mode
    reasons = {
        "server.late-rounds": (server.late_rounds, 0, "a sum is opened once, at its round's end"),
        "server.over-selection": (
            server.over_selection,
            0,
            "who is not needed would be missing from the sum as one who dropped out",
        ),
        "eval.factor-gap": (config.eval.factor_gap, False, "it needs every client's factors"),
    }
    for key, (value, allowed, why) in reasons.items():
        if value != allowed:
            shown = str(allowed).lower()
            raise UserError(
                f"{key} is {str(value).lower()} with privacy.mode={mode}: {why}; set it to {shown}."
            )
    if config.sampling.policy == "utility":
        raise UserError(
            f"sampling.policy is utility with privacy.mode={mode}: it reads every client's loss, "
            "which is summed and not sent."
        )
    if config.wire.dtype == "int8":
        raise UserError(
            f"wire.dtype is int8 with privacy.mode={mode}: uploads are whole numbers in bits of "
            "their own, with no error to feed back; use bfloat16 for what is sent to clients."
        )
