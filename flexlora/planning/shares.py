"""Random assignment of devices, links and quantized bases to clients by shares, in exact quotas.

``clients.quantization = "nf4:0.25,8bit:0.25"`` gives a quarter of the clients each of the two bases
and the others that of ``model.quantization``. The assignment depends on the set of client ids, the
seed and the purpose only, so it is independent of the ranks. A node of a deployment has its
``quantization`` in its node config instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from flexlora.config.sections import QUANTIZATIONS
from flexlora.errors import UserError, nearest
from flexlora.lora.ranks import quotas
from flexlora.seeds import numpy_generator

__all__ = ["deal", "deal_quantizations", "parse_named_shares", "parse_quantization_shares"]

Kind = TypeVar("Kind")


def parse_named_shares(
    key: str, text: str, find: Callable[[str], tuple[str, Kind]]
) -> dict[str, tuple[Kind, float]]:
    """``"a:0.7,b:0.3"`` as ``{name: (kind, share)}``; empty for the empty text.

    ``find`` maps a name as typed to its canonical spelling and what it stands for.

    Raises:
        UserError: a name that ``find`` refuses or that is given twice, a share that is no number
            from 0 to 1.
    """
    found: dict[str, tuple[Kind, float]] = {}
    for item in text.split(",") if text.strip() else ():
        typed, _, number = (part.strip() for part in item.rpartition(":"))
        if not typed:
            raise UserError(
                f"{key} is '{text}': '{number}' has no share, expected a name and a share "
                "from 0 to 1, as 'NAME:0.5'."
            )
        try:
            name, kind = find(typed)
        except UserError as error:
            raise UserError(f"{key} is '{text}': {error}") from None
        if name in found:
            raise UserError(f"{key} is '{text}' and names {name} twice; add its shares.")
        try:
            share = float(number)
        except ValueError:
            share = -1.0
        if not 0.0 <= share <= 1.0:
            raise UserError(
                f"{key} is '{text}': the share of {typed} is '{number}', expected a number "
                f"from 0 to 1, as '{typed}:0.5'."
            )
        found[name] = kind, share
    return found


def parse_quantization_shares(text: str) -> dict[str, float]:
    """``clients.quantization`` as shares by name; they may add up to less than 1.

    Raises:
        UserError: see ``parse_named_shares``; a sum above 1.
    """

    def find(name: str) -> tuple[str, str]:
        if name not in QUANTIZATIONS:
            raise UserError(
                f"it names '{name}', expected some of {', '.join(QUANTIZATIONS)} "
                f"with a share, as 'nf4:0.5'.{nearest(name, QUANTIZATIONS)}"
            )
        return name, name

    shares = dict(parse_named_shares("clients.quantization", text, find).values())
    if sum(shares.values()) > 1.0 + 1e-6:
        raise UserError(
            f"clients.quantization is '{text}' and adds up to {sum(shares.values()):g}, "
            "expected at most 1."
        )
    return shares


def deal(
    client_ids: Sequence[str],
    kinds: Sequence[Kind],
    shares: Sequence[float],
    *,
    seed: int,
    purpose: str,
) -> dict[str, Kind]:
    """The kind of each client: ids shuffled by ``(seed, purpose)``, exact quotas of the shares."""
    ordered = sorted(client_ids)
    counts = quotas(shares, len(ordered))
    dealt = [kind for kind, count in zip(kinds, counts, strict=True) for _ in range(count)]
    shuffled = numpy_generator(seed, purpose).permutation(len(ordered))
    table = {ordered[i]: kind for i, kind in zip(shuffled, dealt, strict=True)}
    return {client_id: table[client_id] for client_id in ordered}


def deal_quantizations(
    client_ids: Sequence[str], *, shares: str, default: str, seed: int
) -> dict[str, str]:
    """The quantization of each client's base; ``default`` for the rest of the shares."""
    named = parse_quantization_shares(shares)
    rest = max(0.0, 1.0 - sum(named.values()))
    kinds, parts = (*named, default), (*named.values(), rest)
    return deal(client_ids, kinds, parts, seed=seed, purpose="quantizations")
