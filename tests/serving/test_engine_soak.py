"""10,000 requests straight into the engine, clients hanging up at random: nightly."""

import gc
import random

import pytest

from flexlora.serving.live_request import LiveRequest
from flexlora.simulations.benchmarks.process_memory import settled_bytes
from flexlora.training.models import load_base
from flexlora.training.targets import find_targets
from served import answer, asked, drained, engine_of, prompts, strong_adapter

REQUESTS, ADAPTERS, TOKENS = 10_000, 24, 6
QUESTIONS = prompts(4, seed=8, longest=20)


@pytest.fixture
def engine():
    """Two thirds of the adapters fit on the device: they are evicted and loaded all the time."""
    base = load_base("embedded", device="cpu", fresh=True)
    shapes = find_targets(base.model, "all-linear")
    ranks = [2 + (7 * k) % 40 for k in range(ADAPTERS)]
    adapters = {f"a{k}": strong_adapter(shapes, rank, k) for k, rank in enumerate(ranks)}
    row_bytes = 4 * sum(out + width for out, width in shapes.values())
    limits = {"max_running": 32, "max_waiting": 200, "cache_bytes": 24 * 64 * 4096}
    limits["device_bytes"] = sum(ranks) * row_bytes * 2 // 3
    with engine_of(base, adapters, **limits) as engine:
        yield engine


class Clients:
    """Sixty clients, each with one request under way, who hang up at random."""

    def __init__(self, engine, expected):
        self.engine, self.expected = engine, expected
        self.draw, self.live = random.Random(0), {}
        self.submitted = self.cancelled = 0

    def ask(self):
        name, q = self.draw.choice(list(self.expected))
        number = self.submitted
        reader = asked(self.engine, str(number), QUESTIONS[q], name, max_tokens=TOKENS)
        self.live[number] = (name, q, reader)
        self.submitted += 1

    def turn(self, until):
        """One step, before which some hang up and the others' places are taken again."""
        while len(self.live) < 60 and self.submitted < until:
            self.ask()
        for number in self.draw.sample(list(self.live), min(2, len(self.live))):
            if self.draw.random() < 0.4:
                self.engine.cancel(str(number))
        self.engine.step()
        for number in [n for n, (_, _, reader) in self.live.items() if reader.reason]:
            name, q, reader = self.live.pop(number)
            whole = self.expected[name, q]
            if reader.reason == "cancelled":
                self.cancelled += 1
                whole = whole[: len(reader.tokens)]
            assert reader.tokens == whole, f"request {number}: not the answer of {name}"


@pytest.mark.nightly
def test_ten_thousand_requests_get_their_own_adapters_answers_and_leave_nothing_behind(engine):
    expected = {
        (name, q): answer(engine, question, name, max_tokens=TOKENS).tokens
        for name in engine.adapters.names()
        for q, question in enumerate(QUESTIONS)
    }
    for q in range(len(QUESTIONS)):
        different = {tuple(tokens) for (_, of), tokens in expected.items() if of == q}
        assert len(different) >= ADAPTERS - 4, "too few adapters have distinct answers"
    clients = Clients(engine, expected)
    while clients.submitted < REQUESTS // 4:
        clients.turn(REQUESTS // 4)
    resident = settled_bytes()
    while clients.live or clients.submitted < REQUESTS:
        clients.turn(REQUESTS)
    drained(engine)
    stats = engine.stats()
    assert stats.finished == REQUESTS - clients.cancelled + len(expected)
    assert (stats.failed, stats.running, stats.waiting, stats.cache_bytes) == (0, 0, 0, 0)
    assert clients.cancelled > REQUESTS // 50
    assert stats.adapter_evictions > 100
    gc.collect()
    assert not [x for x in gc.get_objects() if isinstance(x, LiveRequest)]
    assert settled_bytes() - resident < 16 * 2**20
