"""A SuperLink that has enough requests open turns further ones away, polls first."""

import asyncio

from flexlora.server.transport.admission import MOST_OPEN, MOST_OPEN_POLLS, limit_open_requests
from flexlora.server.transport.flower_private import outermost_middleware

POLL, PULL, CONTROL = (
    "/v1/fleet/pull-messages",
    "/v1/fleet/pull-object",
    "/v1/control/list-runs",
)


def limited():
    """An application whose requests stay open until ``done`` is set."""

    class App:
        def __init__(self):
            self.done, self.served = asyncio.Event(), []

        async def __call__(self, scope, receive, send):
            self.served.append(scope["path"])
            await self.done.wait()
            if scope.get("fails"):
                raise ValueError("what a layer below may do")
            await send({"type": "http.response.start", "status": 200, "headers": []})
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
        assert len(app.served) == MOST_OPEN + 1
        app.done.set()
        assert {(await task)[0] for task in (*polls, *pulls, owner)} == {200}
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


def test_it_is_the_first_layer_of_flowers_application():
    from flwr.superlink.main import _get_middleware

    assert _get_middleware()[0].cls is outermost_middleware()
