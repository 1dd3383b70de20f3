"""Every key of a configuration but the method's: its default, its bounds, one line of help.

A section is a frozen model; ``config.train.max_steps`` is the key ``train.max-steps``. Code below
the entry points takes a section, or plain values of it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator

from flexlora.aggregation.engine.options import Options, choices, option
from flexlora.config.paths import expanded
from flexlora.data.chat import DEFAULT_DATE
from flexlora.errors import nearest

__all__ = [
    "QUANTIZATIONS",
    "RANK_POLICIES",
    "Audit",
    "Clients",
    "Data",
    "Engine",
    "Eval",
    "Lora",
    "Model",
    "PathKey",
    "Personal",
    "Population",
    "Privacy",
    "Ranks",
    "Robust",
    "Run",
    "Sampling",
    "Server",
    "Train",
    "Wire",
    "tracker_names",
]

Quantization = Literal["none", "8bit", "nf4"]
RankPolicyName = Literal[
    "fixed",
    "tiers",
    "paper:uniform",
    "paper:heavy-tail-light",
    "paper:heavy-tail-strong",
    "paper:normal",
    "file",
    "memory",
]
TRACKERS = ("tensorboard", "wandb", "mlflow")


def tracker_names(report_to: str) -> list[str]:
    """The trackers that ``report-to`` names, each once.

    Raises:
        ValueError: one that nothing here reports to.
    """
    names = [name.strip() for name in report_to.split(",") if name.strip()]
    for name in names:
        if name not in TRACKERS:
            known = ", ".join(TRACKERS)
            raise ValueError(f"names '{name}', expected some of {known}.{nearest(name, TRACKERS)}")
    return list(dict.fromkeys(names))


def _trackers(report_to: str) -> str:
    return ",".join(tracker_names(report_to))


PathKey = Annotated[str, AfterValidator(expanded)]  # a key that takes a path
QUANTIZATIONS: tuple[str, ...] = choices(Quantization)
RANK_POLICIES: tuple[str, ...] = choices(RankPolicyName)


class Run(Options):
    """Keys outside any section."""

    seed: int = option(0, "seed of every random draw", ge=0)
    num_server_rounds: int = option(8, "rounds of federated training", ge=1)
    fraction_train: float = option(
        0.34, "share of the clients that train in a round", ge=0.0, le=1.0
    )
    min_train_clients: int = option(1, "train at least this many clients a round", ge=1)
    resume: PathKey = option("", "run folder that `flwr run` goes on with (as its `out`)")
    allow_changed: bool = option(
        False, "`flwr run` goes on with `resume` though the nodes' base is another"
    )
    start_from: PathKey = option(
        "", "run folder from whose last round a new run starts (empty: base)"
    )
    report_to: Annotated[str, AfterValidator(_trackers)] = option(
        "", "also report to tensorboard, wandb, mlflow (names with commas)"
    )
    out: PathKey = option(
        "", "run folder of `flwr run` (default: runs/RUN_ID where the server runs)"
    )


class Clients(Options):
    """The simulated clients."""

    count: int = option(0, "clients to make of the data (0: as many as it names)", ge=0)
    quantization: str = option(
        "", "shares of simulated clients on another base, as 'nf4:0.25,8bit:0.25'"
    )
    held_out: float = option(
        0.0, "share of the clients that never train (`flexlora eval` scores them)", ge=0.0, le=0.9
    )


class Ranks(Options):
    """Assignment of ranks to clients."""

    policy: RankPolicyName = option("tiers", "who trains at which rank")
    fixed: int = option(8, "the rank under ranks.policy=fixed")
    tiers: str = option("2,4,8,16", "the ranks under ranks.policy=tiers")
    shares: str = option("0.5,0.25,0.15,0.1", "share of the clients per tier (or 'equal')")
    scale: float = option(1.0, "factor on the ranks of ranks.policy=paper:...", ge=1e-06)
    file: PathKey = option("", "ranks by client id under ranks.policy=file (.csv or .toml)")


class Lora(Options):
    """LoRA's scaling, dropout and targets."""

    alpha: float = option(16.0, "LoRA's alpha; scaling is alpha/rank", ge=1e-09)
    rslora: bool = option(False, "scaling is alpha/sqrt(rank)")
    dropout: float = option(0.0, "dropout on the input of lora_A", ge=0.0, le=0.99)
    target_modules: str = option(
        "all-linear", "all-linear, names separated by commas, or a regular expression"
    )


