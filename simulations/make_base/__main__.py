"""Pretrain the embedded base from nothing: a small Llama on text that the project generates.

    python -m flexlora.simulations.make_base --out flexlora/assets/base

Seeded, and single-purpose: the same machine and thread count give the same bytes. The loss curve
goes to ``simulations/make_base/loss.csv``. Hidden matrices are trained by Muon, the embedding and
the norms by AdamW; both rates fall linearly to zero. The answer's tokens carry most of the loss,
since a generated input is noise by design and nothing can be learnt about it.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import itertools
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flexlora.seeds import derive_seed
from flexlora.simulations.make_base.corpus import documents
from flexlora.simulations.make_base.tokenizer import train_tokenizer

__all__ = ["PretrainingPlan", "pretrain", "token_batches"]

CONTEXT = 256
PROMPT_WEIGHT = 0.1
# Documents are sorted by length within a pool of this many batches, so that padding stays small.
POOL_BATCHES = 16


@dataclass(frozen=True, kw_only=True)
class PretrainingPlan:
    """What decides the bytes of the base, beside the corpus."""

    seed: int = 0
    max_steps: int = 9000
    batch_size: int = 64
    hidden_size: int = 128
    num_hidden_layers: int = 4
    intermediate_size: int = 384
    num_attention_heads: int = 4
    muon_learning_rate: float = 0.02
    adamw_learning_rate: float = 3e-3
    warmup_steps: int = 100
    threads: int = 1


def token_batches(
    tokenizer: PreTrainedTokenizerFast, *, seed: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless ``(input_ids [b, T], weights [b, T])``: bos, prompt, answer, eos, right padded.

    ``weights[:, t]`` is the weight of predicting token t: 1 in the answer, ``PROMPT_WEIGHT`` in the
    prompt, 0 on padding.
    """
    stream = documents(derive_seed(seed, "pretraining", "corpus"))
    order = torch.Generator().manual_seed(derive_seed(seed, "pretraining", "order"))
    while True:
        pool = list(itertools.islice(stream, batch_size * POOL_BATCHES))
        prompts = tokenizer([prompt for prompt, _ in pool], add_special_tokens=False)["input_ids"]
        answers = tokenizer([answer for _, answer in pool], add_special_tokens=False)["input_ids"]
        rows = sorted(zip(prompts, answers, strict=True), key=lambda row: sum(map(len, row)))
        for index in torch.randperm(POOL_BATCHES, generator=order).tolist():
            yield _padded(rows[index * batch_size : (index + 1) * batch_size], tokenizer)


