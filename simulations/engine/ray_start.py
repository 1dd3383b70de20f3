"""Ray for one run: a private one on this machine, or a cluster; and how many workers fit.

A started Ray listens on the loopback alone, connects to nothing else, asks every peer for a token
that only this process and its children know, sends no usage statistics, shows no dashboard, and
keeps its files in a temporary folder that goes with it.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from flexlora.config.paths import EMBEDDED
from flexlora.config.resolve import Config
from flexlora.errors import UserError, one_line
from flexlora.planning.planner import MARGIN
from flexlora.simulations.engine.cohort_memory import CohortMemory
from flexlora.units import human_bytes

__all__ = ["Need", "Session", "import_ray", "join", "placement", "start"]

# A worker process with torch, transformers, Ray and a small base loaded: 0.46 GB measured.
RUNTIME_BYTES = 500 * 10**6
USUAL_TOKENS = 4096  # in a pass, as long as the cost model of cohorts.py has no worker to measure
HELPERS = ("start_api_server", "start_monitor", "start_log_monitor")
GRACE_SECONDS = 5.0
CONNECT_SECONDS = 10.0  # Ray itself tries for minutes
LEAST_STORE, MOST_STORE, STORE_SHARE = 80 * 2**20, 2 * 2**30, 0.1  # Ray wants 75 MiB at least


@dataclass(frozen=True, kw_only=True)
class Session:
    """A connection to Ray; ``folder`` has the files of a Ray that this process started."""

    connected: bool = True  # by this process; False where the caller was connected before
    folder: Path | None = None

    def end(self) -> None:
        """Disconnect, stop the processes that were started, and wait for them."""
        import ray

        processes = self._processes()
        if self.connected:
            ray.shutdown()
        _, alive = psutil.wait_procs(processes, timeout=GRACE_SECONDS)
        for process in alive:
            with suppress(psutil.Error):
                process.kill()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _processes(self) -> list[psutil.Process]:
        """The child processes whose command names the folder, and their children."""
        found = []
        for child in psutil.Process().children() if self.folder is not None else ():
            with suppress(psutil.Error):
                if str(self.folder) in " ".join(child.cmdline()):
                    found += [child, *child.children(recursive=True)]
        return found


def import_ray(*, workers: int, address: str) -> Any:
    """Import Ray with reports and warnings switched off, before it reads its environment.

    Where the caller has imported Ray already, its address and authentication are left unchanged.

    Raises:
        UserError: Ray is not installed, or the address is not HOST:PORT.
    """
    if address and not re.fullmatch(r"[^\s:/]+:\d+", address):
        raise UserError(
            f"engine.ray-address is '{address}', expected HOST:PORT of `ray start --head`."
        )
    if find_spec("ray") is None:
        asked = f"engine.ray-address is '{address}'" if address else f"engine.workers is {workers}"
        raise UserError(f"{asked}, which needs Ray; pip install 'flexlora[ray]'.")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # says so on stderr otherwise
    if "ray" not in sys.modules and _loopback(address):
        # Ray's word for "no cluster, this machine only": it then stays on the loopback.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    if "ray" not in sys.modules and not address and "RAY_AUTH_MODE" not in os.environ:
        # A process that reaches Ray's ports runs code as this user, and every account of a machine
        # reaches ports of its loopback. Ray reads the token once per process.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    import ray

    return ray


def _loopback(address: str) -> bool:
    return address.rpartition(":")[0] in ("", "127.0.0.1", "localhost")


def start(workers: int) -> Session:
    """Start Ray on this machine with one CPU per worker.

    Raises:
        UserError: it does not start.
    """
    import ray

    if ray.is_initialized():
        return Session(connected=False)
    folder = Path(tempfile.mkdtemp(prefix="flexlora-ray-"))
    available = psutil.virtual_memory().available
    try:
        with _without_helpers():
            ray.init(
                address="local",
                num_cpus=workers,
                object_store_memory=int(min(MOST_STORE, max(LEAST_STORE, STORE_SHARE * available))),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _node_ip_address="127.0.0.1",
                _temp_dir=str(folder),
            )
    except Exception as error:  # whatever a port, a full disk or a firewall makes it raise
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(
            f"engine.workers is {workers}, and Ray does not start here ({one_line(error)}); "
            "leave engine.workers at 1 or give an engine.ray-address."
        ) from error
    return Session(folder=folder)


@contextmanager
def _without_helpers() -> Iterator[None]:
    """Ray without its reporter of usage, its autoscaler and what forwards its logs.

    The first queries a cloud's metadata server even where reports are switched off; each takes a
    process and a second, and Ray has no option to leave them out.
    """
    from ray._private import node

    owner = getattr(node, "Node", None)  # another Ray may start them elsewhere: then they start
    methods = {name: getattr(owner, name) for name in HELPERS if hasattr(owner, name)}
    for name in methods:
        setattr(owner, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for name, method in methods.items():
            setattr(owner, name, method)


def join(address: str) -> Session:
    """The Ray cluster at ``address``, which this process neither starts nor stops.

    Raises:
        UserError: nothing answers there, or this process is connected to another one.
    """
    import ray

    asked = f"engine.ray-address is '{address}'"
    if ray.is_initialized():
        current = ray.get_runtime_context().gcs_address
        if current != address:
            raise UserError(
                f"{asked}, but this process is connected to Ray at '{current}' already."
            )
        return Session(connected=False)
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # ConnectionError, a token that is missing, another Ray or Python
        raise UserError(
            f"{asked}, where no Ray cluster lets this process in ({one_line(error).rstrip('.')}); "
            "expected HOST:PORT as printed by `ray start --head`."
        ) from error
    return Session()


def placement(
    config: Config, session: Session, workers: int, need: Need, *, here: int = 0
) -> dict[str, Any]:
    """The resources that each worker requests of Ray: memory, a GPU if there are any, CPUs.

    ``here`` is 1 where this process is a worker too, beside the ``workers`` that Ray places.

    Raises:
        UserError: not enough room for all workers; names how many fit.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    graphics = config.engine.device != "cpu" and any(node.get("GPU") for node in nodes)
    if config.engine.device == "cuda" and not graphics:
        raise UserError("engine.device is 'cuda' but Ray sees no GPU; use 'cpu'.")
    memory = need.loaded_bytes if graphics else need.training_bytes
    ours = session.folder is not None
    # A Ray started here runs nothing else, so CPUs are not counted.
    ask = {"memory": memory, "num_cpus": 0 if ours else config.engine.threads}
    words = [f"{human_bytes(memory)} of memory (the base and the largest cohort)"]
    if graphics:
        ask["num_gpus"] = 1
        words.append("a GPU")
    if not ours:
        words.append(f"{ask['num_cpus']} CPUs (engine.threads)")
    # This process loads a base too: subtract what it has yet to allocate.
    expected = need.training_bytes if here else need.loaded_bytes
    reserved = max(0, expected - psutil.Process().memory_info().rss) if ours else 0
    room = sum(_places(node, ask, reserved) for node in nodes)
    if room < workers:
        where = "this machine" if ours else "the Ray cluster"
        room += here
        remedy = f"set engine.workers={room}" if room > 1 else "leave engine.workers at 1"
        raise UserError(
            f"engine.workers is {workers + here}, but {where} has room for {room}: each takes "
            f"{', '.join(words)}; {remedy}, or lower engine.cohort-size."
        )
    return ask


