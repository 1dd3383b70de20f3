"""Sample the clients of a round from those that can be reached: seeded, by client id.

    uniform       all with equal probability (FedAvg, arXiv 1602.05629)
    examples      with probability as the number of examples; aggregation weighs by them again
    availability  with probability as one over the share of rounds in which a client could be
                  reached so far, so that all count alike in the long run
    utility       Oort (Lai et al., OSDI 2021, arXiv 2010.06081), without its pacer; below
    stratified    every rank class in its share of those that can be reached
    poisson       every registered client with one probability, independently, whether or not it can
                  be reached (``poisson_sample``): the sampling that differential privacy accounts

Oort's utility of a client that has trained is ``n_k * loss_k``, its examples times its last mean
training loss (the paper's root mean square of per-example losses is not sent here), plus a bonus
``sqrt(0.1 log(t) / t_k)`` of the largest utility, with ``t_k`` the round in which it last trained,
and times ``(T / seconds_k)^2`` where it took longer than ``T``, which four fifths do not. These are
the seconds that clients on machines of their own report, or a simulated clock's; where one process
trains all clients, no client counts as slow.

Nine clients in ten of the first round are new ones, drawn alike; that share falls by 2 % a round
down to a fifth. Of few clients it is no whole number: rounded by chance, it holds in the mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from flexlora.lora.ranks import quotas
from flexlora.seeds import derive_seed, numpy_generator

__all__ = ["History", "Reachable", "choose", "poisson_sample"]

EXPLORATION, DECAY, LEAST = 0.9, 0.98, 0.2
CUT_OFF = 0.95  # of the utility that just would be chosen: who is above may be drawn
SLOW_SHARE, PENALTY = 0.8, 2.0


@dataclass(frozen=True, kw_only=True)
class Reachable:
    """A client that could train now."""

    client_id: str
    num_examples: int
    rank_class: str


@dataclass(kw_only=True)
class History:
    """What the server remembers of its clients from round to round, and across a resume."""

    rounds: int = 0
    seen: dict[str, int] = field(default_factory=dict)  # rounds in which it could be reached
    last: dict[str, tuple[int, float, float]] = field(default_factory=dict)  # round, loss, seconds
    lost: dict[str, tuple[int, int]] = field(default_factory=dict)  # times in a row, last round

    def see(self, client_ids: Sequence[str]) -> None:
        self.rounds += 1
        for client_id in client_ids:
            self.seen[client_id] = self.seen.get(client_id, 0) + 1

    def learn(self, client_id: str, server_round: int, loss: float, seconds: float) -> None:
        """A training that counted."""
        self.last[client_id] = (server_round, loss, seconds)

    def lose(self, client_id: str, server_round: int) -> None:
        """What it was sent was lost (``backoff.py``)."""
        self.lost[client_id] = (self.lost.get(client_id, (0, 0))[0] + 1, server_round)

    def hear(self, client_id: str) -> None:
        """A reply, whatever is in it."""
        self.lost.pop(client_id, None)

    def to_dict(self) -> dict:
        return {"rounds": self.rounds, "seen": self.seen, "last": self.last, "lost": self.lost}

    @staticmethod
    def from_dict(values: Mapping) -> History:
        last = {k: (int(t), float(loss), float(s)) for k, (t, loss, s) in values["last"].items()}
        lost = {k: (int(n), int(t)) for k, (n, t) in values.get("lost", {}).items()}
        return History(rounds=values["rounds"], seen=dict(values["seen"]), last=last, lost=lost)


def choose(
    policy: str,
    reachable: Sequence[Reachable],
    count: int,
    *,
    history: History,
    server_round: int,
    seed: int,
) -> list[str]:
    """``count`` of the clients (all, if there are fewer), sorted by id."""
    ordered = sorted(reachable, key=lambda client: client.client_id)
    count = min(count, len(ordered))
    if policy == "stratified":
        return sorted(_stratified(ordered, count, seed, server_round))
    if policy == "utility":
        return sorted(_by_utility(ordered, count, history, seed, server_round))
    weights = {
        "uniform": lambda client: 1.0,
        "examples": lambda client: float(client.num_examples),
        "availability": lambda client: history.rounds / max(1, history.seen[client.client_id]),
    }[policy]
    return sorted(_draw(ordered, [weights(c) for c in ordered], count, seed, server_round))


def poisson_sample(
    client_ids: Iterable[str], share: float, *, cap: int = 0, seed: int, server_round: int
) -> list[str]:
    """Each client independently with probability ``share``; sorted by id, and maybe empty.

    Its random number is a function of seed, round and client id alone. Beyond a ``cap`` above 0 a
    uniformly random subset of that size remains (truncated Poisson sampling, arXiv 2508.15089): the
    numbers of those drawn are uniform on [0, share), so the ``cap`` smallest are such a subset.
    """
    numbers = {c: derive_seed(seed, "poisson", server_round, c) / 2**63 for c in client_ids}
    drawn = sorted((number, client_id) for client_id, number in numbers.items() if number < share)
    return sorted(client_id for _, client_id in drawn[: cap or None])


def _draw(
    clients: Sequence[Reachable],
    weights: Sequence[float],
    count: int,
    seed: int,
    *names: str | int,
) -> list[str]:
    """``count`` different clients, each draw in proportion to the weights that are left."""
    if count < 1:
        return []
    total = sum(weights)
    equal = len(set(weights)) == 1 or total <= 0
    shares = None if equal else [weight / total for weight in weights]
    if shares is not None and sum(share > 0 for share in shares) < count:
        shares = [(share + 1e-9) / (1 + 1e-9 * len(shares)) for share in shares]
    generator = numpy_generator(seed, "sample", *names)
    chosen = generator.choice(len(clients), size=count, replace=False, p=shares)
    return [clients[k].client_id for k in chosen]


def _stratified(
    clients: Sequence[Reachable], count: int, seed: int, server_round: int
) -> list[str]:
    strata: dict[str, list[Reachable]] = {}
    for client in clients:
        strata.setdefault(client.rank_class, []).append(client)
    names = sorted(strata)
    counts = quotas([len(strata[name]) / len(clients) for name in names], count) if clients else []
    return [
        client_id
        for name, size in zip(names, counts, strict=True)
        for client_id in _draw(
            strata[name], [1.0] * len(strata[name]), size, seed, server_round, name
        )
    ]


def _by_utility(
    clients: Sequence[Reachable], count: int, history: History, seed: int, server_round: int
) -> list[str]:
    known = [client for client in clients if client.client_id in history.last]
    new = [client for client in clients if client.client_id not in history.last]
    explored = max(LEAST, EXPLORATION * DECAY ** (server_round - 1))
    chance = numpy_generator(seed, "sample", server_round, "new").random()
    fresh = min(len(new), max(math.floor(explored * count + chance), count - len(known)))
    utilities = _utilities(known, history, server_round)
    cut = (
        CUT_OFF * sorted(utilities, reverse=True)[count - fresh - 1] if count > fresh else math.inf
    )
    drawn = [k for k, utility in enumerate(utilities) if utility >= cut]
    exploited = _draw(
        [known[k] for k in drawn],
        [utilities[k] for k in drawn],
        count - fresh,
        seed,
        server_round,
        "exploit",
    )
    return exploited + _draw(new, [1.0] * len(new), fresh, seed, server_round, "explore")


def _utilities(known: Sequence[Reachable], history: History, server_round: int) -> list[float]:
    if not known:
        return []
    losses = [client.num_examples * max(0.0, history.last[client.client_id][1]) for client in known]
    largest = max(losses)
    seconds = sorted(took for _, _, took in history.last.values())
    usual = seconds[min(len(seconds) - 1, int(SLOW_SHARE * len(seconds)))]
    utilities = []
    for client, loss in zip(known, losses, strict=True):
        last_round, _, took = history.last[client.client_id]
        bonus = math.sqrt(0.1 * math.log(max(server_round, 1)) / max(last_round, 1))
        slow = (usual / took) ** PENALTY if took > usual > 0 else 1.0
        utilities.append((loss + largest * bonus) * slow)
    return utilities
