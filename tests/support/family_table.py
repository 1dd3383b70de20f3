# ruff: noqa: E501 (the page)
"""Write ``docs/families.md``: ``python tests/support/family_table.py [NAME...]``.

One minute of one core for all families; with names, only their lines are made again.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from pathlib import Path

SUPPORT = Path(__file__).parent
FILE = SUPPORT.parents[1] / "docs" / "families.md"

# Every linear of their layers is adapted, in a cohort as alone, in PEFT as here.
DENSE = [
    "apertus",
    "arcee",
    "bloom",
    "codegen",
    "cohere",
    "cohere2",
    "ernie4_5",
    "exaone4",
    "falcon",
    "falcon#new",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gptj",
    "granite",
    "helium",
    "llama",
    "mistral",
    "mpt",
    "nemotron",
    "olmo",
    "olmo2",
    "olmo3",
    "opt",
    "persimmon",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
]

HEAD = """# Families

Every causal language model of transformers {version} at a size of two layers, checked by
`python tests/support/family_table.py`, which writes this page. Of {count} families and variants
(`#`) {counts}.

- **right**: two clients of unequal ranks and rows have the losses and gradients of each alone; PEFT loads the saved
  adapter whole and gives the same losses; answers to prompts of unequal length are those of each prompt alone.
  The remark is what `flexlora simulate` says before round 1.
- **refused**: the sentence that `flexlora` ends with. Where it says `eval.generate=never`, losses, gradients and
  PEFT were compared, and are right.
- **not built**: the tiny model of this page cannot be made or run here, with transformers' own error, such as a
  package that is not installed; nothing is claimed.

Shares are those of the tiny models. The tests compare the dense families at every run, the rest in turns by the
day (`tests/training/test_families.py`).

| family | | adapted linears | remark |
|---|---|---|---|
"""


def row_of(name, found):
    """One line of the table."""
    said = found["said"].replace("|", "/")
    return f"| {name} | {found['verdict']} | {found.get('targets', '')} | {said} |"


def read_table():
    """The lines of the page by family."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| family")]
    return {row.split("|")[1].strip(): row for row in rows}


def main(names: list[str]) -> None:
    """Examine ``names``, or all families, and write the page."""
    warnings.simplefilter("ignore")
    sys.path[:0] = [str(SUPPORT), str(SUPPORT.parent)]
    import torch
    import transformers

    from family_checks import examined
    from family_configs import families

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    rows = read_table() if names else {}
    for name in names or families():
        rows[name] = row_of(name, examined(name))
        print(rows[name], flush=True)
    counted = Counter(row.split("|")[2].strip() for row in rows.values())
    counts = ", ".join(f"{count} are {verdict}" for verdict, count in counted.most_common())
    head = HEAD.format(version=transformers.__version__, count=len(rows), counts=counts)
    FILE.write_text(head + "\n".join(rows.values()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
