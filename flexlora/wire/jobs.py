"""Jobs and results of clients, independent of any transport.

Simulation, deployment and notebooks share one boundary: ``decode(Message) -> TrainJob``,
``train(jobs) -> results``, ``encode(result) -> Message``; only the number of jobs differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flexlora.aggregation.engine.starts import Start
from flexlora.lora.adapters import Adapter

__all__ = ["PERSONAL", "Capability", "EvalJob", "EvalResult", "Score", "TrainJob", "TrainResult"]

PERSONAL = "personal"  # the name of a score with personal factors, beside rank classes


@dataclass(frozen=True, kw_only=True)
class Capability:
    """A client's description of itself, sent before round 1.

    ``runs`` are the kernels that ran on its device, ``absent`` those that failed, with the error;
    ``free_bytes`` was free on the device before the base was loaded. ``coverage`` says which
    modules LoRA does not reach; empty where it reaches all. ``wire_version`` is the format of the
    node's messages (``packing.WIRE_VERSION``).
    """

    client_id: str
    num_examples: int = 0
    num_dropped: int = 0
    version: str = ""
    wire_version: int = 0
    fingerprint: str = ""
    quantization: str = ""
    device: str = ""
    runs: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    free_bytes: int = 0
    modules: tuple[str, ...] = ()
    out_features: tuple[int, ...] = ()
    in_features: tuple[int, ...] = ()
    fan_in_fan_out: bool = False
    coverage: str = ""
    cause: str = ""

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """``(out_features, in_features)`` of every target module."""
        sizes = zip(self.out_features, self.in_features, strict=True)
        return dict(zip(self.modules, sizes, strict=True))

    @staticmethod
    def failed(client_id: str, cause: str) -> Capability:
        """A node that cannot describe itself, and the cause."""
        return Capability(client_id=client_id, cause=cause)


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Train from ``start`` in round ``server_round`` of ``num_server_rounds``.

    Of the rounds before it ``skipped_rounds`` do not count among these.
    ``personal`` are the client's personal factors of an earlier round; no message holds them.
    """

    client_id: str
    server_round: int
    num_server_rounds: int
    start: Start
    skipped_rounds: int = 0
    personal: Adapter | None = None


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Trained factors and a report; ``cause`` says why there are none.

    ``note`` is a remark on a training that succeeded. A client without memory for its rank asks for
    ``asked_rank`` from the next round on; 0 asks for nothing; ``out_of_memory`` is
    why there are no factors; ``transient``: the same job may succeed in a while.
    ``loss_before`` and ``loss_after`` are over the rows of the first step, before any step and
    after the last; ``train_loss`` is the mean over the steps. ``withheld``: losses and tokens are
    not reported, since no noise covers them. ``personal`` stays with the client: no message holds
    it. Nor ``too_many``, for the engine: the fewest clients whose pass ran out of memory where
    fewer fitted, 0 for none.
    """

    client_id: str
    rank_class: str
    base_round: int
    digest: str
    num_examples: int = 0
    adapter: Adapter | None = None
    steps: int = 0
    tokens: int = 0
    train_loss: float = float("nan")
    loss_before: float = float("nan")
    loss_after: float = float("nan")
    train_seconds: float = 0.0
    asked_rank: int = 0
    out_of_memory: bool = False
    transient: bool = False
    withheld: bool = False
    note: str = ""
    cause: str = ""
    personal: Adapter | None = None
    too_many: int = 0

    @staticmethod
    def failed(client_id: str, cause: str) -> TrainResult:
        """A node that could not decode its job."""
        return TrainResult(client_id=client_id, rank_class="", base_round=0, digest="", cause=cause)


@dataclass(frozen=True, kw_only=True)
class EvalJob:
    """Evaluate every adapter (by rank class; without any, the bare base) on the client's rows.

    ``personal`` adds a score named ``PERSONAL``: these factors beside the adapter
    ``personal_over``, or alone on the base if that is empty. ``held_out_tasks`` scores the rows of
    ``data.held-out-tasks`` too, which a run's rounds leave out; no message asks for it.
    """

    client_id: str
    server_round: int
    adapters: Mapping[str, Adapter]
    generate: bool = False
    personal: Adapter | None = None
    personal_over: str = ""
    held_out_tasks: bool = False


@dataclass(frozen=True, kw_only=True)
class Score:
    """Sums over rows, so that scores of clients add up: divide at the end.

    ``loss`` is summed over answer ``tokens``; exact match and ROUGE-L over ``generated`` rows.
    ``answer_bytes`` is the UTF-8 length of the answers. Of ``choice_rows`` multiple-choice rows the
    right choice has the largest log likelihood in ``correct``, per character in ``correct_norm``;
    of ``pattern_rows`` generated answers with a pattern ``passed`` match it.
    """

    loss: float = 0.0
    tokens: int = 0
    rows: int = 0
    exact_match: float = 0.0
    rouge_l: float = 0.0
    generated: int = 0
    answer_bytes: int = 0
    choice_rows: int = 0
    correct: float = 0.0
    correct_norm: float = 0.0
    pattern_rows: int = 0
    passed: float = 0.0

    def __add__(self, other: Score) -> Score:
        names = self.__dataclass_fields__
        return Score(**{name: getattr(self, name) + getattr(other, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Scores by rank class, and ``PERSONAL``; ``cause`` says why some are missing.

    ``by_task`` splits them by the rows' category and task (empty where a row names none). It stays
    where it was made: no message holds it.
    """

    client_id: str
    scores: Mapping[str, Score] = field(default_factory=dict)
    cause: str = ""
    by_task: Mapping[tuple[str, str], Mapping[str, Score]] = field(default_factory=dict)
