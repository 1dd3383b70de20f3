"""The server's side of a configuration as plain values: read once, at the entry point."""

from __future__ import annotations

from dataclasses import dataclass

from flexlora.aggregation import MethodOptions, check_options
from flexlora.aggregation.engine.method import Factoring
from flexlora.config.resolve import Config
from flexlora.errors import UserError
from flexlora.planning.memory_ranks import run_plan
from flexlora.planning.rank_policies import RankPolicy
from flexlora.planning.rank_tables import read_rank_table
from flexlora.server.transport.resending import Resending
from flexlora.wire.feedback import check_wire

__all__ = ["ServerSettings", "method_options"]

OWN_CARRIED_RANK = ("aligned", "carried")  # methods in which a rank class may name its own


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What ``FlexLoRAStrategy`` needs to know; the defaults live in ``flexlora.config.resolve``."""

    method: str
    method_options: MethodOptions
    max_update_norm: float
    factoring: Factoring
    rank_policy: RankPolicy
    num_server_rounds: int
    fraction_train: float
    min_train_clients: int
    sampling_policy: str
    over_selection: float
    quorum: int
    eval_every: int
    eval_fraction: float
    eval_generate: str
    wire_dtype: str
    min_nodes: int
    wait_seconds: float
    round_timeout_seconds: float
    late_rounds: int
    seed: int
    late_weight: float = 1.0
    resends: int = 0
    silence_seconds: float = 0.0
    message_ttl_seconds: float = 0.0
    backoff_rounds: int = 0

    @classmethod
    def from_config(cls, config: Config) -> ServerSettings:
        """Raises ``UserError`` for a method, a rank or shares that cannot be, or ``resume``."""
        if config["resume"]:
            raise UserError(
                f"resume is '{config['resume']}', which is for `flwr run`; with `flexlora "
                "simulate` use --resume DIR."
            )
        options = method_options(config)
        check_options(config["method.name"], vars(options), vars(method_options(Config())))
        check_wire(
            config["wire.dtype"],
            config["method.name"],
            error_feedback=config["method.error-feedback"],
        )
        policy = RankPolicy(
            policy=config["ranks.policy"],
            fixed=config["ranks.fixed"],
            tiers=config["ranks.tiers"],
            shares=config["ranks.shares"],
            scale=config["ranks.scale"],
            file=config["ranks.file"],
            seed=config["seed"],
            memory=run_plan(config) if config["ranks.policy"] == "memory" else None,
        )
        _refuse_carried(policy, config["method.name"])
        return cls(
            method=config["method.name"],
            method_options=options,
            max_update_norm=config["method.max-update-norm"],
            factoring=Factoring(
                alpha=config["lora.alpha"],
                rslora=config["lora.rslora"],
                seed=config["seed"],
            ),
            rank_policy=policy,
            num_server_rounds=config["num-server-rounds"],
            fraction_train=config["fraction-train"],
            min_train_clients=config["min-train-clients"],
            sampling_policy=config["sampling.policy"],
            over_selection=config["server.over-selection"],
            quorum=config["server.quorum"],
            eval_every=config["eval.every"],
            eval_fraction=config["eval.fraction"],
            eval_generate=config["eval.generate"],
            wire_dtype=config["wire.dtype"],
            min_nodes=config["server.min-nodes"],
            wait_seconds=config["server.wait-seconds"],
            round_timeout_seconds=config["server.round-timeout-seconds"],
            late_rounds=config["server.late-rounds"],
            seed=config["seed"],
            late_weight=config["server.late-weight"],
            resends=config["server.resends"],
            silence_seconds=config["server.silence-seconds"],
            message_ttl_seconds=config["server.message-ttl-seconds"],
            backoff_rounds=config["server.backoff-rounds"],
        )

    def evaluates(self, server_round: int, num_rounds: int) -> bool:
        """Round 0 and the last always; between them every ``eval_every``-th."""
        if server_round in (0, num_rounds):
            return True
        return self.eval_every > 0 and server_round % self.eval_every == 0

    def resending(self, timeout: float) -> Resending:
        """What is done about lost messages of a round that lasts ``timeout``."""
        return Resending(
            resends=self.resends,
            silence_seconds=self.silence_seconds or timeout / 2,
            patience_seconds=self.wait_seconds,
            ttl_seconds=self.message_ttl_seconds,
            late_seconds=self.late_rounds * timeout,
        )

    def generates(self, server_round: int, num_rounds: int) -> bool:
        """Whether an evaluated round generates answers too."""
        ends = server_round in (0, num_rounds)
        return self.eval_generate == "every" or (self.eval_generate == "ends" and ends)


def _refuse_carried(policy: RankPolicy, method: str) -> None:
    """A carried rank in the table is for methods in which a class may have its own."""
    if policy.policy != "file" or method in OWN_CARRIED_RANK:
        return
    for client_id, rank_class in read_rank_table(policy.file).items():
        if rank_class.carried_rank:
            raise UserError(
                f"ranks.file '{policy.file}', client '{client_id}': carried_rank is "
                f"{rank_class.carried_rank}, which method.name={method} does not read (but "
                f"{' and '.join(OWN_CARRIED_RANK)} do); leave it out."
            )


def method_options(config: Config) -> MethodOptions:
    """The ``method.*`` keys as plain values."""
    keys = {name: f"method.{name.replace('_', '-')}" for name in MethodOptions.__dataclass_fields__}
    keys["max_rank"] = "method.server-max-rank"
    return MethodOptions(**{name: config[key] for name, key in keys.items()})
