"""Enrol all machines of an inventory over ssh, several at a time, and start them.

    python examples/enroll_fleet.py fleet.toml --server /srv/flexlora-server

Run it on the server's machine by whoever may log in to the nodes with a key. FlexLoRA, the data and
the base are on the nodes already. It makes one invitation for as many nodes as are missing, and
runs `flexlora client enroll` on each; the token goes through standard input, not the command line,
where others on the node could read it. What failed can be repeated: nodes that are in are left out,
and a node goes on with the folder that it has. `--transport 'sh -c'` runs the commands here.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SSH = "ssh -o BatchMode=yes -o ConnectTimeout=20 {ssh}"
KEYS = {"name", "host", "ssh", "flexlora", "folder", "data", "model", "options"}
NEEDED = ("flexlora", "folder", "data")


def read_inventory(file: Path) -> list[dict[str, str]]:
    """The nodes with the defaults filled in; every mistake in the file is said at once."""
    table = tomllib.loads(file.read_text(encoding="utf-8"))
    defaults, wrong, nodes = table.get("defaults", {}), [], []
    for place, own in enumerate(table.get("node", []), start=1):
        node = {"ssh": "{host}", "model": "embedded", "options": "", **defaults, **own}
        node.setdefault("host", node.get("name", ""))
        what = node.get("name") or f"node {place}"
        wrong += [f"{what}: unknown key '{key}'" for key in sorted(node.keys() - KEYS)]
        wrong += [f"{what}: '{key}' is missing" for key in ("name", *NEEDED) if not node.get(key)]
        nodes.append({key: str(value) for key, value in node.items()})
    names = [node.get("name", "") for node in nodes]
    wrong += [
        f"{name}: twice in the file" for name in sorted({n for n in names if names.count(n) > 1})
    ]
    if wrong or not nodes:
        sys.exit(f"{file}: " + ("; ".join(wrong) or "no [[node]]") + ".")
    return nodes


def flexlora(*words: str) -> str:
    """The server's own ``flexlora``, the one of this Python."""
    command = [str(Path(sys.executable).with_name("flexlora")), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr.strip())
    return done.stdout.strip()


def enroll(node: dict[str, str], token: str, transport: str, seconds: float) -> tuple[bool, str]:
    """Whether the node is in and runs, and the last line that it said."""
    words = [node["flexlora"], "client", "enroll", "-", node["folder"], "--data", node["data"]]
    words += ["--model", node["model"], "--client-id", node["name"], *shlex.split(node["options"])]
    there = shlex.split(transport.format(**node | {"ssh": node["ssh"].format(**node)}))
    try:
        done = subprocess.run(
            [*there, shlex.join(words)],
            input=token,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return False, f"not done within {seconds:g} s"
    said = (done.stdout + done.stderr).strip().splitlines() or [f"status {done.returncode}"]
    return done.returncode == 0, said[-1]


def main() -> int:
    """0 where every node of the inventory is in."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("inventory", type=Path)
    parser.add_argument("--server", default=".", help="the server's folder")
    parser.add_argument("--transport", default=SSH, help="what runs a command on a node")
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for a node")
    given = parser.parse_args()
    nodes = read_inventory(given.inventory)
    listed = json.loads(flexlora("fleet", "list", "--server", given.server, "--json"))["nodes"]
    present = {row["name"] for row in listed if row["state"] == "online"}
    missing = [node for node in nodes if node["name"] not in present]
    print(
        f"{len(nodes)} nodes in {given.inventory}, {len(nodes) - len(missing)} online.", flush=True
    )
    if not missing:
        return 0
    words = ["--count", str(len(missing)), "--hours", "12", "--approve", "--server", given.server]
    token = flexlora("fleet", "invite", *words)
    failed = 0
    with ThreadPoolExecutor(given.parallel) as pool:
        outcomes = pool.map(lambda n: enroll(n, token, given.transport, given.timeout), missing)
        for node, (done, said) in zip(missing, outcomes, strict=True):
            failed += not done
            print(f"{node['name']}: {'in' if done else 'FAILED'}: {said}", flush=True)
    print(f"{len(missing) - failed} enrolled, {failed} failed.")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