def _places(node: Mapping[str, float], ask: Mapping[str, int], reserved: int) -> int:
    """How many workers a node has room for."""
    names = {"memory": "memory", "num_cpus": "CPU", "num_gpus": "GPU"}
    free = {**node, "memory": node.get("memory", 0) - reserved}
    return max(0, min(int(free.get(names[key], 0) // n) for key, n in ask.items() if n))


@dataclass(frozen=True, kw_only=True)
class Need:
    """Memory of the machine that one worker needs, with its bases loaded and in training.

    Of a model whose steps can be predicted it is the prediction for the largest cohort with rows of
    full length; else training takes as much again as the weights. Where a GPU trains, it is what
    the bases take on their way there.
    """

    loaded_bytes: int
    training_bytes: int

    @staticmethod
    def of(config: Config) -> Need:
        try:
            memory = CohortMemory.of(config, unified=True)
        except UserError:  # another architecture, or targets by an expression
            weights = _file_bytes(config.model.name)
            return Need(
                loaded_bytes=RUNTIME_BYTES + weights, training_bytes=RUNTIME_BYTES + 2 * weights
            )
        loaded = RUNTIME_BYTES + memory.base_bytes
        slots = _largest_cohort(config, memory.plan.tokens)
        step = memory.step_bytes(slots=slots, rows=slots * memory.plan.batch)
        return Need(loaded_bytes=loaded, training_bytes=loaded + round(step * (1 + MARGIN)))


def _largest_cohort(config: Config, tokens: int) -> int:
    """Clients in a pass when each fills its ``tokens``."""
    asked, limit = config.engine.cohort_size, config.engine.cohort_tokens
    fitting = max(1, (limit or max(USUAL_TOKENS, asked * tokens)) // tokens)
    return min(asked, fitting) if asked else fitting


def _file_bytes(name: str) -> int:
    """Bytes of the weights in a model's folder or in the hub's cache; 0 where they are not yet."""
    from huggingface_hub import snapshot_download

    folder = EMBEDDED if name == "embedded" else Path(name)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except Exception:  # not there yet, or no name of the hub: the worker will say so
            return 0
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
