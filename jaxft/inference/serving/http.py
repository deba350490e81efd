"""HTTP: OpenAI's routes over an engine, as an ASGI application of starlette."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as Asking
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jaxft.inference.asked import Before
from jaxft.inference.serving.engine import Engine, Full, Piece, Row, Stopping
from jaxft.inference.serving.models import Planned, find, planned
from jaxft.inference.serving.protocol import (
    Refused,
    Request,
    read_chat,
    read_completion,
    read_json,
)
from jaxft.inference.serving.replies import Choice, Reply
from jaxft.inference.serving.versions import Versions

BODY_SECONDS = 60  # in which a body comes
SEND_SECONDS = 60  # in which a client takes a part of a stream

BODY = {"type": "http.response.body"}

Handler = Callable[["Server", Asking], Awaitable[Any]]


class Server:
    """What the routes share.

    Args:
        engine: which answers.
        versions: what is served.
        key: what a client must know; "" for nothing.
        most_bytes: of a body.
        before: what puts something before prompts; None: nothing does.
    """

    def __init__(
        self,
        engine: Engine,
        versions: Versions,
        *,
        key: str = "",
        most_bytes: int = 2**22,
        before: Before | None = None,
    ) -> None:
        self.engine, self.versions, self.key, self.most_bytes = engine, versions, key, most_bytes
        self.before = before

    def application(self) -> Starlette:
        """The routes as an ASGI application."""
        routes = [
            ("/v1/models", _models, "GET"),
            ("/v1/models/{name:path}", _model, "GET"),
            ("/v1/completions", _completions, "POST"),
            ("/v1/chat/completions", _chat, "POST"),
            ("/v1/load_lora_adapter", _put, "POST"),
            ("/v1/unload_lora_adapter", _drop, "POST"),
            ("/health", _health, "GET"),
        ]
        listed = [
            Route(path, self._answering(handler), methods=[method])
            for path, handler, method in routes
        ]
        return Starlette(routes=listed, exception_handlers={HTTPException: _unknown})

    def _answering(self, handler: Handler) -> Callable[[Asking], Awaitable[Response]]:
        """A handler as starlette takes it: what it refuses is an error object, as is what goes wrong in it."""

        async def answer(asking: Asking) -> Response:
            try:
                self._check_key(asking)
                found = await handler(self, asking)
            except Refused as error:
                return JSONResponse(error.body(), error.status, error.headers)
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception as error:
                print(f"jaxft: serve: {type(error).__name__}: {error}", file=sys.stderr)
                failed = Refused(500, "the server failed to answer")
                return JSONResponse(failed.body(), failed.status)
            return found if isinstance(found, Response) else JSONResponse(found)

        return answer

    def _check_key(self, asking: Asking) -> None:
        given = asking.headers.get("authorization", "").removeprefix("Bearer ")
        known = not self.key or hmac.compare_digest(given.encode(), self.key.encode())
        if not known and asking.url.path != "/health":
            told = "a key is needed: Authorization: Bearer KEY"
            raise Refused(401, told, None, "invalid_api_key")

    def submit(self, plans: Sequence[Planned]) -> tuple[list[Row], Any]:
        """The rows of what is asked, and the queue to which all the answers' (index, piece) come."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Piece]]()

        def telling(index: int) -> Callable[[Piece], None]:
            def tell(piece: Piece) -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                    loop.call_soon_threadsafe(queue.put_nowait, (index, piece))

            return tell

        for index, plan in enumerate(plans):
            if plan.ask is None:
                queue.put_nowait((index, Piece(plan.said, end="stop")))
        asks = {index: plan.ask for index, plan in enumerate(plans) if plan.ask is not None}
        try:
            return self.engine.submit(list(asks.values()), list(map(telling, asks))), queue
        except Full:
            wait = {"Retry-After": str(self.engine.seconds_to_wait())}
            raise Refused(429, "too many requests wait already", None, "full", wait) from None
        except Stopping:
            raise Refused(503, "the server stops", None, "stopping", {"Retry-After": "5"}) from None


