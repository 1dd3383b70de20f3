"""The sketch is ``Psi dL/dW`` of a gradient that is never formed, and its rows are nearly the best.

Float32 and NF4 bases, alone and in cohorts of unequal ranks; the benchmark that measures it.
"""

import json

import pytest
import torch

import reference
from builders import random_adapter, random_examples, tiny_model
from flexlora.algebra.linalg import live_rows
from flexlora.algebra.sketch import GradientSketch, top_rows
from flexlora.clients.worker import Worker
from flexlora.config.resolve import Config
from flexlora.data.collation import collate
from flexlora.seeds import generator
from flexlora.simulations.benchmarks import sketch as benchmark
from flexlora.simulations.benchmarks.sketch_choices import choice_rows, memory_rows
from flexlora.training.layers import LoRALinear
from flexlora.training.local import answer_losses
from flexlora.training.slots import SlotModel

BOTH = ("lora_A", "lora_B")
RANKS = (2, 5, 20)  # of the three slots: below, between and above what the smallest module allows


@pytest.fixture(scope="module")
def nf4_folder(tmp_path_factory):
    """The weights of the tiny Llama on disk, for bitsandbytes to quantize while it loads them."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", dtype=torch.float32, hidden=64).save_pretrained(folder)
    return folder


def load(base, nf4_folder):
    """The model of one kind, and one in float64 that multiplies by the same weights."""
    exact = tiny_model("llama", hidden=64)
    if base != "nf4":
        return tiny_model("llama", hidden=64, dtype=getattr(torch, base)), exact
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    chosen = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        nf4_folder, quantization_config=chosen, device_map={"": "cpu"}, dtype=torch.float32
    )
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            exact.get_submodule(name).weight.data.copy_(weight)
    return model.requires_grad_(False).eval(), exact


def exact_gradient(model, factors, batches):
    """``dL/d(delta W)`` of every module by autograd on a dense weight beside the factors."""
    weights = {
        name: (model.get_submodule(name).weight + reference.delta_weight(factors[name]))
        .detach()
        .requires_grad_()
        for name in factors
    }
    by_parameter = {f"{name}.weight": weight for name, weight in weights.items()}
    total = 0.0
    for rows in batches:
        losses = []
        for row in rows:
            ids = torch.tensor([row.input_ids])
            out = torch.func.functional_call(model, by_parameter, (ids,), {"use_cache": False})
            losses.append(reference.answer_loss(out.logits[0], row))
        tokens = sum(len(row.input_ids) - row.prompt_length for row in rows)
        total = total + sum(losses) / tokens
    return dict(zip(weights, torch.autograd.grad(total, list(weights.values())), strict=True))


def sketched(slots, adapters, batches):
    """Every module's sketch after the passes over ``batches``, a list of rows by slot each."""
    slots.load(adapters, trainable=BOTH)
    with slots.sketching(seed=5):
        for rows in batches:
            losses = answer_losses(slots, collate(rows, pad_token_id=0))
            slots.accumulate_gradients(sum(part.mean() for part in losses))
        return {name: layer.observer for name, layer in slots.layers.items()}


@pytest.mark.parametrize(("base", "bound"), [("float64", 1e-12), ("float32", 1e-4), ("nf4", 1e-4)])
def test_the_sketch_is_psi_times_the_exact_gradient_of_each_slot(base, bound, nf4_folder):
    """In a cohort of unequal ranks and row counts, over two batches, with live factors."""
    model, exact = load(base, nf4_folder)
    slots = SlotModel(model)
    dtype = torch.float64 if base == "float64" else torch.float32
    adapters = [random_adapter(slots.shapes, r, seed=r, dtype=dtype) for r in RANKS]
    batches = [[random_examples(2 + k, seed=10 * b + k) for k in range(3)] for b in range(2)]
    sketches = sketched(slots, adapters, batches)
    for k, adapter in enumerate(adapters):
        gradients = exact_gradient(exact, adapter, [rows[k] for rows in batches])
        for name, gradient in gradients.items():
            size = sketches[name].sizes[k]
            assert size == min(4 * adapter[name].rank + 16, gradient.shape[0])
            expected = sketches[name].Psi[:size] @ gradient
            assert reference.relative_error(sketches[name].total[k, :size], expected) < bound, name
            others = sketches[name].total[(k + 1) % 3, :size]
            assert reference.relative_error(others, expected) > 0.3, name


