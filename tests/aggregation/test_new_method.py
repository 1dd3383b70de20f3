"""A method is one file and one entry: the example of CONTRIBUTING.md, added and run."""

import re

import pytest
import torch

from federation import rounds, small
from flexlora import aggregate
from flexlora.aggregation import METHODS, make_method
from flexlora.aggregation.engine.server_step import moved_by
from flexlora.errors import UserError
from flexlora.simulations.simulate import simulate
from law_checks import CHECKS, LAWS
from one_round import SHAPES, OneRound, distance, no_change
from paths import ROOT

EXAMPLE = '''\
"""Every client counts alike, whatever its number of examples.

    client k:  starts from T_{r_k}(G), trains, sends its factors back whole
    server:    G <- G + eta * (1/K sum_k s_k B_k A_k - G)
"""

from __future__ import annotations

from flexlora.aggregation.engine.method import Law
from flexlora.aggregation.engine.options import StepOptions
from flexlora.aggregation.engine.server_step import moved_to
from flexlora.aggregation.engine.starts import Factoring, Start, truncated
from flexlora.aggregation.engine.state import State
from flexlora.aggregation.engine.sums import Needs, Sums
from flexlora.lora.ranks import RankClass

__all__ = ["UniformFedAvg"]


class UniformFedAvg:
    """FedAvg of the products with uniform weights."""

    name = "uniform"
    laws = frozenset({Law.ORDER, Law.SCALE_OF_WEIGHTS, Law.ONE_CLIENT})
    needs = Needs(products=True, weight=lambda update: 1.0)
    wire_space = ""

    Options = StepOptions

    def __init__(self, options: StepOptions) -> None:
        self.options = options

    def start(self, state: State, rank_class: RankClass, factoring: Factoring) -> Start:
        trained = truncated(state, rank_class, factoring)
        return Start(rank_class=rank_class, base_round=state.round, trained=trained)

    def close(self, state: State, sums: Sums) -> State:
        return moved_to(state, sums.products, self.options)
'''


@pytest.fixture(autouse=True)
def uniform(tmp_path, monkeypatch):
    """One file, one entry."""
    (tmp_path / "uniform_example.py").write_text(EXAMPLE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(METHODS, "uniform", "uniform_example:UniformFedAvg")


@pytest.mark.parametrize("law", LAWS)
def test_the_law_functions_of_all_methods_check_it(law):
    method = make_method("uniform")
    if law in method.laws:
        CHECKS[law](method)
    else:
        with pytest.raises(AssertionError):
            CHECKS[law](method)


def test_every_client_counts_alike():
    round_ = OneRound("uniform")
    updates = [round_.update(k, n) for k, n in enumerate((1, 10, 1000))]
    dense = {n: sum(u.adapter.delta_weight(n) for u in updates) / 3 for n in SHAPES}
    assert distance(round_.finish(updates).change, dense) < 1e-12
    pairs = [(update.adapter, update.num_examples) for update in updates]
    assert distance(aggregate(pairs, method="uniform"), dense) < 1e-12
    assert distance(aggregate(pairs, method="flexlora"), dense) > 0.1


def test_its_options_are_read_by_name_and_others_are_refused():
    method = make_method("uniform", server_learning_rate=0.5, server_max_rank=3)
    assert (method.options.server_learning_rate, method.options.server_max_rank) == (0.5, 3)
    with pytest.raises(UserError, match=r"method.carried-rank is 4, which method.name=uniform"):
        make_method("uniform", carried_rank=4)
    with pytest.raises(UserError, match=r"server-learning-rate is -1.0, expected more than 0"):
        make_method("uniform", server_learning_rate=-1.0)


def test_a_sum_that_it_did_not_declare_is_an_error_that_names_the_declaration(monkeypatch):
    method = make_method("uniform")
    monkeypatch.setattr(
        method, "close", lambda state, sums: moved_by(state, sums.starts, method.options)
    )
    round_ = OneRound(method, no_change())
    with pytest.raises(LookupError, match=r"declare needs = Needs\(starts=True\)"):
        round_.finish([round_.update(0)])


def test_a_simulation_runs_with_it(tmp_path):
    config = small(
        method__name="uniform",
        method__server_learning_rate=0.5,
        num_server_rounds=1,
        train__max_steps=2,
    )
    strategy = simulate(config, tmp_path / "run")
    assert strategy.method.name == "uniform"
    assert rounds(tmp_path / "run")[-1]["clients_ok"] > 0
    assert all(bool(torch.isfinite(svd.S).all()) for svd in strategy.state.change.values())


GUIDE = ROOT / "CONTRIBUTING.md"


def test_the_example_is_the_one_of_the_guide():
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S)
    assert EXAMPLE in blocks
