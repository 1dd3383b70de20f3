"""Back-pressure, time-outs, clients that hang up, an engine that fails, a graceful stop.

Over an engine that does what the test says: a real one cannot be full, stuck or dead on demand.
"""

import socket
import threading
import time

import httpx
import pytest

from flexlora.serving.requests import EngineFull
from flexlora.training.models import load_base
from http_service import NoAdapters, ObedientEngine, asked, client_of, error_of, events_of, front_of

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def tokenizer():
    return load_base("embedded").tokenizer


@pytest.fixture
def engine():
    return ObedientEngine()


@pytest.fixture
def front(engine, tokenizer):
    with front_of(engine, NoAdapters(), tokenizer) as front:
        yield front


class Asking(threading.Thread):
    """Sends a request in a thread; ``response`` afterwards."""

    def __init__(self, front, **body):
        super().__init__(daemon=True)
        self.front, self.body, self.response = front, body, None
        self.start()

    def run(self):
        with client_of(self.front) as client:
            self.response = asked(client, **self.body)

    def answered(self):
        self.join(20)
        return self.response


def waits_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_full_queue_is_429_with_a_time_to_come_again(front, engine):
    engine.refusal = EngineFull("256 requests are waiting; try again later.")
    with client_of(front) as client:
        response = asked(client)
        assert error_of(response, 429)["message"] == str(engine.refusal)
        assert 1 <= int(response.headers["retry-after"]) <= 30
        assert response.json()["error"]["type"] == "rate_limit_error"
    assert front.service.calls == 0


def test_when_the_queue_fills_halfway_the_others_of_the_call_are_cancelled(front, engine):
    taken = []

    def submit(request, on_piece, put=engine.submit):
        if len(taken) == 2:
            raise EngineFull("full")
        taken.append(request.request_id)
        put(request, on_piece)

    engine.submit = submit
    with client_of(front) as client:
        error_of(asked(client, n=4), 429)
    assert engine.cancelled == taken


def test_pieces_are_streamed_as_they_come(front, engine):
    body = {"model": "embedded", "messages": [{"role": "user", "content": "x"}], "stream": True}
    with client_of(front) as client, client.stream("POST", CHAT, json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = response.iter_lines()
        assert '"role":"assistant"' in next(lines)
        for text in ("one ", "two "):
            engine.say(text)
            found, _ = events_of([next(line for line in lines if line)])
            assert found[0]["choices"][0]["delta"] == {"content": text}
        engine.say("three", "stop")
        found, done = events_of(lines)
    assert done and found[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_place(front, engine, stream):
    body = f'{{"model":"embedded","messages":[{{"role":"user","content":"x"}}],"stream":{stream}}}'
    body = body.replace("True", "true").replace("False", "false")
    host, port = front.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        assert engine.arrived.acquire(timeout=20)
        if stream:
            assert client.recv(100)
        assert engine.open and not engine.cancelled
    waits_until(lambda: engine.cancelled and not front.service.calls)
    assert not engine.open
    with client_of(front) as other:
        page = other.get("/metrics").text
    assert f'flexlora_serving_calls_total{{outcome="hung_up",path="{CHAT}"}} 1.0' in page


def test_an_answer_that_takes_too_long_is_504_and_its_place_is_free(engine, tokenizer):
    with front_of(engine, NoAdapters(), tokenizer, call_seconds=0.05) as front:
        with client_of(front) as client:
            error = error_of(asked(client), 504)
            assert error["code"] == "timeout" and "not ready within 0.05 s" in error["message"]
            found, done = events_of(asked(client, stream=True).iter_lines())
        assert not done and found[-1]["error"]["code"] == "timeout"
    assert len(engine.cancelled) == 2


def test_an_engine_s_error_reaches_its_client_alone(front, engine):
    asking = Asking(front)
    assert engine.arrived.acquire(timeout=20)
    engine.say("half", "error", error="out of memory")
    assert "out of memory" in error_of(asking.answered(), 500)["message"]
    streamed = Asking(front, stream=True)
    assert engine.arrived.acquire(timeout=20)
    engine.say("half", "error", error="out of memory")
    found, done = events_of(streamed.answered().iter_lines())
    assert not done and "out of memory" in found[-1]["error"]["message"]
    assert front.alive


def test_when_the_engine_dies_nobody_waits_for_it(front, engine):
    asking = Asking(front)
    assert engine.arrived.acquire(timeout=20)
    engine.die(RuntimeError("a bug"))
    assert "RuntimeError: a bug" in error_of(asking.answered(), 503)["message"]
    assert not front.alive
    with client_of(front) as client:
        assert "a bug" in client.get("/health").json()["status"]
        assert client.get("/health").status_code == 503
        assert "a bug" in error_of(asked(client), 503)["message"]
    front.stop(0)


def test_a_stuck_engine_shows_in_its_health(engine, tokenizer):
    with (
        front_of(engine, NoAdapters(), tokenizer, stuck_seconds=0.05) as front,
        client_of(front) as client,
    ):
        time.sleep(0.1)
        assert client.get("/health").json() == {"status": "ok"}, "nothing to do is not stuck"
        asking = Asking(front)
        assert engine.arrived.acquire(timeout=20)
        waits_until(lambda: client.get("/health").status_code == 503)
        assert "no token for" in client.get("/health").json()["status"]
        engine.say("x", "stop")
        assert asking.answered().status_code == 200
        assert client.get("/health").status_code == 200


def test_a_stop_waits_for_calls_in_progress_and_takes_no_new_ones(front, engine):
    asking = Asking(front)
    assert engine.arrived.acquire(timeout=20)
    ended = []
    stopping = threading.Thread(target=lambda: ended.append(front.stop(20)))
    stopping.start()
    waits_until(lambda: front.service.illness() == "stopping")
    with pytest.raises(httpx.TransportError), client_of(front) as client:
        waits_until(lambda: asked(client).status_code != 503 and False)
    assert asking.response is None and not ended
    engine.say("whole", "stop")
    assert asking.answered().json()["choices"][0]["message"]["content"] == "whole"
    stopping.join(20)
    assert ended == [True]


def test_a_stop_cuts_calls_after_its_grace(front, engine):
    whole, streamed = Asking(front), Asking(front, stream=True)
    assert engine.arrived.acquire(timeout=20) and engine.arrived.acquire(timeout=20)
    assert front.stop(0.05) is False
    assert "is stopping" in error_of(whole.answered(), 503)["message"]
    found, done = events_of(streamed.answered().iter_lines())
    assert not done and "is stopping" in found[-1]["error"]["message"]
    assert len(engine.cancelled) == 2


def test_metrics_are_the_engine_s_counts_and_times(front, engine):
    asking = Asking(front)
    assert engine.arrived.acquire(timeout=20)
    with client_of(front) as client:
        assert "flexlora_serving_waiting 1.0" in client.get("/metrics").text
        engine.say("x", "stop")
        asking.answered()
        page = client.get("/metrics").text
    assert "flexlora_serving_waiting 0.0" in page
    assert "flexlora_serving_time_to_first_token_seconds_count 1.0" in page
    assert f'calls_total{{outcome="200",path="{CHAT}"}} 1.0' in page