class Model(Options):
    """The base model."""

    name: PathKey = option("embedded", "local folder or hub name of the base model")
    quantization: Quantization = option("none", "how the base is held")
    outlier_threshold: float = option(
        0.0, "8bit: larger inputs are multiplied in 16 bits, one client at a time (0: none)", ge=0.0
    )
    dtype: Literal["float32", "bfloat16", "float64"] = option("float32", "dtype of the base")
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = option(
        "auto", "attention kernels (auto: sdpa where the model has it)"
    )


class Data(Options):
    """The source of the rows and their partition over clients."""

    path: PathKey = option("", "folder of train, validation and test .jsonl[.gz] files")
    tasks: str = option("default", "built-in families: default, all, or names with commas")
    name: str = option("", "hub data set (needs the datasets package)")
    held_out_tasks: str = option(
        "", "tasks or categories that nobody trains on, separated by ';' (for `flexlora eval`)"
    )
    partition: Literal["client", "task", "iid", "dirichlet"] = option("client", "rows to clients")
    dirichlet_alpha: float = option(0.5, "concentration of the Dirichlet partition", ge=1e-06)
    template: str = option("auto", "prompt template (auto, plain, alpaca, chat)")
    template_date: str = option(DEFAULT_DATE, "the day of chat templates that read the clock")


