"""Types of command-line options."""

from __future__ import annotations

from typing import Any

import click

from flexlora.config.paths import expanded
from flexlora.errors import UserError

__all__ = ["PATH"]


class _PathType(click.ParamType):
    """A file, a folder or a socket; ``~`` is replaced, since ``--out=~/run`` leaves it in bash."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return expanded(str(value))
        except UserError as error:
            flag = param.opts[0] if param is not None and param.opts[0].startswith("-") else ""
            raise UserError(f"{flag} {error}".strip()) from None


PATH = _PathType()
