"""What is installed is what is in the tree: four folders mapped, assets and scenarios included."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from federation import ROOT

FOLDERS = {
    "flexlora/clients": "clients",
    "flexlora/server": "server",
    "flexlora/simulations": "simulations",
    "flexlora": "flexlora",
}
NOT_CODE = (
    "**/*.proto",
    "**/*.pyi",
    "templates/**/*",
    "assets/**/*",
    "**/*.md",
    "scenarios/*.toml",
    "py.typed",
)
NOT_INSTALLED = {"benchmarks", "make_base"}  # in the repository, not in the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a copy of the tree, so that building leaves nothing behind in it."""
    copy = tmp_path_factory.mktemp("package") / "tree"
    left_out = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    copy.mkdir()
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, copy / folder, ignore=left_out, symlinks=True)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy / file)
    code = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    (copy / "dist").mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = (copy / "dist").glob("*.whl")
    return path


def tree():
    """Every file that belongs in the wheel, by its installed name."""
    wanted = {}
    for installed, folder in FOLDERS.items():
        source = ROOT / folder
        for pattern in ("**/*.py", *NOT_CODE):
            for file in source.glob(pattern):
                left_out = {"__pycache__", *NOT_INSTALLED} & set(file.relative_to(source).parts)
                if file.is_file() and not left_out and file.resolve().is_relative_to(source):
                    wanted[f"{installed}/{file.relative_to(source).as_posix()}"] = file
    return wanted


@pytest.mark.slow
def test_the_wheel_holds_the_tree_file_by_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        wanted = tree()
        assert held - wanted.keys() == set()
        assert wanted.keys() - held == set()
        for name, file in wanted.items():
            assert archive.read(name) == file.read_bytes(), name
    for needed in (
        "flexlora/assets/base/model.safetensors",
        "flexlora/aggregation/residual.py",
        "flexlora/data/tasks/__init__.py",
        "flexlora/simulations/scenarios/smoke.toml",
        "flexlora/py.typed",
        "flexlora/clients/templates/folder/bin/start-trainer",
        "flexlora/clients/app.py",
        "flexlora/server/app.py",
    ):
        assert needed in held


@pytest.mark.slow
def test_the_wheel_brings_the_command_the_licence_and_takes_no_common_name(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry,) = [name for name in names if name.endswith("entry_points.txt")]
        assert "flexlora = flexlora.commands.cli:main" in archive.read(entry).decode()
        (metadata,) = [name for name in names if name.endswith("/METADATA")]
        text = archive.read(metadata).decode()
        assert any(name.endswith("LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in text
    assert {name.split("/")[0].split("-")[0] for name in names} == {"flexlora"}


@pytest.mark.slow
def test_the_wheel_runs_unpacked_without_the_tree(wheel, tmp_path):
    """All four packages import from the wheel alone, and its base and scenario are found."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import flexlora, sys; from pathlib import Path\n"
        "here = Path(sys.argv[1]).resolve()\n"
        "import flexlora.clients.app, flexlora.server.app, flexlora.simulations.simulate\n"
        "import flexlora.aggregation, flexlora.data.tasks\n"
        "from flexlora.config.paths import EMBEDDED\n"
        "parts = [flexlora, flexlora.clients, flexlora.server, flexlora.simulations]\n"
        "for part in parts: assert here in Path(part.__file__).resolve().parents, part\n"
        "assert here in EMBEDDED.resolve().parents and (EMBEDDED / 'config.json').is_file()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
