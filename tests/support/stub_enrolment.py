"""``flexlora client enroll - DIR --client-id NAME ...`` of a node that has no data and no base.

The real first contact and the real request; the folder has a key and nothing else.
"""

from __future__ import annotations

import sys
from pathlib import Path

from flexlora.clients.setup.enroll import enrol_key
from flexlora.clients.setup.first_contact import ask, fetch_authority
from flexlora.deploy.invitation import Token
from flexlora.deploy.node_keys import make_node_keys
from flexlora.errors import UserError


def main(words: list[str]) -> None:
    """The words after the program's name."""
    assert words[:3] == ["client", "enroll", "-"], words
    folder, name = Path(words[3]), words[words.index("--client-id") + 1]
    token = Token.parse(sys.stdin.readline())
    authority = fetch_authority(token)
    if not (folder / "keys" / "node.pub").is_file():
        ask(token, authority, name=name)
        keys = make_node_keys(name)
        (folder / "keys").mkdir(parents=True)
        (folder / "keys" / "node").write_bytes(keys.private)
        (folder / "keys" / "node.pub").write_bytes(keys.public)
    enrol_key(folder, token, authority, 60.0)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"flexlora: {error}")
