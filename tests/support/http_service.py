"""Servers for tests of `flexlora serve`, over a real engine or one that obeys the test."""

import json
import threading
from contextlib import contextmanager

import httpx

from flexlora.serving.api.app import make_app
from flexlora.serving.api.front import Front, bind, hosts_of
from flexlora.serving.api.loading import Loading
from flexlora.serving.api.service import Service, ServiceLimits
from flexlora.serving.api.token_bytes import TokenBytes
from flexlora.serving.limits import Stats
from flexlora.serving.prompts import Prompts
from flexlora.serving.requests import Piece

HELLO = [{"role": "user", "content": "Hello"}]


class ObedientEngine:
    """Does with a request what the test says; it shows what a real engine cannot be made to do.

    ``refusal`` is raised by ``submit``. Nothing is answered before ``say``. ``die`` ends ``run``.
    """

    max_length, ends = 64, frozenset({2})

    def __init__(self):
        self.refusal, self.error = None, None
        self.open, self.cancelled = {}, []
        self.arrived, self._die = threading.Semaphore(0), threading.Event()

    def submit(self, request, on_piece):
        if self.refusal is not None:
            raise self.refusal
        self.open[request.request_id] = on_piece
        self.arrived.release()

    def cancel(self, request_id):
        on_piece = self.open.pop(request_id, None)
        if on_piece is not None:
            self.cancelled.append(request_id)
            on_piece(Piece(finish_reason="cancelled"))

    def run(self, stop):
        while not stop.wait(0.01):
            if self._die.is_set():
                raise self.error

    def die(self, error):
        self.error = error
        self._die.set()

    def say(self, text, reason=None, *, error=""):
        """A piece for every open request; with a ``reason`` the last one."""
        piece = Piece(text=text, token_ids=(5,), finish_reason=reason, error=error)
        for request_id, on_piece in list(self.open.items()):
            if reason:
                del self.open[request_id]
            on_piece(piece)

    def stats(self):
        return Stats(waiting=len(self.open))


class NoAdapters:
    def names(self):
        return []


@contextmanager
def front_of(engine, adapters, tokenizer, *, loading=None, api_key="", template="auto", **seconds):
    """A `Front` on a free port; stopped at the end, where it has not been stopped before."""
    service = Service(
        engine,
        adapters,
        Prompts(tokenizer, template=template),
        TokenBytes(tokenizer),
        base_name="embedded",
        limits=ServiceLimits(**seconds),
    )
    app = make_app(service, Loading(adapters, loading) if loading else None)
    hosts = None if api_key else hosts_of("127.0.0.1")
    front = Front(service, app, bind("127.0.0.1", 0), api_key=api_key, hosts=hosts)
    front.start()
    try:
        yield front
    finally:
        if front.alive:
            front.stop(0)


@contextmanager
def client_of(front, **options):
    """An httpx client of ``front`` that uses no proxy."""
    with httpx.Client(base_url=front.url, trust_env=False, timeout=30, **options) as client:
        yield client


def asked(client, path="/v1/chat/completions", **body):
    """The response to a small chat or completion request."""
    body = {"model": "embedded", **({"messages": HELLO} if "chat" in path else {}), **body}
    return client.post(path, json=body)


def error_of(response, status):
    """The error object, which has OpenAI's four fields and no others."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def events_of(lines):
    """The JSON objects of server-sent events, and whether ``[DONE]`` ended them."""
    data = [line.removeprefix("data: ") for line in lines if line]
    done = bool(data) and data[-1] == "[DONE]"
    return [json.loads(one) for one in (data[:-1] if done else data)], done
