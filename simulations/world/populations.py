"""Simulated clients: their devices and links, drop-outs and stragglers.

``population.devices`` deals devices of ``planning/devices.py`` to the clients, with shares that are
met exactly, and ``population.links`` links of ``links.py``, independently. A client is the same in
every round and in every run of the same clients and seed. Without devices there is no simulated
hardware and no clock; ``population.availability``, ``population.dropout``, the stragglers and
``population.examples`` (``flexlora/data/caps.py``) mean the same with and without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from flexlora.config.resolve import KEYS, Config
from flexlora.errors import UserError, nearest
from flexlora.planning.devices import DEVICES, Device, find_device, near_devices
from flexlora.planning.shares import deal, parse_named_shares
from flexlora.seeds import numpy_generator
from flexlora.simulations.world.availability import Availability, availability_of
from flexlora.simulations.world.links import Link, find_link, link_of

__all__ = ["Population", "SimulatedClient"]

Kind = TypeVar("Kind")


@dataclass(frozen=True, kw_only=True)
class SimulatedClient:
    """One client's hardware; without a device it is the machine that simulates."""

    client_id: str
    device: Device | None = None
    link: Link | None = None

    @property
    def free_bytes(self) -> int | None:
        """What the base and its training may take there (``Capability.free_bytes``)."""
        if self.device is None:
            return None
        return max(0, self.device.usable_bytes - self.device.runtime_bytes)

    @property
    def device_label(self) -> str:
        """``Capability.device``: one that begins with cpu shares its memory with the host."""
        if self.device is None:
            return ""
        return f"cpu ({self.device.name})" if self.device.unified else self.device.name


@dataclass(frozen=True, kw_only=True)
class Population:
    """The clients by id, and what chance does to them; see ``from_config``."""

    seed: int
    clients: Mapping[str, SimulatedClient]
    availability: Availability
    dropout: float = 0.0
    straggler_share: float = 0.0
    straggler_slowdown: float = 1.0

    @staticmethod
    def from_config(config: Config, client_ids: Sequence[str]) -> Population:
        """What the ``population.*`` keys say for these clients, in any order.

        Raises:
            UserError: shares that do not add up to 1, an unknown device or link, a key that
                nothing reads, an availability that does not fit these clients.
        """
        _refuse_ignored(config)
        seed, ordered = config.seed, sorted(client_ids)
        devices = _dealt(config, "population.devices", ordered, _device)
        links = _dealt(config, "population.links", ordered, _link)
        sigma = config.population.link_sigma
        clients = {}
        for i in ordered:
            link = link_of(i, links[i], sigma=sigma, seed=seed) if links else None
            clients[i] = SimulatedClient(client_id=i, device=devices.get(i), link=link)
        return Population(
            seed=seed,
            clients=clients,
            availability=availability_of(config, ordered),
            dropout=config.population.dropout,
            straggler_share=config.population.straggler_share,
            straggler_slowdown=config.population.straggler_slowdown,
        )

    @property
    def has_hardware(self) -> bool:
        """Whether devices are simulated, so that a clock can run."""
        return any(client.device is not None for client in self.clients.values())

    def client(self, client_id: str) -> SimulatedClient:
        """
        Raises:
            UserError: no client of that id.
        """
        if client_id not in self.clients:
            hint = nearest(client_id, self.clients)
            raise UserError(f"client '{client_id}' is not in the population.{hint}")
        return self.clients[client_id]

    def slowdown(self, client_id: str, server_round: int) -> float:
        """How many times slower this training is than the device allows: 1 for most."""
        draw = numpy_generator(self.seed, "straggler", server_round, client_id).random()
        return self.straggler_slowdown if draw < self.straggler_share else 1.0

    def leaves_at(self, client_id: str, server_round: int) -> float | None:
        """After which part of its job the client is gone, uniform in [0, 1); None: it stays."""
        chance, part = numpy_generator(self.seed, "dropout", server_round, client_id).random(2)
        return float(part) if chance < self.dropout else None


def _device(name: str) -> tuple[str, Device]:
    try:
        device = find_device(name)
    except UserError:
        raise UserError(
            f"device '{name}' is not known, expected one of the "
            f"{len(DEVICES)} in flexlora/planning/devices.py.{near_devices(name)}"
        ) from None
    return device.name, device


def _link(name: str) -> tuple[str, Link]:
    link = find_link(name)
    return link.kind, link


def _dealt(
    config: Config,
    key: str,
    client_ids: Sequence[str],
    find: Callable[[str], tuple[str, Kind]],
) -> dict[str, Kind]:
    """The kind of each client, with exact quotas; empty where the key is empty."""
    given = config.flat()[key]
    named = parse_named_shares(key, given, find).values()
    if not named:
        return {}
    kinds, shares = zip(*named, strict=True)
    if abs(sum(shares) - 1.0) > 1e-6:
        raise UserError(
            f"{key} is '{given}' and adds up to {sum(shares):g}, expected shares that make 1."
        )
    return deal(client_ids, kinds, shares, seed=config.seed, purpose=key)


def _refuse_ignored(config: Config) -> None:
    """Refuse keys that have no effect without another key."""
    needs = {
        "population.links": ("population.devices", "links count in the clock of simulated devices"),
        "population.clock-model": ("population.devices", "a clock runs for simulated devices"),
        "population.link-sigma": ("population.links", "it spreads the speeds of links"),
        "population.straggler-slowdown": ("population.straggler-share", "it slows stragglers"),
    }
    values = config.flat()
    for key, (needed, why) in needs.items():
        if values[key] != KEYS[key].default and not values[needed]:
            raise UserError(
                f"{key} is {values[key]!r} and {needed} is not set: {why}; "
                f"set {needed}, or leave {key} out."
            )
