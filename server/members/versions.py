"""Which FlexLoRA versions take part in one run.

A node trains with its own code and the server adds up what it sends. Both must read the same
messages, so the wire's version is the same on both sides; beside that a node may be one minor
version older or newer. Such a node trains as its version does: the same settings may give other
bits than the server's version would (a changed optimizer or batch plan). What is sent to it, what
is checked and how updates are added up are the server's alone.
"""

from __future__ import annotations

import re

__all__ = ["version_gap"]

NUMBERS = re.compile(r"(\d+)\.(\d+)")
MOST_MINOR = 1  # versions apart


def version_gap(version: str, wire: int, *, server_version: str, server_wire: int) -> str:
    """Why a node of ``version`` cannot take part; empty where it can.

    ``wire`` is 0 for a node older than the number.
    """
    both = f"FlexLoRA {version}, the server has {server_version}"
    if wire != server_wire:
        spoken = f"wire version {wire}" if wire else "a wire without a version"
        return f"{both}: it speaks {spoken}, expected {server_wire}; install the same version"
    if version == server_version:
        return ""
    theirs, ours = NUMBERS.match(version), NUMBERS.match(server_version)
    if theirs is None or ours is None:
        return f"{both}: a version that is no number takes part only where both are the same"
    if theirs[1] != ours[1] or abs(int(theirs[2]) - int(ours[2])) > MOST_MINOR:
        return f"{both}: more than one minor version apart; update the older one"
    return ""
