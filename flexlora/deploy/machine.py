"""What a written folder says about the installation that wrote it: programs and versions."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

from flexlora.deploy.hosts import plain

__all__ = ["flower_version", "programs", "requirements"]


def programs() -> str:
    """The folder of ``flexlora``, ``flwr`` and Flower's other commands.

    Raises:
        UserError: a path that scripts and units cannot name.
    """
    return plain(Path(sys.executable).parent, "the folder of this Python's programs")


def flower_version() -> str:
    """The version of Flower beside this FlexLoRA."""
    return metadata.version("flwr")


def requirements() -> str:
    """FlexLoRA's own requirements at the versions that are installed, a line each."""
    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in metadata.requires("flexlora") or ()]
    lines = []
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        # A build such as 2.9.0+cpu is of this machine; the plain version is everybody's.
        version = metadata.version(requirement.name).partition("+")[0]
        lines.append(f"{requirement.name}=={version}")
    return "\n".join(sorted(lines))
