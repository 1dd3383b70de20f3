"""What ``flexlora server init`` and ``flexlora client init`` write, and what they refuse."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import shutil
import stat
import subprocess
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
from cryptography import x509
from flwr.cli.build import build_fab_from_disk
from flwr.cli.flower_config import parse_superlink_connection
from flwr.common.config import parse_config_args

from flexlora.clients.setup import machine_plan
from flexlora.clients.setup.init import client_init
from flexlora.clients.setup.machine_plan import plan_machine
from flexlora.clients.trainer.limits import OwnerLimits
from flexlora.commands.cli import main
from flexlora.config.paths import EMBEDDED
from flexlora.config.resolve import Config, all_keys, flatten, of_flower
from flexlora.deploy.certificates import alternative_names
from flexlora.errors import UserError
from flexlora.planning.probing import Probe
from flexlora.server.init import server_init
from init_folders import both_folders, node_of, text_of, tree
from paths import CONFIGS, ROOT


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return both_folders(tmp_path_factory.mktemp("init"))


def test_secrets_are_their_owners_alone_and_everything_else_can_be_read(made):
    secret = {
        "server/private/ca.key",
        "server/tls/server.key",
        "server/tls/superexec.secret",
        "node/keys/node",
        "node/keys/superexec.secret",
    }
    seen = set()
    for path in [*(made / "server").rglob("*"), *(made / "node").rglob("*")]:
        name, mode = str(path.relative_to(made)), stat.S_IMODE(path.stat().st_mode)
        if path.is_file() and b"PRIVATE KEY" in path.read_bytes():
            assert mode == 0o600, name
        if name in secret:
            assert (mode, stat.S_IMODE(path.parent.stat().st_mode)) == (0o600, 0o700), name
            seen.add(name)
        elif path.is_file():
            assert mode == (0o755 if path.parent.name == "bin" else 0o644), name
    assert seen == secret
    assert text_of(made / "node" / "ca.crt") == text_of(made / "server" / "ca.crt")


def test_no_value_is_left_open_and_every_path_named_is_there(made):
    for place in (made / "server", made / "node"):
        for path in place.rglob("*"):
            if not path.is_file() or path.parent.name in ("keys", "tls", "private"):
                continue
            text = text_of(path)
            if path.name != "grafana-dashboard.json":
                assert not re.search(r"\$\{?(folder|programs|data|port|superlink)\b", text), path
            for name in re.findall(rf"{re.escape(str(place))}[A-Za-z0-9_./-]*[A-Za-z0-9]", text):
                observed = Path(name)
                of_run = "/state/" in name or observed.name in ("NAME.pub", "registered")
                assert observed.exists() or of_run or "*" in text[text.find(name) + len(name)], (
                    path,
                    name,
                )


def test_again_into_the_same_folder_changes_no_byte(made, capsys):
    before = tree(made)
    words = ["--host", "other.org"]
    assert main(["server", "init", str(made / "server"), *words]) == 2
    ours = node_of(made)
    observed = ["--superlink", ours["superlink"], "--root-certificates", ours["root_certificates"]]
    assert main(["client", "init", ours["folder"], *observed, "--data", ours["data"]]) == 2
    err = capsys.readouterr().err
    assert (
        err.count("is not empty, and init overwrites nothing") == 2 and len(err.splitlines()) == 2
    )
    assert tree(made) == before


def test_the_servers_app_is_flowers_and_holds_no_code(made):
    app = made / "server" / "app"
    bundle = zipfile.ZipFile(io.BytesIO(build_fab_from_disk(app))).namelist()
    assert sorted(bundle) == [".info/CONTENT", "pyproject.toml"]
    table = tomllib.loads(text_of(app / "pyproject.toml"))["tool"]["flwr"]["app"]
    values = flatten(table["config"])
    assert values.keys() == all_keys().keys()
    wanted = Config.of({"fraction-train": 1.0})  # few nodes: everybody in every round
    assert Config.of(of_flower(values)) == wanted != Config()
    ours = tomllib.loads(text_of(ROOT / "pyproject.toml"))
    assert table["components"] == ours["tool"]["flwr"]["app"]["components"]


def test_flower_reads_the_connection(made):
    read = tomllib.loads(text_of(made / "server" / "flwr" / "config.toml"))["superlink"]
    connection = parse_superlink_connection(read[read["default"]], read["default"])
    assert connection.address == "127.0.0.1:9093" and not connection.insecure
    assert Path(connection.root_certificates).read_bytes() == (made / "server/ca.crt").read_bytes()


def test_flower_knows_every_flag_of_the_scripts(made):
    flags = {}
    for path in [*(made / "server" / "bin").iterdir(), *(made / "node" / "bin").iterdir()]:
        for command, rest in re.findall(
            r"^exec (?:flexlora \w+ supervise -- )?(\S+) ((?:.*\\\n)*.*)$",
            text_of(path),
            re.MULTILINE,
        ):
            flags.setdefault(command, set()).update(re.findall(r"(?<!\S)--[a-z-]+", rest))
    parsers = {
        command: getattr(import_module(f"flwr.{package}.cli.{command.replace('-', '_')}"), name)()
        for command, package, name in (
            ("flower-superlink", "superlink", "_parse_args_run_superlink"),
            ("flower-supernode", "supernode", "_parse_args_run_supernode"),
            ("flower-superexec", "supercore", "_parse_args"),
        )
    }
    assert parsers.keys() | {"flexlora", "nginx"} == flags.keys()
    for command, parser in parsers.items():
        known = {flag for action in parser._actions for flag in action.option_strings}
        assert flags[command] and flags[command] <= known, command


def test_the_node_config_is_what_flower_parses_and_the_client_app_looks_for(made):
    script = text_of(made / "node" / "bin" / "start-supernode")
    (quoted,) = re.findall(r'--node-config (".*")$', script, re.MULTILINE)
    shown = subprocess.run(
        ["sh", "-c", f'socket=/run/flexlora/trainer.sock; printf "%s" {quoted}'],
        capture_output=True,
        text=True,
    ).stdout
    assert parse_config_args([shown]) == {
        "client-id": "site-a",
        "trainer-socket": "/run/flexlora/trainer.sock",
    }


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl here")
def test_the_readmes_way_to_a_new_certificate_gives_one_for_the_same_names(tmp_path):
    place = tmp_path / "server"
    server_init(folder=str(place), host=["fl.example.org", "fd00::5"], days=3)
    first = x509.load_pem_x509_certificate((place / "server.crt").read_bytes())
    section = text_of(place / "README.md").split("## When the certificate ends")[1]
    (block,) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    done = subprocess.run(["bash", "-ec", block], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    second = x509.load_pem_x509_certificate((place / "server.crt").read_bytes())
    assert second.serial_number != first.serial_number
    assert alternative_names(second) == alternative_names(first)
    words = ["-x509_strict", "-purpose", "sslserver", "-CAfile", place / "ca.crt"]
    checked = subprocess.run(["openssl", "verify", *words, place / "server.crt"])
    assert checked.returncode == 0


@pytest.mark.parametrize("place", ["server", "node"])
def test_scripts_are_shell(made, place):
    for script in (made / place / "bin").iterdir():
        done = subprocess.run(["sh", "-n", script], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), script


def test_findings_are_this_machines(made):
    observed = json.loads(text_of(made / "node" / "findings.json"))
    probed = machine_plan.probe(machine_plan.pick_device("cpu"))
    assert tuple(observed["kernels"]) == probed.runs and observed["quantization"] == "none"
    assert "12 rows to train on" in text_of(made / "node" / "README.md")


def test_a_small_memory_takes_a_smaller_base_and_a_broken_kernel_is_not_proposed(monkeypatch):
    asked = {"device": "cpu", "quantization": "", "num_examples": 640}
    config = str(CONFIGS / "qwen2.5-0.5b.json")
    large = plan_machine(model=config, memory_limit="64GiB", **asked)
    small = plan_machine(model=config, memory_limit="2.5GiB", **asked)
    assert (large.quantization, small.quantization) == ("none", "nf4")
    assert small.memory_limit == "2.5GiB"
    broken = Probe(runs=("bf16",), absent=("nf4: no such kernel", "8bit: no", "adamw_8bit: no"))
    monkeypatch.setattr(machine_plan, "probe", lambda device: broken)
    with pytest.raises(UserError, match="does not fit"):
        plan_machine(model=config, memory_limit="1.5GiB", **asked)
    assert plan_machine(model=config, memory_limit="64GiB", **asked).quantization == "none"


def test_without_a_proxy_the_readme_says_so_and_nothing_names_one(tmp_path):
    server_init(folder=str(tmp_path / "out"), host=["10.0.0.7"], proxy="none", port=7000)
    server_init(folder=str(tmp_path / "in"), host=["localhost"], proxy="none", port=7000)
    server_init(folder=str(tmp_path / "six"), host=["fd00::1"], proxy="none", port=7000)
    for name, bind in (("out", "0.0.0.0"), ("in", "127.0.0.1"), ("six", "::")):
        assert f"--host {bind} --port 7000" in text_of(tmp_path / name / "bin/start-superlink")
        assert "can submit code" in text_of(tmp_path / name / "README.md")
        assert not (tmp_path / name / "nginx").exists()
        assert "IPAddressDeny=any" not in text_of(
            tmp_path / name / "systemd/flexlora-superlink.service"
        )
    assert "[::1]:7000" in text_of(tmp_path / "six/bin/start-serverapps")


def test_the_superlink_may_open_as_many_files_as_the_machine_lets_it(made, tmp_path):
    """A thousand nodes keep 2,000 connections, beyond the usual soft limit of 1,024 files."""
    script = re.sub(
        r"(?m)^exec .*", "exec sh -c 'ulimit -n'", text_of(made / "server/bin/start-superlink")
    )
    (tmp_path / "start").write_text(script.split("'ulimit -n'")[0] + "'ulimit -n'\n")
    limited = f"ulimit -S -n 256; exec sh {tmp_path / 'start'}"
    environment = {**os.environ, "STATE_DIRECTORY": str(tmp_path), "CREDENTIALS_DIRECTORY": "/"}
    done = subprocess.run(["sh", "-c", limited], env=environment, capture_output=True, text=True)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert done.stdout.split() == [str(hard)], done.stderr
    assert "LimitNOFILE=" in text_of(made / "server/systemd/flexlora-superlink.service")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"host": []}, "--host is missing, expected the name or address"),
        ({"host": ["a b"]}, "--host is 'a b', expected a DNS name"),
        ({"host": ["ok.org", "https://x"]}, "--host is 'https://x'"),
        ({"port": 443}, "--port is 443, expected a port from 1024"),
        ({"days": 0}, "--days is 0, expected 1 to 3650"),
        ({"days": 4000}, "--days is 4000"),
        (
            {"proxy": "ngnix"},
            r"--proxy is 'ngnix', expected one of nginx, none. Did you mean 'nginx'\?",
        ),
        ({"folder": "with space"}, "the folder is '.*with space', expected a path of letters"),
    ],
)
def test_what_server_init_refuses(tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        server_init(**({"folder": "new", "host": ["localhost"]} | changes))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"superlink": "fl.example.org"}, "--superlink is 'fl.example.org', expected HOST:PORT"),
        ({"root_certificates": "gone"}, "--root-certificates 'gone' cannot be read"),
        ({"root_certificates": "{server}/server.crt"}, "is no authority's"),
        ({"root_certificates": "{server}/app/pyproject.toml"}, "holds no certificate"),
        ({"data": "gone"}, "--data '.*gone' does not exist"),
        ({"data": "{server}"}, "--data '.*' holds .*expected train.jsonl"),
        ({"data": "{empty}"}, "holds no rows"),
        ({"model": "{server}"}, "--model folder '.*' has no config.json"),
        ({"model": "gone"}, "--model is 'gone', which is not a folder"),
        ({"model": "./a/b"}, "--model is './a/b', which is not a folder"),
        ({"client_id": "a b"}, "--client-id is 'a b'"),
        ({"device": "cdua"}, r"--device is 'cdua'.*Did you mean 'cuda'\?"),
        ({"quantization": "nf5"}, "--quantization is 'nf5', expected one of none, 8bit, nf4"),
        ({"memory_limit": "4 apples"}, "--memory-limit is '4 apples'"),
        ({"memory_limit": "1MiB"}, "does not fit"),
        ({"port": 80}, "--port is 80"),
        ({"folder": "x" * 120}, "the folder's path is too long"),
    ],
)
def test_what_client_init_refuses(made, tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "train.jsonl").write_text("\n")
    spelled = {
        key: value.format(server=made / "server", empty=tmp_path / "empty")
        if isinstance(value, str)
        else value
        for key, value in changes.items()
    }
    with pytest.raises(UserError, match=words):
        client_init(**node_of(made, **({"folder": "new"} | spelled)))
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_node_without_a_name_has_its_rows_or_its_computers(made, tmp_path):
    (tmp_path / "train.jsonl").write_text(
        '{"instruction": "a", "output": "b", "client": "north"}\n'
    )
    client_init(**node_of(made, folder=str(tmp_path / "one"), client_id="", data=str(tmp_path)))
    assert "--client-id north " in text_of(tmp_path / "one/bin/start-trainer")
    client_init(**node_of(made, folder=str(tmp_path / "two"), client_id=""))
    assert re.search(r"--client-id [A-Za-z0-9]\S* ", text_of(tmp_path / "two/bin/start-trainer"))


def test_a_base_on_the_disk_closes_the_trainers_network_and_one_on_the_hub_does_not(made, tmp_path):
    shutil.copytree(EMBEDDED, tmp_path / "base")
    client_init(**node_of(made, folder=str(tmp_path / "disk"), model=str(tmp_path / "base")))
    script = text_of(tmp_path / "disk/bin/start-trainer")
    assert f"--model {tmp_path}/base " in script and "HF_HUB_OFFLINE=1" in script
    assert f"{tmp_path}/base:{tmp_path}/base:ro" in text_of(tmp_path / "disk/docker/compose.yaml")
    from flexlora.clients.setup.init import _model

    assert _model("owner/model") == ("owner/model", False)


def test_unknown_flags_get_the_nearest_name(capsys):
    for words, hint in (
        (["server", "init", "x", "--hots", "a"], "--host"),
        (["client", "init", "x", "--superlnik", "a:1"], "--superlink"),
        (["server", "inti", "x"], "init"),
    ):
        status = main(words)
        err = capsys.readouterr().err
        assert status == 2 and err.startswith("flexlora: ") and len(err.splitlines()) == 1
        assert f"Did you mean '{hint}'?" in err or "required" in err


def test_a_server_known_by_its_address_is_the_only_one_that_is_reached(made, tmp_path):
    unit = "systemd/flexlora-supernode.service"
    assert "\nIPAddressDeny" not in text_of(made / "node" / unit)
    asked = {"superlink": "10.1.2.3:9092", "quantization": "nf4", "memory_limit": "8GiB"}
    client_init(**node_of(made, folder=str(tmp_path / "node"), **asked))
    text = text_of(tmp_path / "node" / unit)
    assert "\nIPAddressDeny=any\nIPAddressAllow=localhost 10.1.2.3\n" in text
    trainer = text_of(tmp_path / "node/bin/start-trainer")
    assert "--quantization nf4 " in trainer
    assert f"--limits {tmp_path}/node/limits.toml " in trainer and "memory-limit" not in trainer
    assert OwnerLimits.read(tmp_path / "node/limits.toml").request.memory == "8GiB"
