"""The K slots of a base as one model of lm-evaluation-harness (the ``lm_eval`` package).

The harness asks one model at a time. Here a request is answered for all slots in one pass, and the
answers of the others are kept: the harness then asks for the next ``slot``, and no pass is made.
What a request means (how texts become tokens, windows of long texts, what is cut, where a generated
answer ends) is that of the harness' ``hf`` model, whose numbers with ``peft=DIR`` these are.

Registered as ``flexlora``: ``simple_evaluate(model="flexlora", model_args="adapter=DIR")``.
Import this module only where ``lm_eval`` is installed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from flexlora.errors import UserError
from flexlora.evaluation.generation import greedy_config, passes, with_generation_config
from flexlora.evaluation.padding import takes_padding
from flexlora.lora.adapters import Adapter, zero_factors
from flexlora.lora.peft_config import read_config
from flexlora.lora.peft_folder import load_adapter
from flexlora.training.local import logits_at
from flexlora.training.models import BaseModel, load_base
from flexlora.training.slots import SlotModel, slot_model

__all__ = ["SlotLM", "base_slot"]

Tokens = tuple[Sequence[int], Sequence[int]]  # context and continuation


def base_slot(like: Adapter) -> Adapter:
    """An adapter that changes nothing: in its slot the model is the base."""
    return Adapter({name: zero_factors(factors) for name, factors in like.items()})


@register_model("flexlora")
class SlotLM(TemplateLM):
    """The loaded ``slots`` over ``base``; ``slot`` is the one whose answers are returned.

    ``tokens_in_passes`` counts the tokens that the model has read, over all slots.
    """

    def __init__(self, slots: SlotModel, base: BaseModel, *, batch_size: int = 64) -> None:
        super().__init__()
        self.slots, self.base, self._batch_size = slots, base, batch_size
        self.tokenizer = base.tokenizer
        self.slot = 0
        self.tokens_in_passes = 0
        self._known: dict[str, list[Any]] = {}  # by request: the answer of every slot
        self._device = slots.device
        self._max_length = resolve_max_length(slots.model.config, self.tokenizer)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> SlotLM:
        """The adapter folder ``adapter`` over the base that it names, or over ``base``."""
        options = {k: v for k, v in ({**(additional_config or {}), **arg_dict}).items() if v}
        if "adapter" not in options:
            raise UserError("the model 'flexlora' has no adapter; give model_args 'adapter=DIR'.")
        adapter = load_adapter(options["adapter"])
        stored = read_config(Path(options["adapter"]) / "adapter_config.json").base
        base = load_base(options.get("base", stored or "embedded"))
        slots = slot_model(base.model, ",".join(adapter))
        slots.load([adapter])
        return cls(slots, base, batch_size=int(options.get("batch_size", 64)))

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> SlotLM:
        """As ``create_from_arg_obj``, from ``key=value,key=value``."""
        pairs = (part.partition("=") for part in arg_string.split(",") if part)
        return cls.create_from_arg_obj({k: v for k, _, v in pairs}, additional_config)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.base.name.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The turns under the tokenizer's own chat template."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """The ids of a text, with what the tokenizer adds unless it is there or not wanted."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(
                string, self.tokenizer.decode(self.prefix_token_id)
            )
        options = {} if add_special_tokens else {"add_special_tokens": False}
        return self.tokenizer.encode(string, **options)

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """``(log p(continuation | context), whether it is what greedy decoding says)``."""

        def ask(new: list[Any]) -> list[list[tuple[float, bool]]]:
            return super(SlotLM, self).loglikelihood(new, disable_tqdm=True)

        return self._answers("loglikelihood", requests, ask)

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """``log p`` of whole texts, in windows of the model's length."""

        def ask(new: list[Any]) -> list[list[float]]:
            windows = [self._windows(request.args[0]) for request in new]
            flat = [(None, *window) for of_text in windows for window in of_text]
            found = iter(self._loglikelihood_tokens(flat))
            parts = [[next(found) for _ in of_text] for of_text in windows]
            return [[sum(s for s, _ in slot) for slot in zip(*of, strict=True)] for of in parts]

        return self._answers("loglikelihood_rolling", requests, ask)

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Greedy continuations up to the first stop text.

        Raises:
            UserError: a task that samples, or whose answers leave no room for a prompt.
        """
        return self._answers("generate_until", requests, self._generate_all)

    def _answers(
        self, kind: str, requests: Sequence[Any], ask: Callable[[list[Any]], list[list[Any]]]
    ) -> list[Any]:
        """This slot's answers; requests that are new are asked for all slots."""
        keys = [json.dumps([kind, *request.args], sort_keys=True) for request in requests]
        new = {k: r for k, r in zip(keys, requests, strict=True) if k not in self._known}
        if new:
            self._known |= zip(new, ask(list(new.values())), strict=True)
        return [self._known[key][self.slot] for key in keys]

    def _windows(self, text: str) -> list[Tokens]:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self._max_length,
            context_len=1,
        )
        return [make_disjoint_window(window) for window in windows]

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]], **_: Any
    ) -> list[Any]:
        """By request and slot: the continuation's log likelihood, and whether it is greedy."""
        whole = [[*c, *a][-(self._max_length + 1) :] for _, c, a in requests]
        answers: list[list[Any]] = [[] for _ in requests]
        lengths = [[len(ids) - 1 for ids in whole]] * self.slots.num_slots
        for chosen in passes(lengths, self._batch_size):
            rows = [whole[i] for i in chosen[0]]
            counts = [len(requests[i][2]) for i in chosen[0]]
            found = self._row_scores(rows, counts)
            for i, of_row in zip(chosen[0], found, strict=True):
                answers[i] = of_row
        return answers

    def _row_scores(
        self, rows: Sequence[Sequence[int]], counts: Sequence[int]
    ) -> list[list[tuple[float, bool]]]:
        """Scores by row and slot of the last ``counts`` tokens of each row."""
        K, width = self.slots.num_slots, max(map(len, rows)) - 1
        input_ids = torch.full((len(rows), width), self.base.pad_token_id)
        keep = torch.zeros((len(rows), width), dtype=torch.bool)
        for row, (ids, count) in enumerate(zip(rows, counts, strict=True)):
            input_ids[row, : len(ids) - 1] = torch.tensor(ids[:-1])
            keep[row, len(ids) - 1 - count : len(ids) - 1] = True
        self.tokens_in_passes += K * int(keep.numel())
        logits = logits_at(self.slots, input_ids.repeat(K, 1), keep.repeat(K, 1))
        targets = torch.tensor(
            [t for ids, n in zip(rows, counts, strict=True) for t in ids[-n:]]
        ).repeat(K)
        targets = targets.to(logits.device)
        log_p = logits.log_softmax(dim=1).gather(1, targets[:, None])[:, 0].double().cpu()
        greedy = (logits.argmax(dim=1) == targets).cpu()
        sums = log_p.split(list(counts) * K)
        hits = greedy.split(list(counts) * K)
        pairs = [(float(s.sum()), bool(h.all())) for s, h in zip(sums, hits, strict=True)]
        return [pairs[row :: len(rows)] for row in range(len(rows))]

    def _generate_all(self, requests: list[Any]) -> list[list[str]]:
        answers: dict[int, list[str]] = {}
        eos = self.tokenizer.decode(self.eot_token_id)
        by_options: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            by_options.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        for options, indices in by_options.items():
            kwargs = dict(normalize_gen_kwargs(json.loads(options), 256))
            _refuse_sampling(kwargs)
            stops = handle_stop_sequences(kwargs["until"], eos=eos)
            prompts = self._prompts([requests[i].args[0] for i in indices], kwargs["max_gen_toks"])
            for chosen in self._generation_passes(prompts):
                texts = self._generate([prompts[i] for i in chosen], kwargs["max_gen_toks"], stops)
                answers |= {indices[i]: text for i, text in zip(chosen, texts, strict=True)}
        return [answers[i] for i in range(len(requests))]

    def _prompts(self, texts: Sequence[str], max_new_tokens: int) -> list[list[int]]:
        """The ids of each prompt, cut on the left so that the answer has room."""
        room = self._max_length - max_new_tokens
        if room < 1:
            raise UserError(
                f"a task generates {max_new_tokens} tokens, but the model has "
                f"{self._max_length} positions; set a smaller max_gen_toks in the task."
            )
        return [self.tok_encode(text)[-room:] for text in texts]

    def _generation_passes(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Rows that share a pass: of any length, or of one where padding would be seen."""
        groups: dict[int, list[int]] = {}
        for i, prompt in enumerate(prompts):
            groups.setdefault(0 if takes_padding(self.slots) else len(prompt), []).append(i)
        found = []
        for members in groups.values():
            lengths = [[len(prompts[i]) for i in members]] * self.slots.num_slots
            found += [[members[i] for i in p[0]] for p in passes(lengths, self._batch_size)]
        return found

    @torch.no_grad()
    def _generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stops: Sequence[str]
    ) -> list[list[str]]:
        """Answers by row and slot."""
        K, width = self.slots.num_slots, max(map(len, prompts))
        input_ids = torch.full((len(prompts), width), self.base.pad_token_id)
        mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(prompts):
            input_ids[row, width - len(ids) :] = torch.tensor(ids)
            mask[row, width - len(ids) :] = 1
        pad, model = self.base.pad_token_id, self.slots.model
        config = greedy_config(model, self.tokenizer, max_new_tokens, pad, set())
        with with_generation_config(model, config):
            output = model.generate(
                input_ids=input_ids.repeat(K, 1).to(self._device),
                attention_mask=mask.repeat(K, 1).to(self._device),
                stopping_criteria=[self._stopping(stops, width)],
            )
        self.tokens_in_passes += int(output.numel())
        texts = [
            postprocess_generated_text(
                self.tokenizer.decode(ids, skip_special_tokens=True), list(stops), None
            )
            for ids in output[:, width:].tolist()
        ]
        return [texts[row :: len(prompts)] for row in range(len(prompts))]

    def _stopping(self, stops: Sequence[str], width: int) -> Callable[..., Tensor]:
        """Ends a row at the first of the stop texts in what it has generated."""

        def ended(input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
            texts = self.tokenizer.batch_decode(input_ids[:, width:])
            found = [any(stop and stop in text for stop in stops) for text in texts]
            return torch.tensor(found, device=input_ids.device)

        return ended


def _refuse_sampling(options: dict[str, Any]) -> None:
    """Raises a ``UserError`` for what is not greedy decoding."""
    known = {"until", "max_gen_toks", "temperature", "do_sample"}
    asked = {k: v for k, v in options.items() if k not in known and v not in (None, 1, 1.0, False)}
    if options.get("do_sample"):
        asked["do_sample"] = True
    if asked:
        raise UserError(
            f"a task asks for {', '.join(f'{k}={v}' for k, v in asked.items())}, but answers are "
            "decoded greedily here; take it out of the task's generation_kwargs."
        )
