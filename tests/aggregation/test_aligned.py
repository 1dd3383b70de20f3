"""Two ranks: the carried change, and fresh factors that start in the gradient's own row space."""

import pytest
import torch

import reference
from builders import random_adapter, random_examples, tiny_model, train_job
from flexlora.aggregation import make_method
from flexlora.aggregation.engine.starts import Factoring, LocalPlan
from flexlora.aggregation.engine.state import GlobalChange, State
from flexlora.algebra.linalg import live_rows, svd_of_product
from flexlora.algebra.sketch import GradientSketch, sketch_size, top_rows
from flexlora.data.collation import collate
from flexlora.lora.ranks import RankClass
from flexlora.seeds import generator
from flexlora.training.local import TrainSettings, answer_losses, train
from flexlora.training.slots import SlotModel

BOTH = ("lora_A", "lora_B")
SHAPES = {"attn.q": (10, 12), "mlp.up": (14, 9)}
FACTORING = Factoring(alpha=8.0, seed=3)


def captured(gradient, rows):
    """Share of the energy of ``gradient [out, in]`` in the span of ``rows [rank, in]``."""
    Q = torch.linalg.qr(rows.double().T).Q
    return float((gradient @ Q).square().sum() / gradient.square().sum())


def exact_gradients(slots, batch):
    """``dL/dW`` of every target, dense, by asking autograd for it."""
    weights = {name: layer.base.weight for name, layer in slots.layers.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    loss = sum(part.mean() for part in answer_losses(slots, batch))
    gradients = torch.autograd.grad(loss, list(weights.values()))
    for weight in weights.values():
        weight.requires_grad_(False)
    return dict(zip(weights, gradients, strict=True))


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_the_factors_start_in_the_top_row_space_of_the_exact_gradient(kind):
    """Nearly the best energy that any rank-3 start can capture; random rows are the control."""
    slots = SlotModel(tiny_model(kind))
    batch = collate([random_examples(12, seed=1)], pad_token_id=0)
    slots.load([random_adapter(slots.shapes, 3, seed=1).map(torch.zeros_like)], trainable=BOTH)
    exact = exact_gradients(slots, batch)
    zero_B = random_adapter(slots.shapes, 3, seed=1)
    slots.load([zero_B], trainable=BOTH)
    for layer in slots.layers.values():
        layer.trained.B.data.zero_()
    with slots.sketching(seed=5):
        slots.accumulate_gradients(sum(part.mean() for part in answer_losses(slots, batch)))
    for name, factors in slots.extract(0).items():
        G = exact[name].double()
        S = torch.linalg.svdvals(G)
        best = float(S[:3].square().sum() / S.square().sum())
        assert captured(G, factors.lora_A) > 0.8 * best, name
        control = captured(G, live_rows(3, G.shape[1], generator(0, "control", name)))
        assert captured(G, factors.lora_A) > control + 0.2, name


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_k_aligned_slots_equal_k_separate_runs(gradient_checkpointing):
    """Unequal ranks and rows; more gradient batches than one of the clients has steps."""
    slots = SlotModel(tiny_model("llama"))
    jobs = [
        train_job(
            random_adapter(slots.shapes, rank, seed=rank),
            f"client_{rank}",
            carried=random_adapter(slots.shapes, 6, seed=50),
            local=LocalPlan(gradient_batches=3),
        )
        for rank in (2, 5, 3)
    ]
    rows = [random_examples(n, seed=n) for n in (5, 9, 2)]
    chosen = TrainSettings(
        per_device_train_batch_size=2,
        max_steps=0,
        learning_rate=0.01,
        gradient_checkpointing=gradient_checkpointing,
    )
    for job, examples, result in zip(jobs, rows, train(slots, jobs, rows, chosen), strict=True):
        (alone,) = train(slots, [job], [examples], chosen)
        assert reference.adapter_distance(result.adapter, alone.adapter) < 1e-9
    (random_start,) = train(
        slots,
        [train_job(jobs[0].start.trained, "client_2", carried=jobs[0].start.carried)],
        rows[:1],
        chosen,
    )
    (aligned,) = train(slots, jobs[:1], rows[:1], chosen)
    assert reference.adapter_distance(aligned.adapter, random_start.adapter) > 1e-2


def test_a_sketch_is_as_large_as_the_rank_asks_and_never_out_times_in():
    sketch = GradientSketch(name="w", ranks=[2, 4], out_features=512, seed=0)
    x, gradient = torch.randn(2 * 5, 3, 64), torch.randn(2 * 5, 3, 512)
    sketch.add(x, gradient, 2)
    assert sketch.total.shape == (2, sketch_size(4, 512), 64) == (2, 32, 64)
    assert sketch_size(64, 32) == 32


def test_a_full_sketch_is_the_gradient_up_to_a_known_matrix():
    """``Psi dL/dW`` exactly, for each slot by itself, in one pass or in two."""
    sketch = GradientSketch(name="w", ranks=[3, 3], out_features=6, seed=0)
    x, gradient = torch.randn(4, 5, 7).double(), torch.randn(4, 5, 6).double()
    sketch.add(x[:, :2], gradient[:, :2], 2)
    sketch.add(x[:, 2:], gradient[:, 2:], 2)
    for slot in range(2):
        rows = slice(2 * slot, 2 * slot + 2)
        dense = gradient[rows].reshape(-1, 6).T @ x[rows].reshape(-1, 7)
        torch.testing.assert_close(sketch.total[slot], sketch.Psi @ dense)


def test_rows_have_the_length_of_random_ones_and_missing_directions_stay_live():
    fallback = live_rows(4, 300, generator(0, "rows"))
    rank_two = torch.randn(9, 2).double() @ torch.randn(2, 300).double()
    rows = top_rows(rank_two, 4, fallback)
    lengths = rows.norm(dim=1)
    torch.testing.assert_close(lengths[:2], torch.full((2,), 3**-0.5, dtype=lengths.dtype))
    assert torch.equal(rows[2:], fallback[2:])
    assert torch.equal(top_rows(torch.zeros(9, 300), 4, fallback), fallback)
    assert abs(float(fallback.norm(dim=1).mean()) - 3**-0.5) < 0.03


def test_everybody_carries_the_same_change_whatever_they_train():
    product = {
        n: torch.randn(out, 5).double() @ torch.randn(5, i).double()
        for n, (out, i) in SHAPES.items()
    }
    change = GlobalChange(
        {n: svd_of_product(M, torch.eye(M.shape[1]).double()) for n, M in product.items()}
    )
    method = make_method("aligned", carried_rank=3)
    state = State(round=2, change=change)
    weak, strong = (
        method.start(state, RankClass(name=f"rank_{r}", rank=r), FACTORING) for r in (1, 4)
    )
    for name, matrix in product.items():
        expected = reference.truncate(matrix, 3)
        for start in (weak, strong):
            assert reference.relative_error(start.carried.delta_weight(name), expected) < 1e-12
            assert not start.trained[name].lora_B.any() and start.trained[name].lora_A.any()
            assert start.served() is start.carried
    own = RankClass(name="c", rank=1, carried_rank=5)
    for name, matrix in product.items():
        carried = method.start(state, own, FACTORING).carried
        assert reference.relative_error(carried.delta_weight(name), matrix) < 1e-12
    later = method.start(State(round=3, change=change), own, FACTORING)
    assert not torch.equal(later.trained["attn.q"].lora_A, weak.trained["attn.q"].lora_A)


def test_before_any_change_there_is_nothing_to_carry():
    state = State(round=0, change=GlobalChange.zero(SHAPES))
    start = make_method("aligned").start(state, RankClass(name="c", rank=2), FACTORING)
    assert start.carried is None and start.served() is start.trained
