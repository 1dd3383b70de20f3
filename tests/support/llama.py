"""llama.cpp through llama-cpp-python: logits and greedy continuations of token ids, on the CPU."""

from __future__ import annotations

import numpy as np
import torch


def open_model(file, adapter=None, *, context=128):
    """``adapter``: a GGUF file that is applied at its full strength."""
    import llama_cpp

    more = {} if adapter is None else {"lora_path": str(adapter), "lora_scale": 1.0}
    return llama_cpp.Llama(
        str(file),
        n_ctx=context,
        logits_all=True,
        verbose=False,
        flash_attn=False,
        n_threads=1,
        seed=0,
        type_k=0,
        type_v=0,
        **more,
    )


def logits(model, ids):
    """``[len(ids), vocab]``."""
    model.reset()
    model.eval(list(ids))
    return torch.from_numpy(np.array(model.scores[: len(ids)], dtype=np.float64))


def greedy(model, ids, count):
    """The ``count`` most likely ids after ``ids``, one by one."""
    done = list(ids)
    for _ in range(count):
        done.append(int(logits(model, done)[-1].argmax()))
    return done[len(ids) :]


def torch_logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([list(ids)])).logits[0].double()


def torch_greedy(model, ids, count):
    done = list(ids)
    for _ in range(count):
        done.append(int(torch_logits(model, done)[-1].argmax()))
    return done[len(ids) :]
