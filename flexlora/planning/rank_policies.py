"""Assign a rank class to every client: the policies behind ``ranks.policy``.

    fixed          one rank for all
    tiers          ranks by shares, assigned at random with exact quotas
    paper:NAME     the client types of FlexLoRA (Bai et al., NeurIPS 2024, arXiv 2402.11505)
    file           a table by client id (``rank_tables.py``)
    memory         the rank that fits what each client reports (``memory_ranks.py``)

The paper's types train at rank 8 in all modules; at 30; at 30 in attention and 200 in the MLP; at
200. Shares are those of its public code, which draws types; here the quotas are exact:

    type                 8      30   30/200     200
    uniform           0.25    0.25     0.25    0.25
    heavy-tail-light  0.80    0.05     0.05    0.10
    heavy-tail-strong 0.05    0.05     0.10    0.80
    normal           0.058   0.442    0.442   0.058

``normal`` is the normal density of mean 1.5 and deviation 0.7 at 0, 1, 2, 3, normalised. The public
code evaluates it at type numbers that are not in order of size, which exchanges the shares of 30
and 200; here it is over the types in order of size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexlora.config.sections import RANK_POLICIES
from flexlora.errors import UserError, nearest
from flexlora.lora.ranks import RankClass, parse_shares, parse_tiers
from flexlora.planning.memory_ranks import memory_rank
from flexlora.planning.rank_tables import read_rank_table
from flexlora.planning.shapes import ModelShape, TrainingPlan
from flexlora.planning.shares import deal

if TYPE_CHECKING:
    from flexlora.wire.jobs import Capability

__all__ = ["MLP", "PAPER_SHARES", "RankPolicy", "paper_types"]

# Llama, Qwen, Mistral, Gemma, Phi, GPT-2 and GPT-NeoX keep their MLP in `mlp`, OPT in the layer.
MLP = r"(^|\.)(mlp\.|(fc1|fc2|(gate|up|down|gate_up)_proj|c_fc|dense_(h_to_4h|4h_to_h))$)"


def _bell(mean: float, deviation: float) -> tuple[float, ...]:
    density = [math.exp(-0.5 * ((place - mean) / deviation) ** 2) for place in range(4)]
    return tuple(value / sum(density) for value in density)


PAPER_SHARES = {
    "paper:uniform": (0.25, 0.25, 0.25, 0.25),
    "paper:heavy-tail-light": (0.80, 0.05, 0.05, 0.10),
    "paper:heavy-tail-strong": (0.05, 0.05, 0.10, 0.80),
    "paper:normal": _bell(1.5, 0.7),
}


def paper_types(scale: float = 1.0) -> tuple[RankClass, ...]:
    """The four types in order of size, their ranks times ``scale`` and at least 1."""
    small, middle, large = (max(1, round(rank * scale)) for rank in (8, 30, 200))
    third = RankClass.of(middle)
    if large > middle:
        name = f"rank_{middle}_mlp_{large}"
        third = RankClass(name=name, rank=middle, pattern=((MLP, large),))
    return RankClass.of(small), RankClass.of(middle), third, RankClass.of(large)


@dataclass(frozen=True, kw_only=True)
class RankPolicy:
    """The ``ranks.*`` keys; ``memory`` is the model's shape and plan, for ``ranks.policy=memory``.

    Raises:
        UserError: an unknown policy, or ranks, tiers, shares or a table that are invalid.
    """

    policy: str
    fixed: int = 8
    tiers: str = "4,8,16"
    shares: str = "equal"
    scale: float = 1.0
    file: str = ""
    seed: int = 0
    memory: tuple[ModelShape, TrainingPlan] | None = None

    def __post_init__(self) -> None:
        if self.policy not in RANK_POLICIES:
            raise UserError(
                f"ranks.policy is '{self.policy}', expected one of {', '.join(RANK_POLICIES)}."
                f"{nearest(self.policy, RANK_POLICIES)}"
            )
        self._refuse_ignored()
        if self.policy == "fixed" and self.fixed < 1:
            raise UserError(f"ranks.fixed is {self.fixed}, expected a rank of at least 1.")
        if self.policy == "tiers":
            parse_shares(self.shares, len(parse_tiers(self.tiers)))
        if self.policy == "file":
            read_rank_table(self.file)

    def _refuse_ignored(self) -> None:
        if self.file and self.policy != "file":
            raise UserError(
                f"ranks.file is '{self.file}', which ranks.policy={self.policy} does not read; "
                "set ranks.policy=file."
            )
        if self.scale != 1.0 and self.policy not in PAPER_SHARES:
            raise UserError(
                f"ranks.scale is {self.scale:g}, which ranks.policy={self.policy} does not read; "
                "it scales the ranks of ranks.policy=paper:..."
            )

    def assign(
        self,
        client_ids: Sequence[str],
        *,
        others: Sequence[str] | None = (),
        capabilities: Mapping[str, Capability] | None = None,
    ) -> dict[str, RankClass]:
        """A rank class for every client, depending on the set of ids and the seed only.

        Under ``memory`` it depends on each client's report only, and clients that do not fit
        (``too_small``) are left out.

        Args:
            others: known clients that do not take part; None if some have not reported their id,
                so that unknown names in a table are accepted.
            capabilities: the report of each client, for ``memory``.

        Raises:
            UserError: a table that does not fit these clients.
        """
        ordered = sorted(client_ids)
        if self.policy == "fixed":
            return dict.fromkeys(ordered, RankClass.of(self.fixed))
        if self.policy == "file":
            return _from_table(read_rank_table(self.file), ordered, others, self.file)
        if self.policy == "memory":
            fits = {i: self.from_memory((capabilities or {})[i]) for i in ordered}
            return {i: fit for i, fit in fits.items() if isinstance(fit, RankClass)}
        if self.policy == "tiers":
            types = tuple(RankClass.of(rank) for rank in parse_tiers(self.tiers))
            shares = parse_shares(self.shares, len(types))
        else:
            types, shares = paper_types(self.scale), PAPER_SHARES[self.policy]
        return deal(ordered, types, shares, seed=self.seed, purpose="ranks")

    def from_memory(self, report: Capability) -> RankClass | str:
        """The class that fits what a client reported, or why there is none."""
        if self.memory is None:
            raise ValueError("ranks.policy=memory needs the model's shape and the run's plan.")
        shape, plan = self.memory
        return memory_rank(
            shape,
            plan,
            free_bytes=report.free_bytes,
            num_examples=report.num_examples,
            quantization=report.quantization,
            device=report.device,
        )

    def too_small(self, report: Capability) -> str:
        """Why a client cannot train at any rank; empty if it can or under another policy."""
        fit = self.from_memory(report) if self.policy == "memory" else ""
        return fit if isinstance(fit, str) else ""


def _from_table(
    table: Mapping[str, RankClass],
    ordered: Sequence[str],
    others: Sequence[str] | None,
    file: str,
) -> dict[str, RankClass]:
    if missing := [client_id for client_id in ordered if client_id not in table]:
        raise UserError(
            f"ranks.file '{file}' has no entry for client '{missing[0]}'{_and_more(missing)}; "
            f"every client that trains needs one.{nearest(missing[0], table)}"
        )
    known = {*ordered, *(others or ())}
    unknown = sorted(set(table) - known)
    if unknown and others is not None:
        raise UserError(
            f"ranks.file '{file}' names client '{unknown[0]}'{_and_more(unknown)}, which "
            f"does not take part.{nearest(unknown[0], known)}"
        )
    return {client_id: table[client_id] for client_id in ordered}


def _and_more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