class Events(Response):
    """Server-sent events from an iterator, which is closed as soon as the client is gone or takes nothing more."""

    media_type = "text/event-stream"

    def __init__(self, parts: AsyncIterator[str]) -> None:
        super().__init__(headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self.parts = parts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Sends the parts as they come."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        sending = asyncio.ensure_future(self._send(send, start))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _send(self, send: Any, start: dict[str, Any]) -> None:
        try:
            await _sent(send, start)
            async for part in self.parts:
                await _sent(send, {**BODY, "body": part.encode(), "more_body": True})
            await _sent(send, {**BODY, "body": b"", "more_body": False})
        except (OSError, TimeoutError):
            pass  # the client is gone
        finally:
            await self.parts.aclose()  # type: ignore[attr-defined]


async def _sent(send: Any, message: dict[str, Any]) -> None:
    async with asyncio.timeout(SEND_SECONDS):
        await send(message)


async def _left(receive: Any) -> None:
    """Returns once the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _unknown(asking: Asking, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = "there is no such route" if error.status_code == 404 else str(error.detail)
    refused = Refused(error.status_code, f"{asking.method} {asking.url.path}: {told}")
    return JSONResponse(refused.body(), error.status_code, error.headers)


async def _health(server: Server, asking: Asking) -> Any:
    """How busy the engine is; 503 once it answers nothing any more."""
    alive = server.engine.failure is None and not server.engine.closed
    state = {"status": "ok" if alive else "stopped", **server.engine.load()}
    return JSONResponse(state, 200 if alive else 503)


async def _models(server: Server, asking: Asking) -> Any:
    return {"object": "list", "data": [model.card() for model in server.versions.models.values()]}


async def _model(server: Server, asking: Asking) -> Any:
    return find(server.versions.models, asking.path_params["name"]).card()


async def _put(server: Server, asking: Asking) -> Any:
    body = read_json(await _body(asking, server.most_bytes))
    named = (body.get("lora_name"), body.get("lora_path"))
    return (await asyncio.to_thread(server.versions.put, server.engine, *named)).card()


async def _drop(server: Server, asking: Asking) -> Any:
    body = read_json(await _body(asking, server.most_bytes))
    await asyncio.to_thread(server.versions.drop, body.get("lora_name"))
    return {"id": body["lora_name"], "object": "model", "deleted": True}


async def _completions(server: Server, asking: Asking) -> Any:
    return await _answer(server, asking, read_completion)


async def _chat(server: Server, asking: Asking) -> Any:
    return await _answer(server, asking, read_chat)


async def _answer(server: Server, asking: Asking, read: Callable[[dict[str, Any]], Request]) -> Any:
    request = read(read_json(await _body(asking, server.most_bytes)))
    model, engine = find(server.versions.models, request.model), server.engine
    sizes = {"context": engine.context, "vocabulary": engine.config.vocabulary}
    plans = await asyncio.to_thread(planned, model, request, before=server.before, **sizes)
    choices = [
        Choice(index, plan.echo, plan.prompt_tokens, row=plan.row)
        for index, plan in enumerate(plans)
    ]
    rows, queue = server.submit(plans)
    reply = Reply(request, model.tokenizer)
    if request.stream:
        return Events(_events(server, request, reply, choices, rows, queue))
    return await _whole(server, asking, reply, choices, rows, queue)


async def _whole(
    server: Server,
    asking: Asking,
    reply: Reply,
    choices: list[Choice],
    rows: list[Row],
    queue: asyncio.Queue[tuple[int, Piece]],
) -> Any:
    """The answer once it is whole; rows whose client is gone are given up."""
    leaving = asyncio.ensure_future(_left(asking.receive))
    try:
        while not all(choice.end for choice in choices):
            coming = asyncio.ensure_future(queue.get())
            done, _ = await asyncio.wait({coming, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if coming not in done:
                coming.cancel()
                raise ClientDisconnect
            index, piece = coming.result()
            _check_end(piece)
            choices[index].add(piece)
    finally:
        leaving.cancel()
        server.engine.cancel(rows)
    return reply.whole(choices, {})


async def _events(
    server: Server,
    request: Request,
    reply: Reply,
    choices: list[Choice],
    rows: list[Row],
    queue: asyncio.Queue[tuple[int, Piece]],
) -> AsyncIterator[str]:
    """The answer as server-sent events; rows are given up when nobody listens any more."""
    try:
        for choice in choices:
            if (opening := reply.opening(choice)) is not None:
                yield _event(opening)
        while not all(choice.end for choice in choices):
            index, piece = await queue.get()
            _check_end(piece)
            part = reply.part(choices[index], piece)
            choices[index].add(piece)
            if part is not None:
                yield _event(part)
        if request.usage:
            yield _event(reply.usage_part(choices))
    except Refused as error:
        yield _event(error.body())
    finally:
        server.engine.cancel(rows)
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _check_end(piece: Piece) -> None:
    if piece.end == "error":
        raise Refused(500, "the engine failed", None, "engine_failed")
    if piece.end == "cancelled":
        raise Refused(503, "the server stops", None, "stopping")


async def _body(asking: Asking, most: int) -> bytes:
    """The body, if it is not larger than may be and comes in time."""
    large = Refused(
        413, f"the body has more than the {most:,} bytes that are read", None, "too_large"
    )
    declared = asking.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > most:
        raise large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in asking.stream():
                body += part
                if len(body) > most:
                    raise large
    except TimeoutError:
        raise Refused(408, f"the body did not come within {BODY_SECONDS} seconds") from None
    return bytes(body)
