"""Where the model that comes with the package lies."""

from pathlib import Path

__all__ = ["EMBEDDED"]

EMBEDDED = Path(__file__).parents[1] / "assets" / "base"
