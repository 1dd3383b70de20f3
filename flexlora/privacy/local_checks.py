"""Refuse configurations that the noise of ``privacy.mode=local`` and ``example`` does not cover.

The server checks a run with it, and a client checks what it is asked to do.
"""

from __future__ import annotations

from flexlora.config.resolve import Config
from flexlora.errors import UserError
from flexlora.privacy.accounting import LOWEST_NOISE
from flexlora.privacy.client_rounds import CLIENT_MODES

__all__ = ["LOCAL_METHODS", "check_client_privacy"]

LOCAL_METHODS = ("basis", "ffa-lora")  # every client trains and sends lora_B over one frozen lora_A
ALTERNATING = ("rolora", "slora")


def check_client_privacy(config: Config) -> None:
    """Refuse what noise on the clients does not cover; nothing is refused under other modes.

    Raises:
        UserError: names the key, and says why.
    """
    privacy, mode = config.privacy, config.privacy.mode
    if mode not in CLIENT_MODES:
        return
    for name in ("clip_quantile", "as_if_clients"):
        if value := getattr(privacy, name):
            raise UserError(
                f"privacy.{name.replace('_', '-')} is {value:g} with privacy.mode={mode}, which "
                "does not read it (but central does); leave it out."
            )
    what = "its change" if mode == "local" else "the gradient of each row"
    if privacy.clip == 0.0:
        raise UserError(
            f"privacy.clip is 0 with privacy.mode={mode}: noise hides nothing unless the norm of "
            f"{what} is bounded; set it, to 1.0 for a start."
        )
    least = LOWEST_NOISE * (2 if mode == "local" else 1)  # a clipped change moves by 2C
    if privacy.noise_multiplier < least:
        raise UserError(
            f"privacy.noise-multiplier is {privacy.noise_multiplier:g} with privacy.mode={mode}, "
            f"expected at least {least:g}: less protects nobody."
        )
    if mode == "local":
        _check_local(config)
    else:
        _check_example(config)
    _check_both(config)


def _check_local(config: Config) -> None:
    method = config.method.name
    if method not in LOCAL_METHODS:
        why = "trains lora_A and lora_B, and noise on both would multiply in their product"
        if method in ALTERNATING:
            why = "trains other factors in other rounds, of which one clip cannot bound the change"
        if method == "aligned":
            why = "sends the row space of the client's own gradient, which no noise covers"
        raise UserError(
            f"method.name is {method}, which {why}; privacy.mode=local takes "
            f"{' or '.join(LOCAL_METHODS)}, whose upload is linear in what is trained."
        )
    if config.wire.dtype == "int8":
        raise UserError(
            "wire.dtype is int8 with privacy.mode=local: what rounding drops of one upload would "
            "be added to the next behind its clip; use bfloat16."
        )


def _check_example(config: Config) -> None:
    if config.method.name == "aligned":
        raise UserError(
            "method.name is aligned with privacy.mode=example: it turns lora_A to the gradient of "
            "the rows before the first step, which no noise covers; use carried."
        )
    if config.lora.dropout:
        raise UserError(
            f"lora.dropout is {config.lora.dropout:g} with privacy.mode=example: a row's mask "
            "depends on which rows come before it; set it to 0."
        )
    if config.model.outlier_threshold:
        raise UserError(
            f"model.outlier-threshold is {config.model.outlier_threshold:g} with "
            "privacy.mode=example: which columns are outliers depends on all rows of a pass; set "
            "it to 0."
        )


def _check_both(config: Config) -> None:
    mode = config.privacy.mode
    if config.personal.rank:
        raise UserError(
            f"personal.rank is {config.personal.rank} with privacy.mode={mode}: personal factors "
            "are trained without noise, and their scores would leave the client; set it to 0."
        )
    if config.sampling.policy == "utility":
        raise UserError(
            f"sampling.policy is utility with privacy.mode={mode}: it chooses by the clients' "
            "losses, which are withheld; use uniform."
        )
    if config.start_from:
        raise UserError(
            f"start-from is '{config.start_from}' with privacy.mode={mode}: what that run learned "
            "of its clients is in no ledger; start from the base."
        )
