"""A family against its oracles: two slots, PEFT, and each prompt alone."""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from family_configs import tiny_family
from flexlora.config.base_config import base_config
from flexlora.data.collation import Example, collate
from flexlora.errors import UserError, one_line
from flexlora.evaluation.generation import generate_answers
from flexlora.evaluation.padding import takes_padding
from flexlora.lora.adapters import Adapter, LoRAFactors
from flexlora.lora.peft_folder import save_adapter
from flexlora.training.local import answer_losses
from flexlora.training.slots import SlotModel

TOLERANCE = 1e-3  # of losses and of the largest gradient: rounding; mixed rows are off by 0.1 to 1
LABELS = ("lora_A", "lora_B")
FAILS = "a pass of text alone fails"
WORDS = range(5, 500)


class Ids:
    """A tokenizer whose text is the ids."""

    eos_token_id, bos_token_id = 2, 1

    def batch_decode(self, rows, **_):
        return [" ".join(str(int(i)) for i in row) for row in rows]


def build(name):
    config = tiny_family(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.requires_grad_(False).eval()


def example(seed, prompt, answer):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(WORDS.start, WORDS.stop, (prompt + answer,), generator=generator)
    return Example(input_ids=tuple(ids.tolist()), prompt_length=prompt, prompt="", answer="x")


def adapter(shapes, rank, seed):
    generator = torch.Generator().manual_seed(seed)

    def factors(out, width):
        r = min(rank, out, width)
        A, B = (torch.randn(*s, generator=generator) * 0.1 for s in ((r, width), (out, r)))
        return LoRAFactors(lora_A=A, lora_B=B, alpha=8.0)

    return Adapter({name: factors(*shape) for name, shape in shapes.items()})


ROWS = [[example(1, 5, 4), example(2, 9, 6)], [example(3, 7, 5)]]


def examined(name):
    """``verdict``: right, refused, wrong or not built; with what is said, or what is wrong."""
    try:
        model = build(name)
    except Exception as error:
        return _unbuilt(name, error)
    refused, slots = "", None
    try:
        slots = SlotModel(model)
        takes_padding(slots)
    except UserError as error:
        refused = str(error)
    if slots is None:
        built = FAILS not in refused  # else the plain model's own code fails at this size
        return {"verdict": "refused" if built else "not built", "said": refused}
    slots.clear()
    try:
        with torch.no_grad():
            answer_losses(slots, collate(ROWS, pad_token_id=0))
    except Exception as error:
        return {"verdict": "not built", "said": f"its own pass fails: {one_line(error)}"}
    found = {"verdict": "right", "targets": len(slots.shapes), "said": slots.targets.note}
    adapters = [adapter(slots.shapes, 2, 10), adapter(slots.shapes, 4, 11)]
    checks = (_slots_apart, _like_peft) if refused else (_slots_apart, _like_peft, _generates)
    for check in checks:  # a model that cannot generate is right without (the refusal's remedy)
        try:
            wrong = check(name, slots, adapters)
        except Exception as error:
            wrong = f"{type(error).__name__}: {one_line(error)}"
        if wrong:
            return found | {"verdict": "wrong", "said": f"{check.__name__[1:]}: {wrong}"}
    return found | {"verdict": "refused", "said": refused} if refused else found


def _unbuilt(name, error):
    """What flexlora says of the family's ``config.json``, or why transformers cannot build it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.json")
        try:
            file.write_text(json.dumps(tiny_family(name).to_dict()), encoding="utf-8")
            base_config(str(file))
        except UserError as refused:
            said = str(refused).replace(f"'{file}'", f"'{name}'")
            return {"verdict": "refused", "said": said}
        except Exception:  # not even a configuration
            pass
    return {"verdict": "not built", "said": one_line(error)}


def _pass(slots, adapters, rows):
    slots.load(adapters, trainable=LABELS)
    losses = answer_losses(slots, collate(rows, pad_token_id=0))
    slots.accumulate_gradients(sum(part.sum() for part in losses))
    leaves = zip(slots._spans.items(), slots._leaves, strict=True)
    gradients = {key: slots.gradients[:, span].view_as(leaf) for (key, span), leaf in leaves}
    by_slot = []
    for k, own in enumerate(adapters):
        cut = {
            (name, label): grad[k, : own[name].rank]
            if label == "lora_A"
            else grad[k, :, : own[name].rank]
            for (name, label), grad in gradients.items()
        }
        by_slot.append({key: grad.detach().clone() for key, grad in cut.items()})
    return [part.detach() for part in losses], by_slot


def _slots_apart(name, slots, adapters):
    together, gradients = _pass(slots, adapters, ROWS)
    for k in range(2):
        (alone,), (own,) = _pass(slots, [adapters[k]], [ROWS[k]])
        off = float((together[k] - alone).abs().max())
        if not off < TOLERANCE:
            return f"losses of slot {k} are off by {off:.2g}"
        size = max(float(grad.abs().max()) for grad in own.values())
        for key, grad in own.items():
            off = float((gradients[k][key] - grad).abs().max())
            if not off < TOLERANCE * size:
                return f"gradients of {key[0]} in slot {k} are off by {off / size:.2g}"
    return ""


def _like_peft(name, slots, adapters):
    from peft import PeftModel

    slots.load(adapters)
    with torch.no_grad():
        ours = answer_losses(slots, collate(ROWS, pad_token_id=0))
    for k, own in enumerate(adapters):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save_adapter(own, folder, base="x", fan_in_fan_out=slots.fan_in_fan_out)
            peft = PeftModel.from_pretrained(build(name), folder).eval()
            tensors = load_file(f"{folder}/adapter_model.safetensors")
        loaded = {n.replace(".default", ""): p for n, p in peft.named_parameters() if "lora_" in n}
        lost = [
            key
            for key in tensors
            if key not in loaded or not torch.equal(tensors[key], loaded[key])
        ]
        if lost or len(loaded) != len(tensors):
            return f"PEFT has {len(loaded)} tensors, the file {len(tensors)}, not loaded {lost[:2]}"
        theirs = torch.cat([_loss_alone(peft, row) for row in ROWS[k]])
        off = float((theirs - ours[k]).abs().max())
        if not off < TOLERANCE:
            return f"losses of slot {k} are off by {off:.2g}"
    return ""


def _loss_alone(model, row):
    ids = torch.tensor([row.input_ids])
    with torch.no_grad():
        options = {"attention_mask": torch.ones_like(ids), "use_cache": False}
        logits = model(input_ids=ids, **options).logits[0].float()
    first = row.prompt_length
    return torch.nn.functional.cross_entropy(
        logits[first - 1 : -1], ids[0, first:], reduction="none"
    )


def _generates(name, slots, adapters):
    options = {"tokenizer": Ids(), "max_new_tokens": 5, "pad_token_id": 0}
    slots.load(adapters)
    together = generate_answers(slots, ROWS, batch_size=8, **options)
    for k, rows in enumerate(ROWS):
        slots.load([adapters[k]])
        for i, row in enumerate(rows):
            ((alone,),) = generate_answers(slots, [[row]], batch_size=1, **options)
            if alone != together[k][i]:
                return f"slot {k}, row {i}: {together[k][i]}, alone {alone}"
    return ""