class Train(Options):
    """Local training, in Hugging Face's words."""

    learning_rate: float = option(0.005, "peak learning rate", ge=0.0)
    per_device_train_batch_size: int = option(8, "rows of a client in one pass", ge=1)
    gradient_accumulation_steps: int = option(1, "passes per optimizer step", ge=1)
    max_steps: int = option(20, "optimizer steps a round (0: num-train-epochs)", ge=0)
    num_train_epochs: int = option(1, "epochs a round where max-steps is 0", ge=1)
    max_length: int = option(256, "tokens of prompt and answer together", ge=8)
    optim: Literal["adamw_torch", "sgd", "adamw_8bit", "paged_adamw_8bit"] = option(
        "adamw_torch", "local optimizer (8bit: bitsandbytes; paged: CUDA)"
    )
    weight_decay: float = option(0.0, "weight decay (decoupled in AdamW)", ge=0.0)
    # Larger than the usual 1e-8, at which gradients of pure float32 rounding make full steps in
    # random directions.
    adam_epsilon: float = option(1e-06, "AdamW's epsilon", ge=0.0)
    proximal_mu: float = option(0.0, "FedProx: pull to where the round began", ge=0.0)
    max_grad_norm: float = option(1.0, "gradient norm bound per client (0: none)", ge=0.0)
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = option(
        "linear", "learning rate across all rounds"
    )
    gradient_checkpointing: bool = option(False, "recompute activations to save memory")

    @property
    def examples_per_step(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


class Eval(Options):
    """Evaluation of the global and personal models."""

    every: int = option(1, "evaluate the loss every N rounds (0: first and last)", ge=0)
    split: Literal["validation", "test"] = option("validation", "rows to evaluate on")
    fraction: float = option(1.0, "share of the clients that evaluate", ge=0.0, le=1.0)
    max_examples: int = option(8, "rows per client (0: all)", ge=0)
    generate: Literal["never", "ends", "every"] = option("ends", "generated answers")
    max_new_tokens: int = option(24, "tokens generated per answer", ge=1)
    batch_size: int = option(64, "rows per evaluation pass", ge=1)
    factor_gap: bool = option(
        False, "report the gap between averaging factors and averaging products"
    )

    def due(self, server_round: int, num_rounds: int) -> bool:
        """Whether a round is evaluated: round 0, the last, and every ``every``-th between."""
        if server_round in (0, num_rounds):
            return True
        return self.every > 0 and server_round % self.every == 0

    def generates(self, server_round: int, num_rounds: int) -> bool:
        """Whether an evaluated round generates answers too."""
        ends = server_round in (0, num_rounds)
        return self.generate == "every" or (self.generate == "ends" and ends)


class Personal(Options):
    """Personal factors, which never leave a client."""

    rank: int = option(0, "rank of factors that each client keeps to itself (0: none)", ge=0)
    max_steps: int = option(10, "steps a round on a client's own factors", ge=1)
    learning_rate: float = option(0.002, "peak rate of a client's own factors", ge=0.0)


class Sampling(Options):
    """Selection of the clients of a round."""

    policy: Literal["uniform", "availability", "examples", "utility", "stratified", "poisson"] = (
        option("uniform", "who trains in a round (utility: Oort-like; stratified: by rank class)")
    )
    cap: int = option(0, "poisson: most clients of a round (0: no cap)", ge=0)


class Privacy(Options):
    """Differential privacy: of whole clients, or of single rows (``example``)."""

    mode: Literal["none", "central", "secure", "secure+central", "local", "example"] = option(
        "none",
        "noise: central on the sum, local on uploads, example on rows; secure: only sums are seen",
    )
    clip: float = option(
        0.0, "norm to which a client's change (example: a row's gradient) is clipped", ge=0.0
    )
    clip_quantile: float = option(
        0.0, "quantile of the clients' norms that the clip follows (0: it is fixed)", ge=0.0, le=1.0
    )
    noise_multiplier: float = option(0.0, "deviation of the noise over privacy.clip", ge=0.0)
    delta: float = option(1e-5, "chance at which epsilon may fail: below 1/clients", gt=0.0, le=0.5)
    epsilon: float = option(0.0, "budget: no round is begun that would exceed it (0: none)", ge=0.0)
    as_if_clients: int = option(
        0, "simulate the noise and epsilon of so many clients (0: of those that take part)", ge=0
    )
    reproducible: bool = option(
        False, "sampling and noise from the seed: no protection from those who know it"
    )
    min_group: int = option(3, "secure: the least clients whose sum the server may learn", ge=3)
    weights: Literal["examples", "uniform"] = option(
        "examples", "secure: what a client counts in the sum (with noise all count alike)"
    )

    @property
    def secure(self) -> bool:
        """Whether updates leave the clients masked."""
        return self.mode.startswith("secure")

    @property
    def noisy(self) -> bool:
        """Whether the server adds noise to the sum."""
        return self.mode in ("central", "secure+central")

    @property
    def by_examples(self) -> bool:
        """Whether a masked update counts by its examples."""
        return self.weights == "examples" and not self.noisy


class Audit(Options):
    """Canary clients of a simulation, by which `flexlora audit` measures epsilon."""

    canaries: int = option(0, "made-up clients that send a random change, or nothing", ge=0)
    canary_norm: float = option(0.0, "norm of that change (0: privacy.clip)", ge=0.0)


class Robust(Options):
    """Sums that withstand hostile clients."""

    rule: Literal[
        "none",
        "multi-krum",
        "geometric-median",
        "centred-clipping",
        "nearest-trimmed-mean",
        "nearest-median",
    ] = option("none", "how the updates of a round are weighed against each other")
    hostile_share: float = option(
        0.2, "share of a round's clients that may be hostile: below 0.5", gt=0.0, le=1.0
    )


class Population(Options):
    """Simulated devices, links, availability and attacks."""

    devices: str = option(
        "", "shares of simulated devices, as 'jetson-orin-nano-8gb:0.7,rtx-4090:0.3'"
    )
    links: str = option("", "shares of links, as 'fiber:0.2,wifi:0.5,lte:0.3'")
    link_sigma: float = option(0.5, "spread of speeds around a link's median", ge=0.0, le=3.0)
    availability: Literal["always", "diurnal", "markov", "trace"] = option(
        "always", "when clients can be reached"
    )
    online_share: float = option(0.6, "mean share of clients online", ge=0.01, le=1.0)
    online_hours: float = option(2.0, "mean time online (markov)", ge=0.01)
    trace: PathKey = option("", "CSV of client_id,start_seconds,end_seconds (trace)")
    dropout: float = option(0.0, "chance that a client leaves while it trains", ge=0.0, le=1.0)
    straggler_share: float = option(0.0, "share of slow trainings", ge=0.0, le=1.0)
    straggler_slowdown: float = option(3.0, "how many times slower they are", ge=1.0)
    examples: str = option("", "train rows per client, as '100' or 'lognormal:60:1.0' (empty: all)")
    hostile: str = option(
        "", "attack by a share of the clients, as 'sign-flip:0.2', until a round: 'backdoor:0.2:5'"
    )
    clock_model: PathKey = option(
        "", "model folder or hub name whose cost the clock counts (empty: model.name)"
    )


class Engine(Options):
    """How a simulation uses this machine."""

    cohort_size: int = option(0, "clients in one pass in simulation (0: by the cost model)", ge=0)
    cohort_tokens: int = option(0, "tokens in one pass of a cohort (0: by the cost model)", ge=0)
    workers: int = option(1, "processes or GPUs that share the cohorts, through Ray", ge=1)
    ray_address: str = option("", "address of a Ray cluster (empty: this machine)")
    threads: int = option(0, "CPU threads (0: the cores free when the run starts)", ge=0)
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to train")


class Wire(Options):
    """Encoding of messages."""

    dtype: Literal["float32", "bfloat16", "float64", "int8"] = option(
        "float32", "factors between server and client"
    )


class Server(Options):
    """Waiting, resending, late updates and metrics of the server."""

    min_nodes: int = option(1, "nodes to wait for before round 1", ge=1)
    wait_seconds: float = option(300.0, "how long to wait for them", ge=0.0)
    round_timeout_seconds: float = option(3600.0, "how long to wait for replies", ge=0.1)
    over_selection: float = option(0.0, "ask this share of clients more", ge=0.0, le=4.0)
    quorum: int = option(1, "updates below which a round changes nothing", ge=1)
    skipped_rounds: int = option(
        5, "real nodes: rounds in a row below the quorum that end a run (0: they count)", ge=0
    )
    late_rounds: int = option(1, "rounds after which a late update still counts", ge=0)
    late_weight: float = option(1.0, "weight of an update per round it is late", ge=0.0, le=1.0)
    max_norm_ratio: float = option(
        50.0, "refuse updates whose norm is this many times the usual one (0: no bound)", ge=0.0
    )
    resends: int = option(2, "times a lost message is sent again in its round", ge=0)
    silence_seconds: float = option(
        0.0, "silence after which a message counts as lost (0: half the round's time)", ge=0.0
    )
    message_ttl_seconds: float = option(
        0.0, "how long a message may live (0: its round and server.late-rounds more)", ge=0.0
    )
    backoff_rounds: int = option(
        8, "most rounds that a node which keeps failing sits out (0: none)", ge=0
    )
    keep_checkpoints: int = option(
        3, "checkpoints that a run keeps, to go back to with `flexlora rollback`", ge=1
    )
    publish: str = option(
        "", "where a finished run's adapters go, such as s3://BUCKET/ADAPTERS or hf://USER/REPO"
    )
    metrics_port: int = option(0, "port of the Prometheus endpoint (0: none)", ge=0, le=65535)
    metrics_host: str = option("127.0.0.1", "address that the endpoint listens on")
