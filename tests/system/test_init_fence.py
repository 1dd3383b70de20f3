"""The fences that ``init`` writes: units, containers and a proxy, each asked who reaches what."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path

import crossplane
import pytest
import yaml
from flwr.superlink.main import create_app

from flexlora.clients.setup import machine_plan
from flexlora.clients.setup.init import client_init
from flexlora.server.init import server_init
from init_folders import (
    HOSTS,
    both_folders,
    free_ports,
    node_of,
    remove_proxy_folder,
    status,
    text_of,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return both_folders(tmp_path_factory.mktemp("init"))


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
@pytest.mark.parametrize("folder", ["server", "node"])
def test_systemd_finds_nothing_wrong_with_the_units(made, folder, tmp_path):
    units = sorted((made / folder / "systemd").glob("*.service"))
    assert len(units) == {"server": 3, "node": 3}[folder]
    assert _verified(units) == (0, "")
    broken = tmp_path / units[0].name
    broken.write_text(text_of(units[0]).replace("NoNewPrivileges", "NoSuchThing"))
    assert "Unknown key 'NoSuchThing'" in _verified([broken])[1]


@pytest.mark.skipif(not shutil.which("systemd-sysusers"), reason="no systemd here")
@pytest.mark.parametrize("folder", ["server", "node"])
def test_systemd_makes_every_user_that_a_unit_runs_as(made, folder, tmp_path):
    """In a root of its own: an entry that it does not take is a line in a log, and no user."""
    (tmp_path / "etc").mkdir()
    files = sorted((made / folder / "systemd").glob("sysusers-*.conf"))
    done = subprocess.run(
        ["systemd-sysusers", f"--root={tmp_path}", *files], capture_output=True, text=True
    )
    made_users = {line.split(":")[0] for line in text_of(tmp_path / "etc/passwd").splitlines()}
    wanted = {unit(path)["User"][0] for path in (made / folder / "systemd").glob("*.service")}
    assert len(wanted) == 3 and wanted <= made_users, done.stderr


def _verified(units):
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True
    )
    ours = [line for line in done.stderr.splitlines() if "flexlora" in line]
    return done.returncode, "\n".join(ours)


def unit(path):
    """``{key: [values]}`` of a unit's [Service]."""
    values = {}
    for line in text_of(path).split("[Service]\n")[1].split("\n[")[0].splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            values.setdefault(key, []).append(value)
    return values


def test_the_fence_no_unit_has_two_of_data_key_socket_and_foreign_code(made):
    units = {p.stem.partition("-")[2]: unit(p) for p in (made / "node/systemd").glob("*.service")}
    users = {name: values["User"][0] for name, values in units.items()}
    assert len(set(users.values())) == 3
    data, keys = str(made / "rows"), str(made / "node" / "keys")
    hidden = {
        n: " ".join(v["InaccessiblePaths"]).replace("-/", "/").split() for n, v in units.items()
    }
    assert data in hidden["supernode"] and data in hidden["clientapps"]
    assert keys in hidden["trainer"] and keys in hidden["clientapps"]
    assert "/run/flexlora" in hidden["supernode"]
    assert [n for n, v in units.items() if "PrivateDevices" not in v] == ["trainer"]
    credentials = {name: v.get("LoadCredential", []) for name, v in units.items()}
    assert [n for n, v in credentials.items() if any("keys/node" in x for x in v)] == ["supernode"]
    assert units["clientapps"]["IPAddressDeny"] == ["any"]
    assert units["clientapps"]["IPAddressAllow"] == ["localhost"]
    assert units["trainer"]["PrivateNetwork"] == ["yes"]
    for values in units.values():
        assert values["NoNewPrivileges"] == ["yes"] and values["ProtectSystem"] == ["strict"]
    members = re.findall(
        r"^m (\S+)\s+flexlora$", text_of(made / "node/systemd/sysusers-flexlora.conf"), re.M
    )
    assert set(members) == {users["trainer"], users["clientapps"]}


