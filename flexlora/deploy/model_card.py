"""The ``README.md`` of an exported folder: a Hugging Face model card with the run's figures.

Front matter and text have what the run folder and the base's own card say; what they do not say is
"unknown". Paths of this machine are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flexlora.config.paths import EMBEDDED, expanded, resolve_name
from flexlora.report.records import RunRecords

__all__ = ["Exported", "base_title", "license_of", "summary", "write_card"]

LIBRARIES = {"merged": "transformers", "gguf": "gguf", "gguf-lora": "gguf"}
CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written: one of the formats of ``export``, from which base, in one sentence.

    ``ranks`` are the smallest and the largest of the modules; ``run`` is None for an adapter from
    elsewhere; ``quantization`` is the base's in training, empty for none.
    """

    form: str
    model: str
    fingerprint: str
    quantization: str
    dequantized: bool
    ranks: tuple[int, int]
    num_modules: int
    run: RunRecords | None


def license_of(model: str) -> str:
    """The licence in the card of a base that is a folder here; empty where none is stated."""
    from huggingface_hub import metadata_load

    folder = Path(resolve_name(model))
    if folder == EMBEDDED:
        return "apache-2.0"  # this project's
    card = folder / CARD
    try:
        found = metadata_load(card) if card.is_file() else None
    except Exception:  # a card of another form; yaml raises many types
        return ""
    stated = (found or {}).get("license")
    return stated if isinstance(stated, str) else ""


def base_title(model: str) -> str:
    """A hub name as it is, of a folder or file its last part."""
    if model == "embedded" or _is_hub_name(model):
        return model
    return Path(expanded(model)).resolve().name


def _is_hub_name(model: str) -> bool:
    return model.count("/") == 1 and model[0] not in "./~" and not Path(model).exists()


def write_card(folder: Path, exported: Exported) -> None:
    """Write ``README.md`` into ``folder``.

    ``base_model`` is there for a base with a hub name: the hub refuses another value.
    """
    from huggingface_hub import ModelCard, ModelCardData

    stated = license_of(exported.model)
    data = ModelCardData(
        base_model=exported.model if _is_hub_name(exported.model) else None,
        library_name=LIBRARIES.get(exported.form, "peft"),
        license=stated or None,
        pipeline_tag="text-generation",
        tags=["lora", "federated-learning", "flexlora", *(["gguf"] * ("gguf" in exported.form))],
    )
    parts = [_title(exported), _base(exported, stated), _loading(exported)]
    if exported.run is not None:
        parts += [_training(exported.run), _data(exported.run), _privacy(exported.run)]
    text = "\n\n".join(parts)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").save(folder / CARD)


def summary(exported: Exported) -> str:
    """One sentence for ``general.description`` of a GGUF file."""
    low, high = exported.ranks
    ranks = f"rank {high}" if low == high else f"ranks {low} to {high}"
    what = f"LoRA of {ranks} on {exported.num_modules} modules of {base_title(exported.model)}"
    if exported.form in ("merged", "gguf"):
        what = f"{base_title(exported.model)} with a {what} merged into it"
    run = exported.run
    rounds = f", {run.last_round} rounds of federated training by FlexLoRA" if run else ""
    return f"{what}{rounds}."


def _title(exported: Exported) -> str:
    return f"# {base_title(exported.model)}, trained by FlexLoRA\n\n{summary(exported)}"


def _base(exported: Exported, stated: str) -> str:
    rows = [
        ("base", base_title(exported.model)),
        ("licence of the base", stated or "unknown: its folder does not say"),
        ("fingerprint of the base", exported.fingerprint or "not recorded"),
    ]
    if exported.quantization:
        rows.append(("base in training", exported.quantization))
    if exported.form in ("merged", "gguf"):
        full = "the base at full precision"
        rounded = f"the base rounded to {exported.quantization} and dequantized, as in training"
        rows.append(("merged into", rounded if exported.dequantized else full))
    return f"## Base\n\n{_table(('', ''), rows)}"


def _loading(exported: Exported) -> str:
    base = base_title(exported.model)
    rank = exported.ranks[1]
    adapter = (
        "```python\n"
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{base}")\n'
        'model = PeftModel.from_pretrained(model, "FOLDER")\n```\n\n'
        f"vLLM: `vllm serve {base} --enable-lora --max-lora-rank {_vllm_rank(rank)} "
        "--lora-modules name=FOLDER`. "
        f"llama.cpp reads the same adapter as `flexlora export FOLDER --format gguf-lora`."
    )
    texts = {
        "merged": (
            "transformers and vLLM load the folder as any other model: "
            '`AutoModelForCausalLM.from_pretrained("FOLDER")`, `vllm serve FOLDER`. llama.cpp '
            "reads it as `flexlora export ... --format gguf`."
        ),
        "gguf": "llama.cpp: `llama-cli -m model.gguf`.",
        "gguf-lora": (
            f"llama.cpp, with a GGUF file of {base}: `llama-cli -m BASE.gguf --lora adapter.gguf`."
        ),
    }
    return f"## Loading\n\n{texts.get(exported.form, adapter)}"


def _vllm_rank(rank: int) -> int:
    """The least ``max_lora_rank`` that vLLM takes for it."""
    return next((r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= rank), rank)


def _training(run: RunRecords) -> str:
    clients = {row["client_id"] for row in run.clients if row["status"] == "ok"}
    rows = [("rounds", str(run.last_round)), ("clients that trained", str(len(clients)))]
    rows += [("method", str(run.setting("method.name"))), ("seed", str(run.setting("seed")))]
    lines = []
    for title, suffix in [("all clients", ""), *((c, f"/{c}") for c in run.rank_classes)]:
        before, after = run.base(f"eval_loss{suffix}"), run.last(f"eval_loss{suffix}")
        if before and after:
            lines.append((title, f"{before[1]:.4f}", f"{after[1]:.4f}"))
    losses = _table(("held-out loss", "base", "after training"), lines) if lines else ""
    return f"## Training\n\n{_table(('', ''), rows)}\n\n{losses}".rstrip()


def _data(run: RunRecords) -> str:
    counts = {r["client_id"]: int(r["num_examples"] or 0) for r in run.clients}
    total, name = sum(counts.values()), run.setting("data.name")
    source = f"the data set `{name}`" if name else "rows that are not part of this folder"
    return (
        f"## Data\n\n{total} train examples of {len(counts)} clients, from {source}. "
        "The rows stayed with the clients."
    )


def _privacy(run: RunRecords) -> str:
    mode = str(run.setting("privacy.mode"))
    if mode == "none":
        return "## Privacy\n\nNo differential privacy (`privacy.mode=none`)."
    spent = run.last("epsilon")
    epsilon = f"{spent[1]:.4g}" if spent else "not recorded"
    rows = [("mode", mode), ("epsilon", epsilon), ("delta", str(run.setting("privacy.delta")))]
    return f"## Privacy\n\n{_table(('', ''), rows)}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
