"""Objects that the server derives from a configuration, and checks of keys against each other."""

from __future__ import annotations

from pathlib import Path

from flexlora.aggregation.engine.starts import Factoring
from flexlora.config.base_config import base_config
from flexlora.config.paths import resolve_name
from flexlora.config.resolve import Config
from flexlora.data.chat import parse_date
from flexlora.errors import UserError
from flexlora.planning.memory_ranks import run_plan
from flexlora.planning.rank_policies import RankPolicy
from flexlora.planning.rank_tables import read_rank_table
from flexlora.privacy.canary_checks import check_canaries
from flexlora.privacy.checks import check_privacy
from flexlora.server.observing.tracker_kinds import check_trackers
from flexlora.server.publishing import check_publish
from flexlora.server.robustness import check_robust
from flexlora.wire.feedback import check_wire

__all__ = ["check_config", "factoring_of", "rank_policy_of"]

OWN_CARRIED_RANK = ("aligned", "basis", "carried")  # methods in which a rank class may name its own


def check_config(config: Config) -> None:
    """Refuse keys that do not go together, before anything heavy is loaded.

    Raises:
        UserError: a key of ``flwr run`` alone, a template date that is none, a base that its
            config.json rules out, a wire that the method cannot use, ranks or shares that cannot
            be, a carried rank in a table that the method does not read, a ``server.publish`` that
            cannot be one, a tracker that is not installed, a number of clients under Poisson
            sampling, what differential privacy or a robust rule or canaries exclude.
    """
    if config.resume:
        raise UserError(
            f"resume is '{config.resume}', which is for `flwr run`; with `flexlora "
            "simulate` use --resume DIR."
        )
    if config.allow_changed:
        raise UserError(
            "allow-changed is true, which is for `flwr run` with resume; with `flexlora simulate` "
            "use --resume DIR --allow-changed."
        )
    _check_sampling(config)
    check_privacy(config)
    check_canaries(config)
    check_robust(config)
    check_publish(config.server.publish)
    check_trackers(config.report_to)
    if Path(resolve_name(config.model.name)).is_dir():  # a hub model is the nodes' to fetch
        base_config(config.model.name)
    parse_date(config.data.template_date)
    method = config.method.name
    feedback = getattr(config.method, "error_feedback", False)
    check_wire(config.wire.dtype, method, error_feedback=feedback)
    policy = rank_policy_of(config)
    if policy.policy != "file" or method in OWN_CARRIED_RANK:
        return
    for client_id, rank_class in read_rank_table(policy.file).items():
        if rank_class.carried_rank:
            raise UserError(
                f"ranks.file '{policy.file}', client '{client_id}': carried_rank is "
                f"{rank_class.carried_rank}, which method.name={method} does not read (but "
                f"{', '.join(OWN_CARRIED_RANK)} do); leave it out."
            )


def _check_sampling(config: Config) -> None:
    """Refuse a cap without Poisson sampling, and with it what asks for a number of clients."""
    if config.sampling.policy != "poisson":
        if config.sampling.cap:
            raise UserError(
                f"sampling.cap is {config.sampling.cap}, which sampling.policy="
                f"{config.sampling.policy} does not read (but poisson does); leave it out."
            )
        return
    numbers = {"server.over-selection": config.server.over_selection}
    numbers["min-train-clients"] = config.min_train_clients - 1
    for key, beyond in numbers.items():
        if beyond:
            raise UserError(
                f"{key} is {config.flat()[key]:g}, but under sampling.policy=poisson each client "
                "is sampled by itself and no number of them is fixed; leave it out."
            )


def rank_policy_of(config: Config) -> RankPolicy:
    """The rank policy of the configuration.

    Raises:
        UserError: ranks or shares that cannot be, a model whose memory cannot be predicted.
    """
    memory = run_plan(config) if config.ranks.policy == "memory" else None
    return RankPolicy(**dict(config.ranks), seed=config.seed, memory=memory)


def factoring_of(config: Config) -> Factoring:
    """How ``T_r(G)`` becomes factors."""
    return Factoring(alpha=config.lora.alpha, rslora=config.lora.rslora, seed=config.seed)
