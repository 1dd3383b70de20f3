"""What a person sees of a run: a word while it loads, simulated time where there is a world."""

from __future__ import annotations

import io

from rich.console import Console

from flexlora.simulations.terminal import TerminalObserver

ROUND = {"round": 1, "clients_ok": 2, "clients_failed": 0, "train_loss": 1.5, "seconds": 2.25}


def seen(*rounds, terminal=False):
    text = io.StringIO()
    console = Console(file=text, width=120, force_terminal=terminal, highlight=False, markup=False)
    with TerminalObserver(console) as observer:
        for metrics in rounds:
            observer.round_finished(metrics)
    return text.getvalue()


def test_simulated_time_and_energy_stand_beside_a_round():
    line = seen({**ROUND, "simulated_seconds": 754.0, "joules": 4321.0}).splitlines()[-1]
    assert line.endswith("2.2  out there 12.6 min, 4.3 kJ")
    assert seen({**ROUND, "simulated_seconds": 5.0}).splitlines()[-1].endswith("out there 5.0 s")


def test_without_a_world_nothing_is_said_of_one():
    assert "out there" not in seen(ROUND)


def test_epsilon_of_a_cohort_that_stands_for_more_says_so():
    assert seen({**ROUND, "epsilon": 2.5}).endswith("  epsilon 2.5\n")
    line = seen({**ROUND, "epsilon": 2.5, "as_if_clients": 10000})
    assert line.endswith("  epsilon 2.5 as if 10,000 clients\n")


def test_loading_is_shown_on_a_terminal_alone():
    assert "loading the base" in seen(terminal=True)
    assert seen() == ""
