"""The installed programs and versions, for the folders that init writes."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

from flexlora.deploy.hosts import plain

__all__ = ["flower_version", "programs", "requirements"]


def programs() -> str:
    """The folder of ``flexlora``, ``flwr`` and Flower's other commands.

    Raises:
        UserError: a path that scripts and units would have to quote.
    """
    return plain(Path(sys.executable).parent, "the folder of this Python's programs")


def flower_version() -> str:
    """The version of Flower beside this FlexLoRA."""
    return metadata.version("flwr")


def requirements() -> str:
    """FlexLoRA's requirements at the installed versions, a line each."""
    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in metadata.requires("flexlora") or ()]
    lines = []
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        # Without the build, such as +cpu, which is specific to this machine.
        version = metadata.version(requirement.name).partition("+")[0]
        lines.append(f"{requirement.name}=={version}")
    return "\n".join(sorted(lines))
