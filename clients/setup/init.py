"""``flexlora client init``: a ready folder for a machine that trains.

Writes the node's keys, a copy of the authority's certificate, start scripts, systemd units for
three users, Dockerfiles, and a README of the steps with all values filled in. The quantization is
chosen on this machine: the kernels are run and the bytes are counted.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template
from typing import Annotated

from typer import Argument, Option

import flexlora
from flexlora.commands.options import PATH
from flexlora.data.rows import Row
from flexlora.data.sources import load_folder
from flexlora.deploy.certificates import Authorities, read_authorities
from flexlora.deploy.folder import SECRET, File, check_free, fill_tree, write_folder
from flexlora.deploy.hosts import SuperLink, parse_name, parse_port, parse_superlink, plain
from flexlora.deploy.machine import flower_version, programs, requirements
from flexlora.deploy.node_keys import make_node_keys, make_secret
from flexlora.errors import UserError, nearest

__all__ = ["client_init", "make_node"]

TEMPLATES = Path(__file__).parents[1] / "templates"
DEVICES = ("auto", "cpu", "cuda")
HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*")
EMPTY = {"state": 0o700, "docker/wheels": 0o755}
GPU_GROUPS = ("video", "render")  # own the device files on distributions and JetPack


@dataclass(frozen=True, kw_only=True)
class CheckedInit:
    """The command line, checked and resolved."""

    folder: Path
    superlink: SuperLink
    authorities: Authorities
    data: Path
    train_rows: str
    model: str
    is_local: bool
    client_id: str
    port: int


def client_init(
    folder: Annotated[
        str, Argument(metavar="DIR", click_type=PATH, help="folder to make, not there yet")
    ],
    superlink: Annotated[str, Option(metavar="HOST:PORT", help="the server")],
    root_certificates: Annotated[
        str, Option(metavar="CA.crt", click_type=PATH, help="ca.crt of the server's folder")
    ],
    data: Annotated[str, Option(metavar="DIR", click_type=PATH, help="this node's data folder")],
    model: Annotated[str, Option(click_type=PATH, help="folder or hub name")] = "embedded",
    client_id: Annotated[str, Option(metavar="NAME", help="this node's name")] = "",
    device: Annotated[str, Option(help="auto, cpu or cuda")] = "auto",
    quantization: Annotated[str, Option(help="none, 8bit or nf4 (default: what fits)")] = "",
    memory_limit: Annotated[str, Option(metavar="SIZE", help="bytes to use, like 6GiB")] = "",
    port: Annotated[int, Option(help="of this node on loopback")] = 9094,
) -> None:
    """Write the folder and print the next step.

    Raises:
        UserError: see ``make_node``.
    """
    path = make_node(
        folder=folder,
        superlink=superlink,
        root_certificates=root_certificates,
        data=data,
        model=model,
        client_id=client_id,
        device=device,
        quantization=quantization,
        memory_limit=memory_limit,
        port=port,
    )
    print(f"{path} is ready; follow {path}/README.md.")
    print(f"Bring {path}/keys/node.pub to the server's owner: it lets this node in.")


def make_node(
    *,
    folder: str,
    superlink: str,
    root_certificates: str,
    data: str,
    model: str,
    client_id: str,
    device: str,
    quantization: str,
    memory_limit: str,
    port: int,
) -> Path:
    """Write the folder and print what was found in the data; returns its absolute path.

    Raises:
        UserError: a malformed address, certificate, data or model, a folder that is not empty, a
            base that does not fit or cannot run here.
    """
    if device not in DEVICES:
        raise UserError(
            f"--device is '{device}', expected one of {', '.join(DEVICES)}."
            f"{nearest(device, DEVICES)}"
        )
    address = parse_superlink(superlink, "--superlink")
    authorities = read_authorities(Path(root_certificates))
    authorities.check_dates()
    parse_port(port, "--port")
    path = check_free(folder)
    plain(path, "the folder")
    _check_socket(path)
    data_path = Path(data).resolve()
    rows = _rows(data_path)
    plain(data_path, "--data")
    name, is_local = _model(model)

    from flexlora.clients.setup.machine_plan import count_train_rows, plan_machine  # loads torch
    from flexlora.clients.trainer.limits import limits_text

    count = count_train_rows(rows, model=model)
    node = CheckedInit(
        folder=path,
        superlink=address,
        authorities=authorities,
        data=data_path,
        train_rows=str(count),
        model=name,
        is_local=is_local,
        client_id=_client_id(client_id, rows),
        port=port,
    )

    plan = plan_machine(
        model=model,
        device=device,
        quantization=quantization,
        memory_limit=memory_limit,
        num_examples=count.examples,
    )
    keys = make_node_keys(node.client_id)
    values = _values(node) | plan.values()
    values["doctor_step"] = _part("doctor.md", values)
    values["gpu_reservation"] = _part("gpu.yaml", values) if plan.on_card else ""
    files = [
        *fill_tree(TEMPLATES / "folder", values),
        File(path="ca.crt", content=node.authorities.pem),
        File(path="limits.toml", content=limits_text(memory=plan.memory_limit).encode()),
        File(path="findings.json", content=(json.dumps(asdict(plan), indent=1) + "\n").encode()),
        File(path="keys/node", content=keys.private, mode=SECRET),
        File(path="keys/node.pub", content=keys.public),
        File(path="keys/superexec.secret", content=make_secret(), mode=SECRET),
    ]
    write_folder(node.folder, files, empty=EMPTY)
    print(f"{node.data}: {node.train_rows}.", flush=True)
    return node.folder


def _check_socket(folder: Path) -> None:
    from flexlora.clients.trainer.sockets import LONGEST

    path = folder / "state" / "run" / "trainer.sock"
    if len(os.fsencode(path)) > LONGEST:
        raise UserError(
            f"the folder's path is too long: '{path}' has {len(os.fsencode(path))} bytes, and a "
            f"socket's has {LONGEST} at most; give a shorter one, such as /srv/flexlora-node."
        )


def _rows(data: Path) -> list[Row]:
    try:
        return load_folder(data)["train"]
    except UserError as error:
        raise UserError(str(error).replace("data.path", "--data")) from None


def _model(name: str) -> tuple[str, bool]:
    """The trainer's ``--model``, and whether it is on this machine.

    Raises:
        UserError: a folder without a model, or a malformed name.
    """
    if name == "embedded":
        return name, True
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"--model folder '{name}' has no config.json; is it a model folder?")
        return plain(path.resolve(), "--model"), True
    if not HUB_NAME.fullmatch(name) or path.exists():
        raise UserError(
            f"--model is '{name}', which is not a folder; expected 'embedded', a model folder or a "
            "hub name like 'owner/model'."
        )
    return name, False


def _client_id(given: str, rows: list[Row]) -> str:
    """The given name, else the rows' only client, else this computer's name."""
    if given:
        return parse_name(given, "--client-id")
    named = {row.client for row in rows}
    (only,) = named if len(named) == 1 else (None,)
    own = re.sub(r"[^A-Za-z0-9-]+", "-", platform.node().partition(".")[0]).strip("-")
    try:
        return parse_name(only or own, "--client-id")
    except UserError:
        raise UserError(
            f"--client-id is missing, and neither the rows ('{only or ''}') nor this computer "
            f"('{own}') has a name that can be used; give one, such as --client-id site-a."
        ) from None


def _values(node: CheckedInit) -> dict[str, str]:
    ends = min(each.not_valid_after_utc for each in node.authorities.certificates)
    return {
        "folder": str(node.folder),
        "programs": programs(),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "version": flexlora.__version__,
        "flwr": flower_version(),
        "requirements": requirements(),
        "superlink": str(node.superlink),
        "port": str(node.port),
        "data": str(node.data),
        "train_rows": node.train_rows,
        "model": node.model,
        "client_id": node.client_id,
        "expires": f"{ends:%Y-%m-%d}",
        "gpu_groups": _gpu_groups(),
        **_network(node),
    }


def _network(node: CheckedInit) -> dict[str, str]:
    """Network rules: a trainer whose base is on this disk needs no network."""
    address = node.superlink.host.address
    if address:
        supernode = f"IPAddressDeny=any\nIPAddressAllow=localhost {address}"
    else:
        supernode = (
            "# The server is known by a name, so no address is shut out here; if its address is\n"
            "# fixed, write: IPAddressDeny=any, and IPAddressAllow=localhost and that address."
        )
    mounted = node.is_local and node.model != "embedded"
    return {
        "supernode_addresses": supernode,
        "offline": "export HF_HUB_OFFLINE=1" if node.is_local else "# the base is on the hub",
        "trainer_network_mode": "none" if node.is_local else "bridge",
        "trainer_network_told": "none" if node.is_local else "any, to fetch the base",
        "model_volume": f"      - {node.model}:{node.model}:ro\n" if mounted else "",
        "trainer_network": (
            "# The base is on this disk: the trainer needs no network, no row can leave by one.\n"
            "PrivateNetwork=yes"
            if node.is_local
            else "# The base comes from the hub; a local folder would need no network at all."
        ),
    }


def _gpu_groups() -> str:
    """The unit's line for the GPU groups of this machine; a unit with an unknown one fails."""
    import grp

    known = {entry.gr_name for entry in grp.getgrall()}
    groups = [name for name in GPU_GROUPS if name in known]
    if not groups:
        return "# There is none."
    return f"SupplementaryGroups={' '.join(groups)}"


def _part(name: str, values: dict[str, str]) -> str:
    return Template((TEMPLATES / "parts" / name).read_text(encoding="utf-8")).substitute(values)
