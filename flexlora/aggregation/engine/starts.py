"""The payload of a rank class: factors to train, factors to carry, and how to train.

It is a method's only interface to its clients: their code does not depend on the method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.algebra.linalg import FactoredSVD
from flexlora.lora.adapters import Adapter, LoRAFactors, zero_factors
from flexlora.lora.ranks import RankClass
from flexlora.seeds import derive_seed, numpy_generator

__all__ = ["Factoring", "LocalPlan", "Start", "directions", "fresh", "truncated", "whole_change"]


@dataclass(frozen=True, kw_only=True)
class Factoring:
    """How ``T_r(G)`` is split into factors: alpha, plain or rsLoRA scaling, seed."""

    alpha: float
    rslora: bool = False
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class LocalPlan:
    """A method's changes to local training, as plain numbers for the wire.

    Args:
        gradient_batches: batches whose gradient ``lora_A`` is aligned with before the first step;
            0 leaves it as sent.
        merge: add the carried factors to a copy of float weights instead of multiplying with them
            in every forward pass.
        prune_penalty, prune_factor: HetLoRA's regulariser of the last terms, and the share of the
            rank that remains when they have shrunk; 0 for neither.
        select: train ``rank`` of the sent terms, drawn from (``select_seed``, round, client), and
            carry the others.
    """

    gradient_batches: int = 0
    merge: bool = False
    prune_penalty: float = 0.0
    prune_factor: float = 0.0
    select: bool = False
    select_seed: int = 0

    def to_dict(self) -> dict[str, bool | int | float]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Start:
    """The payload of one rank class as its clients decode it.

    ``trained`` are the factors that training starts from; ``carried`` are frozen factors (None for
    none), sent and stored in ``carried_dtype`` ("": as the others). ``trainable`` names the factors
    that get gradients and are returned.
    """

    rank_class: RankClass
    base_round: int
    trained: Adapter
    carried: Adapter | None = None
    carried_dtype: str = ""
    trainable: tuple[str, ...] = ("lora_A", "lora_B")
    local: LocalPlan = LocalPlan()
    digest: str = ""

    def sealed(self) -> Start:
        """The same start with the digest of its factors."""
        parts = [self.trained.digest(), self.carried.digest() if self.carried else ""]
        return replace(self, digest="+".join(part[:32] for part in parts))

    @property
    def carried_bytes(self) -> int:
        """Bytes of the carried factors in a client's memory."""
        if self.carried is None:
            return 0
        halved = self.carried_dtype == "bfloat16"
        return self.carried.num_bytes // (2 if halved else 1)

    def for_client(self, client_id: str) -> Start:
        """The start of this client: that of its class, or with ``select`` its drawn terms.

        Server and client compute it from the class's payload, so it costs no bytes.
        """
        if not self.local.select:
            return self
        trained, carried = {}, {}
        for name, drawn in self.drawn_terms(client_id).items():
            factors = self.trained[name]
            rest = [term for term in range(factors.rank) if term not in set(drawn)]
            trained[name] = factors.terms(drawn)
            parts = [factors.terms(rest)] if rest else []
            parts += [self.carried[name]] if self.carried is not None else []
            if parts:
                carried[name] = LoRAFactors.side_by_side(parts)
        for name in set(trained) - set(carried) if carried else ():
            carried[name] = zero_factors(trained[name])
        whole = Adapter(carried) if carried else None
        return replace(self, trained=Adapter(trained), carried=whole)

    def drawn_terms(self, client_id: str) -> dict[str, list[int]]:
        """Indices of the sent terms of every module that the client trains, ascending."""
        ranks = {name: factors.rank for name, factors in self.trained.items()}
        if not self.local.select:
            return {name: list(range(rank)) for name, rank in ranks.items()}
        purpose = (self.local.select_seed, "select", self.base_round, client_id)
        order = numpy_generator(*purpose).permutation(max(ranks.values())).tolist()
        drawn = {}
        for name, factors in self.trained.items():
            rank = self.rank_class.rank_of(name, factors.out_features, factors.in_features)
            drawn[name] = sorted([term for term in order if term < factors.rank][:rank])
        return drawn

    def served(self) -> Adapter:
        """The whole change of this class's model: trained and carried factors side by side.

        Fresh factors, whose ``lora_B`` is zero, are left out.
        """
        if self.carried is None:
            return self.trained
        if not any(bool(factors.lora_B.any()) for factors in self.trained.values()):
            return self.carried
        return Adapter(
            {
                name: LoRAFactors.side_by_side([factors, self.carried[name]])
                for name, factors in self.trained.items()
            }
        )


def truncated(state: State, rank_class: RankClass, factoring: Factoring) -> Adapter:
    """``T_r(G)`` as factors at the ranks of the class: the start of FlexLoRA's clients."""
    ranks = rank_class.ranks(state.change.shapes)
    return state.change.adapter(
        ranks, factoring.alpha, rslora=factoring.rslora, seed=factoring.seed
    )


def fresh(state: State, rank_class: RankClass, factoring: Factoring) -> Adapter:
    """Random ``lora_A``, zero ``lora_B``, from another seed in every round.

    With the same rows in all rounds a client would always train in the same subspace.
    """
    shapes = state.change.shapes
    seed = derive_seed(factoring.seed, "fresh", state.round)
    return GlobalChange.zero(shapes, state.dtype, state.device).adapter(
        rank_class.ranks(shapes), factoring.alpha, rslora=factoring.rslora, seed=seed
    )


def directions(
    state: State, first: Mapping[str, int], last: int, factoring: Factoring
) -> Adapter | None:
    """Directions ``first`` (by module) to ``last`` of ``G`` as factors; None if there are none."""

    def between(name: str, svd: FactoredSVD) -> FactoredSVD:
        span = slice(first[name], last)
        return FactoredSVD(U=svd.U[:, span], S=svd.S[span], Vh=svd.Vh[span])

    rest = GlobalChange({name: between(name, svd) for name, svd in state.change.items()})
    if not any(svd.rank for svd in rest.values()):
        return None
    return rest.full_rank_adapter(factoring.alpha, rslora=factoring.rslora)


def whole_change(state: State, factoring: Factoring) -> Adapter | None:
    """All directions of ``G`` as factors; None if it is zero."""
    most = max(svd.rank for svd in state.change.values())
    return directions(state, dict.fromkeys(state.change, 0), most, factoring)
