"""What the engine refuses, how requests end, and that one never harms another."""

import threading

import pytest
import torch

from flexlora.errors import UserError
from flexlora.serving.requests import EngineFull, Request, Sampling
from flexlora.training.models import load_base
from flexlora.training.targets import find_targets
from served import Reader, answer, asked, drained, engine_of, prompts, strong_adapter

PROMPT = prompts(1, seed=11)[0]
LONG = {"max_tokens": 30, "temperature": 5.0, "seed": 1}  # flat: the end token is rare


@pytest.fixture(scope="module")
def base():
    return load_base("embedded", device="cpu", fresh=True)


@pytest.fixture(scope="module")
def adapters(base):
    shapes = find_targets(base.model, "all-linear")
    return {name: strong_adapter(shapes, rank, rank) for name, rank in (("low", 2), ("high", 20))}


@pytest.fixture
def engine(base, adapters):
    with engine_of(base, adapters, max_running=3, max_waiting=4) as engine:
        yield engine


@pytest.mark.parametrize(
    ("prompt", "adapter", "cause"),
    [
        ([], None, "the prompt is empty"),
        ([5] * 256, None, "the prompt has 256 tokens and leaves no room for an answer in the 256"),
        ([5, 529], None, "a token id outside the vocabulary of 529"),
        ([-1], None, "a token id outside the vocabulary"),
        ([5], "hihg", r"no adapter is named 'hihg'\. Did you mean 'high'\?"),
        ([5], "", r"no adapter is named ''\. There are 2 adapters"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused(engine, prompt, adapter, cause):
    with pytest.raises(UserError, match=cause):
        asked(engine, "x", prompt, adapter)
    assert not engine.step()


def test_an_id_in_use_is_refused_and_free_again_afterwards(engine):
    asked(engine, "x", PROMPT, None, **LONG)
    with pytest.raises(UserError, match="request id 'x' is in use"):
        asked(engine, "x", PROMPT, None)
    engine.step()
    engine.cancel("x")
    drained(engine)
    assert asked(engine, "x", PROMPT, None, max_tokens=1)


def test_a_full_queue_is_said_at_once_and_has_room_again_later(engine):
    for i in range(4):
        asked(engine, str(i), PROMPT, "low", max_tokens=1)
    with pytest.raises(EngineFull, match="4 requests are waiting"):
        asked(engine, "more", PROMPT, "low")
    engine.step()
    assert engine.stats().waiting == 1, "three run at once"
    asked(engine, "more", PROMPT, "low")


def test_a_request_that_no_cache_can_hold_is_refused(base):
    with (
        engine_of(base, {}, cache_bytes=64 * 4096) as engine,
        pytest.raises(UserError, match=r"41 tokens and answer|tokens need more than the 0\.25 MiB"),
    ):
        asked(engine, "x", PROMPT, None, max_tokens=100)


def test_a_cancelled_request_gives_its_place_to_the_next(engine):
    readers = [asked(engine, str(i), PROMPT, "high", **LONG) for i in range(4)]
    engine.step()
    engine.step()
    assert [len(r.tokens) for r in readers] == [2, 2, 2, 0]
    engine.cancel("1")
    engine.cancel("unknown")
    engine.step()
    assert readers[1].reason == "cancelled"
    assert [len(r.tokens) for r in readers] == [3, 2, 3, 1]
    drained(engine)
    assert readers[3].tokens == readers[0].tokens
    stats = engine.stats()
    assert (stats.cancelled, stats.finished) == (1, 3)
    assert (stats.cache_bytes, stats.cache_bytes_used) == (0, 0)


def test_one_that_is_cancelled_in_the_queue_never_starts(engine):
    readers = [asked(engine, str(i), PROMPT, "high", **LONG) for i in range(4)]
    engine.cancel("3")
    engine.step()
    assert readers[3].reason == "cancelled"
    assert readers[3].tokens == []


def test_a_reader_that_raises_loses_its_request_alone(engine):
    def broken(piece):
        raise OSError("the client has gone")

    request = Request(request_id="x", adapter="low", prompt_ids=PROMPT, sampling=Sampling(**LONG))
    engine.submit(request, broken)
    other = asked(engine, "other", PROMPT, "low", **LONG)
    drained(engine)
    assert engine.stats().cancelled == 1
    assert other.tokens == answer(engine, PROMPT, "low", **LONG).tokens


def test_an_adapter_that_overflows_fails_its_own_requests_alone(base, adapters):
    """And whoever gets its slot afterwards reads no NaN."""
    name, factors = next(iter(adapters["low"].items()))
    wild = {**adapters["low"], name: factors.map(lambda t: t.sign() * 1e37)}
    broken = type(adapters["low"])(wild)
    with engine_of(base, {**adapters, "broken": broken}, max_running=2) as engine:
        expected = answer(engine, PROMPT, "high", **LONG).tokens
        readers = [
            asked(engine, str(i), PROMPT, adapter, **LONG)
            for i, adapter in enumerate(("broken", "high", "broken", "high", "high"))
        ]
        drained(engine)
        for reader in readers[::2][:2]:
            assert (reader.reason, reader.tokens) == ("error", [])
            assert "not finite" in reader.pieces[-1].error
        for reader in (readers[1], *readers[3:]):
            assert reader.tokens == expected
        assert engine.stats().failed == 2


def test_a_step_that_fails_ends_its_requests_and_the_engine_goes_on(engine, monkeypatch, caplog):
    expected = answer(engine, PROMPT, "low", max_tokens=5).tokens
    asked_before = asked(engine, "x", PROMPT, "low", max_tokens=5)
    engine.step()
    with monkeypatch.context() as patched:

        def out_of_memory(*_, **__):
            raise torch.OutOfMemoryError("CUDA out of memory")

        patched.setattr(engine.base.model.model.layers[1].mlp, "forward", out_of_memory)
        engine.step()
    assert asked_before.reason == "error"
    assert "out of memory" in asked_before.pieces[-1].error
    assert "a step of 1 requests failed" in caplog.text
    assert engine.stats().cache_bytes_used == 0
    assert answer(engine, PROMPT, "low", max_tokens=5).tokens == expected


def test_stop_texts_end_an_answer_and_are_no_part_of_it(engine):
    whole = answer(engine, PROMPT, "high", **LONG)
    middle = whole.text[len(whole.text) // 2 :][:3]
    reader = answer(engine, PROMPT, "high", stop=(middle, "never"), **LONG)
    assert reader.reason == "stop"
    assert reader.text == whole.text[: whole.text.index(middle)]
    assert reader.tokens == whole.tokens[: len(reader.tokens)]


def test_an_end_of_the_request_ends_it_without_a_text(engine):
    whole = answer(engine, PROMPT, "high", **LONG)
    end = whole.tokens[5]
    reader = Reader()
    request = Request(
        request_id="x",
        adapter="high",
        prompt_ids=PROMPT,
        ends=(end,),
        sampling=Sampling(**LONG),
    )
    engine.submit(request, reader)
    drained(engine)
    first = whole.tokens.index(end) + 1
    assert (reader.reason, reader.tokens) == ("stop", whole.tokens[:first])
    assert reader.text == "".join(piece.text for piece in whole.pieces[: first - 1])


def test_logprobs_are_the_models(engine, base):
    reader = answer(engine, PROMPT, None, max_tokens=4, logprobs=2)
    engine.close()
    ids = torch.tensor([PROMPT + reader.tokens[:-1]])
    with torch.no_grad():
        logs = base.model(input_ids=ids).logits[0, len(PROMPT) - 1 :].log_softmax(dim=-1)
    for row, found in zip(logs, reader.logprobs, strict=True):
        assert found.logprob == pytest.approx(float(row[found.token_id]), abs=1e-4)
        assert [t for t, _ in found.top] == row.topk(2).indices.tolist()
    assert [p.token_id for p in reader.logprobs] == reader.tokens


def test_a_thread_runs_it_while_others_submit_and_cancel(base, adapters):
    """Eight threads, some of whose requests hang up; the rest get the same answer."""
    stop, done = threading.Event(), threading.Semaphore(0)
    with engine_of(base, adapters, max_running=8, max_waiting=100) as engine:
        expected = answer(engine, PROMPT, "low", max_tokens=8).tokens
        loop = threading.Thread(target=engine.run, args=(stop,))
        loop.start()
        readers = {}

        def client(k):
            for i in range(4):
                reader = readers[k, i] = Reader()

                def on_piece(piece, reader=reader):
                    reader(piece)
                    if piece.finish_reason:
                        done.release()

                request = Request(
                    request_id=f"{k}-{i}",
                    adapter="low",
                    prompt_ids=PROMPT,
                    sampling=Sampling(max_tokens=8),
                )
                engine.submit(request, on_piece)
                if i == 3:
                    engine.cancel(f"{k}-{i}")

        clients = [threading.Thread(target=client, args=(k,)) for k in range(8)]
        for thread in clients:
            thread.start()
        for _ in range(32):
            assert done.acquire(timeout=60)
        never = asked(engine, "left", PROMPT, "low", **LONG)
        stop.set()
        for thread in (*clients, loop):
            thread.join(timeout=60)
    for (_, i), reader in readers.items():
        if reader.reason == "cancelled":
            assert i == 3
        assert reader.tokens == expected[: len(reader.tokens)]
        assert len(reader.tokens) == len(expected) or reader.reason == "cancelled"
    assert never.reason == "cancelled" or never.tokens
