"""Refuse configurations to which the theorem of ``privacy.mode=central`` does not apply."""

from __future__ import annotations

from flexlora.config.resolve import Config
from flexlora.errors import UserError
from flexlora.privacy.accounting import LOWEST_NOISE
from flexlora.privacy.client_rounds import CLIENT_MODES
from flexlora.privacy.local_checks import check_client_privacy

__all__ = ["PRIVATE_METHODS", "check_privacy"]

# Their sum is one of clipped changes: of products, or of the columns over one public lora_A.
PRIVATE_METHODS = ("aligned", "basis", "carried", "ffa-lora", "residual")


def check_privacy(config: Config) -> None:
    """Refuse keys that privacy needs and are missing, and keys that it excludes.

    Raises:
        UserError: names the key, and says why.
    """
    privacy = config.privacy
    if privacy.mode in CLIENT_MODES:
        check_client_privacy(config)
        return
    if privacy.mode == "none":
        for name in ("clip", "clip_quantile", "noise_multiplier", "epsilon", "as_if_clients"):
            if value := getattr(privacy, name):
                key = name.replace("_", "-")
                raise UserError(
                    f"privacy.{key} is {value:g} with privacy.mode=none, which adds no noise; set "
                    "privacy.mode=central."
                )
        return
    if privacy.clip == 0.0:
        raise UserError(
            "privacy.clip is 0 with privacy.mode=central: noise hides a client only if the norm of "
            "its change is bounded. `clipped_share` in metrics.jsonl shows how a clip fits."
        )
    if privacy.noise_multiplier < LOWEST_NOISE:
        raise UserError(
            f"privacy.noise-multiplier is {privacy.noise_multiplier:g}, expected at least "
            f"{LOWEST_NOISE:g}; `flexlora privacy --epsilon BUDGET` finds it."
        )
    if config.method.name not in PRIVATE_METHODS:
        raise UserError(
            f"method.name is {config.method.name} with privacy.mode=central, which clips what a "
            f"client adds; expected one of {', '.join(PRIVATE_METHODS)}, which add changes."
        )
    _check_data_dependence(config)


def _check_data_dependence(config: Config) -> None:
    """Refuse what lets one client's data decide which others count, or how much."""
    server, method = config.server, config.method
    if config.sampling.policy != "poisson":
        raise UserError(
            f"sampling.policy is {config.sampling.policy} with privacy.mode=central, expected "
            "poisson: epsilon is accounted for clients that are sampled one by one. With "
            "fraction-train=1 all that can be reached are asked, and nothing is amplified."
        )
    if config.sampling.cap and config.privacy.as_if_clients:
        raise UserError(
            f"sampling.cap is {config.sampling.cap} with privacy.as-if-clients, whose population "
            "would have another cap; leave one of them out."
        )
    if config.fraction_train == 0.0:
        raise UserError("fraction-train is 0 with privacy.mode=central, expected more.")
    reasons = {
        "server.late-rounds": (
            server.late_rounds,
            "a late update belongs to the sample of another round",
        ),
        "server.quorum": (
            server.quorum - 1,
            "whether enough clients came must not show in the result",
        ),
    }
    for key, (value, why) in reasons.items():
        if value:
            least = 1 if key == "server.quorum" else 0
            raise UserError(
                f"{key} is {value + least} with privacy.mode=central: {why}; set it to {least}."
            )
    if getattr(method, "server_learning_rate", 1.0) == 0.0:
        raise UserError(
            "method.server-learning-rate is 0 (FedExP's, from the clients' norms) with "
            "privacy.mode=central: no noise covers those norms; set a number, such as 1.0."
        )
    if config.start_from:
        raise UserError(
            f"start-from is '{config.start_from}' with privacy.mode=central: what that run learned "
            "of its clients is in no ledger; start from the base."
        )
