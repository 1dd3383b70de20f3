"""The clients that take part, with their nodes, capabilities and rank classes.

A client is identified by its own id. Flower draws node ids anew in every run; they are addresses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import flexlora
from flexlora.errors import UserError
from flexlora.lora.ranks import RankClass
from flexlora.planning.rank_policies import RankPolicy
from flexlora.seeds import numpy_generator
from flexlora.server.members.bases import Base, KnownBase, choose_base, most_common
from flexlora.server.members.bindings import Bindings
from flexlora.server.members.versions import version_gap
from flexlora.wire.jobs import Capability
from flexlora.wire.packing import WIRE_VERSION

__all__ = ["Member", "Roster", "sample"]


@dataclass(frozen=True, kw_only=True)
class Member:
    """A client that can train, with the node that it is reached at."""

    node_id: int
    capability: Capability
    rank_class: RankClass


@dataclass(kw_only=True)
class Roster:
    """Members by client id, and the clients left out with the cause of each.

    ``disputed`` says, by member, which other node has used its name, until a row has said it.
    """

    members: dict[str, Member] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    disputed: dict[str, str] = field(default_factory=dict)
    base: Base = field(default_factory=Base)

    @property
    def coverage(self) -> str:
        """Which modules LoRA does not reach, as most members say it: they hold the same base."""
        return most_common(m.capability.coverage for m in self.members.values())

    @property
    def fingerprint(self) -> str:
        """Of the base that all members hold."""
        return self.base.fingerprint

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """``(out_features, in_features)`` of every target module of that base."""
        return self.base.shapes

    @property
    def fan_in_fan_out(self) -> bool:
        return self.base.fan_in_fan_out

    @property
    def rank_classes(self) -> dict[str, RankClass]:
        """The classes in use by name, in ascending order of rank."""
        classes = {m.rank_class.name: m.rank_class for m in self.members.values()}
        return dict(sorted(classes.items(), key=lambda item: (item[1].rank, item[0])))

    @classmethod
    def meet(
        cls,
        reports: Mapping[int, Capability],
        policy: RankPolicy,
        known: Mapping[str, RankClass] | None = None,
        bindings: Bindings | None = None,
        known_base: KnownBase | None = None,
    ) -> Roster:
        """Members from the reports by node id; ``known`` classes (of a resumed run) are kept.

        A node is left out, with its cause, if it cannot train, speaks another wire, has a FlexLoRA
        too far from the server's (``versions.py``), reports another base than the run's
        (``bases.py``), or uses a name that is another node's.

        Raises:
            UserError: no client can train.
        """
        roster, bindings = cls(), bindings or Bindings(None)
        reports = roster._without_impostors(reports, bindings)
        fit: dict[str, tuple[int, Capability]] = {}
        roster.base = choose_base(reports.values(), known_base or KnownBase())
        for node_id, report in _by_client(reports):
            client_id = report.client_id
            cause = _unfit(report, roster.base) or policy.too_small(report)
            holder = bindings.holder(client_id, node_id, reports)
            if not cause and holder is not None:
                cause = roster._claim(client_id, node_id, holder)
            if cause:
                taken = client_id in roster.left_out or client_id in bindings.nodes
                name = f"{client_id} (node {node_id})" if taken else client_id
                roster.left_out[name] = cause
            else:
                fit[client_id] = node_id, report
                bindings.bind(client_id, node_id)
        if not fit:
            causes = "; ".join(f"{k}: {v}" for k, v in sorted(roster.left_out.items())[:3])
            raise UserError(f"no client can train, expected at least one ({causes or 'no nodes'}).")
        all_named = all(report.version for report in reports.values())
        assigned = policy.assign(
            list(fit),
            others=list(roster.left_out) if all_named else None,
            capabilities={client_id: report for client_id, (_, report) in fit.items()},
        )
        table = {**assigned, **(known or {})}
        roster.members = {
            client_id: Member(node_id=node_id, capability=report, rank_class=table[client_id])
            for client_id, (node_id, report) in fit.items()
        }
        return roster

    def add(
        self,
        reports: Mapping[int, Capability],
        policy: RankPolicy,
        known: Mapping[str, RankClass] | None = None,
        bindings: Bindings | None = None,
    ) -> list[str]:
        """Add nodes that came later, and clients that are back under another node id.

        The policy assigns new clients their rank classes one by one, in the order of their ids;
        the classes of members do not change. A client that does not fit is left out with its
        cause. Returns the ids of the new members.
        """
        bindings = bindings or Bindings(None)
        joined = []
        for node_id, report in _by_client(self._without_impostors(reports, bindings)):
            client_id = report.client_id
            cause = _unfit(report, self.base) or policy.too_small(report)
            if not cause and client_id in self.members:
                member = self.members[client_id]
                self.members[client_id] = replace(member, node_id=node_id, capability=report)
            elif not cause:
                cause = self._join(node_id, report, policy, known or {})
                joined += [] if cause else [client_id]
            self.left_out.pop(f"node_{node_id}", None)
            if cause:
                name = f"{client_id} (node {node_id})" if client_id in self.members else client_id
                self.left_out[name] = cause
            else:
                bindings.bind(client_id, node_id)
                self.left_out.pop(client_id, None)
                self.left_out.pop(f"{client_id} (node {node_id})", None)
        return joined

    def wait_for(self, client_id: str, node_id: int, holder: int) -> None:
        """Leave a node out while another one with its name is connected; both are named."""
        cause = self._claim(client_id, node_id, holder)
        self.left_out[f"{client_id} (node {node_id})"] = cause

    def _claim(self, client_id: str, node_id: int, holder: int) -> str:
        self.disputed[client_id] = f"node {node_id} says that it is this client too"
        return f"node {holder} is this client already, and keeps the name while it is connected"

    def _without_impostors(
        self, reports: Mapping[int, Capability], bindings: Bindings
    ) -> dict[int, Capability]:
        """The reports of nodes that may use their names; the others are left out."""
        honest = {}
        for node_id, report in sorted(reports.items()):
            cause = bindings.refusal(node_id, report.client_id)
            # A failed query has no name of its own, and so claims nobody's.
            if not cause or not report.version:
                honest[node_id] = report
                continue
            own = bindings.name_of(node_id)
            free = own and own not in self.members and own not in self.left_out
            name = own if free else f"{report.client_id} (node {node_id})"
            self.left_out[name] = cause
            self.disputed[report.client_id] = cause
        return honest

    def _join(
        self, node_id: int, report: Capability, policy: RankPolicy, known: Mapping[str, RankClass]
    ) -> str:
        """Add one member, or return why the policy has no class for it."""
        client_id = report.client_id
        reports = {k: member.capability for k, member in self.members.items()}
        try:
            assigned = policy.assign(
                [*self.members, client_id],
                others=None,
                capabilities={**reports, client_id: report},
            )
        except UserError as error:
            return str(error)
        rank_class = known.get(client_id, assigned[client_id])
        member = Member(node_id=node_id, capability=report, rank_class=rank_class)
        self.members[client_id] = member
        return ""


def _by_client(reports: Mapping[int, Capability]) -> list[tuple[int, Capability]]:
    return sorted(reports.items(), key=lambda item: (item[1].client_id, item[0]))


def _unfit(report: Capability, base: Base) -> str:
    if report.cause:
        return report.cause
    gap = version_gap(
        report.version,
        report.wire_version,
        server_version=flexlora.__version__,
        server_wire=WIRE_VERSION,
    )
    return gap or base.difference(report)


def sample(client_ids: Iterable[str], count: int, *, seed: int, purpose: tuple) -> list[str]:
    """``count`` of the clients, sorted: a function of the ids and the seed, never of node ids."""
    ordered = sorted(client_ids)
    generator = numpy_generator(seed, *purpose)
    chosen = generator.choice(len(ordered), size=min(count, len(ordered)), replace=False)
    return sorted(ordered[i] for i in chosen)