@pytest.mark.parametrize("base", ["float32", "nf4"])
def test_of_the_held_inputs_and_output_gradients_it_is_the_sum_to_rounding(base, nf4_folder):
    """The float32 numbers that the backward pass really had, multiplied in float64."""
    slots = SlotModel(load(base, nf4_folder)[0])
    held = {}

    def keep(layer, inputs, out):
        out.register_hook(lambda gradient: held.update({layer.name: (inputs[0], gradient)}))

    layers = [module for module in slots.model.modules() if isinstance(module, LoRALinear)]
    hooks = [layer.register_forward_hook(keep) for layer in layers]
    adapters = [random_adapter(slots.shapes, r, seed=r, dtype=torch.float32) for r in (2, 5)]
    sketches = sketched(slots, adapters, [[random_examples(3, seed=k) for k in range(2)]])
    for hook in hooks:
        hook.remove()
    assert set(held) == set(slots.shapes)
    for name, (x, gradient) in held.items():
        rows = x.shape[0] // 2
        for k in range(2):
            inputs, outputs = (
                t.detach()[k * rows : (k + 1) * rows].flatten(0, 1).double() for t in (x, gradient)
            )
            expected = sketches[name].Psi @ (outputs.T @ inputs)
            assert reference.relative_error(sketches[name].total[k], expected) < 2e-6, name


@pytest.mark.parametrize("out_features", [6, 172, 1500])
def test_psi_has_orthonormal_nested_rows(out_features):
    """Also where it is built in several blocks of columns, and up to k = out."""

    def Psi(ranks, name="w", seed=0):  # noqa: N802
        return GradientSketch(name=name, ranks=ranks, out_features=out_features, seed=seed).Psi

    large = Psi([2, 50])
    assert large.shape == (min(216, out_features), out_features)
    identity = torch.eye(len(large), dtype=torch.float64)
    torch.testing.assert_close(large @ large.T, identity, atol=1e-12, rtol=0)
    small = Psi([2])
    assert torch.equal(small, large[: len(small)])
    assert not torch.equal(small, Psi([2], name="v"))
    assert not torch.equal(small, Psi([2], seed=1))


def test_a_sketch_as_large_as_the_module_finds_the_best_rows_and_signs_would_not():
    """Orthonormal rows leave singular values as they are; the control's own bend them."""
    x, outputs = (torch.randn(1, 200, n, generator=generator(0, str(n))) for n in (40, 32))
    G = outputs[0].double().T @ x[0].double()
    sketch = GradientSketch(name="w", ranks=[4], out_features=32, seed=0)
    sketch.add(x, outputs, 1)
    fallback = live_rows(4, 40, generator(0, "fallback"))
    best = benchmark.captured(G, benchmark.best_rows(G, 4))
    assert benchmark.captured(G, top_rows(sketch.total[0], 4, fallback)) > (1 - 1e-9) * best
    signs = torch.sign(torch.randn(32, 32, generator=generator(1, "signs"), dtype=torch.float64))
    assert benchmark.captured(G, top_rows(signs @ G, 4, fallback)) < 0.98 * best


def test_directions_that_are_only_float32_rounding_are_not_taken():
    """A gradient of rank 3 summed over 512 tokens; two of five rows stay the random ones."""
    draw = generator(0, "rank three")
    core = torch.randn(512, 3, generator=draw)
    x, outputs = core @ torch.randn(3, 96, generator=draw), torch.randn(512, 64, generator=draw)
    sketch = GradientSketch(name="w", ranks=[5], out_features=64, seed=0)
    sketch.add(x[None], outputs[None], 1)
    fallback = live_rows(5, 96, generator(0, "fallback"))
    rows = top_rows(sketch.total[0], 5, fallback)
    assert torch.equal(rows[3:], fallback[3:]) and not torch.equal(rows[2], fallback[2])
    G = outputs.double().T @ x.double()
    assert benchmark.captured(G, rows[:3]) > (1 - 1e-9) * float(G.square().sum())


