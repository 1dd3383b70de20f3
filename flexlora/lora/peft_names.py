"""Module names that PEFT refuses or takes for something else, by model type.

PEFT rewrites the ``target_modules`` of mixtures of experts whose layers transformers 5 fused: a
name that ends in ``gate_proj`` becomes the fused experts' parameter, in a list and in a regular
expression alike, so a dense or shared linear of that name cannot be addressed and its pair is
dropped without a word. In Mamba-like models PEFT refuses ``out_proj`` and ``conv1d``. Read from
peft 0.21.2: ``utils/transformers_weight_conversion.py`` and ``tuners/tuners_utils.py``; the tests
compare the tables with both packages.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["is_matched", "peft_cause", "unaddressable"]

_MIXTRAL = frozenset({"gate", "w1", "w2", "w3"})
_QWEN2_MOE = frozenset({"gate", "gate_proj", "up_proj", "down_proj"})

REWRITTEN: dict[str, frozenset[str]] = {
    **dict.fromkeys(("minimax", "minimax_m2"), _MIXTRAL),
    **dict.fromkeys(
        (
            "afmoe",
            "beam",
            "cohere2_moe",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "dots1",
            "ernie4_5_moe",
            "exaone_moe",
            "flex_olmo",
            "glm4_moe",
            "glm4_moe_lite",
            "glm4v_moe",
            "glm_moe_dsa",
            "hunyuan_v1_moe",
            "longcat_flash",
            "mellum",
            "olmoe",
            "qwen3_moe",
            "qwen3_next",
            "qwen3_omni_moe",
            "qwen3_omni_moe_text",
            "qwen3_omni_moe_thinker",
            "solar_open",
        ),
        _QWEN2_MOE,
    ),
}
FORBIDDEN: dict[str, frozenset[str]] = dict.fromkeys(
    ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"),
    frozenset({"conv1d", "out_proj"}),
)


# Loading renames ``mlp.shared_expert.``, which as an expression matches ``mlp.shared_experts``.
RENAMED: dict[str, str] = {"laguna": ".mlp.shared_experts."}


def peft_cause(model_type: str, name: str) -> str:
    """Why PEFT cannot load LoRA of module ``name``; empty where it can."""
    leaf = name.rpartition(".")[2]
    if leaf in REWRITTEN.get(model_type, ()):
        return "PEFT takes their names for the fused experts"
    if leaf in FORBIDDEN.get(model_type, ()):
        return f"PEFT refuses them in {model_type}"
    if model_type in RENAMED and RENAMED[model_type] in name:
        return "PEFT renames them when it loads"
    return ""


def is_matched(target: str, name: str) -> bool:
    """PEFT's rule for an entry of ``target_modules``: the whole name, or its end after a dot."""
    return name == target or name.endswith(f".{target}")


def unaddressable(targets: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """Targets whose full name, as an entry, also selects another of the model's ``names``.

    Returns that other name by target.
    """
    wanted = set(targets)
    found = {}
    for name in names:
        if name in wanted:
            continue
        at = name.find(".")
        while at >= 0:
            if (end := name[at + 1 :]) in wanted:
                found[end] = name
            at = name.find(".", at + 1)
    return found
