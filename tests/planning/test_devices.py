"""Device profiles that can be true, names as people write them, and this machine as it is."""

from __future__ import annotations

import stat

import psutil
import pytest

from flexlora.errors import UserError
from flexlora.planning import devices
from flexlora.planning.devices import DEVICES, GIB, Device, find_device, this_machine


def test_there_are_at_least_25_from_a_jetson_to_an_h200():
    assert len(DEVICES) >= 25
    assert {"Jetson Orin Nano 8GB", "RTX 4090 Laptop", "Pixel 8 Pro", "H200"} <= DEVICES.keys()
    sizes = [device.memory_gib for device in DEVICES.values()]
    assert min(sizes) == 4 and max(sizes) == 141


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)
def test_every_profile_is_possible_and_names_its_source(device):
    assert device.source and device.memory_gib >= 4
    assert 0 < device.usable_bytes <= device.memory_bytes <= device.memory_gib * GIB
    assert device.runtime_bytes < device.usable_bytes
    assert device.watts is not None and 5 <= device.watts <= 1000
    if device.bandwidth_gbs is not None:
        assert 30 <= device.bandwidth_gbs <= 8000
    if device.tensor_tflops is not None and device.float32_tflops is not None:
        # Dense 16-bit matrix units do 2 to 16 times what the float32 units do.
        assert 1.9 <= device.tensor_tflops / device.float32_tflops <= 16.1
    if device.tensor_tflops is not None and device.bandwidth_gbs is not None:
        assert 50 <= 1000 * device.tensor_tflops / device.bandwidth_gbs <= 600  # numbers a byte


def test_power_is_a_vendors_own_or_says_what_stands_there():
    named = [device for device in DEVICES.values() if not device.watts_source]
    assert len(named) >= 30 and all(device.kind == "cuda" for device in named)
    assumed = {device.name for device in DEVICES.values() if "assumed" in device.watts_source}
    assert {"Pixel 8", "Galaxy S24", "Raspberry Pi 5 8GB"} <= assumed
    assert all(DEVICES[name].kind == "cpu" for name in assumed)


def test_more_power_does_more_within_a_generation():
    for family in (("RTX 4060", "RTX 4070", "RTX 4080", "RTX 4090"), ("A10", "A40", "L40S")):
        cards = [DEVICES[name] for name in family]
        assert [card.watts for card in cards] == sorted(card.watts for card in cards)
        assert [card.float32_tflops for card in cards] == sorted(c.float32_tflops for c in cards)
    watts = [DEVICES[f"Jetson {name}"].watts for name in ("Orin Nano 4GB", "Orin NX 8GB")]
    assert watts[0] < watts[1] < DEVICES["Jetson AGX Orin 64GB"].watts == 60


@pytest.mark.parametrize(
    "name", ["RTX 4090", "rtx4090", "NVIDIA GeForce RTX 4090", "geforce-rtx-4090", " Rtx_4090 "]
)
def test_a_name_is_found_as_people_write_it(name):
    assert find_device(name).name == "RTX 4090"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("RTX 4091", r"Did you mean .*'RTX 4090'"),
        ("orin nano", r"'Jetson Orin Nano 4GB' or 'Jetson Orin Nano 8GB'"),
        ("a100", r"'A100 40GB' or 'A100 80GB'"),
        ("4090", r"'RTX 4090 Laptop' or 'RTX 4090'"),
    ],
)
def test_an_unknown_name_is_told_the_nearest(name, near):
    with pytest.raises(UserError, match=near):
        find_device(name)


@pytest.mark.parametrize("name", ["", "zzzzqq", "---"])
def test_a_name_like_no_other_is_told_where_all_are(name):
    with pytest.raises(UserError, match=rf"'{name}' is not known\. `flexlora plan .* --table`"):
        find_device(name)


def test_names_stay_apart_however_they_are_written():
    assert len({devices._plain(name) for name in DEVICES}) == len(DEVICES)


def test_what_a_process_can_have():
    assert DEVICES["RTX 3090"].usable_bytes == 24 * GIB
    assert DEVICES["T4"].memory_bytes == 15 * GIB  # error correction takes a sixteenth
    assert DEVICES["Jetson Orin Nano 4GB"].usable_bytes == 3 * GIB
    assert DEVICES["Jetson Orin Nano 8GB"].usable_bytes == 6 * GIB
    assert DEVICES["Jetson AGX Thor"].usable_bytes == 120 * GIB
    assert Device(name="x", memory_gib=8, free_bytes=5).usable_bytes == 5
    assert DEVICES["Jetson Orin NX 8GB"].runtime_bytes > DEVICES["RTX 3070"].runtime_bytes > 0


def fake_smi(folder, monkeypatch, text, status=0):
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {status}\n", encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_this_machines_card_is_what_nvidia_smi_says(tmp_path, monkeypatch):
    shown = "NVIDIA GeForce RTX 4090, 24564, 20000, 8.9\nTesla T4, 15360, 15000, 7.5"
    fake_smi(tmp_path, monkeypatch, shown)
    card = this_machine()
    assert card.name == "NVIDIA GeForce RTX 4090" and card.kind == "cuda" and not card.unified
    assert card.usable_bytes == 20000 * 2**20 and card.bfloat16
    assert card.tensor_tflops == DEVICES["RTX 4090"].tensor_tflops and card.watts == 450


def test_an_old_card_has_no_bfloat16(tmp_path, monkeypatch):
    fake_smi(tmp_path, monkeypatch, "Tesla T4, 15360, 15000, 7.5")
    assert not this_machine().bfloat16


@pytest.mark.parametrize(("text", "status"), [("no devices were found", 9), ("[N/A]", 0), ("", 0)])
def test_a_driver_without_a_card_leaves_the_processor(tmp_path, monkeypatch, text, status):
    fake_smi(tmp_path, monkeypatch, text, status)
    machine = this_machine()
    assert machine.kind == "cpu" and machine.unified
    assert machine.memory_bytes == pytest.approx(psutil.virtual_memory().total, rel=1e-6)
    assert 0 < machine.usable_bytes <= machine.memory_bytes
