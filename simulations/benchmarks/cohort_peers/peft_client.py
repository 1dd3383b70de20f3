"""What a person writes today to train one client's LoRA factors: transformers, PEFT, AdamW.

The model is read once for as many clients as the caller likes, with one PEFT adapter per rank; a
client's weights go in and out by PEFT's own functions. The optimizer is torch's fused AdamW, the
default of Hugging Face's Trainer and the fastest on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from flexlora.simulations.benchmarks.cohort_peers.work import (
    State,
    TextRow,
    Training,
    Work,
    as_batch,
)

__all__ = ["load_model", "mean_loss", "train_client"]


def load_model(work: Work, ranks: Iterable[int]) -> Any:
    """The base in float32 with an adapter ``rank_R`` on all linears for each of ``ranks``."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    base = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32)
    return with_adapters(base, ranks, work.alpha)


def with_adapters(base: Any, ranks: Iterable[int], alpha: float) -> Any:
    """``base`` as a ``PeftModel`` with an adapter of each rank."""
    configs = {
        f"rank_{rank}": LoraConfig(
            r=rank, lora_alpha=int(alpha), target_modules="all-linear", task_type="CAUSAL_LM"
        )
        for rank in sorted(set(ranks))
    }
    first, *others = configs
    model = get_peft_model(base, configs[first], adapter_name=first)
    for name in others:
        model.add_adapter(name, configs[name])
    return model


def train_client(
    model: Any, work: Work, server_round: int, client_id: str, start: State
) -> tuple[dict[str, Tensor], Training]:
    """One local training: the factors afterwards, and what it took."""
    name = f"rank_{work.ranks[client_id]}"
    set_peft_model_state_dict(model, dict(start), adapter_name=name)
    model.set_adapter(name)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=work.learning_rate, eps=work.adam_epsilon, weight_decay=0.0, fused=True
    )
    losses, tokens = [], 0
    for rows in work.batches(server_round, client_id):
        batch = as_batch(rows)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, work.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        tokens += int((batch["labels"] != -100).sum())
    state = get_peft_model_state_dict(model, adapter_name=name)
    training = Training(
        server_round=server_round,
        client_id=client_id,
        steps=len(losses),
        tokens=tokens,
        loss=sum(losses) / len(losses),
    )
    return {key: tensor.detach().clone() for key, tensor in state.items()}, training


@torch.no_grad()
def mean_loss(model: Any, rank: int, state: State, rows: list[TextRow]) -> float:
    """The loss per answer token of ``rows`` under these factors."""
    set_peft_model_state_dict(model, dict(state), adapter_name=f"rank_{rank}")
    model.set_adapter(f"rank_{rank}")
    return float(model(**as_batch(rows)).loss)
