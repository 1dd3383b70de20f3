"""The fingerprint: one for all copies of a base, another for every other base."""

import pytest
import torch
from safetensors.torch import load_file

import bases
from flexlora.config.paths import EMBEDDED
from flexlora.errors import UserError
from flexlora.training import fingerprint as fingerprints
from flexlora.training.checkpoint import open_checkpoint
from flexlora.training.models import load_base

LINEAR = "model.layers.2.mlp.down_proj.weight"


def fingerprint(folder, **options):
    return load_base(str(folder), device="cpu", fresh=True, **options).fingerprint


@pytest.fixture(scope="module")
def embedded():
    return load_base("embedded", device="cpu").fingerprint


def as_dtype(dtype):
    return lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"dtype": "float64"},
        {"quantization": "nf4"},
        {"quantization": "8bit"},
    ],
    ids=str,
)
def test_how_a_base_is_held_does_not_matter(options, embedded):
    assert fingerprint("embedded", **options) == embedded


def test_how_a_base_is_stored_does_not_matter(tmp_path, embedded):
    narrow = bases.with_tensors(bases.copied(tmp_path / "narrow"), as_dtype(torch.bfloat16))
    assert fingerprint(narrow) == embedded
    assert fingerprint(bases.sharded(bases.copied(tmp_path / "shards"), 3)) == embedded
    base = load_base("embedded", dtype="float64", device="cpu", fresh=True)
    assert fingerprint(bases.saved(tmp_path / "again", base.model)) == embedded


def test_a_copy_of_a_tied_output_layer_does_not_matter(tmp_path, embedded):
    def with_copy(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def with_that_alone(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    for k, change in enumerate((with_copy, with_that_alone)):
        assert fingerprint(bases.with_tensors(bases.copied(tmp_path / str(k)), change)) == embedded


def another_draw(tensors):
    drawn = torch.Generator().manual_seed(1)
    tensors[LINEAR] = torch.randn(tensors[LINEAR].shape, generator=drawn) * tensors[LINEAR].std()


def fine_tuned(tensors):
    tensors[LINEAR] *= 1.02


def a_norm(tensors):
    tensors["model.norm.weight"][7] *= 1.1


def swapped(tensors):
    names = [f"model.layers.{k}.self_attn.q_proj.weight" for k in (0, 1)]
    return {**tensors, names[0]: tensors[names[1]], names[1]: tensors[names[0]]}


@pytest.mark.parametrize("change", [another_draw, fine_tuned, a_norm, swapped])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_other_weights_are_another_base(change, quantization, tmp_path, embedded):
    """Before, only embeddings and norms were covered: two draws of a linear were one base."""
    folder = bases.with_tensors(bases.copied(tmp_path / "m"), change)
    assert fingerprint(folder, quantization=quantization) != embedded


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rms_norm_eps": 1e-5},
        {"hidden_act": "gelu"},
        {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64},
    ],
)
def test_settings_that_change_what_the_weights_compute_are_another_base(
    changes, tmp_path, embedded
):
    assert fingerprint(bases.configured(bases.copied(tmp_path / "m"), **changes)) != embedded


def test_settings_that_change_nothing_are_the_same_base(tmp_path, embedded):
    folder = bases.copied(tmp_path / "m")
    bases.configured(folder, transformers_version="4.40.0", use_cache=False, dtype="bfloat16")
    assert fingerprint(folder) == embedded


def test_every_tensor_is_covered(tmp_path, embedded):
    """Each in turn, the last number of it."""
    names = sorted(load_file(EMBEDDED / "model.safetensors"))
    folder = bases.copied(tmp_path / "m")
    model, seen = load_base("embedded", device="cpu").model, {embedded}
    for name in names:

        def last(tensors, name=name):
            tensors[name].view(-1)[-1] += 1

        bases.with_tensors(folder, last)
        seen.add(fingerprints.fingerprint(model, open_checkpoint(folder, "m")))
    assert len(seen) == 1 + len(names)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_refused_by_tensor(value, dtype, tmp_path):
    def broken(tensors):
        tensors[LINEAR][:] = value
        tensors["model.norm.weight"][3] = value
        return as_dtype(dtype)(tensors)

    folder = bases.with_tensors(bases.copied(tmp_path / "m"), broken)
    message = rf"'{LINEAR}', 'model.norm.weight' in the checkpoint is not finite"
    for quantization in ("none", "nf4"):
        with pytest.raises(UserError, match=message):
            fingerprint(folder, quantization=quantization)


def test_one_number_anywhere_in_a_small_base_is_refused(tmp_path):
    def broken(tensors):
        tensors[LINEAR].view(-1)[4000] = float("nan")  # between the runs that are sampled

    folder = bases.with_tensors(bases.copied(tmp_path / "m"), broken)
    with pytest.raises(UserError, match=f"'{LINEAR}' in the checkpoint is not finite"):
        fingerprint(folder)
