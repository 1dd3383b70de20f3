"""Which base each simulated client trains on: ``clients.quantization``.

``nf4:0.5`` gives half of the clients an NF4 base, whatever ``model.quantization`` gives the others;
``nf4:0.25,8bit:0.25`` names several. The clients are dealt by the seed with exact quotas, and
independently of the ranks. A node of a deployment says ``quantization`` in its node config instead.
"""

from __future__ import annotations

from collections.abc import Sequence

from flexlora.config.sections import QUANTIZATIONS
from flexlora.errors import UserError, nearest
from flexlora.lora.ranks import quotas
from flexlora.seeds import numpy_generator

__all__ = ["deal_quantizations", "parse_base_shares"]


def parse_base_shares(text: str) -> dict[str, float]:
    """``"nf4:0.25,8bit:0.25"`` as shares by name; the rest of the clients is not named.

    Raises:
        UserError: a name that is unknown or given twice, a share that is not in 0 to 1, a sum
            beyond 1.
    """
    shares: dict[str, float] = {}
    for item in text.split(",") if text.strip() else ():
        name, _, number = (part.strip() for part in item.partition(":"))
        if name not in QUANTIZATIONS:
            raise UserError(
                f"clients.quantization is '{text}' and names '{name}', expected some of "
                f"{', '.join(QUANTIZATIONS)} with a share, as 'nf4:0.5'."
                f"{nearest(name, QUANTIZATIONS)}"
            )
        if name in shares:
            raise UserError(f"clients.quantization is '{text}' and names {name} twice.")
        shares[name] = _share(text, name, number)
    if sum(shares.values()) > 1.0 + 1e-6:
        raise UserError(
            f"clients.quantization is '{text}' and adds up to {sum(shares.values()):g}, "
            "expected at most 1."
        )
    return shares


def _share(text: str, name: str, number: str) -> float:
    try:
        share = float(number)
    except ValueError:
        share = -1.0
    if not 0.0 <= share <= 1.0:
        raise UserError(
            f"clients.quantization is '{text}': the share of {name} is '{number}', "
            "expected a number from 0 to 1, as 'nf4:0.5'."
        )
    return share


def deal_quantizations(
    client_ids: Sequence[str], *, shares: str, default: str, seed: int
) -> dict[str, str]:
    """The quantization of every client's base: a function of the set of ids and the seed."""
    named = parse_base_shares(shares)
    ordered = sorted(client_ids)
    rest = max(0.0, 1.0 - sum(named.values()))
    counts = quotas((*named.values(), rest), len(ordered))
    kinds = [
        kind for kind, count in zip((*named, default), counts, strict=True) for _ in range(count)
    ]
    shuffled = numpy_generator(seed, "quantizations").permutation(len(ordered))
    table = {ordered[i]: kind for i, kind in zip(shuffled, kinds, strict=True)}
    return {client_id: table[client_id] for client_id in ordered}
