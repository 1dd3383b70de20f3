"""Links between a client and the server: median speeds that were published, and a spread.

A client's speeds are lognormal around its link's median, in both directions by one draw (a good
line is good both ways), its latency by another:

    speed = median * exp(sigma * z1),  latency = median * exp(sigma * z2),  z1, z2 ~ N(0, 1)

so half of the clients are below the median, whatever ``population.link-sigma``. A transfer takes
the latency once and its bytes at the speed: no contention, no retries, no slow start.

``watts`` is what a radio draws while it transfers: assumed, of the size that Huang et al. (MobiSys
2012) measured for LTE and 3G. Of a wire it is nothing, since a modem is on anyway.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from flexlora.errors import UserError, nearest
from flexlora.seeds import numpy_generator

__all__ = ["LINKS", "Link", "find_link", "link_of"]


@dataclass(frozen=True, kw_only=True)
class Link:
    """Speeds in 10^6 bits a second; the latency is there and back. ``source`` says who measured."""

    kind: str
    down_mbps: float
    up_mbps: float
    latency_seconds: float
    watts: float = 0.0
    source: str

    def download_seconds(self, num_bytes: float) -> float:
        """Seconds from asking to the last byte; nothing to send takes no time."""
        return self._seconds(num_bytes, self.down_mbps)

    def upload_seconds(self, num_bytes: float) -> float:
        return self._seconds(num_bytes, self.up_mbps)

    def _seconds(self, num_bytes: float, mbps: float) -> float:
        return self.latency_seconds + 8 * num_bytes / (1e6 * mbps) if num_bytes > 0 else 0.0


_OOKLA_2022 = "Ookla, United States, June 2022"
_OFCOM = "Ofcom, mobile broadband in five UK cities, Q4 2014"


def _link(
    kind: str, down: float, up: float, milliseconds: float, watts: float, source: str
) -> Link:
    return Link(
        kind=kind,
        down_mbps=down,
        up_mbps=up,
        latency_seconds=milliseconds / 1000,
        watts=watts,
        source=source,
    )


_KINDS = (
    _link("datacenter", 10_000, 10_000, 1, 0, "assumed: 10-gigabit Ethernet"),
    _link("ethernet", 1_000, 1_000, 5, 0, "assumed: gigabit Ethernet of an office"),
    _link("fiber", 171.01, 112.36, 8, 0, f"{_OOKLA_2022}: Verizon's medians"),
    _link("cable", 184.08, 18.88, 14, 0, f"{_OOKLA_2022}: Xfinity's medians"),
    _link("dsl", 41.29, 12.02, 15, 0, f"{_OOKLA_2022}: CenturyLink's medians, in part fibre"),
    _link(
        "wifi",
        100.0,
        14.0,
        19,
        1.0,
        f"{_OOKLA_2022}: 65 % of all fixed lines' medians, since Wi-Fi was 30 to 40 % below "
        "Ethernet (Ookla 2023); 5 ms more latency is assumed",
    ),
    _link(
        "5g",
        166.13,
        21.08,
        31,
        3.0,
        f"Ookla, the world's medians, Q3 2021; latency: {_OOKLA_2022}, T-Mobile",
    ),
    _link(
        "lte",
        21.3,
        6.3,
        54,
        2.5,
        "Opensignal, United States, means of Q1 2019; latency: the same, July 2018, AT&T",
    ),
    _link("3g", 5.9, 1.6, 63.5, 1.5, f"{_OFCOM}, means"),
    _link("satellite", 104.71, 14.84, 45, 0, "Ookla: Starlink, Q1 2025; latency of Q2 2021"),
    _link("geo-satellite", 19.73, 2.43, 724, 0, "Ookla: HughesNet, Q2 2021"),
)

LINKS: Mapping[str, Link] = {link.kind: link for link in _KINDS}


def find_link(name: str) -> Link:
    """The median of that kind, whatever its case.

    Raises:
        UserError: no kind has that name; the nearest and all are named.
    """
    found = LINKS.get(name.strip().lower())
    if found is None:
        raise UserError(
            f"link '{name}' is not known, expected one of {', '.join(LINKS)}."
            f"{nearest(name.lower(), LINKS)}"
        )
    return found


def link_of(client_id: str, median: Link, *, sigma: float, seed: int) -> Link:
    """A client's own link: a function of the seed, its id and the kind alone."""
    speed, latency = numpy_generator(seed, "link", median.kind, client_id).normal(size=2)
    factor = math.exp(sigma * speed)
    return replace(
        median,
        down_mbps=median.down_mbps * factor,
        up_mbps=median.up_mbps * factor,
        latency_seconds=median.latency_seconds * math.exp(sigma * latency),
    )
