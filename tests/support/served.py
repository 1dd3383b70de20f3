"""Adapters, engines and oracles for the tests of serving."""

import random
from contextlib import contextmanager

import torch

from builders import random_factors
from flexlora.lora.adapters import Adapter
from flexlora.serving.adapter_store import AdapterStore
from flexlora.serving.engine import Engine, Limits
from flexlora.serving.requests import Request, Sampling


def strong_adapter(shapes, rank, seed, *, size=12.0):
    """Every module at ``rank``: strong enough that other adapters answer otherwise."""
    return Adapter(
        {
            name: random_factors(*shape, rank, alpha=size * rank, seed=seed * 100 + i).map(
                lambda t: t.float()
            )
            for i, (name, shape) in enumerate(sorted(shapes.items()))
        }
    )


@contextmanager
def engine_of(base, adapters, *, device_bytes=2**30, **limits):
    """An engine, closed at the end, whose store has ``adapters`` by name."""
    store = AdapterStore(base, device_bytes=device_bytes)
    for name, adapter in adapters.items():
        store.add(name, adapter)
    engine = Engine(base, store, Limits(**limits))
    try:
        yield engine
    finally:
        engine.close()


class Reader:
    """Collects the pieces of one request."""

    def __init__(self):
        self.pieces = []

    def __call__(self, piece):
        self.pieces.append(piece)

    @property
    def tokens(self):
        return [token for piece in self.pieces for token in piece.token_ids]

    @property
    def text(self):
        return "".join(piece.text for piece in self.pieces)

    @property
    def logprobs(self):
        return [logprob for piece in self.pieces for logprob in piece.logprobs]

    @property
    def reason(self):
        """The finish reason, which only the last piece has."""
        reasons = [piece.finish_reason for piece in self.pieces]
        assert all(reason is None for reason in reasons[:-1]), reasons
        return reasons[-1] if reasons else None


def asked(engine, name, prompt, adapter, **sampling):
    """A reader of the request, which is submitted."""
    reader = Reader()
    request = Request(
        request_id=name, adapter=adapter, prompt_ids=list(prompt), sampling=Sampling(**sampling)
    )
    engine.submit(request, reader)
    return reader


def drained(engine):
    """Step until nothing is left."""
    while engine.step():
        pass


def answer(engine, prompt, adapter=None, **sampling):
    """The reader of one request alone in the engine."""
    reader = asked(engine, "alone", prompt, adapter, **sampling)
    drained(engine)
    return reader


def prompts(count, seed, *, longest=40, vocab=500):
    """Token ids of unequal length, none of them special."""
    draw = random.Random(seed)
    return [
        [draw.randrange(10, vocab) for _ in range(draw.randint(1, longest))] for _ in range(count)
    ]


@torch.no_grad()
def generated(model, prompt, count, ends=()):
    """Greedy tokens of transformers' ``generate`` for one prompt alone."""
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        eos_token_id=sorted(ends) or None,
        **options,
    )
    return found[0, len(prompt) :].tolist()
