"""Refuse canaries where their trace in the global change could not be read as epsilon."""

from __future__ import annotations

from flexlora.config.resolve import KEYS, Config
from flexlora.errors import UserError

__all__ = ["AUDITED_METHODS", "check_canaries"]

# Their clients send lora_B, and the change of one is a term of the next global change.
AUDITED_METHODS = ("aligned", "basis", "carried", "flexlora", "residual")
AUDITED_MODES = ("none", "central")
TIMED = ("population.dropout", "population.straggler-share")


def check_canaries(config: Config) -> None:
    """Refuse keys that ``audit.canaries`` excludes, or needs and are missing.

    Raises:
        UserError: names the key, and says why.
    """
    audit, count = config.audit, config.audit.canaries
    if not count:
        if audit.canary_norm:
            raise UserError(
                f"audit.canary-norm is {audit.canary_norm:g} and audit.canaries is 0; set "
                "audit.canaries, or leave the norm out."
            )
        return
    asked = f"with audit.canaries={count}"
    if config.method.name not in AUDITED_METHODS:
        raise UserError(
            f"method.name is {config.method.name} {asked}, expected one of "
            f"{', '.join(AUDITED_METHODS)}: of these a client's change is a term of the sum."
        )
    if config.privacy.mode not in AUDITED_MODES:
        raise UserError(
            f"privacy.mode is {config.privacy.mode} {asked}, expected none or central: a canary is "
            "made in the simulation and takes no part in what clients do to their updates."
        )
    clip = config.privacy.clip
    if not (audit.canary_norm or clip):
        raise UserError(
            f"audit.canary-norm is 0 {asked} and no privacy.clip: set the norm of a canary's "
            "change, such as 1.0."
        )
    if clip and audit.canary_norm > clip:
        raise UserError(
            f"audit.canary-norm is {audit.canary_norm:g} {asked}, above privacy.clip={clip:g}, to "
            "which it would be cut; leave it out: canaries have the norm of the clip."
        )
    if config.sampling.policy not in ("uniform", "poisson"):
        raise UserError(
            f"sampling.policy is {config.sampling.policy} {asked}, expected uniform or poisson: "
            "canaries have no losses, and all must be sampled alike."
        )
    for key, why in {
        "privacy.clip-quantile": "a canary has the norm of a clip that stays",
        "privacy.as-if-clients": "epsilon is then that of noise which is not added",
    }.items():
        if value := config.flat()[key]:
            raise UserError(f"{key} is {value:g} {asked}: {why}; leave it out.")
    if config.robust.rule != "none":
        raise UserError(
            f"robust.rule is {config.robust.rule} {asked}: it weighs updates against each other, "
            "so that a canary changes what others count; leave it out."
        )
    for key in ("server.over-selection", "server.quorum", *TIMED):
        if (value := config.flat()[key]) != KEYS[key].default:
            raise UserError(
                f"{key} is {value:g} {asked}: who else counts would depend on the canaries that "
                "send nothing, or on time, which canaries do not need; leave it out."
            )
    if config.population.devices or config.population.availability != "always":
        raise UserError(
            f"population.* describes devices or their time online {asked}: canaries have no "
            "device; leave these keys out."
        )
