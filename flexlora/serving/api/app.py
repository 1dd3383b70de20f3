"""The endpoints: OpenAI's chat and completions, models, health and metrics."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

import flexlora
from flexlora.serving.api.answers import Answers, ChatAnswers, CompletionAnswers
from flexlora.serving.api.bodies import ChatBody, CompletionBody
from flexlora.serving.api.calls import Call, CallEnded
from flexlora.serving.api.errors import add_handlers
from flexlora.serving.api.guard import HUNG_UP
from flexlora.serving.api.loading import Loading, add_loading
from flexlora.serving.api.metrics import CONTENT_TYPE_LATEST
from flexlora.serving.api.service import Service
from flexlora.serving.api.streams import EventStream
from flexlora.serving.requests import Piece, Sampling
from flexlora.serving.requests import Request as EngineRequest

__all__ = ["make_app"]

LONG_TEXT = 20_000  # characters beyond which a prompt is tokenised outside the event loop


def make_app(service: Service, loading: Loading | None = None) -> FastAPI:
    """The application of ``service``; ``loading``: adapters may be loaded and dropped through it.

    The pages with interactive documentation are off: they would load scripts from elsewhere.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.begin()
        yield

    app = FastAPI(
        title="FlexLoRA",
        version=flexlora.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    add_handlers(app)
    _add_generation(app, service)
    _add_state(app, service)
    add_loading(app, service, loading)
    return app


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        adapter = service.adapter_of(body.model)
        turns, sampling = body.turns(), body.sampling()
        size = sum(len(content) for _, content in turns)
        prompt = await _off_loop(size, service.prompts.chat, turns)
        requests = _requests(adapter, [prompt.ids], sampling, prompt.ends)
        answers = ChatAnswers(
            call_id=f"chatcmpl-{uuid.uuid4().hex}",
            model=body.model,
            prompt_tokens=len(prompt.ids),
            ends=service.engine.ends.union(prompt.ends),
            token_bytes=service.token_bytes,
            logprobs=body.logprobs,
            separator=prompt.separator,
            with_usage=body.with_usage,
        )
        return await _answer(service, requests, answers, request, stream=body.stream)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        adapter, sampling = service.adapter_of(body.model), body.sampling()
        prompts = [
            await _off_loop(len(prompt), service.prompts.text, prompt)
            if isinstance(prompt, str)
            else prompt
            for prompt in body.prompts()
        ]
        requests = _requests(adapter, prompts, sampling)
        answers = CompletionAnswers(
            call_id=f"cmpl-{uuid.uuid4().hex}",
            model=body.model,
            prompt_tokens=sum(map(len, prompts)),
            ends=service.engine.ends,
            token_bytes=service.token_bytes,
            logprobs=body.logprobs is not None,
            with_usage=body.with_usage,
        )
        return await _answer(service, requests, answers, request, stream=body.stream)


async def _off_loop(size: int, encode: Any, text: Any) -> Any:
    """``encode(text)``, in another thread where it takes long."""
    return encode(text) if size < LONG_TEXT else await run_in_threadpool(encode, text)


def _requests(
    adapter: str | None,
    prompts: Sequence[list[int]],
    sampling: Sequence[Sampling],
    ends: tuple[int, ...] = (),
) -> list[EngineRequest]:
    """One for each prompt and choice, in OpenAI's order: all choices of a prompt, then the next."""
    return [
        EngineRequest(
            request_id=uuid.uuid4().hex, adapter=adapter, prompt_ids=ids, ends=ends, sampling=one
        )
        for ids in prompts
        for one in sampling
    ]


async def _answer(
    service: Service,
    requests: Sequence[EngineRequest],
    answers: Answers,
    request: Request,
    *,
    stream: bool,
) -> Response:
    """The whole answer, or a response that streams it."""
    call = service.call(requests, each_piece=stream)
    if stream:
        return EventStream(service, call, answers)
    try:
        return JSONResponse(answers.whole(await _all_pieces(call, request)))
    except CallEnded:
        return Response(status_code=HUNG_UP)
    finally:
        service.leave(call)


async def _all_pieces(call: Call, request: Request) -> list[tuple[int, Piece]]:
    async with call.while_connected(request.receive):
        return [item async for batch in call.batches() for item in batch]


def _add_state(app: FastAPI, service: Service) -> None:
    def described(name: str) -> dict[str, Any]:
        parent = None if name == service.base_name else service.base_name
        return {
            "id": name,
            "object": "model",
            "created": service.started_at,
            "owned_by": "flexlora",
            "root": name,
            "parent": parent,
            "max_model_len": service.engine.max_length,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described(name) for name in service.models()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return described(service.adapter_of(name) or service.base_name)

    @app.get("/health")
    async def health() -> Response:
        cause = service.illness()
        body = {"status": cause or "ok"}
        return JSONResponse(body, 503 if cause else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type=CONTENT_TYPE_LATEST)
