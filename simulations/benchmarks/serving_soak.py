"""A soak of the HTTP server: many requests, clients hanging up at random, and nothing may leak.

    python -m flexlora.simulations.benchmarks.serving_soak [--requests 10000] [--clients 64]
        [--adapters 8] [--hang-ups 0.3] [--seed 0]

Answers are greedy and distinguishable: those of the engine alone, one request at a time, are the
oracle. Half of the requests are streamed. The first fifth is warm-up; memory, open files and the
engine's slots are compared between its end and the end of all. The exit status is 1 where an answer
was wrong or something has leaked.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Mapping

import httpx
import psutil
import torch

from flexlora.serving.adapter_store import AdapterStore
from flexlora.serving.api.app import make_app
from flexlora.serving.api.front import Front, bind
from flexlora.serving.api.service import Service
from flexlora.serving.api.token_bytes import TokenBytes
from flexlora.serving.engine import Engine
from flexlora.serving.prompts import Prompts
from flexlora.serving.requests import Piece, Request, Sampling
from flexlora.simulations.benchmarks.serving import random_adapter
from flexlora.training.models import load_base
from flexlora.training.targets import find_targets

__all__ = ["main"]

QUESTIONS = [f"Reverse the word: {word}" for word in ("stone", "apple", "tree", "house")]
TOKENS, LONGEST_STAY = 8, 0.2  # of an answer; seconds before a client hangs up
CHAT = "/v1/chat/completions"
Key = tuple[str, str]  # adapter, question


def _alone(engine: Engine, prompts: Prompts) -> dict[Key, str]:
    """Each adapter's greedy answer to each question, one request at a time."""
    found = {}
    for name in engine.adapters.names():
        for question in QUESTIONS:
            prompt, pieces = prompts.chat([("user", question)]), list[Piece]()
            request = Request(
                request_id="alone",
                adapter=name,
                prompt_ids=prompt.ids,
                ends=prompt.ends,
                sampling=Sampling(max_tokens=TOKENS),
            )
            engine.submit(request, pieces.append)
            while engine.step():
                pass
            text = "".join(piece.text for piece in pieces)
            found[name, question] = text.removeprefix(prompt.separator)
    return found


class Clients:
    """``count`` clients that ask one question after the other."""

    def __init__(self, url: str, expected: Mapping[Key, str], options: argparse.Namespace) -> None:
        self._url, self._expected, self._options = url, expected, options
        self._draw = random.Random(options.seed)
        self.outcomes: Counter[str] = Counter()

    def ask(self, requests: int) -> None:
        """Send that many requests."""
        asyncio.run(self._ask(requests))

    async def _ask(self, requests: int) -> None:
        left = iter(range(requests))
        async with httpx.AsyncClient(
            base_url=self._url,
            trust_env=False,
            timeout=120,
            limits=httpx.Limits(max_connections=self._options.clients),
        ) as client:

            async def one_client() -> None:
                for _ in left:
                    self.outcomes[await self._one(client)] += 1

            await asyncio.gather(*(one_client() for _ in range(self._options.clients)))

    async def _one(self, client: httpx.AsyncClient) -> str:
        key = self._draw.choice(list(self._expected))
        body = {
            "model": key[0],
            "messages": [{"role": "user", "content": key[1]}],
            "temperature": 0,
            "max_tokens": TOKENS,
            "stream": self._draw.random() < 0.5,
        }
        leaves = self._draw.random() < self._options.hang_ups
        stay = self._draw.random() * LONGEST_STAY if leaves else None
        try:
            async with asyncio.timeout(stay):
                found = await _answer(client, body)
        except TimeoutError:
            return "hung up"
        except httpx.HTTPError as error:
            return f"lost ({type(error).__name__})"
        return "right" if found == self._expected[key] else "wrong"


async def _answer(client: httpx.AsyncClient, body: dict) -> str:
    if not body["stream"]:
        response = await client.post(CHAT, json=body)
        return str(response.raise_for_status().json()["choices"][0]["message"]["content"])
    text = ""
    async with client.stream("POST", CHAT, json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
    return text


def _held(front: Front, engine: Engine) -> dict[str, float]:
    """What must not grow, once all calls have ended."""
    while front.service.calls or engine.stats().running or engine.stats().waiting:
        time.sleep(0.05)
    time.sleep(0.5)  # connections that the clients have closed
    process = psutil.Process()
    return {
        "MiB of memory": process.memory_info().rss / 2**20,
        "open files": process.num_fds(),
        "threads": process.num_threads(),
        "bytes in slots": engine.stats().cache_bytes_used,
        "calls": front.service.calls,
    }


def main(arguments: list[str] | None = None) -> int:
    """Print the outcomes and what has grown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--hang-ups", type=float, default=0.3, help="share of the clients")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    base = load_base("embedded", device="cpu", fresh=True)
    shapes, store = find_targets(base.model, "all-linear"), AdapterStore(base)
    for k in range(options.adapters):
        store.add(f"adapter-{k}", random_adapter(shapes, 2 + 2 * k, k))
    engine, prompts = Engine(base, store), Prompts(base.tokenizer)
    expected = _alone(engine, prompts)
    print(f"{len(set(expected.values()))} of {len(expected)} answers are distinct")
    service = Service(engine, store, prompts, TokenBytes(base.tokenizer), base_name="embedded")
    front = Front(service, make_app(service), bind("127.0.0.1", 0))
    front.start()
    clients, began = Clients(front.url, expected, options), time.monotonic()
    clients.ask(options.requests // 5)
    before = _held(front, engine)
    clients.ask(options.requests - options.requests // 5)
    after, seconds = _held(front, engine), time.monotonic() - began
    calm = front.stop(30)
    outcomes = ", ".join(f"{count} {name}" for name, count in clients.outcomes.items())
    print(f"{options.requests} requests in {seconds:.0f} s: {outcomes}")
    for name, value in before.items():
        print(f"{name:<16} {value:8.1f} after warm-up, {after[name]:8.1f} at the end")
    grown = after["MiB of memory"] - before["MiB of memory"] > 50
    grown |= after["open files"] > before["open files"] + 4 or after["bytes in slots"] > 0
    return int(grown or bool(clients.outcomes.keys() - {"right", "hung up"}) or not calm)


if __name__ == "__main__":
    raise SystemExit(main())
