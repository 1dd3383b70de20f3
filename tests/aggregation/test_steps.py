"""The server's step: its optimizers, the cap, what the cap drops, and options nobody reads."""

import pytest
import torch

import equations
import reference
from flexlora.aggregation import METHODS, make_method, method_class, method_options
from flexlora.aggregation.engine.server_step import unpack_svd
from flexlora.aggregation.florist import rank_for_energy
from flexlora.errors import UserError
from flexlora.runs.checkpoints import load_checkpoint, save_checkpoint
from one_round import SHAPES, OneRound, distance, next_state, same_bits

ETA, BETA = 0.7, 0.8
STEPPED = ("aligned", "fedex-lora", "flexlora", "flora", "raflora", "residual")


def replies_of(round_, updates):
    return [
        equations.Reply(
            adapter=update.adapter,
            num_examples=update.num_examples,
            start=round_.start(k).trained,
        )
        for k, update in enumerate(updates)
    ]


def asked_change(name, round_, updates, module):
    """The D that the method asks for, dense, from what was sent and what came back."""
    replies, G = replies_of(round_, updates), round_.state.change.delta_weight(module)
    if name in ("aligned", "flora", "florist"):
        return equations.stacked(replies, module)
    if name == "raflora":
        return equations.raflora_sum(replies, module) - G
    rule = equations.flexlora_round if name == "flexlora" else equations.residual_round
    return rule(G, replies, module) - G


def rounds_of(name, optimizer, count=4, **options):
    """``(changes asked for, states)`` of some rounds, both by module and round."""
    method = make_method(
        name,
        server_learning_rate=ETA,
        server_optimizer=optimizer,
        server_momentum=BETA,
        **options,
    )
    state, asked, states = None, {module: [] for module in SHAPES}, []
    for _ in range(count):
        round_ = OneRound(method, state)
        updates = [round_.update(k, 10 + 9 * k) for k in range(5)]
        for module in SHAPES:
            asked[module].append(asked_change(name, round_, updates, module))
        state = round_.finish(updates)
        states.append(state)
    return asked, states


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
@pytest.mark.parametrize("name", STEPPED)
def test_four_rounds_of_every_optimizer_equal_the_dense_ones(name, optimizer):
    asked, states = rounds_of(name, optimizer)
    for module, changes in asked.items():
        zero = torch.zeros(SHAPES[module], dtype=torch.float64)
        beta = BETA if optimizer == "momentum" else 0.0
        expected = equations.momentum_steps(zero, changes, ETA, beta)
        for state, G in zip(states, expected, strict=True):
            assert reference.relative_error(state.change.delta_weight(module), G) < 1e-10


@pytest.mark.parametrize("name", ["residual", "florist", "fedex-lora"])
def test_a_run_that_is_saved_between_rounds_gives_the_same_bits(tmp_path, name):
    """Moments, held factors, what the cap and the cut dropped: all are in the checkpoint."""
    options = {"server_optimizer": "momentum", "server_max_rank": 4, "error_feedback": True}
    method = make_method(name, **options)
    state = next_state(method)
    save_checkpoint(tmp_path, state, {})
    loaded, _ = load_checkpoint(tmp_path)
    assert loaded.round == 1 and same_bits(loaded, state)
    assert {"velocity/attn.q/S", "dropped/attn.q/S"} <= set(loaded.extra)
    assert same_bits(next_state(method, loaded, seed=1), next_state(method, state, seed=1))


def test_what_a_cut_dropped_survives_a_checkpoint(tmp_path):
    method, key = make_method("florist", error_feedback=True), "cut/attn.v/S"
    state = next_state(method)
    save_checkpoint(tmp_path, state, {})
    loaded, _ = load_checkpoint(tmp_path)
    assert key in loaded.extra and same_bits(loaded, state)
    assert same_bits(next_state(method, loaded, seed=1), next_state(method, state, seed=1))


@pytest.mark.parametrize(
    ("name", "kept_as", "options"),
    [
        ("residual", "dropped", {"server_max_rank": 3}),
        ("flora", "dropped", {"server_max_rank": 3}),
        ("florist", "cut", {"energy_threshold": 0.6}),
    ],
)
def test_what_was_applied_and_what_is_held_back_is_the_sum_of_all_that_was_asked_for(
    name, kept_as, options
):
    """Error feedback loses nothing: G and what is held make up the uncapped sum, every round."""
    total = {module: torch.zeros(shape, dtype=torch.float64) for module, shape in SHAPES.items()}
    method = make_method(name, server_learning_rate=ETA, error_feedback=True, **options)
    without = make_method(name, server_learning_rate=ETA, **options)
    state = lossy = None
    for _ in range(4):
        round_ = OneRound(method, state)
        updates = [round_.update(k, 10 + 9 * k) for k in range(5)]
        for module in SHAPES:
            total[module] += ETA * asked_change(name, round_, updates, module)
        state, lossy = round_.finish(updates), next_state(without, lossy)
        for module in SHAPES:
            held = unpack_svd(state.extra, kept_as, module)
            weight = ETA if kept_as == "cut" else 1.0  # the cut is of D, the cap is of G
            whole = state.change.delta_weight(module) + weight * held.to_dense()
            assert held.rank > 0 and reference.relative_error(whole, total[module]) < 1e-10
    assert distance(lossy.change, total) > 0.05
    assert not any(key.startswith(kept_as) for key in lossy.extra)


