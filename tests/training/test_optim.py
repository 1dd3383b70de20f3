"""The optimizer over rows: each row is torch.optim's own, and rows do not feel each other."""

import pytest
import torch

from flexlora.errors import UserError
from flexlora.training.optim import SlotOptimizer, clip_rows


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("optim", "oracle"), [("adamw_torch", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_every_row_is_torch_optim(optim, oracle, weight_decay, dtype, bound):
    """Own rates per row and step; row 2 ends after three steps and row 1 after five."""
    start, ends = numbers(3, 11, dtype=dtype), (8, 5, 3)
    rows = start.clone()
    ours = SlotOptimizer(rows, optim=optim, weight_decay=weight_decay, adam_epsilon=1e-4)
    theirs = [row.clone().requires_grad_() for row in start]
    own = {"eps": 1e-4} if optim == "adamw_torch" else {}
    optimizers = [oracle([row], lr=1.0, weight_decay=weight_decay, **own) for row in theirs]
    for step in range(8):
        gradients = numbers(3, 11, seed=step + 1, dtype=dtype)
        rates = [0.01 * (k + 1) / (step + 1) for k in range(3) if step < ends[k]]
        ours.step(gradients, rates)
        for k, rate in enumerate(rates):
            theirs[k].grad = gradients[k].clone()
            optimizers[k].param_groups[0]["lr"] = rate
            optimizers[k].step()
        for k in range(3):
            torch.testing.assert_close(rows[k], theirs[k].detach(), rtol=bound, atol=bound)
    assert not torch.equal(rows, start)


def test_a_row_that_has_ended_does_not_move():
    rows = numbers(3, 5)
    optimizer = SlotOptimizer(rows, optim="adamw_torch", weight_decay=0.1)
    optimizer.step(numbers(3, 5, seed=1), [0.1] * 3)
    after = rows.clone()
    optimizer.step(numbers(3, 5, seed=2), [0.1])
    assert torch.equal(rows[1:], after[1:]) and not torch.equal(rows[0], after[0])


def test_moments_begin_at_zero_with_every_optimizer():
    """Trap T7: moments kept across rounds belong to directions that the SVD has rotated."""
    first, second = numbers(2, 5), numbers(2, 5)
    used = SlotOptimizer(first, optim="adamw_torch")
    used.step(numbers(2, 5, seed=1), [0.1, 0.1])
    first.copy_(second)
    SlotOptimizer(first, optim="adamw_torch").step(numbers(2, 5, seed=2), [0.1, 0.1])
    SlotOptimizer(second, optim="adamw_torch").step(numbers(2, 5, seed=2), [0.1, 0.1])
    assert torch.equal(first, second)


@pytest.mark.parametrize("max_norm", [0.5, 3.0, 1e6])
def test_every_row_is_clipped_as_clip_grad_norm_does(max_norm):
    gradients = numbers(4, 9) * torch.tensor([[0.01], [1.0], [50.0], [0.0]], dtype=torch.float64)
    expected = []
    for row in gradients:
        leaf = torch.zeros(9, dtype=torch.float64, requires_grad=True)
        leaf.grad = row.clone()
        norm = torch.nn.utils.clip_grad_norm_([leaf], max_norm)
        expected.append((leaf.grad, norm))
    norms = clip_rows(gradients, max_norm)
    for k, (row, norm) in enumerate(expected):
        torch.testing.assert_close(gradients[k], row, rtol=1e-14, atol=0)
        torch.testing.assert_close(norms[k], norm.double(), rtol=1e-14, atol=0)


def test_no_bound_clips_nothing():
    gradients = numbers(2, 9) * 1e6
    before = gradients.clone()
    norms = clip_rows(gradients, 0.0)
    assert torch.equal(gradients, before)
    torch.testing.assert_close(norms, before.norm(dim=1))


@pytest.mark.parametrize(
    ("optim", "dtype", "error", "message"),
    [
        ("adam", torch.float32, ValueError, "expected one of adamw_torch, sgd, adamw_8bit, paged"),
        ("adamw_8bits", torch.float32, ValueError, r"Did you mean 'adamw_8bit'\?"),
        (
            "paged_adamw_8bit",
            torch.float32,
            UserError,
            "'paged_adamw_8bit', whose .* CUDA's managed memory, .* on the cpu; use 'adamw_8bit'",
        ),
        ("adamw_8bit", torch.float64, UserError, "but these are float64; use 'adamw_torch'"),
    ],
)
def test_an_optimizer_that_cannot_step_is_refused(optim, dtype, error, message):
    with pytest.raises(error, match=message):
        SlotOptimizer(numbers(1, 2, dtype=dtype), optim=optim)
