"""What a server refuses, in OpenAI's error shape: malformed, oversized, unknown, not allowed."""

import json
import socket

import httpx
import pytest

from flexlora.errors import UserError
from flexlora.serving.api.front import bind, is_loopback
from flexlora.serving.api.guard import MAX_BODY
from flexlora.training.models import load_base
from http_service import HELLO, NoAdapters, ObedientEngine, asked, client_of, error_of, front_of

COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def tokenizer():
    return load_base("embedded").tokenizer


@pytest.fixture(scope="module")
def front(tokenizer):
    with front_of(ObedientEngine(), NoAdapters(), tokenizer) as front:
        yield front


@pytest.fixture(scope="module")
def client(front):
    with client_of(front) as client:
        yield client


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({"max_tokens": -1}, "max_tokens is -1, expected at least 1", None),
        ({"max_tokens": 0}, "max_tokens is 0", None),
        ({"max_completion_tokens": 2.5}, "max_completion_tokens: Input should be", None),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "differ; give one", None),
        ({"temperature": -0.1}, "temperature is -0.1, expected 0 to 100", None),
        ({"temperature": "hot"}, "temperature: Input should be a valid number", "temperature"),
        ({"temperature": True}, "temperature: Input should be a valid number", "temperature"),
        ({"top_p": 0}, "top_p is 0", None),
        ({"n": 0}, "n: Input should be greater than or equal to 1", "n"),
        ({"n": 65}, "n: Input should be less than or equal to 64", "n"),
        ({"seed": 2**63}, "seed is", None),
        ({"stop": [""]}, "stop has a text that is not 1 to 256", None),
        ({"stop": ["x"] * 17}, "stop has 17 texts, expected at most 16", None),
        ({"stop": 5}, "stop", "stop"),
        ({"stream": "yes"}, "stream: Input should be a valid boolean", "stream"),
        ({"stream_options": {"usage": True}}, "unknown field 'usage'", "stream_options"),
        ({"top_logprobs": 3}, "top_logprobs is given without logprobs", None),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs is 21, expected 0 to 20", None),
        ({"max_token": 3}, "unknown field 'max_token'. Did you mean 'max_tokens'?", None),
        ({"qwertz": 3}, "unknown field 'qwertz'", None),
        ({"tools": [{}]}, "'tools' is not supported", None),
        ({"presence_penalty": 0.5}, "'presence_penalty' is not supported", None),
        ({"response_format": {"type": "json_object"}}, "'response_format' is not", None),
        ({"model": ""}, "model: String should have at least 1 character", "model"),
        ({"model": None}, "model: Field required", "model"),
        ({"messages": []}, "messages: List should have at least 1 item", "messages"),
        ({"messages": "Hello"}, "messages: Input should be a valid list", "messages"),
        ({"messages": [{"role": "user"}]}, "Field required", "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "has the role 'robot', exp", None),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "message 1 has a part of type 'image_url', expected 'text'",
            None,
        ),
        ({"messages": HELLO * 1001}, "messages: List should have at most 1000", "messages"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_chat_that_cannot_be_is_refused_by_name(client, body, message, param):
    error = error_of(asked(client, **body), 400)
    assert message in error["message"] and error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "prompt: Field required"),
        ({"prompt": []}, "prompt: expected text, token ids"),
        ({"prompt": [1, "x"]}, "prompt: expected text, token ids"),
        ({"prompt": [[]] * 2 + ["x"]}, "prompt: expected text, token ids"),
        ({"prompt": [True]}, "prompt: expected text, token ids"),
        ({"prompt": ["x"] * 33, "n": 2}, "33 prompts with n=2 are 66 answers"),
        ({"prompt": "x", "echo": True}, "'echo' is not supported"),
        ({"prompt": "x", "logprobs": -1}, "logprobs is -1"),
        ({"prompt": "x", "messages": []}, "unknown field 'messages'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_completion_that_cannot_be_is_refused_by_name(client, body, message):
    assert message in error_of(asked(client, COMPLETIONS, **body), 400)["message"]


def test_fields_that_change_nothing_are_taken(front, client):
    ignored = {"user": "me", "metadata": {"a": "b"}, "store": False, "logit_bias": {}, "tools": []}
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "response_format": {"type": "text"}}
    turn = {"role": "assistant", "content": "Hi", "refusal": None, "tool_calls": None}
    body = {"messages": [*HELLO, turn, *HELLO], "stop": None, **ignored, **neutral}
    front.service.engine.refusal = UserError("it has reached the engine")
    try:
        error = error_of(asked(client, **body), 400)
    finally:
        front.service.engine.refusal = None
    assert error["message"] == "it has reached the engine"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{bad", "the body is not JSON: "),
        (b"", "the body is empty"),
        (b"[" * 100_000, "error parsing the body"),
        (b"[1]", "valid dictionary"),
        (b"null", ""),
        (b'"\xff"', ""),
        (b'{"model": "embedded", "prompt": "\\ud800"}', "half of a surrogate pair"),
        (b'{"model": "embedded", "prompt": ["\\ud800"]}', "half of a surrogate pair"),
        (b'{"model": "a\\ud800", "prompt": "x"}', "model: "),
        (b'{"model": "embedded", "prompt": "x", "temperature": NaN}', "temperature: "),
        (b'{"model": "embedded", "prompt": "x", "seed": 1e999}', "seed: "),
        (b'{"model": "embedded", "prompt": "x", "\\ud800": 1}', "unknown field"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_body_that_is_no_request_is_refused(client, content, message):
    headers = {"Content-Type": "application/json"}
    error = error_of(client.post(COMPLETIONS, content=content, headers=headers), 400)
    assert message in error["message"]


def test_an_oversized_body_is_refused_whether_its_size_is_told_or_not(client):
    headers = {"Content-Type": "application/json"}
    body = b" " * (MAX_BODY + 1)
    announced = client.post(COMPLETIONS, content=body, headers=headers)
    chunks = (b" " * 2**16 for _ in range(MAX_BODY // 2**16 + 1))
    chunked = client.post(COMPLETIONS, content=chunks, headers=headers)
    for response in (announced, chunked):
        assert f"more than {MAX_BODY} bytes" in error_of(response, 413)["message"]
    assert client.get("/health").status_code == 200


def test_other_content_types_paths_and_methods_are_refused(client):
    plain = client.post(COMPLETIONS, content=b"{}", headers={"Content-Type": "text/plain"})
    assert "is 'text/plain', expected application/json" in error_of(plain, 415)["message"]
    assert "/v1/nothing" in error_of(client.get("/v1/nothing"), 404)["message"]
    error_of(client.get(COMPLETIONS), 405)


def test_a_web_page_that_names_another_host_is_refused(client):
    error = error_of(client.get("/v1/models", headers={"Host": "evil.example:8000"}), 403)
    assert "the Host header names 'evil.example'" in error["message"]
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:8000"):
        assert client.get("/v1/models", headers={"Host": host}).status_code == 200


def test_an_error_cannot_write_to_a_terminal(client):
    error = error_of(asked(client, model="\x1b[2J" + "x" * 5000), 404)
    assert "\x1b" not in error["message"] and len(error["message"]) < 600


def test_without_the_key_only_health_is_answered(tokenizer):
    with (
        front_of(ObedientEngine(), NoAdapters(), tokenizer, api_key="secret") as front,
        client_of(front) as client,
    ):
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            assert error_of(client.get(path), 401)["code"] == "invalid_api_key"
        for wrong in ("secret", "Bearer", "Bearer secre", "Bearer secret2", "Basic secret"):
            error_of(client.get("/v1/models", headers={"Authorization": wrong}), 401)
        assert client.get("/health").status_code == 200
        right = {"Authorization": "bearer secret", "Host": "any.example"}
        assert client.get("/v1/models", headers=right).status_code == 200


def test_a_body_that_never_comes_does_not_hold_its_connection(front, tokenizer):
    """The guard alone, with a short wait."""
    import asyncio

    from flexlora.serving.api.guard import Guard

    sent, counted = [], []
    guard = Guard(None, body_seconds=0.01, count=lambda *outcome: counted.append(outcome))

    async def receive():
        await asyncio.sleep(3600)

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": headers}
    asyncio.run(guard(scope, receive, send))
    assert sent[0]["status"] == 408 and "did not arrive" in json.loads(sent[1]["body"])["error"][
        "message"
    ]  # fmt: skip
    assert counted == [(COMPLETIONS, "408")]


def test_a_port_in_use_and_an_address_of_elsewhere_are_one_sentence():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"--port is {port}, which another process listens on"):
            bind("127.0.0.1", port)
    with pytest.raises(UserError, match=r"--host is '192\.0\.2\.1', which this machine cannot"):
        bind("192.0.2.1", 0)
    with pytest.raises(UserError, match=r"--host is 'no such host', which this machine cannot"):
        bind("no such host", 0)
    with pytest.raises(UserError, match="--port is 70000, expected 0 to 65535"):
        bind("127.0.0.1", 70000)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True)]
    + [(host, False) for host in ("0.0.0.0", "::", "10.0.0.1", "localhost.example", "")],
)
def test_loopback_is_what_only_this_machine_reaches(host, loopback):
    assert is_loopback(host) is loopback


def test_pages_that_load_scripts_from_elsewhere_are_off(client):
    for path in ("/docs", "/redoc"):
        error_of(client.get(path), 404)
    assert isinstance(client.get("/openapi.json"), httpx.Response)
