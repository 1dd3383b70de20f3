"""How much LoRA rank each family of the embedded tasks needs: one model, one family, one rank.

    python -m flexlora.simulations.rank_table --json rank_table.json

Each cell is a run of its own: PEFT LoRA on every linear of the embedded base, trained on the
family's train rows, read as exact match of greedy generation on its test rows. The learning rate is
chosen per cell on validation rows, so that a rank is not punished for a rate that suits another.
With ``--pooled`` one adapter learns all families at once, which is what a federation asks of it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from flexlora.data.rows import Row
from flexlora.data.tasks import FAMILIES, generate_rows
from flexlora.data.templates import render
from flexlora.seeds import derive_seed

RANKS = (1, 2, 4, 8, 16, 32)
TRAIN_ROWS, VALIDATION_ROWS, TEST_ROWS = 1000, 40, 100
# scaling = alpha / rank is the same at every rank, so ranks differ in capacity alone.
SCALING = 2.0


def encode(rows: Sequence[Row], tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    """``(prompt ids with bos, answer ids with eos)``, tokenised apart."""
    encoded = []
    for row in rows:
        prompt, answer = render(row, template="plain", tokenizer=tokenizer)
        prompt_ids, answer_ids = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer)
        )
        encoded.append(
            ([tokenizer.bos_token_id, *prompt_ids], [*answer_ids, tokenizer.eos_token_id])
        )
    return encoded


def training_batch(
    examples: Sequence[tuple[list[int], list[int]]], pad_token_id: int
) -> tuple[Tensor, Tensor]:
    """``(input_ids, labels)``, both ``[b, T]`` and right padded; labels are the answers alone."""
    width = max(len(prompt) + len(answer) for prompt, answer in examples)
    input_ids = torch.full((len(examples), width), pad_token_id)
    labels = torch.full((len(examples), width), -100)
    for index, (prompt, answer) in enumerate(examples):
        end = len(prompt) + len(answer)
        input_ids[index, :end] = torch.tensor(prompt + answer)
        labels[index, len(prompt) : end] = torch.tensor(answer)
    return input_ids, labels


@torch.no_grad()
def exact_matches(model: PreTrainedModel, rows: Sequence[Row], tokenizer: Tokenizer) -> list[bool]:
    """For each row, whether greedy generation from its prompt gives its output and then ends."""
    encoded = encode(rows, tokenizer)
    width = max(len(prompt) for prompt, _ in encoded)
    longest = max(len(answer) for _, answer in encoded)
    input_ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(input_ids)
    for index, (prompt, _) in enumerate(encoded):
        input_ids[index, width - len(prompt) :] = torch.tensor(prompt)
        mask[index, width - len(prompt) :] = 1
    out = model.generate(
        input_ids=input_ids,
        attention_mask=mask,
        max_new_tokens=longest + 1,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return [text.strip() == row.output.strip() for text, row in zip(texts, rows, strict=True)]


def tuned(
    base: Path, rows: Sequence[Row], *, rank: int, learning_rate: float, steps: int,
    batch_size: int, seed: int,
) -> PreTrainedModel:  # fmt: skip
    """The base with a LoRA of ``rank`` on every linear, after ``steps`` of AdamW on ``rows``."""
    torch.manual_seed(derive_seed(seed, "rank-table", rank))
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules="all-linear"),
    ).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 10) * (1 - step / steps)
    )
    examples, rng = encode(rows, tokenizer), random.Random(derive_seed(seed, "rank-table", "order"))
    for _ in range(steps):
        input_ids, labels = training_batch(rng.sample(examples, batch_size), tokenizer.pad_token_id)
        model(input_ids=input_ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def _rows(names: Sequence[str], split: str, count: int, seed: int) -> list[Row]:
    return [row for name in names for row in generate_rows(name, split, count, seed)]


def best_of_rates(
    base: Path, names: Sequence[str], rank: int, rates: Sequence[float], arguments
) -> tuple[dict[str, float], float]:
    """Test exact match by family and the learning rate that validation chose."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    train = _rows(names, "train", TRAIN_ROWS, arguments.seed)
    validation = _rows(names, "validation", VALIDATION_ROWS, arguments.seed)
    best, chosen, chosen_rate = -1, None, 0.0
    for rate in rates:
        model = tuned(
            base, train, rank=rank, learning_rate=rate, steps=arguments.steps,
            batch_size=arguments.batch_size, seed=arguments.seed,
        )  # fmt: skip
        hits = sum(exact_matches(model, validation, tokenizer))
        if hits > best:
            best, chosen, chosen_rate = hits, model, rate
    return by_family(chosen, names, tokenizer, arguments.seed), chosen_rate


def by_family(
    model: PreTrainedModel, names: Sequence[str], tokenizer: Tokenizer, seed: int
) -> dict[str, float]:
    """Exact match on ``TEST_ROWS`` test rows of each family."""
    rows = _rows(names, "test", TEST_ROWS, seed)
    hits = Counter()
    for row, hit in zip(rows, exact_matches(model, rows, tokenizer), strict=True):
        hits[row.task] += hit
    return {name: hits[name] / TEST_ROWS for name in names}


def rank_table(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """One dictionary per family: base exact match and, per rank, exact match and chosen rate."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    names = arguments.families or list(FAMILIES)
    untouched = AutoModelForCausalLM.from_pretrained(arguments.base).eval()
    before = by_family(untouched, names, tokenizer, arguments.seed)
    table = {
        name: {
            "family": name,
            "category": FAMILIES[name].category,
            "half": FAMILIES[name].half,
            "base": before[name],
        }
        for name in names
    }
    for group in [names] if arguments.pooled else [[name] for name in names]:
        for rank in arguments.ranks:
            scores, rate = best_of_rates(
                arguments.base, group, rank, arguments.learning_rates, arguments
            )
            for name, score in scores.items():
                table[name] |= {f"rank_{rank}": score, f"learning_rate_{rank}": rate}
        for name in group:
            print(_line(table[name], arguments.ranks), flush=True)
    return list(table.values())


def _line(row: dict[str, object], ranks: Sequence[int]) -> str:
    cells = " ".join(f"{row[key]:7.2f}" for key in ("base", *(f"rank_{rank}" for rank in ranks)))
    return f"{row['family']:15} {row['half']:9} {cells}"


def main() -> None:
    """Print the table as it grows; write it with its settings where ``--json`` says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shipped = Path(str(files("flexlora"))) / "assets" / "base"
    parser.add_argument("--base", type=Path, default=shipped)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[5e-3, 1e-2])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--pooled", action="store_true", help="one adapter for all families")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the table here")
    arguments = parser.parse_args()
    print(f"{'family':15} {'half':9}    base " + " ".join(f"rank {r:2}" for r in arguments.ranks))
    started = time.perf_counter()
    table = rank_table(arguments)
    for half in ("known", "held-out"):
        rows = [row for row in table if row["half"] == half]
        if rows:
            keys = ("base", *(f"rank_{rank}" for rank in arguments.ranks))
            mean = {key: sum(row[key] for row in rows) / len(rows) for key in keys}
            print(_line({"family": "mean", "half": half, **mean}, arguments.ranks))
    seconds = time.perf_counter() - started
    print(f"{seconds:.0f} s, {arguments.steps} steps of {arguments.batch_size}")
    if arguments.json:
        settings = {key: str(value) for key, value in vars(arguments).items() if key != "json"}
        written = json.dumps({"settings": settings, "rows": table}, indent=1)
        arguments.json.write_text(written + "\n")


if __name__ == "__main__":
    main()
