"""K slots over one frozen model: each is the merged model, and nothing of the base is touched."""

import pytest
import torch
from torch import nn

import reference
from builders import random_adapter, random_factors, tiny_model
from flexlora import UserError
from flexlora.training.layers import LoRALinear, SlotFactors
from flexlora.training.slots import SlotModel, find_targets, slot_model

IDS = torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(2))
LEAVES = {
    "llama": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "qwen2": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "gpt2": "c_attn c_proj c_fc",
    "neox": "query_key_value dense dense_h_to_4h dense_4h_to_h",
}


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def reference_logits(model, adapters, ids=IDS):
    """Row by row under the merged weights of the plain model."""
    with torch.no_grad():
        return torch.stack([reference.logits_of(model, adapters, row.tolist()) for row in ids])


@pytest.mark.parametrize("rslora", [False, True])
def test_each_slot_is_the_merged_model(architecture, rslora):
    plain, model = tiny_model(architecture), tiny_model(architecture)
    slots = SlotModel(model)
    ranks, alphas = ([2, 9], [1, 4, 3], [40]), ([16.0], [3.0, 8.0], [5.0])
    adapters = [
        random_adapter(slots.shapes, ranks[k], alpha=alphas[k], rslora=rslora, seed=k)
        for k in range(3)
    ]
    slots.load(adapters)
    rows = logits(model, IDS[:2].repeat(3, 1))
    for k, adapter in enumerate(adapters):
        expected = reference_logits(plain, [adapter], IDS[:2])
        torch.testing.assert_close(rows[2 * k : 2 * k + 2], expected, rtol=0, atol=1e-11)
    assert float((rows[:2] - rows[2:4]).abs().max()) > 0.1, "the slots do not differ"


def test_carried_factors_are_added_frozen_beside_the_trained(architecture):
    """Two ranks: slots with other carried ranks, and one that carries nothing."""
    plain, model = tiny_model(architecture), tiny_model(architecture)
    slots = SlotModel(model)
    trained = [random_adapter(slots.shapes, 2 + k, seed=k) for k in range(3)]
    carried = [
        random_adapter(slots.shapes, 6, alpha=3.0, seed=8),
        None,
        random_adapter(slots.shapes, 11, rslora=True, seed=9),
    ]
    slots.load(trained, carried=carried, trainable=("lora_A", "lora_B"))
    rows = logits(model, IDS[:2].repeat(3, 1))
    for k in range(3):
        both = [trained[k]] + ([carried[k]] if carried[k] is not None else [])
        expected = reference_logits(plain, both, IDS[:2])
        torch.testing.assert_close(rows[2 * k : 2 * k + 2], expected, rtol=0, atol=1e-11)
    trained_numbers = sum(
        max(adapter[name].rank for adapter in trained) * sum(shape)
        for name, shape in slots.shapes.items()
    )
    assert slots.parameters.shape == (3, trained_numbers), "the carried factors are in the buffer"
    for k in range(3):
        assert slots.extract(k).digest() == trained[k].digest()


def test_one_layer_equals_the_merged_linear():
    linear = nn.Linear(7, 5, dtype=torch.float64)
    layer = LoRALinear(linear, name="w", in_features=7, out_features=5)
    x = torch.randn(6, 4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(layer(x), linear(x), rtol=0, atol=0)
    factors = [random_factors(5, 7, rank, alpha=rank + 0.5, seed=rank) for rank in (1, 5, 2)]
    layer.trained, layer.num_slots = SlotFactors.stack(factors, linear.weight.detach()), 3
    out = layer(x)
    for k, one in enumerate(factors):
        merged = nn.functional.linear(
            x[2 * k : 2 * k + 2], linear.weight + reference.delta_weight(one), linear.bias
        )
        torch.testing.assert_close(out[2 * k : 2 * k + 2], merged, rtol=0, atol=1e-13)


def test_a_linear_that_is_fed_flattened_rows_knows_its_slots():
    """OPT's MLP sees ``[K * b * T, in]``: slot-major rows stay in order."""
    linear = nn.Linear(7, 5, dtype=torch.float64)
    layer = LoRALinear(linear, name="w", in_features=7, out_features=5)
    factors = [random_factors(5, 7, rank, seed=rank) for rank in (1, 3)]
    layer.trained, layer.num_slots = SlotFactors.stack(factors, linear.weight.detach()), 2
    x = torch.randn(4, 6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(layer(x.flatten(0, 1)), layer(x).flatten(0, 1))


def test_all_linear_is_every_linear_but_the_output_layer(architecture):
    targets = find_targets(tiny_model(architecture), "all-linear")
    leaves = LEAVES[architecture].split()
    assert {name.rpartition(".")[2] for name in targets} == set(leaves)
    per_layer = 4 if architecture == "gpt2" else len(leaves)
    assert len(targets) == 2 * per_layer
    assert not any("lm_head" in name or "embed" in name for name in targets)


def test_shapes_are_out_then_in_for_conv1d_as_for_linear():
    gpt2 = find_targets(tiny_model("gpt2"), "all-linear")
    assert gpt2["transformer.h.0.attn.c_attn"] == (96, 32)
    assert gpt2["transformer.h.1.mlp.c_proj"] == (32, 128)
    llama = find_targets(tiny_model("llama"), "all-linear")
    assert llama["model.layers.0.self_attn.k_proj"] == (16, 32)
    assert llama["model.layers.1.mlp.down_proj"] == (32, 48)


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("q_proj", 2),
        ("q_proj, v_proj", 4),
        ("self_attn.q_proj", 2),
        ("model.layers.1.self_attn.q_proj", 1),
        (r".*\.(q|v)_proj", 4),
        (r"model\.layers\.0\..*", 7),
        (r".*layers\.[01]\.mlp\.(up|gate)_proj", 4),
    ],
)
def test_names_and_expressions_pick_what_they_say(llama, pattern, count):
    found = find_targets(llama, pattern)
    assert len(found) == count
    assert set(found) <= set(find_targets(llama, "all-linear"))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("q_prj", "is 'q_prj', which matches no linear module.*Did you mean 'q_proj'"),
        ("proj", "matches no linear module of the model, expected 'all-linear' or some of down_pr"),
        ("layers", "matches no linear module"),
        ("*q_proj", "neither a list of names nor a regular expression"),
        ("", "matches no linear module"),
        ("q_proj,vv_proj", "vv_proj"),
    ],
)
def test_a_target_that_matches_nothing_is_refused(llama, pattern, message):
    with pytest.raises(UserError, match=message):
        find_targets(llama, pattern)