def test_every_unit_of_flowers_programs_has_a_watchdog_and_a_supervisor_that_answers_it(made):
    found = {}
    for path in [*made.glob("*/systemd/flexlora-*.service")]:
        values = unit(path)
        script = text_of(Path(values["ExecStart"][0]))
        assert values["Restart"] == ["on-failure"]
        found[path.stem] = values.get("Type"), values.get("WatchdogSec"), " supervise -- " in script
    assert found.pop("flexlora-trainer") == (None, None, False)
    assert len(found) == 4 and set(map(str, found.values())) == {"(['notify'], ['60'], True)"}


def locations(path):
    """``[(modifier, path, directives)]`` of the one server in an nginx file."""
    parsed = crossplane.parse(str(path), single=True, check_ctx=False)
    assert parsed["status"] == "ok", parsed["errors"]
    top = parsed["config"][0]["parsed"]
    (server,) = [block for block in top if block["directive"] == "server"]
    found = []
    for block in server["block"]:
        if block["directive"] == "location":
            modifier, where = ["", *block["args"]][-2:]
            found.append((modifier, where, block["block"]))
    return server["block"], found


def answer(found, method, path):
    """What nginx does with a request: an exact location first, else the longest prefix."""
    exact = [block for modifier, where, block in found if modifier == "=" and where == path]
    prefixes = [
        (len(where), block)
        for modifier, where, block in found
        if not modifier and path.startswith(where)
    ]
    assert {modifier for modifier, _, _ in found} <= {"", "="}  # all that this matcher knows
    block = exact[0] if exact else max(prefixes, key=lambda pair: pair[0])[1]
    for line in block:
        if line["directive"] == "return":
            return int(line["args"][0])
        if line["directive"] == "limit_except" and method not in line["args"]:
            assert [rule["directive"] for rule in line["block"]] == ["deny"]
            # nginx lets HEAD pass where GET does
            if not (method == "HEAD" and "GET" in line["args"]):
                return 403
    (to,) = [line["args"][0] for line in block if line["directive"] == "proxy_pass"]
    return to


def routes(app):
    """``(method, path)`` of everything that a SuperLink of this Flower serves."""
    found = set()
    for path, methods in app.openapi()["paths"].items():
        found |= {(method.upper(), path) for method in methods}
    return found | {("GET", "/docs"), ("GET", "/openapi.json"), ("POST", "/"), ("GET", "/")}


def test_the_proxy_lets_the_fleet_path_and_health_pass_and_nothing_else(made):
    server, found = locations(made / "server" / "nginx" / "flexlora.conf")
    served = routes(create_app())
    passed = {pair for pair in served if not isinstance(answer(found, *pair), int)}
    wanted = {(m, p) for m, p in served if p.startswith("/v1/fleet/") or p == "/health"}
    assert passed == wanted and len(wanted) > 10
    assert {"/v1/control/start-run", "/v1/runtime/acquire-task"} <= {path for _, path in served}
    for method, path in (
        ("POST", "/v1/control/start-run"),
        ("POST", "/v1/runtime/acquire-task"),
        ("POST", "/v1/fleet"),
        ("POST", "/v1/fleetx/pull-messages"),
        ("POST", "/V1/FLEET/pull-messages"),
        ("GET", "/health/x"),
        ("POST", "/flwr.proto.Control/StartRun"),
    ):
        assert answer(found, method, path) == 404, path
    assert answer(found, "GET", "/v1/fleet/pull-messages") == 403
    assert answer(found, "POST", "/health") == 403
    # What is matched is what is sent: with a path at its end nginx sends the one it has matched.
    for _, where, block in found:
        to = [line["args"][0] for line in block if line["directive"] == "proxy_pass"]
        enrols = where.startswith("/flexlora/")
        behind = "http://127.0.0.1:9095" if enrols else "https://127.0.0.1:9093"
        assert to in ([], [f"{behind}{where}"])
        limits = {line["directive"]: line["args"] for line in block}
        assert ("limit_req" in limits) == enrols
    assert answer(found, "GET", "/flexlora/enroll") == 403
    assert answer(found, "POST", "/flexlora/ca.crt") == 403
    assert answer(found, "POST", "/flexlora/other") == 404
    values = {line["directive"]: line["args"] for line in server}
    assert values["proxy_ssl_verify"] == ["on"]
    assert values["server_name"] == list(HOSTS)


