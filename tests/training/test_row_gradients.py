"""The gradient of each row: as autograd takes it one by one, and as Opacus does."""

import pytest
import torch
from torch import nn

import reference
from builders import random_adapter, random_examples, random_factors, tiny_model
from flexlora.data.collation import collate
from flexlora.lora.adapters import Adapter
from flexlora.training.local import checkpointing, row_losses
from flexlora.training.slots import SlotModel

BOTH = ("lora_A", "lora_B")
ROWS = [random_examples(n, seed=n) for n in (3, 1, 4)]  # of three slots


def recorded(slots, adapters, trainable, *, carried=None, rows=ROWS, checkpointed=False):
    """The recorder after one pass over ``rows``, with each row's loss."""
    slots.load(adapters, trainable=trainable, carried=carried)
    batch = collate(rows, pad_token_id=0)
    with (
        checkpointing(slots.model, checkpointed),
        slots.recording_rows(len(batch.input_ids)) as found,
    ):
        losses = row_losses(slots, batch)
        found.backward(losses)
    return found, losses.detach()


def one_by_one(model, adapter, row, trainable, carried=None):
    """One row's loss and its gradient of every trained factor in turn, under dense weights."""
    leaves = adapter.map(lambda tensor: tensor.clone().requires_grad_())
    loss = reference.row_loss(model, [leaves] + ([carried] if carried is not None else []), row)
    wanted = {(n, label): getattr(f, label) for n, f in leaves.items() for label in trainable}
    gradients = torch.autograd.grad(loss, list(wanted.values()))
    return loss.detach(), dict(zip(wanted, gradients, strict=True))


def unpadded(slots, buffer, row, adapter):
    """A row's recorded gradients by module and factor, at its slot's ranks."""
    parts = {}
    for (name, label), span in slots._spans.items():
        whole = getattr(slots.layers[name].trained, label[-1])
        part, rank = buffer[row, span].view(whole.shape[1:]), adapter[name].rank
        inside = part[:rank] if label == "lora_A" else part[:, :rank]
        assert float(part.abs().sum()) == pytest.approx(float(inside.abs().sum()), rel=1e-12)
        parts[name, label] = inside
    return parts


@pytest.mark.parametrize(
    ("kind", "trainable", "checkpointed"),
    [
        ("llama", BOTH, False),
        ("llama", ("lora_B",), False),
        ("llama", ("lora_A",), False),
        ("gpt2", BOTH, True),
        ("opt", BOTH, False),  # its MLP is fed flattened rows
    ],
)
def test_each_row_has_the_gradient_that_autograd_gives_it_alone(kind, trainable, checkpointed):
    """Slots of unequal ranks and rows, over carried factors; dummy rows have none."""
    slots, plain = SlotModel(tiny_model(kind)), tiny_model(kind)
    adapters = [random_adapter(slots.shapes, rank, alpha=4.0, seed=rank) for rank in (2, 5, 3)]
    carried = [random_adapter(slots.shapes, 4, seed=9)] * 3
    found, losses = recorded(slots, adapters, trainable, carried=carried, checkpointed=checkpointed)
    assert found.buffer.shape == (12, slots.parameters.shape[1])
    for k, rows in enumerate(ROWS):
        for i in range(4):
            at = 4 * k + i
            if i >= len(rows):
                assert not found.buffer[at].any() and losses[at] == 0.0
                continue
            loss, expected = one_by_one(plain, adapters[k], rows[i], trainable, carried[k])
            assert losses[at] == pytest.approx(float(loss), rel=1e-10)
            got = unpadded(slots, found.buffer, at, adapters[k])
            for key, part in expected.items():
                torch.testing.assert_close(got[key], part, rtol=1e-9, atol=1e-12)


def test_no_factor_gets_a_gradient_on_the_way(llama):
    slots = SlotModel(llama)
    recorded(slots, [random_adapter(slots.shapes, 2)] * 3, BOTH)
    assert all(leaf.grad is None for leaf in slots._leaves)
    assert not slots.gradients.any()
    assert all(layer.observer is None for layer in slots.layers.values())


def test_the_clipped_sum_is_that_of_the_rows_and_no_clipped_mean(llama):
    slots, plain = SlotModel(llama), tiny_model("llama")
    adapters = [random_adapter(slots.shapes, rank, alpha=4.0, seed=rank) for rank in (2, 5, 3)]
    found, _ = recorded(slots, adapters, BOTH)
    norms = found.buffer.norm(dim=1)
    clip = float(norms[norms > 0].median())  # some rows are longer, some shorter
    sums = found.clipped_sum(clip, 3)
    for k, rows in enumerate(ROWS):
        gradients = [one_by_one(plain, adapters[k], row, BOTH)[1] for row in rows]
        keys = list(gradients[0])
        expected = reference.clipped_row_sum([[g[key] for key in keys] for g in gradients], clip)
        got = unpadded(slots, sums, k, adapters[k])
        for key, part in zip(keys, expected, strict=True):
            torch.testing.assert_close(got[key], part, rtol=1e-9, atol=1e-12)
        assert float(sums[k].norm()) <= clip * len(rows)
    whole = found.buffer.view(3, 4, -1).sum(1)
    clipped_whole = whole * (clip / whole.norm(dim=1, keepdim=True)).clamp(max=1.0)
    assert float((sums - clipped_whole).norm()) > 0.1 * clip