@pytest.mark.parametrize("feedback", [False, True])
def test_under_a_cap_feedback_keeps_the_momentum_whole_too(feedback):
    asked, states = rounds_of("flora", "momentum", server_max_rank=3, error_feedback=feedback)
    for module, changes in asked.items():
        zero = torch.zeros(SHAPES[module], dtype=torch.float64)
        expected = equations.momentum_steps(zero, changes, ETA, BETA)
        whole = states[-1].change.delta_weight(module)
        if feedback:
            whole = whole + unpack_svd(states[-1].extra, "dropped", module).to_dense()
        error = reference.relative_error(whole, expected[-1])
        assert error < 1e-10 if feedback else error > 0.1
        assert unpack_svd(states[-1].extra, "velocity", module).rank > 3 or not feedback


def test_flexlora_with_error_feedback_is_the_residual_form_at_rate_one():
    feedback = make_method("flexlora", error_feedback=True)
    residual = make_method("residual", server_learning_rate=1.0)
    first, second = next_state(feedback), next_state(residual)
    for seed in (1, 2):
        first, second = (
            next_state(feedback, first, seed=seed),
            next_state(residual, second, seed=seed),
        )
        assert distance(first.change, second.change) < 1e-12
    published = next_state("flexlora", next_state("flexlora"), seed=1)
    assert distance(published.change, first.change) > 0.1


def test_raflora_loses_bands_that_nobody_reaches_unless_it_feeds_back():
    for feedback, bound in ((False, 0.1), (True, 1e-12)):
        method = make_method("raflora", error_feedback=feedback)
        state = next_state(method)
        round_ = OneRound(method, state)
        weak = [round_.update(k, 5 + k, trained=False) for k in (0, 1, 3)]
        moved = distance(round_.finish(weak).change, state.change)
        assert moved < bound if feedback else moved > bound


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.95, 0.999])
def test_florist_keeps_the_fewest_directions_that_hold_the_threshold(threshold):
    round_ = OneRound(make_method("florist", energy_threshold=threshold))
    updates = [round_.update(k, 10 + 9 * k) for k in range(5)]
    state = round_.finish(updates)
    replies = replies_of(round_, updates)
    ranks = set()
    for module, svd in state.change.items():
        M = equations.stacked(replies, module)
        energy = float(M.square().sum())
        assert float(svd.S.square().sum()) >= threshold * energy
        assert float(svd.S[:-1].square().sum()) < threshold * energy
        assert reference.relative_error(svd.to_dense(), reference.truncate(M, svd.rank)) < 1e-10
        ranks.add(svd.rank)
    assert len(ranks) > 1 or threshold < 0.9, "the cut is by module"


def test_the_rank_of_a_threshold_at_its_edges():
    S = torch.tensor([2.0, 1.0, 1.0])
    expected = {0.01: 1, 4 / 6: 1, 4.01 / 6: 2, 5 / 6: 2, 1.0: 3}
    assert {share: rank_for_energy(S, share) for share in expected} == expected
    assert rank_for_energy(torch.zeros(0), 0.9) == 0
    with pytest.raises(ValueError, match=r"energy-threshold is 0\.0, expected at least 1e-06"):
        make_method("florist", energy_threshold=0.0)


def test_an_unknown_optimizer_is_refused_and_does_not_run_as_another():
    """Trap T20, on the server's step."""
    with pytest.raises(UserError, match=r"'momentun', expected .*Did you mean 'momentum'"):
        make_method("residual", server_optimizer="momentun")


ANOTHER = {
    "carried_dtype": "bfloat16",
    "carried_rank": 1,
    "energy_threshold": 0.5,
    "error_feedback": True,
    "gradient_batches": 2,
    "prune_factor": 0.5,
    "prune_penalty": 0.5,
    "server_learning_rate": 0.5,
    "server_max_rank": 2,
    "server_momentum": 0.3,
    "server_optimizer": "momentum",
    "sparse_rounds": 0,
}
FIELDS = {n: method_class(n).Options.model_fields.keys() - {"name"} for n in METHODS}


def test_every_option_of_every_method_is_checked_here():
    assert ANOTHER.keys() == {field for fields in FIELDS.values() for field in fields}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_an_option_that_the_method_does_not_have_is_refused_by_its_key(name):
    for option, value in ANOTHER.items():
        if option in FIELDS[name]:
            assert getattr(method_options(name, {option: value}), option) == value
            continue
        key, having = option.replace("_", "-"), [n for n in METHODS if option in FIELDS[n]]
        expected = f"method.{key} is .*method.name={name} does not have .but {', '.join(having)} do"
        with pytest.raises(UserError, match=expected):
            method_options(name, {key: value})


@pytest.mark.parametrize("option", sorted(ANOTHER))
def test_an_option_that_a_method_has_changes_what_it_sends_or_makes_of_the_replies(option):
    """Nothing is an option in name only."""
    for name, fields in FIELDS.items():
        if option not in fields:
            continue
        given = {option: ANOTHER[option]}
        if option == "error_feedback":
            given |= {"server_max_rank": 2}
        if option == "server_momentum":
            given |= {"server_optimizer": "momentum"}
        base = {key: value for key, value in given.items() if key != option}
        assert shown(make_method(name, **base)) != shown(make_method(name, **given)), name


def shown(method):
    """What three rounds leave and send, as numbers."""
    state = None
    for seed in range(3):
        state = next_state(method, state, seed=seed)
    sent = OneRound(method, state).sent.values()
    changes = [state.change.delta_weight(name).sum().item() for name in SHAPES]
    return changes, [(start.digest, start.local, start.carried_dtype) for start in sent]
