"""A node one minor version apart takes part if it speaks the same wire; others are refused."""

from __future__ import annotations

import pytest

import flexlora
from faulty_grid import FaultyGrid, capability, people, run
from federation import same_bytes
from flexlora.server.members.versions import version_gap
from flexlora.wire.packing import WIRE_VERSION


def gap(version, wire=3, server_version="1.4.2"):
    return version_gap(version, wire, server_version=server_version, server_wire=3)


@pytest.mark.parametrize("version", ["1.4.2", "1.4.0", "1.3.9", "1.5.0rc1"])
def test_the_same_version_and_its_neighbours_fit(version):
    assert gap(version) == ""


@pytest.mark.parametrize("version", ["1.2.9", "1.6.0", "2.4.2", "0.4.2"])
def test_two_minors_or_a_major_apart_do_not_fit_and_both_versions_are_named(version):
    cause = gap(version)
    assert cause.startswith(f"FlexLoRA {version}, the server has 1.4.2: more than one minor")


@pytest.mark.parametrize(("wire", "spoken"), [(0, "a wire without a version"), (4, "version 4")])
def test_another_wire_does_not_fit_whatever_the_version_says(wire, spoken):
    for version in ("1.4.2", "1.5.0"):
        assert spoken in gap(version, wire) and "expected 3" in gap(version, wire)


def test_a_version_that_is_no_number_fits_itself_alone():
    assert gap("local", server_version="local") == ""
    assert "takes part only where both are the same" in gap("local")


def neighbour(minor):
    major, ours, *_ = flexlora.__version__.split(".")
    return f"{major}.{int(ours) + minor}.0"


def test_in_a_run_the_neighbour_trains_and_the_others_are_left_out():
    reports = {
        "client_0": capability("client_0", version=neighbour(1)),
        "client_1": capability("client_1", version=neighbour(2)),
        "client_2": capability("client_2", wire_version=WIRE_VERSION + 1),
    }
    rows = []
    strategy = run(FaultyGrid(people(4), reports=reports), rows=rows)
    assert set(strategy.roster.members) == {"client_0", "client_3"}
    assert f"FlexLoRA {neighbour(2)}, the server has" in strategy.roster.left_out["client_1"]
    assert f"wire version {WIRE_VERSION + 1}" in strategy.roster.left_out["client_2"]
    assert [r["status"] for r in rows if r["client_id"] == "client_0"] == ["ok", "ok"]
    same = run(FaultyGrid({10: "client_0", 13: "client_3"}))
    assert same_bytes(strategy.state, same.state), "aggregation is the server's"