def _padded(
    rows: list[tuple[list[int], list[int]]], tokenizer: PreTrainedTokenizerFast
) -> tuple[Tensor, Tensor]:
    """One right padded batch of ``token_batches``."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows) + 2
    input_ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    weights = torch.zeros(len(rows), width)
    for index, (prompt, answer) in enumerate(rows):
        ids = [tokenizer.bos_token_id, *prompt, *answer, tokenizer.eos_token_id]
        input_ids[index, : len(ids)] = torch.tensor(ids)
        weights[index, 1 : 1 + len(prompt)] = PROMPT_WEIGHT
        weights[index, 1 + len(prompt) : len(ids)] = 1.0
    return input_ids, weights


def _new_model(plan: PretrainingPlan, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Freshly drawn weights, from torch's global generator, which transformers draws from."""
    torch.manual_seed(derive_seed(plan.seed, "pretraining", "weights"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=plan.hidden_size,
        intermediate_size=plan.intermediate_size,
        num_hidden_layers=plan.num_hidden_layers,
        num_attention_heads=plan.num_attention_heads,
        num_key_value_heads=plan.num_attention_heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def _optimizers(model: LlamaForCausalLM, plan: PretrainingPlan) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    rest = [p for name, p in model.named_parameters() if p.ndim < 2 or "layers" not in name]
    muon = torch.optim.Muon(matrices, lr=plan.muon_learning_rate, weight_decay=0.01)
    adamw = torch.optim.AdamW(
        rest, lr=plan.adamw_learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    return [muon, adamw]


def pretrain(
    plan: PretrainingPlan, tokenizer: PreTrainedTokenizerFast, curve_path: Path
) -> LlamaForCausalLM:
    """Train for ``plan.max_steps``; every 50th step's mean losses go to ``curve_path``."""
    torch.set_num_threads(plan.threads)
    model = _new_model(plan, tokenizer)
    optimizers = _optimizers(model, plan)
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    batches = token_batches(tokenizer, seed=plan.seed, batch_size=plan.batch_size)
    started, sums = time.perf_counter(), torch.zeros(4)
    with curve_path.open("w", newline="") as file:
        curve = csv.writer(file)
        curve.writerow(["step", "answer_loss", "prompt_loss"])
        for step in range(1, plan.max_steps + 1):
            warm = min(1.0, step / plan.warmup_steps)
            fraction = warm * (1 - (step - 1) / plan.max_steps)
            for optimizer, peak in zip(optimizers, peaks, strict=True):
                optimizer.param_groups[0]["lr"] = peak * fraction
            input_ids, weights = next(batches)
            logits = model(input_ids=input_ids).logits[:, :-1]
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none"
            ).view_as(input_ids[:, 1:])
            weights = weights[:, 1:]
            ((losses * weights).sum() / weights.sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                answer, prompt = weights == 1, (weights > 0) & (weights < 1)
                sums += torch.stack(
                    [losses[answer].sum(), answer.sum(), losses[prompt].sum(), prompt.sum()]
                )
            if step % 50 == 0:
                means = (sums[0] / sums[1]).item(), (sums[2] / sums[3].clamp_min(1)).item()
                curve.writerow([step, f"{means[0]:.4f}", f"{means[1]:.4f}"])
                file.flush()
                sums.zero_()
                seconds = time.perf_counter() - started
                print(f"step {step} answer {means[0]:.4f} prompt {means[1]:.4f} {seconds:.0f}s",
                      flush=True)  # fmt: skip
    return model.eval()


def provenance(out: Path, plan: PretrainingPlan, model: LlamaForCausalLM, seconds: float) -> str:
    """The folder's README: what was run, on what, and the digests of what it wrote."""
    digests = "\n".join(
        f"    {hashlib.sha256((out / name).read_bytes()).hexdigest()}  {name}"
        for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja", "config.json")
    )
    return f"""# The embedded base

A Llama of {model.num_parameters():,} parameters, pretrained from nothing on text that this project
generates. No outside text or weights went in; the licence is the project's.

    python -m flexlora.simulations.make_base --out flexlora/assets/base

seed {plan.seed}, {plan.max_steps:,} steps of {plan.batch_size} documents, {plan.threads} thread,
{seconds / 60:.0f} minutes, torch {torch.__version__} on {platform.machine()} under Python
{platform.python_version()}. The corpus: `simulations/make_base/corpus.py` (generic skills, half of
the wordings of the known task families on their train instances, plain sentences; nothing of the
held-out families). The loss curve: `simulations/make_base/loss.csv`. The prompt is the
tokenizer's own chat template: instruction, input and "Answer: ", after bos. Vocabulary: bytes and
the words of running text, so that what a task works on is spelled letter by letter.

Two whole runs on one kind of machine, hours apart, gave the same bytes (2026-11-21: 38 and 24
minutes); another machine may round differently. The shipped files' digests (sha256):

{digests}
"""


def main() -> None:
    """Train the tokenizer and the base, and write both as a Hugging Face folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).resolve().parent
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and tokenizer")
    parser.add_argument("--curve", type=Path, default=here / "loss.csv")
    parser.add_argument("--max-steps", type=int, default=PretrainingPlan.max_steps)
    parser.add_argument("--seed", type=int, default=PretrainingPlan.seed)
    arguments = parser.parse_args()
    plan = PretrainingPlan(seed=arguments.seed, max_steps=arguments.max_steps)
    tokenizer = train_tokenizer(
        derive_seed(plan.seed, "pretraining", "tokenizer"), num_documents=20_000, max_length=CONTEXT
    )
    started = time.perf_counter()
    model = pretrain(plan, tokenizer, arguments.curve)
    seconds = time.perf_counter() - started
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.do_sample = False
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    (arguments.out / "model.safetensors").chmod(0o644)  # save_pretrained keeps it from others
    (arguments.out / "README.md").write_text(provenance(arguments.out, plan, model, seconds))
    print(f"{model.num_parameters():,} parameters in {arguments.out}")


if __name__ == "__main__":
    main()
