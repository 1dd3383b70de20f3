"""The doctor finds out by doing: each failure is one sentence with the command that mends it."""

import builtins
import json
import os
import subprocess
import sys
from collections import namedtuple

import pytest
import torch

from flexlora.commands.cli import main
from flexlora.deploy import doctor
from flexlora.planning import probing
from flexlora.simulations import flower_checks

VERSION = namedtuple("VERSION", "major minor micro releaselevel serial")


def printed(finding):
    assert finding.status in ("warning", "failed") and finding.remedy
    assert "\n" not in finding.message and len(finding.message) < 300
    return finding.status, finding.message


def test_on_this_machine_the_main_job_can_run(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for name in ("python", "torch", "bitsandbytes", "training", "disk", "ports", "flower"):
        assert any(line.startswith(f"{name} ") and " ok " in line for line in out.splitlines()), out


def test_json_is_for_machines(capsys):
    assert main(["doctor", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True and len(found["findings"]) == 8
    assert all(set(f) == {"name", "status", "message", "remedy"} for f in found["findings"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "jsn"], "--format is 'jsn', expected one of text, json. Did you mean"),
        (["--superlink", "here"], "--superlink is 'here', expected HOST:PORT"),
        (["--superlink", "here:0"], "--superlink is 'here:0'"),
        (["--superlink", "here:99999"], "--superlink is 'here:99999'"),
        (["--superlnk", "x:1"], "Did you mean '--superlink'"),
    ],
)
def test_a_mistake_is_told_before_anything_is_tried(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "CHECKS", (("never", pytest.fail),))
    try:
        status = main(["doctor", *arguments])
    except SystemExit as exit:
        status = exit.code
    assert status == 2 and message in capsys.readouterr().err


def test_one_failure_is_the_exit_status_and_a_warning_is_not(capsys):
    fine, odd, broken = (
        doctor.Finding(name="x", status=status, message="t", remedy="m")
        for status in ("ok", "warning", "failed")
    )
    assert doctor.report([fine, odd]) == 0
    assert doctor.report([fine, broken, odd]) == 1
    assert "remedy: m" in capsys.readouterr().out


def test_a_check_that_raises_has_failed_and_the_others_go_on():
    def raises():
        raise OSError("no such luck")

    found = doctor.diagnose([("a", raises), ("b", lambda: doctor.ok("fine"))])
    assert [(f.name, f.status) for f in found] == [("a", "failed"), ("b", "ok")]
    assert found[0].message == "OSError: no such luck."


def test_a_check_may_find_several_things_and_name_them():
    def several():
        return [doctor.ok("a", name="own"), doctor.failed("b.", "c")]

    found = doctor.diagnose([("given", several), ("none", lambda: [])])
    assert [(f.name, f.status) for f in found] == [("own", "ok"), ("given", "failed")]


def test_an_old_python(monkeypatch):
    monkeypatch.setattr(doctor.sys, "version_info", VERSION(3, 9, 2, "final", 0))
    assert printed(doctor.check_python()) == ("failed", "Python 3.9.2, expected 3.11 or later.")


def test_a_torch_that_cannot_be_imported(monkeypatch):
    honest = builtins.__import__

    def without(name, *rest, **options):
        if name == "torch":
            raise ImportError("libtorch.so: undefined symbol")
        return honest(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    status, sentence = printed(doctor.check_torch())
    assert status == "failed" and "undefined symbol" in sentence


def test_a_machine_without_torch_still_gets_its_answer():
    """Nothing on the way to the doctor may need what the doctor is asked about."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from flexlora.commands.cli import main\n"
        "raise SystemExit(main(['doctor', '--format', 'json']))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    found = {f["name"]: f for f in json.loads(run.stdout)["findings"]}
    assert found["torch"]["status"] == "failed" and found["torch"]["remedy"] == "pip install torch"
    assert found["disk"]["status"] == found["ports"]["status"] == "ok"


def test_a_driver_whose_card_torch_does_not_see(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    status, sentence = printed(doctor.check_cuda())
    assert status == "warning" and "torch sees no card" in sentence
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.check_cuda().status == "ok"


def test_a_bitsandbytes_that_imports_and_dies(monkeypatch):
    def dies(device):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setitem(probing.KERNELS, "nf4", dies)
    probing.probe.cache_clear()
    status, sentence = printed(doctor.check_bitsandbytes())
    probing.probe.cache_clear()
    assert status == "warning" and sentence.endswith(
        "nf4: RuntimeError: no kernel image is available."
    )


def test_an_8_bit_optimizer_that_dies_while_the_bases_run(monkeypatch):
    def dies(device):
        raise RuntimeError("undefined symbol: cadam_8bit_blockwise")

    monkeypatch.setitem(probing.KERNELS, "adamw_8bit", dies)
    probing.probe.cache_clear()
    status, sentence = printed(doctor.check_bitsandbytes())
    probing.probe.cache_clear()
    assert status == "warning" and sentence.startswith("8-bit optimizers cannot step on ")
    assert sentence.endswith("adamw_8bit: RuntimeError: undefined symbol: cadam_8bit_blockwise.")


def test_training_that_does_not_lower_the_loss(monkeypatch):
    import flexlora.training.local

    honest = flexlora.training.local.TrainSettings
    monkeypatch.setattr(
        flexlora.training.local,
        "TrainSettings",
        lambda **given: honest(**{**given, "learning_rate": 0.0}),
    )
    status, sentence = printed(doctor.check_training())
    assert status == "failed" and "not down" in sentence


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    assert doctor.check_disk(tmp_path / "not" / "there").status == "ok"
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"

    def refuses(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "fsync", refuses)
    status, sentence = printed(doctor.check_disk(tmp_path))
    assert (
        status == "failed" and sentence == f"'{tmp_path}' cannot be written to: Permission denied."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_nearly_full(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(1, 1, 5 * 2**20)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda where: usage)
    status, sentence = printed(doctor.check_disk(tmp_path))
    assert status == "warning" and "5 MiB free" in sentence


def test_loopback_that_is_down(monkeypatch):
    def refuses(*_, **__):
        raise OSError(99, "Cannot assign requested address")

    monkeypatch.setattr(doctor.socket, "create_server", refuses)
    status, sentence = printed(doctor.check_ports())
    assert status == "warning" and "Cannot assign" in sentence


# Flower


@pytest.mark.parametrize("version", ["1.40.0", "1.42.0", "2.0"])
def test_a_flower_of_another_version(version, monkeypatch):
    monkeypatch.setattr(flower_checks.metadata, "version", lambda name: version)
    finding = flower_checks.check_flower()
    assert finding.status == "failed" and f"Flower {version} is installed" in finding.message
    assert finding.remedy.startswith("pip install 'flwr") and "1.41" in finding.remedy


def test_a_message_that_comes_back_changed_or_not_at_all(monkeypatch):
    assert flower_checks.check_flower().status == "ok"
    monkeypatch.setattr(flower_checks, "_round_trip", lambda: "something else")
    assert printed(flower_checks.check_flower()) == ("failed", "a message comes back changed.")

    def raises():
        raise AttributeError("no TaskIdentity")

    monkeypatch.setattr(flower_checks, "_round_trip", raises)
    assert "no TaskIdentity" in flower_checks.check_flower().message
