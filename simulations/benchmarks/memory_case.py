"""One measured training step in a process of its own: how far its peak grows beyond its baseline.

    python -m flexlora.simulations.benchmarks.memory_case CASE_AS_JSON

A random Llama of the case's shape is written to a temporary folder and read back by the product's
own loader, then trained for two steps by the product's own training. Prints one JSON object of
bytes. The baseline is the resident set after all imports and a training of the embedded base; on a
CPU the peak is the kernel's ``VmHWM``, set back before training, on a GPU torch's own count.
"""

from __future__ import annotations

import ctypes
import gc
import json
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from flexlora.aggregation.engine.starts import LocalPlan, Start
from flexlora.config.paths import EMBEDDED
from flexlora.data.collation import Example
from flexlora.lora.adapters import Adapter, LoRAFactors
from flexlora.lora.ranks import RankClass
from flexlora.planning.shapes import TrainingPlan
from flexlora.training.local import TrainSettings, train
from flexlora.training.models import BaseModel, load_base
from flexlora.training.slots import slot_model
from flexlora.wire.jobs import TrainJob

__all__ = ["LlamaCase", "measure", "train_once"]


@dataclass(frozen=True, kw_only=True)
class LlamaCase:
    """A random Llama and how it is trained."""

    hidden_size: int
    num_layers: int
    intermediate_size: int
    heads: int
    key_value_heads: int
    vocab_size: int
    plan: TrainingPlan
    device: str = "cpu"

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> LlamaCase:
        values: dict[str, Any] = json.loads(text)
        return LlamaCase(**{**values, "plan": TrainingPlan(**values["plan"])})


def measure(case: LlamaCase) -> dict[str, int]:
    """The baseline; and beyond it, what is loaded, the peak of loading and that of training."""
    with tempfile.TemporaryDirectory() as folder:
        _write_model(case, Path(folder))
        _warm_up(case)
        baseline = _settled(case.device)
        _reset_peak(case.device)
        base = load_base(
            folder,
            dtype=case.plan.dtype,
            quantization=case.plan.quantization,
            attention=case.plan.attention,
            device=case.device,
        )
        loading = _peak(case.device) - baseline
        _leave_the_file(base.model)
        loaded = _settled(case.device) - baseline
        _reset_peak(case.device)
        train_once(base, case.plan, case.vocab_size)
        training = _peak(case.device) - baseline
    return {"baseline": baseline, "loaded": loaded, "loading": loading, "training": training}


def _write_model(case: LlamaCase, folder: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(case.config(), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for file in EMBEDDED.glob("tokenizer*"):
        shutil.copy(file, folder)


def _leave_the_file(model: Any) -> None:
    """Copies of the weights that are still the mapped file's own pages.

    One of them keeps the whole file mapped, the weights that were quantized from it too. The kernel
    takes such pages back when memory is short, but counts them as the process's until then.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def _warm_up(case: LlamaCase) -> None:
    """Imports, thread pools and kernels that a first training brings in belong to the baseline."""
    base = load_base(
        "embedded",
        dtype=case.plan.dtype,
        quantization=case.plan.quantization,
        attention=case.plan.attention,
        device=case.device,
        fresh=True,
    )
    optim = case.plan.optim
    train_once(base, TrainingPlan(rank=4, max_length=16, batch=2, aligned=True, optim=optim), 64)


def train_once(base: BaseModel, plan: TrainingPlan, vocab_size: int) -> None:
    """Two steps of the plan on random rows that fill it, from random factors."""
    slots = slot_model(base.model, plan.target_modules)
    generator = torch.Generator().manual_seed(1)
    rows = [
        Example(
            input_ids=tuple(
                torch.randint(3, vocab_size, (plan.max_length,), generator=generator).tolist()
            ),
            prompt_length=plan.max_length - round(plan.max_length * plan.answer_fraction),
            prompt="",
            answer="",
        )
        for _ in range(plan.batch)
    ]
    carried = _adapter(slots.shapes, plan.carried_rank) if plan.carried_rank else None
    start = Start(
        rank_class=RankClass(name="measured", rank=plan.rank),
        base_round=0,
        trained=_adapter(slots.shapes, plan.rank),
        carried=carried,
        carried_dtype=plan.carried_dtype,
        local=LocalPlan(gradient_batches=int(plan.aligned), merge=plan.merged),
    )
    job = TrainJob(client_id="one", server_round=1, num_server_rounds=1, start=start)
    settings = TrainSettings.model_validate(
        {
            "max_steps": 2,
            "per_device_train_batch_size": plan.batch,
            "gradient_checkpointing": plan.gradient_checkpointing,
            "optim": plan.optim,
        }
    )
    result = train(slots, [job], [rows], settings)[0]
    if result.adapter is None:
        raise RuntimeError(f"the measured training failed: {result.cause}")


def _adapter(shapes: dict[str, tuple[int, int]], rank: int) -> Adapter:
    generator = torch.Generator().manual_seed(2)
    return Adapter(
        {
            name: LoRAFactors(
                lora_A=torch.randn(min(rank, out, inner), inner, generator=generator) * 0.01,
                lora_B=torch.randn(out, min(rank, out, inner), generator=generator) * 0.01,
                alpha=16.0,
            )
            for name, (out, inner) in shapes.items()
        }
    )


def _settled(device: str) -> int:
    """Bytes in use now, after what is free has gone back to the system."""
    gc.collect()
    if device == "cuda":
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def _reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}, expected a Linux kernel that counts it.")


if __name__ == "__main__":
    print(json.dumps(measure(LlamaCase.from_json(sys.argv[1]))))
