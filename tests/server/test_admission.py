"""A SuperLink that has enough requests open turns further ones away, polls first; few are worked on
at once, and a slow link holds no turn."""

import asyncio

from flexlora.server.transport.admission import (
    MOST_AT_ONCE,
    MOST_BYTES,
    MOST_OPEN,
    MOST_OPEN_POLLS,
    limit_open_requests,
)
from flexlora.server.transport.flower_private import outermost_middleware

POLL, PULL, CONTROL = (
    "/v1/fleet/pull-messages",
    "/v1/fleet/pull-object",
    "/v1/control/list-runs",
)


def limited():
    """An application whose requests stay open until ``done`` is set; it answers with the body."""

    class App:
        def __init__(self):
            self.done, self.served, self.parts = asyncio.Event(), [], []

        async def __call__(self, scope, receive, send):
            self.served.append(scope["path"])
            await self.done.wait()
            if scope.get("fails"):
                raise ValueError("what a layer below may do")
            more, body = True, b""
            while more:
                event = await receive()
                more, body = event["more_body"], body + event["body"]
                self.parts.append(len(event["body"]))
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for letter in body:
                event = {"type": "http.response.body", "body": bytes([letter]), "more_body": True}
                await send(event)
            await send({"type": "http.response.body", "body": b""})

    limit_open_requests(App)
    return App()


async def ask(app, path, parts=1, **scope):
    """The status of one request and how many parts of its body were read."""
    left, sent = parts, []

    async def receive():
        nonlocal left
        left -= 1
        return {"type": "http.request", "body": b"x", "more_body": left > 0}

    async def send(message):
        sent.append(message)

    await app({"type": "http", "path": path, **scope}, receive, send)
    return sent[0]["status"], parts - left


async def started(*requests):
    tasks = [asyncio.create_task(request) for request in requests]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return tasks


def test_polls_are_turned_away_before_the_requests_of_a_round_and_the_owner_never():
    async def scene():
        app = limited()
        polls = await started(*(ask(app, POLL) for _ in range(MOST_OPEN_POLLS)))
        assert await ask(app, POLL) == (503, 1)
        rest = MOST_OPEN - MOST_OPEN_POLLS
        pulls = await started(*(ask(app, PULL) for _ in range(rest)))
        assert await ask(app, PULL, parts=5) == (503, 5), "the body is read: the connection lives"
        (owner,) = await started(ask(app, CONTROL))
        assert app.served == [POLL] * MOST_AT_ONCE + [CONTROL], "the others wait for their turn"
        app.done.set()
        assert {(await task)[0] for task in (*polls, *pulls, owner)} == {200}
        assert len(app.served) == MOST_OPEN + 1
        assert (await ask(app, POLL))[0] == 200, "there is room again"

    asyncio.run(scene())


def test_a_request_that_fails_or_is_given_up_leaves_its_place():
    async def scene():
        app = limited()
        tasks = await started(*(ask(app, PULL, fails=True) for _ in range(MOST_OPEN)))
        tasks[0].cancel()
        app.done.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(result) for result in results} == {ValueError, asyncio.CancelledError}
        assert (await ask(app, POLL))[0] == 200

    asyncio.run(scene())


def test_a_request_comes_whole_and_its_answer_goes_whole():
    async def scene():
        app, sent = limited(), []
        app.done.set()
        parts = iter([b"a", b"bc", b"", b"d"])

        async def receive():
            body = next(parts)
            return {"type": "http.request", "body": body, "more_body": body != b"d"}

        async def send(event):
            sent.append(event)

        await app({"type": "http", "path": PULL}, receive, send)
        assert app.parts == [4], "one part for the layers below"
        assert [event.get("body") for event in sent] == [None, b"abcd"]
        assert not sent[-1].get("more_body")

    asyncio.run(scene())


def test_a_link_that_is_slow_holds_no_turn():
    async def scene():
        app, arrived = limited(), asyncio.Event()
        app.done.set()

        async def slow():
            await arrived.wait()
            return {"type": "http.request", "body": b"x", "more_body": False}

        async def stuck(event):
            await arrived.wait()

        async def whole():
            return {"type": "http.request", "body": b"x", "more_body": False}

        scope = {"type": "http", "path": PULL}
        slow_ones = [app(scope, slow, stuck) for _ in range(MOST_AT_ONCE)]
        tasks = await started(*slow_ones, *(app(scope, whole, stuck) for _ in range(MOST_AT_ONCE)))
        assert (await asyncio.wait_for(ask(app, PULL), 10))[0] == 200
        arrived.set()
        await asyncio.gather(*tasks)

    asyncio.run(scene())


def test_a_body_beyond_the_limit_is_refused_before_any_work():
    async def scene():
        app, sent = limited(), []
        app.done.set()
        left = 2 * MOST_BYTES // 2**20

        async def receive():
            nonlocal left
            left -= 1
            return {"type": "http.request", "body": bytes(2**20), "more_body": left > 0}

        async def send(event):
            sent.append(event)

        await app({"type": "http", "path": PULL}, receive, send)
        assert (sent[0]["status"], left, app.served) == (413, 0, [])

        async def gone():
            return {"type": "http.disconnect"}

        await app({"type": "http", "path": PULL}, gone, send)
        assert (len(sent), app.served) == (2, []), "a client that hung up is not served"

    asyncio.run(scene())


def test_it_is_the_first_layer_of_flowers_application():
    from flwr.superlink.main import _get_middleware

    assert _get_middleware()[0].cls is outermost_middleware()
