"""What a GGUF file says about itself (``general.*``), and writing it whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexlora.config.gguf_package import gguf_package
from flexlora.errors import UserError

__all__ = ["Description", "open_writer"]


@dataclass(frozen=True, kw_only=True)
class Description:
    """Name, one paragraph, licence (empty: unknown), and the base it was made from."""

    name: str
    text: str
    license: str
    base: str
    tags: tuple[str, ...] = ()


@contextmanager
def open_writer(file: Path, architecture: str, description: Description) -> Iterator[Any]:
    """A ``gguf.GGUFWriter``; ``file`` appears when the block ends without an error.

    Raises:
        UserError: the file cannot be written.
    """
    gguf, part = gguf_package(), file.with_name(f"{file.name}.part")
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(part, architecture)
    _describe(writer, description)
    try:
        yield writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(part, file)
    except OSError as error:
        raise UserError(f"'{file}' cannot be written: {error.strerror}.") from None
    finally:
        part.unlink(missing_ok=True)


def _describe(writer: Any, description: Description) -> None:
    writer.add_name(description.name)
    writer.add_description(description.text)
    if description.license:
        writer.add_license(description.license)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, description.base)
    if description.base.count("/") == 1 and not description.base.startswith(("/", ".")):
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{description.base}")
    if description.tags:
        writer.add_tags(description.tags)