def test_the_whole_nginx_configuration_parses_with_what_it_includes(made):
    parsed = crossplane.parse(
        str(made / "server/nginx/nginx.conf"), check_ctx=True, check_args=True
    )
    assert parsed["status"] == "ok", parsed["errors"]
    assert len(parsed["config"]) == 2


@pytest.mark.skipif(not shutil.which("nginx"), reason="no nginx here")
def test_nginx_takes_its_configuration(made):
    (made / "server" / "state" / "nginx").mkdir(exist_ok=True)
    file = made / "server/nginx/nginx.conf"
    done = subprocess.run(
        ["nginx", "-t", "-e", "stderr", "-p", made / "server/state/nginx", "-c", file],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not shutil.which("nginx"), reason="no nginx here")
def test_a_real_nginx_resolves_dots_and_escapes_before_it_matches(tmp_path):
    """Nobody is behind it: what it would pass on is 502, what it refuses is its own answer."""
    port = free_ports(2)
    place = tmp_path / "server"
    server_init(folder=str(place), host=["localhost"], port=port)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([place / "bin" / "start-proxy"], stderr=log)
    try:
        deadline = time.monotonic() + 120
        while "start worker process" not in (tmp_path / "log").read_text():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        for path, wanted in (
            ("/v1/fleet/pull-messages", 502),
            ("/x/../v1/fleet/pull-messages", 502),
            ("/v1/fleet/../control/start-run", 404),
            ("/v1/fleet/%2e%2e/control/start-run", 404),
            ("/v1/fleet/..%2fcontrol/start-run", 404),
            ("//v1/control/start-run", 404),
            ("/v1/control/start-run?/v1/fleet/", 404),
            ("/v1/fleet/../../v1/control/start-run", 404),
            ("/v1/fleet/../../../v1/control/start-run", 400),
            ("/openapi.json", 404),
        ):
            assert status("POST", port, path, place / "ca.crt") == wanted, path
    finally:
        process.terminate()
        process.wait(120)
        remove_proxy_folder(port)


def test_compose_keeps_data_key_and_foreign_code_apart(made):
    node = yaml.safe_load(text_of(made / "node" / "docker" / "compose.yaml"))
    services = node["services"]
    assert len({service["user"].split(":")[0] for service in services.values()}) == 3
    mounts = {name: " ".join(service["volumes"]) for name, service in services.items()}
    rows, keys = str(made / "rows"), f"{made}/node/keys:"
    assert [name for name in services if rows in mounts[name]] == ["trainer"]
    assert [name for name in services if keys in mounts[name]] == ["supernode"]
    assert {name for name in services if "socket:" in mounts[name]} == {"trainer", "clientapps"}
    assert services["trainer"]["network_mode"] == "none"
    assert (
        services["clientapps"]["networks"] == ["inside"] and node["networks"]["inside"]["internal"]
    )
    assert all(service["cap_drop"] == ["ALL"] for service in services.values())
    assert "deploy" not in services["trainer"]  # no card here, so none is asked for

    server = yaml.safe_load(text_of(made / "server" / "docker" / "compose.yaml"))["services"]
    assert server["superlink"]["ports"] == ["9092:9092"]
    assert {server[n]["network_mode"] for n in ("serverapps", "proxy")} == {"service:superlink"}
    for place in ("server", "node"):
        lines = text_of(made / place / "docker" / "requirements.txt").splitlines()
        assert any(re.fullmatch(r"flwr==1\.41\.\d+", line) for line in lines)
        assert not [line for line in lines if "+" in line or "crossplane" in line]


def test_a_card_is_given_to_the_trainer_alone(made, monkeypatch, tmp_path):
    monkeypatch.setattr(machine_plan.MachinePlan, "on_card", True, raising=False)
    real = machine_plan.plan_machine

    def with_card(**asked):
        found = real(**asked)
        object.__setattr__(found, "on_card", True)
        return found

    monkeypatch.setattr(machine_plan, "plan_machine", with_card)
    client_init(**node_of(made, folder=str(tmp_path / "node")))
    services = yaml.safe_load(text_of(tmp_path / "node/docker/compose.yaml"))["services"]
    assert [name for name, service in services.items() if "deploy" in service] == ["trainer"]
    (device,) = services["trainer"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]
