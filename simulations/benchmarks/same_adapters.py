"""Whether two states of the code train the same bytes: every method, and three configurations.

    python -m flexlora.simulations.benchmarks.same_adapters BEFORE AFTER [--before-set KEY=VALUE]

``BEFORE`` and ``AFTER`` are commits (checked out beside the repository for as long as this runs) or
folders. Each simulation runs in both; the digest is over the bytes of PEFT's files in
``adapters/``.
Exit status 1 if a digest differs or a run fails.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

METHODS = (
    *("aligned", "carried", "fed-plora", "fedex-lora", "fedit", "ffa-lora", "flexlora", "flora"),
    *("florist", "hetlora", "raflora", "rbla", "residual", "rolora", "slora"),
)
SMOKE = ["--config", "simulations/scenarios/smoke.toml"]
EDGE = ["--config", "simulations/scenarios/edge-mixed.toml"]
THREE = [
    "--set",
    "num-server-rounds=3",
]  # slora goes over to its second form, rolora to lora_B again
CASES = {name: [*SMOKE, *THREE, "--set", f"method.name={name}"] for name in METHODS} | {
    "smoke": SMOKE,
    "edge-mixed": [*EDGE, "--set", "num-server-rounds=2"],
    "default, 2 rounds": ["--set", "num-server-rounds=2"],
}
ENTRY = """
import importlib.util, sys
new = importlib.util.find_spec("flexlora.commands") is not None
from importlib import import_module
sys.exit(import_module("flexlora.commands.cli" if new else "flexlora.cli").main())
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", help="a commit or a folder")
    parser.add_argument("after", help="a commit or a folder")
    for side in ("before", "after"):
        parser.add_argument(f"--{side}-set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--only", action="append", choices=list(CASES), help="one of the cases")
    parser.add_argument("--known", type=Path, help="digests by commit, kept between runs (JSON)")
    options = parser.parse_args()
    same = True
    print(f"{'case':<20}{'before':<14}{'after':<14}")
    with tree_of(options.before) as before, tree_of(options.after) as after:
        for case in options.only or CASES:
            sides = (before, options.before_set), (after, options.after_set)
            digests = [_digest(tree, case, sets, options.known) for tree, sets in sides]
            equal = digests[0] == digests[1] and "failed" not in digests
            same &= equal
            word = "equal" if equal else "DIFFERENT"
            print(f"{case:<20}{digests[0][:12]:<14}{digests[1][:12]:<14}{word}", flush=True)
    return 0 if same else 1


@contextlib.contextmanager
def tree_of(name: str) -> Iterator[Path]:
    """A folder as it is; a commit in a worktree, with the links that older commits lack."""
    if Path(name).is_dir():
        yield Path(name).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="flexlora-tree-") as folder:
        tree = Path(folder) / "tree"
        git = ["git", "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), name], check=True)
        for part in ("clients", "server", "simulations"):
            link = tree / "flexlora" / part
            if not link.is_symlink():
                link.symlink_to(Path("..") / part)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def _digest(tree: Path, case: str, sets: Sequence[str], known: Path | None) -> str:
    """Sha256 over PEFT's files in ``adapters/`` in the order of their names, or ``failed``."""
    key = _key(tree, case, sets)
    kept = json.loads(known.read_text()) if known and known.exists() else {}
    if key and key in kept:
        return kept[key]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", ENTRY, "simulate", *CASES[case], "--out", f"{folder}/run"]
        pairs = (f"engine.threads={os.cpu_count()}", *sets)  # not those that are free now
        command += [word for pair in pairs for word in ("--set", pair)]
        paths = {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=tree, env={**os.environ, **paths}, capture_output=True, text=True
        )
        if done.returncode != 0:
            print(done.stderr[-2000:] or done.stdout[-2000:], file=sys.stderr)
            return "failed"
        digest = hashlib.sha256()
        adapters = Path(folder) / "run" / "adapters"
        for file in sorted(path for path in adapters.rglob("adapter_*") if path.is_file()):
            digest.update(str(file.relative_to(adapters)).encode() + b"\0")
            digest.update(file.read_bytes().replace(str(tree).encode(), b"TREE"))  # the base's path
    if known and key:
        known.write_text(json.dumps({**kept, key: digest.hexdigest()}, indent=1))
    return digest.hexdigest()


def _key(tree: Path, case: str, sets: Sequence[str]) -> str:
    """What a digest is kept under; empty for a tree with changes of its own."""
    git = ["git", "-C", str(tree)]
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
    )
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if changed.returncode or changed.stdout.strip():
        return ""
    return " ".join([head.stdout.strip(), case, *sets])


if __name__ == "__main__":
    sys.exit(main())
