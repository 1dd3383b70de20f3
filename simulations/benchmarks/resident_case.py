"""One ClientApp process of ``resident.py``: answers one message from a file, as Flower has it done.

    python -m flexlora.simulations.benchmarks.resident_case REQUEST REPLY NODE_CONFIG SETTINGS

REQUEST and REPLY hold a content as its header's length, its header and its arrays' bytes; the two
others are JSON. What is imported here is what ``flwr-clientapp`` imports for the same app.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from flexlora.clients.app import app
from flexlora.clients.trainer.content_codec import (
    PART_BYTES,
    array_parts,
    decode_content,
    encode_header,
)
from flexlora.clients.trainer.trainer_pb2 import Content

__all__ = ["main", "read_content", "write_content"]

PREFIX = 8
RUN, NODE = 1, 2


def write_content(path: Path, content: RecordDict) -> None:
    """A content as a file."""
    header = encode_header(content).SerializeToString()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(PREFIX, "little") + header)
        file.writelines(array_parts(content))


def read_content(path: Path) -> RecordDict:
    """The content behind ``write_content``."""
    with path.open("rb") as file:
        header = Content.FromString(file.read(int.from_bytes(file.read(PREFIX), "little")))

        def parts() -> Iterator[bytes]:
            while part := file.read(PART_BYTES):
                yield part

        return decode_content(header, parts())


def main(arguments: list[str]) -> None:
    """Answer, tell the parent by a line that it was done, then write the reply down."""
    request, reply, node_config, settings = arguments
    kind = Path(request).suffix.removeprefix(".")
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN, NODE
    message = Message(read_content(Path(request)), dst_node_id=NODE, message_type=kind)
    context = Context(
        run_id=RUN,
        node_id=NODE,
        node_config=json.loads(node_config),
        state=RecordDict(),
        run_config=json.loads(settings),
    )
    content = app(message, context).content
    print("torch" if "torch" in sys.modules else "no torch", flush=True)
    write_content(Path(reply), content)


if __name__ == "__main__":
    main(sys.argv[1:])