def test_a_subclass_of_linear_is_a_linear_as_it_is_for_peft():
    """Falcon's FalconLinear is one; by class name alone such a model has no linear at all."""

    class OwnLinear(nn.Linear):
        pass

    model = nn.Sequential(OwnLinear(4, 6), nn.Linear(6, 4))
    assert find_targets(model, "all-linear") == {"0": (6, 4), "1": (4, 6)}


@pytest.mark.parametrize("square", [2, 5])
def test_factors_are_told_apart_by_name_where_rank_equals_a_dimension(square):
    """Trap T5: rank 5 of a 5 x 5 module has A and B of one shape."""
    model = nn.Sequential(nn.Linear(5, 5, bias=False, dtype=torch.float64)).requires_grad_(False)
    slots = SlotModel(model)
    adapter = random_adapter(slots.shapes, square)
    slots.load([adapter], trainable=("lora_A", "lora_B"))
    x = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    base = model[0].base.weight
    expected = x @ (base + reference.delta_weight(adapter["0"])).T
    torch.testing.assert_close(model(x).detach(), expected, rtol=0, atol=1e-13)
    assert slots.extract(0).digest() == adapter.digest()


@pytest.mark.parametrize("trainable", [(), ("lora_B",), ("lora_A", "lora_B")])
def test_load_and_extract_give_every_slot_its_own_bits_back(llama, trainable):
    slots = SlotModel(llama)
    adapters = [
        random_adapter(slots.shapes, [1 + k, 5], alpha=[2.0 + k, 9.0], rslora=k == 1, seed=k)
        for k in range(3)
    ]
    slots.load(adapters, trainable=trainable)
    assert [slots.extract(k).digest() for k in range(3)] == [a.digest() for a in adapters]
    slots.load(adapters[::-1][:2])
    assert slots.extract(0).digest() == adapters[2].digest()


def test_extract_is_a_copy(llama):
    slots = SlotModel(llama)
    adapter = random_adapter(slots.shapes)
    slots.load([adapter], trainable=("lora_A", "lora_B"))
    before = slots.extract(0)
    with torch.no_grad():
        slots.parameters += 1.0
    assert before.digest() == adapter.digest() != slots.extract(0).digest()


def test_the_buffer_and_the_layers_are_the_same_numbers(llama):
    slots = SlotModel(llama)
    adapters = [random_adapter(slots.shapes, rank, seed=rank) for rank in (2, 3)]
    slots.load(adapters, trainable=("lora_A", "lora_B"))
    with torch.no_grad():
        slots.parameters[0] *= 2.0
    quadrupled, same = slots.extract(0), slots.extract(1)
    for name in adapters[0]:
        four = 4.0 * reference.delta_weight(adapters[0][name])
        assert reference.relative_error(reference.delta_weight(quadrupled[name]), four) < 1e-14
    assert same.digest() == adapters[1].digest()


def test_clear_and_remove_leave_the_base_as_it_was(architecture):
    model = tiny_model(architecture)
    before, modules = logits(model), [type(m) for m in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    slots = SlotModel(model)
    slots.load([random_adapter(slots.shapes)], trainable=("lora_A", "lora_B"))
    assert not torch.equal(logits(model), before)
    slots.clear()
    assert torch.equal(logits(model), before)
    slots.remove()
    assert [type(m) for m in model.modules()] == modules
    assert torch.equal(logits(model), before)
    assert set(model.state_dict()) == set(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_an_adapter_of_another_model_is_refused(llama):
    slots = SlotModel(llama, "q_proj,v_proj")
    whole = random_adapter(find_targets(tiny_model("llama"), "all-linear"))
    with pytest.raises(ValueError, match=r"down_proj' is in the adapter only.*'q_proj,v_proj'"):
        slots.load([whole])
    with pytest.raises(ValueError, match=r"v_proj' is in the model only"):
        slots.load([random_adapter({n: s for n, s in slots.shapes.items() if "q_proj" in n})])
    wrong = {**slots.shapes, "model.layers.0.self_attn.v_proj": (16, 31)}
    with pytest.raises(ValueError, match=r"adapter is \(16, 31\), the model \(16, 32\)"):
        slots.load([random_adapter(wrong)])


def test_slots_are_injected_once_and_anew_for_other_targets(llama):
    first = slot_model(llama, "all-linear")
    assert slot_model(llama, "all-linear") is first
    other = slot_model(llama, "q_proj")
    assert sum(isinstance(m, LoRALinear) for m in llama.modules()) == 2
    assert set(other.shapes) < set(first.shapes)
    with pytest.raises(UserError, match="matches no linear module"):
        slot_model(llama, "nothing")
    again = slot_model(llama, "q_proj")
    again.load([random_adapter(again.shapes)])
    assert sum(isinstance(m, LoRALinear) for m in llama.modules()) == 2
    assert again.extract(0).digest() == random_adapter(again.shapes).digest()
