"""Every benchmark and ``make_base`` starts as a module of a checkout."""

import runpy
import sys
from pathlib import Path

import pytest

import flexlora.simulations.benchmarks as benchmarks

PACKAGE = "flexlora.simulations"
COMMANDS = sorted(
    f"{PACKAGE}.benchmarks.{path.stem}"
    for path in Path(benchmarks.__file__).parent.glob("*.py")
    if "argparse" in path.read_text(encoding="utf-8")
    and 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("module", [*COMMANDS, f"{PACKAGE}.make_base"])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_it_starts_and_says_what_it_takes(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_the_benchmarks_are_found():
    names = {command.rpartition(".")[2] for command in COMMANDS}
    assert {"aggregation", "cohort", "memory", "resident", "server_memory", "sketch"} <= names
