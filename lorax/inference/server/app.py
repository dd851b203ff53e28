"""The routes.

POST /v1/chat/completions  /v1/completions      answers, whole or streamed
GET  /v1/models  /v1/models/NAME                the base and its adapters
POST /v1/load_lora_adapter  /v1/unload_lora_adapter     vLLM's
GET  /health  /metrics                          without a key
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from lorax.adapters.tables import embedding_weight
from lorax.errors import LoraxError
from lorax.inference.server import replies
from lorax.inference.server.adapters import Models, Served
from lorax.inference.server.answer import Scored
from lorax.inference.server.asking import Answers, encoded
from lorax.inference.server.engine import Closed, Engine
from lorax.inference.server.metrics import Metrics
from lorax.inference.server.protocol import (
    Asked,
    Chat,
    Completion,
    LoadAdapter,
    Refused,
    UnloadAdapter,
    read_request,
)

_UNREAD = (401, 404, 405, 408, 413, 415)  # may be answered before the body has come


def make_app(engine: Engine, models: Models, api_key: str | None = None) -> ASGIApp:
    """The ASGI application; api_key: what clients of /v1 must know, None: nothing."""
    pages = Pages(engine, models)
    routes = [
        Route("/v1/chat/completions", pages.chat, methods=["POST"]),
        Route("/v1/completions", pages.completion, methods=["POST"]),
        Route("/v1/models", pages.models),
        Route("/v1/models/{name:path}", pages.model),
        Route("/v1/load_lora_adapter", pages.load, methods=["POST"]),
        Route("/v1/unload_lora_adapter", pages.unload, methods=["POST"]),
        Route("/health", pages.health),
        Route("/metrics", pages.metrics),
    ]
    handlers: Any = {
        Refused: _refused,
        LoraxError: _lorax_error,
        HTTPException: _http_error,
        Closed: _closed,
        ClientDisconnect: _gone,
        Exception: _bug,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    return Counted(Keyed(app, api_key), pages.counted)


class Pages:
    """What stands behind the routes."""

    def __init__(self, engine: Engine, models: Models):
        self.engine, self.served = engine, models
        self.vocabulary = embedding_weight(engine.model).shape[0]
        self.counted = Metrics()

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        asked = read_request(Chat, await self._body(request))
        return await self._answer(request, asked, replies.Reply(asked.model))

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions."""
        asked = read_request(Completion, await self._body(request))
        return await self._answer(request, asked, replies.CompletionReply(asked.model))

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return as_response(replies.models(self.served.all()))

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        return as_response(replies.model(self._find(request.path_params["name"]), self.served.base))

    async def load(self, request: Request) -> Response:
        """POST /v1/load_lora_adapter."""
        asked = read_request(LoadAdapter, await self._body(request))
        given = asked.lora_name, asked.lora_path, asked.load_inplace
        await run_in_threadpool(self.served.load, *given)
        return Response(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        """POST /v1/unload_lora_adapter."""
        asked = read_request(UnloadAdapter, await self._body(request))
        if not await run_in_threadpool(self.served.unload, asked.lora_name):
            raise _no_model(asked.lora_name, "lora_name")
        return Response(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")

    async def health(self, request: Request) -> Response:
        """GET /health: 200 while the engine answers."""
        alive = self.engine.is_alive
        return as_response({"status": "ok" if alive else "ending"}, 200 if alive else 503)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        text = self.counted.text(self.engine, len(self.served.all()) - 1)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    def _find(self, name: str, param: str = "model") -> Served:
        found = self.served.find(name)
        if found is None:
            raise _no_model(name, param)
        return found

    async def _body(self, request: Request) -> bytes:
        """The whole body, if it is JSON by its type, small enough, and there in time."""
        limits = self.engine.limits
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which no web page may send here without being asked
            raise Refused(f"content-type {kind[:80]!r}; expected application/json", 415)
        found = bytearray()
        try:
            async with asyncio.timeout(limits.patience_seconds):
                async for part in request.stream():
                    found += part
                    if len(found) > limits.body_bytes:
                        raise Refused(f"the body is larger than {limits.body_bytes} bytes", 413)
        except TimeoutError:
            raise Refused(f"no body within {limits.patience_seconds:g} seconds", 408) from None
        return bytes(found)

    async def _answer(
        self, request: Request, asked: Chat | Completion, reply: replies.Reply
    ) -> Response:
        served = self._find(asked.model)
        prompts = await encoded(asked, served, self.vocabulary)
        answers = Answers(self.engine, served, asked, prompts)
        if asked.stream:
            return EventStream(_chunks(answers, asked, reply), answers.cancel)
        try:
            whole = await unless_gone(request.receive, _whole(answers, asked, reply))
        finally:
            answers.cancel()
        return as_response(whole)


async def _whole(
    answers: Answers, asked: Chat | Completion, reply: replies.Reply
) -> dict[str, Any]:
    texts = [""] * len(answers.all)
    told: list[list[Scored]] = [[] for _ in texts]
    finish: list[str | None] = [None for _ in texts]
    async for index, piece in answers:
        texts[index] += piece.text
        told[index] += piece.scored
        finish[index] = piece.finish
    choices = [
        reply.choice(index, text, None if asked.top is None else told[index], finish[index])
        for index, text in enumerate(texts)
    ]
    return reply.whole(choices, replies.usage(answers.prompt_tokens, answers.made))


async def _chunks(
    answers: Answers, asked: Asked, reply: replies.Reply
) -> AsyncGenerator[dict[str, Any], None]:
    for index in range(len(answers.all)):
        for choice in reply.opening(index):
            yield reply.chunk([choice])
    top = asked.top if isinstance(asked, Chat | Completion) else None
    async for index, piece in answers:
        told = None if top is None else piece.scored
        for choice in reply.delta(index, piece.text, told, piece.finish):
            yield reply.chunk([choice])
    if asked.stream_options.include_usage:
        yield reply.chunk([], replies.usage(answers.prompt_tokens, answers.made))


class EventStream(Response):
    """Objects as server-sent events, until they end or the client is gone; then `close` is called.

    An error on the way is the last event: the status was sent long ago.
    """

    def __init__(self, objects: AsyncGenerator[dict[str, Any], None], close: Callable[[], None]):
        self.objects, self.close = objects, close
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's."""
        try:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            await unless_gone(receive, self._send_all(send))
        except ClientDisconnect:
            pass
        finally:
            self.close()

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self.objects) as objects:
            try:
                async for one in objects:
                    await send(_event(replies.as_json(one)))
            except Refused as error:
                body = replies.error(str(error), error.status, code=error.code)
                await send(_event(replies.as_json(body)))
        await send(_event(b"[DONE]", more=False))


def _event(data: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": more}


async def unless_gone(receive: Receive, work: Any) -> Any:
    """The result of `work`, which is cancelled when the client leaves.

    Raises:
        ClientDisconnect: it has left.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Keyed:
    """/v1 for those that know the key."""

    def __init__(self, app: ASGIApp, api_key: str | None):
        self.app = app
        self.wanted = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's."""
        is_open = self.wanted is None or scope["type"] != "http"
        if not is_open and scope["path"] not in ("/health", "/metrics"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.wanted or b""):
                body = replies.error("Incorrect API key provided.", 401, code="invalid_api_key")
                await as_response(body, 401)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class Counted:
    """Counts answers by path and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's."""

        async def counting(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.metrics.count(scope["path"], message["status"])
            await send(message)

        await self.app(scope, receive, counting)


def as_response(value: Any, status: int = 200) -> Response:
    """A value as JSON. Where the request was not read to its end, nothing more of it is."""
    headers = {"connection": "close"} if status in _UNREAD else None
    return Response(replies.as_json(value), status, headers, media_type="application/json")


def _no_model(name: str, param: str) -> Refused:
    return Refused(
        f"The model {json.dumps(name[:256])} does not exist.", 404, param, "model_not_found"
    )


async def _refused(request: Request, error: Refused) -> Response:
    return as_response(
        replies.error(str(error), error.status, error.param, error.code), error.status
    )


async def _lorax_error(request: Request, error: LoraxError) -> Response:
    return as_response(replies.error(str(error), 400), 400)


async def _http_error(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    found = as_response(replies.error(message, error.status_code), error.status_code)
    found.headers.update(error.headers or {})
    return found


async def _closed(request: Request, error: Closed) -> Response:
    return as_response(replies.error("the server is ending", 503), 503)


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody reads it; nginx's word


async def _bug(request: Request, error: Exception) -> Response:
    return as_response(replies.error("internal error", 500), 500)