def test_one_row_moves_the_clipped_sum_by_the_clip_at_most(llama):
    """Also a row that is no number: it adds nothing."""
    slots = SlotModel(llama)
    adapters = [random_adapter(slots.shapes, 3, seed=1)]
    rows = random_examples(4, seed=5)
    with_it, _ = recorded(slots, adapters, BOTH, rows=[rows])
    clip = float(with_it.buffer.norm(dim=1).min()) / 2
    last = with_it.buffer[3].clone()
    whole = with_it.clipped_sum(clip, 1)
    without, _ = recorded(slots, adapters, BOTH, rows=[rows[:3]])
    moved = whole - without.clipped_sum(clip, 1)
    assert float(moved.norm()) == pytest.approx(clip, rel=1e-9)
    torch.testing.assert_close(moved[0] / clip, last / last.norm())
    for odd in (torch.inf, torch.nan):
        again, _ = recorded(slots, adapters, BOTH, rows=[rows])
        again.buffer[3, 7] = odd
        torch.testing.assert_close(again.clipped_sum(clip, 1), whole - moved)


class Twice(nn.Module):
    """A model that comes by the same linear twice."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(6, 6, dtype=torch.float64)
        self.head = nn.Linear(6, 1, dtype=torch.float64)
        self.requires_grad_(False)

    def get_output_embeddings(self):
        return self.head

    def forward(self, x):
        return self.head(torch.tanh(self.shared(torch.tanh(self.shared(x))))).squeeze(-1).sum(1)


def plain_pass(slots, x, factors):
    """The recorder of one pass of a plain model over ``x [rows, T, in]``."""
    slots.load([Adapter(factors)], trainable=BOTH)
    with slots.recording_rows(len(x)) as found:
        found.backward(slots.model(x))
    return found


def test_a_module_that_is_called_twice_has_one_gradient():
    """The square of a sum: norms of each call alone would miss what they have in common."""
    torch.manual_seed(0)
    slots = SlotModel(Twice())
    factors = random_factors(6, 6, 2, seed=3)
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    found = plain_pass(slots, x, {"shared": factors})
    for i in range(4):
        A, B = (t.clone().requires_grad_() for t in (factors.lora_A, factors.lora_B))
        base = slots.layers["shared"].base
        weight = base.weight + factors.scaling * B @ A
        hidden = torch.tanh(nn.functional.linear(x[i], weight, base.bias))
        out = slots.model.head(torch.tanh(nn.functional.linear(hidden, weight, base.bias))).sum()
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(out, (A, B))])
        torch.testing.assert_close(found.buffer[i], expected, rtol=1e-10, atol=1e-12)


class TwoLinears(nn.Module):
    """Two linears; with ``lora`` the factors are linears beside them, as Opacus takes them."""

    def __init__(self, factors=None):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
        self.double().requires_grad_(False)
        self.factors = nn.ModuleDict()
        for name, pair in (factors or {}).items():
            A = nn.Linear(pair.in_features, pair.rank, bias=False, dtype=torch.float64)
            B = nn.Linear(pair.rank, pair.out_features, bias=False, dtype=torch.float64)
            A.weight.data, B.weight.data = pair.lora_A.clone(), pair.lora_B.clone()
            self.factors[name] = nn.ModuleDict({"A": A, "B": B})
        self.scaling = {name: pair.scaling for name, pair in (factors or {}).items()}

    def get_output_embeddings(self):
        return None

    def _linear(self, name, x):
        out = getattr(self, name)(x)
        if name in self.factors:
            pair = self.factors[name]
            out = out + self.scaling[name] * pair["B"](pair["A"](x))
        return out

    def forward(self, x):
        return self._linear("second", torch.tanh(self._linear("first", x))).square().mean((1, 2))


def test_clipped_sums_are_those_of_opacus():
    """Opacus 1.6 clips over all parameters together; its sum before noise is ``summed_grad``."""
    opacus = pytest.importorskip("opacus")
    from opacus.optimizers import DPOptimizer

    factors = {"first": random_factors(8, 6, 2, seed=1), "second": random_factors(5, 8, 3, seed=2)}
    x = torch.randn(7, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    slots = SlotModel(TwoLinears())
    found = plain_pass(slots, x, factors)
    norms = found.buffer.norm(dim=1)
    clip = float(norms.median())
    theirs = opacus.GradSampleModule(TwoLinears(factors), loss_reduction="sum")
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = DPOptimizer(
        torch.optim.SGD(trained, lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=clip,
        expected_batch_size=7,
        loss_reduction="sum",
    )
    theirs(x).sum().backward()
    samples = torch.cat([p.grad_sample.flatten(1) for p in trained], dim=1)
    torch.testing.assert_close(found.buffer, samples, rtol=1e-9, atol=1e-12)
    optimizer.clip_and_accumulate()
    summed = torch.cat([p.summed_grad.flatten() for p in trained])
    ours = found.clipped_sum(clip, 1)[0]
    # They divide by the norm plus 1e-6.
    torch.testing.assert_close(ours, summed, rtol=1e-5, atol=1e-9)
    assert float((norms > clip).sum()) >= 2
