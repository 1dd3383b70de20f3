"""Every option once: its key, its default, what it accepts, one line of help."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from flexlora.errors import UserError, nearest

__all__ = ["OPTIONS", "Option", "Scalar"]

Scalar = bool | int | float | str
QUANTIZATIONS = ("none", "8bit", "nf4")
RANK_POLICIES = (
    "fixed",
    "tiers",
    "paper:uniform",
    "paper:heavy-tail-light",
    "paper:heavy-tail-strong",
    "paper:normal",
    "file",
    "memory",
)


@dataclass(frozen=True, kw_only=True)
class Option:
    """One key. ``minimum`` and ``maximum`` are inclusive; the type is the default's type."""

    key: str
    default: Scalar
    help: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None

    @property
    def type_name(self) -> str:
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        return names[type(self.default)]

    def parse(self, text: str) -> Scalar:
        """The value of ``--set key=text``."""
        try:
            if isinstance(self.default, bool):
                return {"true": True, "false": False}[text.strip().lower()]
            if isinstance(self.default, int):
                return self.check(int(text))
            if isinstance(self.default, float):
                return self.check(float(text))
        except (KeyError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.key} is '{text}', expected {self.type_name}.") from None
        return self.check(text)

    def check(self, value: Any) -> Any:
        """``value`` in this option's type and range, or a ``UserError``."""
        if isinstance(self.default, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(self.default):
            raise UserError(f"{self.key} is {value!r}, expected {self.type_name}.")
        if self.choices and value not in self.choices:
            known = ", ".join(choice or "nothing" for choice in self.choices)
            hint = nearest(str(value), self.choices)
            raise UserError(f"{self.key} is '{value}', expected one of {known}.{hint}")
        if self.minimum is not None and not float(value) >= self.minimum:
            raise UserError(f"{self.key} is {value}, expected at least {self.minimum:g}.")
        if self.maximum is not None and not float(value) <= self.maximum:
            raise UserError(f"{self.key} is {value}, expected at most {self.maximum:g}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{self.key} is {value}, expected a finite number.")
        return value


def _options() -> tuple[Option, ...]:
    def option(key, default, help, choices=(), minimum=None, maximum=None):
        return Option(
            key=key, default=default, help=help, choices=choices, minimum=minimum, maximum=maximum
        )

    return (
        option("seed", 0, "seed of every random draw", minimum=0),
        option("num-server-rounds", 8, "rounds of federated training", minimum=1),
        option("fraction-train", 0.34, "share of the clients that train in a round", (), 0.0, 1.0),
        option("min-train-clients", 1, "train at least this many clients a round", minimum=1),
        option("clients.count", 0, "clients to make of the data (0: as many as it names)", (), 0),
        option(
            "clients.quantization",
            "",
            "shares of simulated clients on another base, as 'nf4:0.5' or 'nf4:0.25,8bit:0.25'",
        ),
        option(
            "method.name",
            "carried",
            "aligned, carried, fed-plora, fedex-lora, fedit, ffa-lora, flexlora, flora, florist, "
            "hetlora, raflora, rbla, residual, rolora, slora",
        ),
        option(
            "method.server-learning-rate",
            0.0,
            "step on the aggregate (0: the method's own: 2 for residual, carried, aligned; else 1)",
            minimum=0.0,
        ),
        option(
            "method.server-optimizer",
            "sgd",
            "how the server steps",
            ("sgd", "momentum"),
        ),
        option("method.server-momentum", 0.9, "momentum of the server's optimizer", (), 0.0, 0.999),
        option("method.server-max-rank", 256, "rank of G that is kept per module", minimum=1),
        option("method.error-feedback", False, "add what truncation drops to the next sum"),
        option("method.carried-rank", 32, "rank carried (carried, aligned, fed-plora)", minimum=1),
        option(
            "method.carried-dtype",
            "",
            "dtype of what is carried (carried, aligned; empty: wire.dtype)",
            ("", "float32", "bfloat16"),
        ),
        option("method.gradient-batches", 1, "batches to align with; 0: random (aligned)", (), 0),
        option("method.energy-threshold", 0.95, "energy that is kept (florist)", (), 1e-6, 1.0),
        option("method.prune-factor", 0.75, "share kept by self-pruning (hetlora)", (), 0.0, 0.999),
        option("method.prune-penalty", 1e-3, "regulariser of the tail (hetlora)", minimum=0.0),
        option("method.sparse-rounds", 2, "rounds before the SVD start (slora)", minimum=0),
        option("method.max-update-norm", 0.0, "refuse larger updates (0: no bound)", minimum=0.0),
        option("ranks.policy", "tiers", "who trains at which rank", RANK_POLICIES),
        option("ranks.fixed", 8, "the rank under ranks.policy=fixed"),
        option("ranks.tiers", "2,4,8,16", "the ranks under ranks.policy=tiers"),
        option("ranks.shares", "0.5,0.25,0.15,0.1", "share of the clients per tier (or 'equal')"),
        option("ranks.scale", 1.0, "factor on the ranks of ranks.policy=paper:...", minimum=1e-6),
        option("ranks.file", "", "ranks by client id under ranks.policy=file (.csv or .toml)"),
        option("lora.alpha", 16.0, "LoRA's alpha; scaling is alpha/rank", minimum=1e-9),
        option("lora.rslora", False, "scaling is alpha/sqrt(rank)"),
        option("lora.dropout", 0.0, "dropout on the input of lora_A", (), 0.0, 0.99),
        option(
            "lora.target-modules",
            "all-linear",
            "all-linear, names separated by commas, or a regular expression",
        ),
        option("model.name", "embedded", "local folder or hub name of the base model"),
        option("model.quantization", "none", "how the base is held", QUANTIZATIONS),
        option(
            "model.outlier-threshold",
            0.0,
            "8bit: inputs beyond it are multiplied in 16 bits, one client at a time (0: none)",
            minimum=0.0,
        ),
        option("model.dtype", "float32", "dtype of the base", ("float32", "bfloat16", "float64")),
        option(
            "model.attn-implementation",
            "auto",
            "attention kernels (auto: sdpa where the model has it)",
            ("auto", "eager", "sdpa", "flash_attention_2"),
        ),
        option("data.path", "", "folder of train, validation and test .jsonl[.gz] files"),
        option("data.tasks", "default", "built-in families: default, all, or names with commas"),
        option("data.name", "", "hub data set (needs the datasets package)"),
        option(
            "data.partition", "client", "rows to clients", ("client", "task", "iid", "dirichlet")
        ),
        option("data.dirichlet-alpha", 0.5, "concentration of the Dirichlet partition", (), 1e-6),
        option("data.template", "auto", "prompt template (auto, plain, alpaca, chat)"),
        option("train.learning-rate", 5e-3, "peak learning rate", minimum=0.0),
        option("train.per-device-train-batch-size", 8, "rows of a client in one pass", minimum=1),
        option("train.gradient-accumulation-steps", 1, "passes per optimizer step", minimum=1),
        option("train.max-steps", 20, "optimizer steps a round (0: num-train-epochs)", minimum=0),
        option("train.num-train-epochs", 1, "epochs a round where max-steps is 0", minimum=1),
        option("train.max-length", 256, "tokens of prompt and answer together", minimum=8),
        option(
            "train.optim",
            "adamw_torch",
            "local optimizer (8bit: bitsandbytes; paged: CUDA)",
            ("adamw_torch", "sgd", "adamw_8bit", "paged_adamw_8bit"),
        ),
        option("train.weight-decay", 0.0, "weight decay (decoupled in AdamW)", minimum=0.0),
        # Larger than the usual 1e-8: below it a gradient that is only float32
        # rounding would still move its weight by a whole step, in a direction of chance.
        option("train.adam-epsilon", 1e-6, "AdamW's epsilon", minimum=0.0),
        option("train.proximal-mu", 0.0, "FedProx: pull to where the round began", minimum=0.0),
        option("train.max-grad-norm", 1.0, "gradient norm bound per client (0: none)", minimum=0.0),
        option(
            "train.lr-scheduler-type",
            "linear",
            "learning rate across all rounds",
            ("constant", "linear", "cosine"),
        ),
        option("train.gradient-checkpointing", False, "recompute activations to save memory"),
        option("eval.every", 1, "evaluate the loss every N rounds (0: first and last)", minimum=0),
        option("eval.split", "validation", "rows to evaluate on", ("validation", "test")),
        option("eval.fraction", 1.0, "share of the clients that evaluate", (), 0.0, 1.0),
        option("eval.max-examples", 8, "rows per client (0: all)", minimum=0),
        option("eval.generate", "ends", "generated answers", ("never", "ends", "every")),
        option("eval.max-new-tokens", 24, "tokens generated per answer", minimum=1),
        option("eval.batch-size", 64, "rows per evaluation pass", minimum=1),
        option(
            "personal.rank", 0, "rank of factors that each client keeps to itself (0: none)", (), 0
        ),
        option("personal.max-steps", 10, "steps a round on a client's own factors", minimum=1),
        option("personal.learning-rate", 2e-3, "peak rate of a client's own factors", minimum=0.0),
        option(
            "sampling.policy",
            "uniform",
            "who trains in a round (utility: Oort-like; stratified: by rank class)",
            ("uniform", "availability", "examples", "utility", "stratified"),
        ),
        option(
            "population.devices",
            "",
            "shares of simulated devices, as 'jetson-orin-nano-8gb:0.7,rtx-4090:0.3'; a clock runs",
        ),
        option("population.links", "", "shares of links, as 'fiber:0.2,wifi:0.5,lte:0.3'"),
        option(
            "population.link-sigma", 0.5, "spread of speeds around a link's median", (), 0.0, 3.0
        ),
        option(
            "population.availability",
            "always",
            "when clients can be reached",
            ("always", "diurnal", "markov", "trace"),
        ),
        option("population.online-share", 0.6, "mean share of clients online", (), 0.01, 1.0),
        option("population.online-hours", 2.0, "mean time online (markov)", minimum=0.01),
        option("population.trace", "", "CSV of client_id,start_seconds,end_seconds (trace)"),
        option(
            "population.dropout", 0.0, "chance that a client leaves while it trains", (), 0.0, 1.0
        ),
        option("population.straggler-share", 0.0, "share of slow trainings", (), 0.0, 1.0),
        option("population.straggler-slowdown", 3.0, "how many times slower they are", minimum=1.0),
        option(
            "population.examples",
            "",
            "train rows per client, as '100' or 'lognormal:60:1.0' (empty: all of its rows)",
        ),
        option(
            "population.clock-model",
            "",
            "model folder or hub name whose cost the clock counts (empty: model.name)",
        ),
        option(
            "engine.cohort-size",
            0,
            "clients in one pass in simulation (0: by the cost model)",
            (),
            0,
        ),
        option(
            "engine.cohort-tokens",
            0,
            "tokens in one pass of a cohort (0: by the cost model)",
            (),
            0,
        ),
        option(
            "engine.workers", 1, "processes or GPUs that share the cohorts, through Ray", minimum=1
        ),
        option("engine.ray-address", "", "address of a Ray cluster (empty: this machine)"),
        option("engine.threads", 0, "CPU threads (0: all; fixed when the run starts)", minimum=0),
        option("engine.device", "auto", "where to train", ("auto", "cpu", "cuda")),
        option(
            "wire.dtype",
            "float32",
            "factors between server and client",
            ("float32", "bfloat16", "float64", "int8"),
        ),
        option("server.min-nodes", 1, "nodes to wait for before round 1", minimum=1),
        option("server.wait-seconds", 300.0, "how long to wait for them", minimum=0.0),
        option("server.round-timeout-seconds", 3600.0, "how long to wait for replies", minimum=0.1),
        option("server.over-selection", 0.0, "ask this share of clients more", (), 0.0, 4.0),
        option("server.quorum", 1, "updates below which a round changes nothing", minimum=1),
        option("server.late-rounds", 1, "rounds after which a late update still counts", minimum=0),
        option("server.late-weight", 1.0, "weight of an update per round it is late", (), 0.0, 1.0),
        option("server.resends", 2, "times a lost message is sent again in its round", minimum=0),
        option(
            "server.silence-seconds",
            0.0,
            "silence after which a message counts as lost (0: half the round's time)",
            minimum=0.0,
        ),
        option(
            "server.message-ttl-seconds",
            0.0,
            "how long a message may live (0: its round and server.late-rounds more)",
            minimum=0.0,
        ),
        option(
            "server.backoff-rounds",
            8,
            "rounds that a node which keeps failing sits out, 1, 2, 4 ... at most (0: none)",
            minimum=0,
        ),
        option("server.metrics-port", 0, "port of the Prometheus endpoint (0: none)", (), 0, 65535),
        option("server.metrics-host", "127.0.0.1", "address that the endpoint listens on"),
        option("resume", "", "run folder that `flwr run` goes on with (as its `out`)"),
        option("out", "", "run folder of `flwr run` (default: runs/RUN_ID where the server runs)"),
    )


OPTIONS: dict[str, Option] = {option.key: option for option in _options()}
