"""Tiny models of the four architectures, adapters of unequal ranks and alphas, and rows of tokens.

Everything is built in code from a seed; nothing is downloaded, no global generator is moved.
"""

from __future__ import annotations

import torch

from flexlora.aggregation.engine.starts import Start
from flexlora.data.collation import Example
from flexlora.lora.adapters import Adapter, LoRAFactors
from flexlora.lora.ranks import RankClass
from flexlora.wire.jobs import TrainJob

ARCHITECTURES = ("llama", "gpt2", "neox", "qwen2")
VOCAB = 64


def tiny_config(kind, hidden=32):
    """A two-layer configuration; attention and MLP shapes differ, so that a swap is seen."""
    import transformers

    common = {"vocab_size": VOCAB, "max_position_embeddings": 64, "pad_token_id": 0}
    llama_like = {
        "hidden_size": hidden,
        "intermediate_size": hidden * 3 // 2 if hidden % 64 else hidden * 2,  # NF4: blocks of 64
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    if kind == "llama":
        return transformers.LlamaConfig(**common, **llama_like)
    if kind == "qwen2":
        return transformers.Qwen2Config(**common, **llama_like)
    if kind == "gpt2":
        return transformers.GPT2Config(
            vocab_size=VOCAB, n_positions=64, n_embd=hidden, n_layer=2, n_head=4, pad_token_id=0
        )
    if kind == "neox":
        return transformers.GPTNeoXConfig(
            **common,
            hidden_size=hidden,
            intermediate_size=hidden * 3,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    if kind == "opt":  # its decoder layer calls dropout with its own `training` flag
        return transformers.OPTConfig(
            **common,
            hidden_size=hidden,
            word_embed_proj_dim=hidden,
            ffn_dim=hidden * 2,
            num_hidden_layers=2,
            num_attention_heads=4,
            dropout=0.3,
        )
    raise AssertionError(f"no tiny {kind}")


def tiny_model(kind="llama", *, dtype=torch.float64, hidden=32, seed=0):
    """A frozen random model in evaluation mode, with weights large enough to have opinions."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(kind, hidden))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=0.15)
    return model.to(dtype).requires_grad_(False).eval()


def random_factors(
    out_features, in_features, rank, *, alpha=16.0, rslora=False, seed=0, dtype=torch.float64
):
    """Both factors nonzero, entries of the size of trained ones."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, in_features, generator=generator, dtype=torch.float64) * in_features**-0.5
    B = torch.randn(out_features, rank, generator=generator, dtype=torch.float64) * 0.1
    return LoRAFactors(lora_A=A.to(dtype), lora_B=B.to(dtype), alpha=alpha, rslora=rslora)


def random_adapter(shapes, rank=4, *, alpha=16.0, rslora=False, seed=0, dtype=torch.float64):
    """Factors for every module; ``rank`` and ``alpha`` are one number or a list dealt in turn."""
    ranks = rank if isinstance(rank, list) else [rank]
    alphas = alpha if isinstance(alpha, list) else [alpha]
    return Adapter(
        {
            name: random_factors(
                *shape,
                min(ranks[i % len(ranks)], *shape),
                alpha=alphas[i % len(alphas)],
                rslora=rslora,
                seed=1000 * seed + i,
                dtype=dtype,
            )
            for i, (name, shape) in enumerate(sorted(shapes.items()))
        }
    )


def random_examples(count, *, seed=0, shortest=5, longest=12):
    """Rows of unequal length; ids 3 and above, so that pad, bos and eos stay apart."""
    generator = torch.Generator().manual_seed(seed + 77)
    rows = []
    for _ in range(count):
        length = int(torch.randint(shortest, longest + 1, (), generator=generator))
        prompt_length = int(torch.randint(2, length - 1, (), generator=generator))
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        rows.append(
            Example(input_ids=tuple(ids), prompt_length=prompt_length, prompt="", answer="")
        )
    return rows


def train_job(trained, client_id="c0", *, carried=None, server_round=1, rounds=3, **start):
    """A job that starts from ``trained``, in round ``server_round`` of ``rounds``."""
    rank = max(factors.rank for factors in trained.values())
    return TrainJob(
        client_id=client_id,
        server_round=server_round,
        num_server_rounds=rounds,
        start=Start(
            rank_class=RankClass(name=f"rank_{rank}", rank=rank),
            base_round=server_round - 1,
            trained=trained,
            carried=carried,
            **start,
        ).sealed(),
    )
