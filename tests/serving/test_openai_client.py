"""The `openai` package as client, over the real engine on the embedded base."""

import asyncio

import httpx
import openai
import pytest

from flexlora.serving.prompts import Prompts
from flexlora.training.models import load_base
from flexlora.training.targets import find_targets
from http_service import front_of
from served import answer, engine_of, strong_adapter

RANKS = (2, 3, 4, 6, 8, 12, 16)
QUESTIONS = [f"Reverse the word: {word}" for word in ("stone", "apple", "tree", "house", "sky")]
TOKENS = 8


@pytest.fixture(scope="module")
def base():
    return load_base("embedded", device="cpu", fresh=True)


@pytest.fixture(scope="module")
def adapters(base):
    shapes = find_targets(base.model, "all-linear")
    return {f"rank_{r}": strong_adapter(shapes, r, r, size=6.0) for r in RANKS}


@pytest.fixture(scope="module")
def expected(base, adapters):
    """Greedy answers of the engine alone, one request at a time, by (model, question)."""
    prompts, found = Prompts(base.tokenizer), {}
    with engine_of(base, adapters) as engine:
        for name in ("embedded", *adapters):
            for question in QUESTIONS:
                prompt = prompts.chat([("user", question)])
                adapter = None if name == "embedded" else name
                alone = answer(engine, prompt.ids, adapter, max_tokens=TOKENS)
                found[name, question] = alone.text.removeprefix(prompt.separator), alone.reason
    return found


@pytest.fixture(scope="module")
def front(base, adapters, expected):
    """After ``expected``: a model belongs to one engine at a time."""
    with (
        engine_of(base, adapters) as engine,
        front_of(engine, engine.adapters, base.tokenizer) as front,
    ):
        yield front


def options_of(front):
    return {"base_url": f"{front.url}/v1", "api_key": "none", "max_retries": 0}


@pytest.fixture(scope="module")
def client(front):
    with (
        httpx.Client(trust_env=False) as http,
        openai.OpenAI(**options_of(front), http_client=http) as client,
    ):
        yield client


def chat(client, model, question, **options):
    messages = [{"role": "user", "content": question}]
    options = {"temperature": 0, "max_tokens": TOKENS, **options}
    return client.chat.completions.create(model=model, messages=messages, **options)


def test_64_at_once_are_each_answered_by_their_adapter(front, expected):
    """Streamed and not, eight models in turn: each answer is that of the engine alone."""
    calls = [list(expected)[i % len(expected)] for i in range(64)]
    assert len({expected[call] for call in calls if call[1] == QUESTIONS[0]}) >= 7, "distinct"

    async def one(client, number):
        model, question = calls[number]
        if number % 2:
            chunks = [c async for c in await chat(client, model, question, stream=True)]
            text = "".join(c.choices[0].delta.content or "" for c in chunks)
            return text, chunks[-1].choices[0].finish_reason
        choice = (await chat(client, model, question)).choices[0]
        return choice.message.content, choice.finish_reason

    async def all_of_them():
        limits = httpx.Limits(max_connections=64)
        async with (
            httpx.AsyncClient(trust_env=False, limits=limits) as http,
            openai.AsyncOpenAI(**options_of(front), http_client=http) as client,
        ):
            return await asyncio.gather(*(one(client, number) for number in range(64)))

    found = asyncio.run(all_of_them())
    assert found == [expected[call] for call in calls]


def test_the_models_are_the_base_and_the_adapters(client, adapters):
    assert [model.id for model in client.models.list()] == ["embedded", *sorted(adapters)]
    one = client.models.retrieve("rank_8")
    assert (one.id, one.parent, one.max_model_len) == ("rank_8", "embedded", 256)


def test_an_unknown_model_is_not_found_and_the_nearest_named(client):
    with pytest.raises(openai.NotFoundError, match=r"'rank_88' does not exist. Did you mean 'ra"):
        chat(client, "rank_88", "x")
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("nothing/like/it")


def test_usage_is_that_of_the_tokens(client, base, expected):
    prompt = Prompts(base.tokenizer).chat([("user", QUESTIONS[0])])
    found = chat(client, "rank_4", QUESTIONS[0])
    assert found.usage.prompt_tokens == len(prompt.ids)
    assert 1 <= found.usage.completion_tokens <= TOKENS
    assert found.usage.total_tokens == len(prompt.ids) + found.usage.completion_tokens
    chunks = list(
        chat(client, "rank_4", QUESTIONS[0], stream=True, stream_options={"include_usage": True})
    )
    assert chunks[-1].choices == [] and chunks[-1].usage == found.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1


