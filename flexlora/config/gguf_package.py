"""The optional package ``gguf``, which reads and writes llama.cpp's files."""

from __future__ import annotations

from typing import Any

from flexlora.errors import UserError

__all__ = ["gguf_package"]


def gguf_package() -> Any:
    """The module ``gguf``.

    Raises:
        UserError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise UserError(
            "GGUF files need the package gguf, which is not installed; "
            "run `pip install 'flexlora[gguf]'`."
        ) from None
    return gguf
