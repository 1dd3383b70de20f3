"""Small models of every family that the memory planner knows, and what they really hold."""

from __future__ import annotations

import json
from types import SimpleNamespace

import torch
from torch.profiler import ProfilerActivity, profile

from flexlora.data.collation import Example, collate
from flexlora.planning.architectures import shape_from_config
from flexlora.training.local import answer_losses, checkpointing
from flexlora.training.slots import SlotModel
from paths import CONFIGS

VOCAB = 512
LENGTH, ROWS = 64, 4


def published(name):
    """The shape of a real model, from its config.json alone."""
    return shape_from_config(json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8")))


def _configs():
    import transformers as t

    common = {"vocab_size": VOCAB, "max_position_embeddings": 256, "pad_token_id": 0}
    common |= {"bos_token_id": 1, "eos_token_id": 2}
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    grouped = {**common, **sizes, "num_key_value_heads": 2}
    wide = {**grouped, "head_dim": 32}
    gemma = {**wide, "query_pre_attn_scalar": 32}
    gpt2 = {"vocab_size": VOCAB, "n_positions": 256, "n_embd": 64, "n_layer": 3, "n_head": 4}
    return {
        "llama": t.LlamaConfig(**grouped),
        "mistral": t.MistralConfig(**grouped, sliding_window=4096),
        "qwen2": t.Qwen2Config(**grouped),
        "qwen3": t.Qwen3Config(**wide),
        "gemma": t.GemmaConfig(**wide),
        "gemma2": t.Gemma2Config(**gemma),
        "gemma3_text": t.Gemma3TextConfig(**gemma),
        "gpt2": t.GPT2Config(**gpt2, bos_token_id=1, eos_token_id=2, pad_token_id=0),
        "gpt_neox": t.GPTNeoXConfig(**common, **sizes),
        "phi": t.PhiConfig(**grouped),
        "phi3": t.Phi3Config(**grouped),
    }


def config_of(family, **changes):
    config = _configs()[family]
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def model_of(config, dtype="float32"):
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model.requires_grad_(False).eval()


def as_8bit(model):
    """The linears of the layers as bitsandbytes' 8-bit ones, on the CPU, without outliers."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    head = model.get_output_embeddings()
    for name, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear) and linear is not head:
            sizes = (linear.in_features, linear.out_features, False)
            quantized = Linear8bitLt(*sizes, has_fp16_weights=False, threshold=0.0)
            weight = linear.weight.data.clone()
            quantized.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            model.set_submodule(name, quantized)
    return model.to("cpu").requires_grad_(False).eval()


def rows_of(length, rows):
    """Rows of which the second half is the answer, all of one length."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator).tolist()
    return [
        Example(input_ids=tuple(row), prompt_length=length // 2, prompt="", answer="")
        for row in ids
    ]


def saved_bytes(model, adapter, *, length=LENGTH, rows=ROWS, checkpoint=False):
    """Bytes of every storage that autograd keeps of one forward pass, weights and factors apart."""
    slots = SlotModel(model)
    slots.load([adapter(slots.shapes)], trainable=("lora_A", "lora_B"))
    held = [*model.parameters(), *model.buffers(), slots.parameters]
    for layer in slots.layers.values():
        held += [layer.trained.A, layer.trained.B, layer.trained.scaling]
    known = {tensor.untyped_storage().data_ptr() for tensor in held}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    batch = collate([rows_of(length, rows)], pad_token_id=0)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        checkpointing(model, checkpoint),
    ):
        losses = answer_losses(slots, batch)
    count = sum(size for size, _ in found.values())
    del losses
    slots.remove()
    return count


def peak_bytes(function):
    """The most bytes that torch's CPU allocator had out at once while ``function`` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def base_of(model):
    """What ``memory_case`` asks of a loaded base."""
    return SimpleNamespace(model=model)


__all__ = ["as_8bit", "base_of", "config_of", "model_of", "peak_bytes", "published", "saved_bytes"]