def test_log_probabilities_name_the_tokens_of_the_answer(client):
    """The bytes of the tokens, joined, are the text; a greedy token is the likeliest."""
    found = chat(client, "embedded", QUESTIONS[1], logprobs=True, top_logprobs=3).choices[0]
    tokens = found.logprobs.content
    assert bytes(b for one in tokens for b in one.bytes).decode() == found.message.content
    for one in tokens:
        assert len(one.top_logprobs) == 3 and one.logprob <= 0
        assert (one.token, one.logprob) == (one.top_logprobs[0].token, one.top_logprobs[0].logprob)
    without = chat(client, "embedded", QUESTIONS[1]).choices[0]
    assert without.logprobs is None and without.message == found.message


def test_completions_take_texts_and_token_ids(client, base):
    prompt = "Reverse the word: stone\nAnswer:"
    ids = Prompts(base.tokenizer).text(prompt)
    options = {"model": "embedded", "temperature": 0, "max_tokens": TOKENS}
    text = client.completions.create(prompt=prompt, **options)
    assert client.completions.create(prompt=ids, **options).choices == text.choices
    both = client.completions.create(prompt=[prompt, "Hello"], n=2, **options)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert {choice.text for choice in both.choices[:2]} == {text.choices[0].text}
    assert client.completions.create(prompt=[ids, ids], **options).usage.prompt_tokens == (
        2 * len(ids)
    )
    streamed = list(client.completions.create(prompt=prompt, stream=True, **options))
    assert "".join(c.choices[0].text for c in streamed) == text.choices[0].text
    found = client.completions.create(prompt=prompt, logprobs=2, **options).choices[0]
    assert "".join(found.logprobs.tokens) == found.text
    assert [found.text[at:][: len(token)] for at, token in zip(
        found.logprobs.text_offset, found.logprobs.tokens, strict=True
    )] == found.logprobs.tokens  # fmt: skip
    assert all(len(top) == 2 for top in found.logprobs.top_logprobs)


def test_a_seed_repeats_an_answer_and_choices_differ(client):
    options = {"temperature": 5.0, "seed": 7, "n": 4, "max_tokens": 12}
    first, again = (chat(client, "rank_2", "Hello", **options) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1
    other = chat(client, "rank_2", "Hello", **{**options, "seed": 100})
    assert [choice.message.content for choice in other.choices] != texts


def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(client, expected):
    (model, question), (text, _) = next(
        (call, found) for call, found in expected.items() if len(found[0]) >= 3
    )
    stop = text[1:3]
    choice = chat(client, model, question, stop=[stop]).choices[0]
    assert (choice.message.content, choice.finish_reason) == (text[: text.index(stop)], "stop")


def test_clients_that_hang_up_free_their_places(front, expected):
    """Of 24 long answers 16 lose their clients; all places are free again, and answers go on."""
    engine = front.service.engine
    before = engine.stats()
    body = {
        "model": "rank_2",
        "messages": [{"role": "user", "content": "Hello"}],
        "temperature": 3.0,
        "max_tokens": 240,
    }

    async def one(client, number):
        if number % 3 == 0:
            return (await client.post("/v1/chat/completions", json=body)).status_code
        if number % 3 == 1:  # not streamed
            with pytest.raises(httpx.ReadTimeout):
                await client.post("/v1/chat/completions", json=body, timeout=0.05)
            return None
        streamed = {**body, "stream": True}
        async with client.stream("POST", "/v1/chat/completions", json=streamed) as response:
            async for _ in response.aiter_lines():
                return None

    async def all_of_them():
        async with httpx.AsyncClient(base_url=front.url, trust_env=False, timeout=60) as client:
            found = await asyncio.gather(*(one(client, number) for number in range(24)))
            while front.service.calls or engine.stats().running or engine.stats().waiting:
                await asyncio.sleep(0.01)
            return found

    found = asyncio.run(asyncio.wait_for(all_of_them(), 60))
    assert found[::3] == [200] * 8
    after = engine.stats()
    assert after.cancelled - before.cancelled >= 8, "the others may have ended before"
    assert after.cache_bytes_used == 0
    with httpx.Client(base_url=front.url, trust_env=False) as client:
        assert 'outcome="hung_up"' in client.get("/metrics").text