def test_sixteen_bit_passes_are_summed_in_float32():
    x, outputs = (torch.randn(1, 300, n, generator=generator(2, str(n))) for n in (48, 700))
    x, outputs = x.bfloat16(), outputs.bfloat16()
    sketch = GradientSketch(name="w", ranks=[4], out_features=700, seed=0)
    sketch.add(x, outputs, 1)
    expected = sketch.Psi @ (outputs[0].double().T @ x[0].double())
    assert sketch.total.dtype == torch.float32
    assert reference.relative_error(sketch.total[0], expected) < 1e-6


def test_memory_does_not_grow_with_out_features():
    """Held: the sketch and a few bytes per output; inside ``add``: blocks of one width."""
    rows = memory_rows(in_features=512, tokens=64, rank=4)
    for row, out_features in zip(rows, (512, 2048, 8192), strict=True):
        assert row["sketch_bytes"] == 32 * 512 * 4
        assert row["held_bytes"] == row["sketch_bytes"] + 32 * 8 + out_features
        assert row["ratio"] <= row["target"] and row["error"] < 1e-6
    assert rows[-1]["dense_bytes"] == 16 * rows[0]["dense_bytes"]
    assert rows[-1]["add_bytes"] < rows[-1]["dense_bytes"] / 16


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_on_the_embedded_base_the_rows_are_nearly_the_best(quantization):
    """Every module, two clients, ranks 2 to 16; as many random rows are the control."""
    worker = Worker(Config.of({"model.quantization": quantization, "engine.device": "cpu"}))
    clients = benchmark.pick_clients(worker, 2, 1)
    captures = benchmark.cohort_captures(worker, benchmark.oracle_of(worker), clients, 1, 0)
    assert len(captures) == 2 * len(benchmark.RANKS) * len(worker.shapes)
    for rank in benchmark.RANKS:
        group = [c for c in captures if c.rank == rank]
        assert sum(c.ratio for c in group) / len(group) > 0.9
        assert min(c.ratio for c in group) > 0.6
        assert max(c.random for c in group) < 0.3
        assert max(c.ratio for c in group) <= 1 + 1e-9
        assert max(c.error for c in group) < 1e-4


def test_other_ways_are_ordered_as_theory_has_them():
    """Of a batch's own gradient: more rows, then a look within them, then a power iteration."""
    draw = generator(0, "batches")
    decay = torch.arange(1, 97, dtype=torch.float64).rsqrt()[:, None]
    batches = [
        {"w": torch.randn(128, 96, generator=draw, dtype=torch.float64) @ (decay * torch.eye(96))}
        for _ in range(4)
    ]
    rows = choice_rows([batches], (2,), "float64")
    own = {row["name"].split(", ", 2)[2]: row["own"] for row in rows}
    assert own["2r + 8"] < own["4r + 16"] < own["8r + 32"] < own["one batch, exact"]
    assert own["4r + 16"] < own["4r + 16, best within it"] < own["4r + 16, power iteration"]
    assert own["one batch, exact"] == pytest.approx(1.0)
    exact = next(row for row in rows if row["name"].endswith("one batch, exact"))
    assert exact["ratio"] == exact["target"] < 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clients", "1000"], "--clients is 1000, expected 1 to 24"),
        (["--clients", "0"], "--clients is 0, expected 1"),
        (["--batches", "one"], "invalid whole_numbers value: 'one'"),
        (["--model", "nowhere/at/all"], "is not a folder"),
    ],
)
def test_the_benchmark_refuses_in_one_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_the_benchmark_prints_its_tables_and_writes_its_rows(tmp_path, capsys):
    benchmark.main(["--clients", "1", "--batches", "1", "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    printed = capsys.readouterr().out
    for row in rows:
        assert {"name", "ratio", "target", "error"} <= set(row)
    for name in ("float32, clients 1, batches 1, rank 2, all", "4r + 16, 3 batches", "8192 x 512"):
        assert name in printed and any(name in row["name"] for row in rows)
