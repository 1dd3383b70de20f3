"""Three ways to answer the same requests for many adapters, under the same load.

The load is closed: so many clients ask, and each asks again as soon as it is answered.

    switching   PEFT's ``set_adapter`` and ``generate``, request by request in their order
    mixed       PEFT's ``generate(adapter_names=...)``, all that are asked at once, until the
                longest answer of the batch has ended
    engine      the engine of ``flexlora serve``

All are greedy, without end tokens, so that every way computes the same tokens.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexlora.lora.adapters import Adapter
from flexlora.lora.peft_folder import save_adapter
from flexlora.serving.adapter_store import AdapterStore
from flexlora.serving.engine import Engine, Limits
from flexlora.serving.requests import Piece, Request, Sampling
from flexlora.training.models import load_base

__all__ = ["Ask", "Engined", "Peft", "Run"]


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One prompt for one adapter, and how many tokens its answer has."""

    adapter: str
    prompt: list[int]
    tokens: int


@dataclass(kw_only=True)
class Run:
    """What one way did: tokens by request, seconds, and seconds to each first token."""

    answers: list[list[int]]
    seconds: float = 0.0
    waits: list[float] = field(default_factory=list)


class Peft:
    """PEFT's model with all adapters loaded."""

    def __init__(self, base: str, adapters: Mapping[str, Adapter]) -> None:
        from peft import PeftModel

        model = load_base(base, device="cpu", fresh=True).model
        with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for i, (name, adapter) in enumerate(adapters.items()):
                folder = Path(place) / str(i)
                save_adapter(adapter, folder, base=base)
                if i == 0:
                    self.model: Any = PeftModel.from_pretrained(model, folder, adapter_name=name)
                else:
                    self.model.load_adapter(folder, adapter_name=name)
        self.model.eval()
        self.model.generation_config.eos_token_id = None

    def switching(self, asks: Sequence[Ask], clients: int, clock: Callable[[], float]) -> Run:
        """One request after the other; client i's next request follows its last answer."""
        run, began = Run(answers=[]), clock()
        asked = [began] * len(asks)
        for i, ask in enumerate(asks):
            self.model.set_adapter(ask.adapter)
            first = self._generate([ask], run, clock)
            run.waits.append(first - asked[i])
            if i + clients < len(asks):
                asked[i + clients] = clock()
        run.seconds = clock() - began
        return run

    def mixed(self, asks: Sequence[Ask], clients: int, clock: Callable[[], float]) -> Run:
        """The requests of all clients at once; the next when the last of them is answered."""
        run, began = Run(answers=[]), clock()
        for at in range(0, len(asks), clients):
            batch, asked = asks[at : at + clients], clock()
            names = [ask.adapter for ask in batch]
            first = self._generate(batch, run, clock, adapter_names=names)
            run.waits += [first - asked] * len(batch)
        run.seconds = clock() - began
        return run

    @torch.inference_mode()
    def _generate(
        self, batch: Sequence[Ask], run: Run, clock: Callable[[], float], **options: Any
    ) -> float:
        """Answers of left-padded prompts, and when the first token was there."""
        longest, times = max(len(ask.prompt) for ask in batch), list[float]()
        padding = [longest - len(ask.prompt) for ask in batch]
        ids = torch.tensor([[0] * n + a.prompt for n, a in zip(padding, batch, strict=True)])
        mask = (torch.arange(longest) >= torch.tensor(padding)[:, None]).long()

        def token_is_there(input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
            times.append(clock())
            return torch.zeros(len(input_ids), dtype=torch.bool)

        found = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max(ask.tokens for ask in batch),
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[token_is_there],
            **options,
        )
        for row, ask in zip(found[:, longest:].tolist(), batch, strict=True):
            run.answers.append(row[: ask.tokens])
        return times[0]


class Engined:
    """The engine with all adapters in its store."""

    def __init__(self, base: str, adapters: Mapping[str, Adapter], limits: Limits) -> None:
        loaded = load_base(base, device="cpu", fresh=True)
        loaded.model.generation_config.eos_token_id = None
        store = AdapterStore(loaded, device_bytes=2**33)
        for name, adapter in adapters.items():
            store.add(name, adapter)
        self.engine = Engine(loaded, store, limits)
        self.engine.ends = frozenset()

    def run(self, asks: Sequence[Ask], clients: int, clock: Callable[[], float]) -> Run:
        """``clients`` requests in flight."""
        run, began = Run(answers=[[] for _ in asks]), clock()
        first: dict[int, float] = {}
        waiting = iter(enumerate(asks))

        def ask_next() -> None:
            for i, ask in waiting:
                asked = clock()

                def on_piece(piece: Piece, i: int = i, asked: float = asked) -> None:
                    run.answers[i] += piece.token_ids
                    first.setdefault(i, clock() - asked)
                    if piece.finish_reason is not None:
                        ask_next()

                sampling = Sampling(max_tokens=ask.tokens)
                request = Request(
                    request_id=str(i),
                    adapter=ask.adapter,
                    prompt_ids=ask.prompt,
                    sampling=sampling,
                )
                self.engine.submit(request, on_piece)
                return

        for _ in range(clients):
            ask_next()
        while self.engine.step():
            pass
        run.seconds, run.waits = clock() - began, list(first.values())
        return run
