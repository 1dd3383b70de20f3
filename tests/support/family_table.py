"""Write ``docs/families.md``: ``python tests/support/family_table.py``, two minutes of one core."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from pathlib import Path

SUPPORT = Path(__file__).parent
FILE = SUPPORT.parents[1] / "docs" / "families.md"

# Every linear of their layers is adapted, in a cohort as alone, in PEFT as here.
DENSE = (
    "apertus arcee bloom codegen cohere cohere2 ernie4_5 exaone4 falcon falcon#new gemma gemma2 "
    "gemma3_text glm glm4 gpt2 gpt_bigcode gpt_neo gpt_neox gptj granite helium llama mistral mpt "
    "nemotron olmo olmo2 olmo3 opt persimmon phi phi3 qwen2 qwen3 seed_oss smollm3 stablelm "
    "starcoder2"
).split()

HEAD = """# Families

Every causal language model of transformers {version} at a size of two layers, checked by
`python tests/support/family_table.py`, which writes this page. Of {count} families and variants
(`#`) {counts}.

- **right**: two clients of unequal ranks and rows have the losses and gradients of each alone; PEFT loads the saved
  adapter whole and gives the same losses; answers to prompts of unequal length are those of each prompt alone.
  The remark is what `flexlora simulate` says before round 1.
- **refused**: the sentence that `flexlora` ends with.
- **not built**: the tiny model of this page cannot be made or run, with transformers' own error; nothing is claimed.

Shares are those of the tiny models. The tests compare the dense families at every run, the rest in turns
(`tests/training/test_families.py`).

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


def main() -> None:
    warnings.simplefilter("ignore")
    sys.path[:0] = [str(SUPPORT), str(SUPPORT.parent)]
    import torch
    import transformers

    from family_checks import examined
    from family_configs import families

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    found = {}
    for name in families():
        found[name] = examined(name)
        print(row_of(name, found[name]), flush=True)
    counted = Counter(one["verdict"] for one in found.values())
    counts = ", ".join(f"{count} are {verdict}" for verdict, count in counted.most_common())
    head = HEAD.format(version=transformers.__version__, count=len(found), counts=counts)
    rows = "\n".join(row_of(name, one) for name, one in found.items())
    FILE.write_text(f"{head}{rows}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
