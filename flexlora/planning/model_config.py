"""The sizes of the base behind a model's name, from its ``config.json`` alone."""

from __future__ import annotations

from flexlora.config.base_config import base_config
from flexlora.planning.architectures import shape_from_config
from flexlora.planning.shapes import ModelShape

__all__ = ["read_shape"]


def read_shape(name: str) -> ModelShape:
    """The shape of a model folder, of ``embedded``, or of a hub model.

    Raises:
        UserError: a base that is refused (``config/base_config.py``), or one whose architecture
            the planner does not know.
    """
    return shape_from_config(base_config(name))
