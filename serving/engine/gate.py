"""The front of vLLM, inside its API server processes: ASGI middleware, so that no request crosses one process
more than it must.

vLLM imports `serving.engine.gate.Gate` (its option --middleware) in its own interpreter, which sees our
package `serving` and nothing else of ours: only Python's library, uvicorn (vLLM's own) and `ledger`, `state`,
`limiter`, `admission`, `toll` with what it needs, and `requestlog.recorder` are used. One Gate per API server
process, on its event loop.

It keeps the limit (429, Retry-After), answers the probes from the ledger's state, says `Connection: close`
while the engine drains, appends our metrics to the engine's, and opens a unix socket of its own,
`server-SLOT`, on which the supervisor probes this very process without a limit: the port is shared by all
server processes, so a request to it says nothing about any one of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

from serving import service
from serving.engine import admission, limiter, toll
from serving.engine.budget import Budget
from serving.engine.ledger import Ledger
from serving.engine.requestlog.recorder import Exchange, Recorder
from serving.engine.state import State

RUN_DIRECTORY = "GLOWPLUG_ENGINE_RUN"
"""Environment variable: the supervisor's run directory."""

LEDGER_NAME, BUDGET_NAME, METRICS_NAME = "ledger", "budget", "metrics.prom"
_TOKENS = "vllm:iteration_tokens_total_count"
_CACHE = "vllm:kv_cache_usage_perc"
_SUPERVISOR = "glowplug.supervisor"
"""Key in the scope of a request that came over the unix socket."""
_JSON = (b"content-type", b"application/json")
_CLOSE = (b"connection", b"close")
_TENANT = service.TENANT_HEADER.encode()
_WITHOUT_BODY = frozenset({"GET", "HEAD", "OPTIONS", "DELETE"})

_Message = MutableMapping[str, Any]
_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]


def server_socket(directory: Path, slot: int) -> Path:
    """Where the server process of a slot answers the supervisor."""
    return directory / f"server-{slot}"


class Gate:
    """ASGI middleware."""

    def __init__(self, app: _App) -> None:
        self._app = app
        self._directory = Path(os.environ[RUN_DIRECTORY])
        self._ledger = Ledger(self._directory / LEDGER_NAME)
        self._tokens, self._cache = _sum_of(_TOKENS), _sum_of(_CACHE)
        self._budget = Budget(self._directory / BUDGET_NAME)
        self._limiter: limiter.Limiter | None = None
        self._toll: toll.Toll | None = None
        self._recorder = Recorder(self._directory)

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        if scope["type"] == "lifespan":
            async with self._serving(scope["app"]):
                await self._app(scope, receive, send)
        elif scope["type"] != "http" or _SUPERVISOR in scope:
            await self._app(scope, receive, send)
        elif scope["path"] in admission.PROBES:
            status, body = admission.probe(scope["path"], self._ledger.state)
            await _respond(send, status, body)
        elif scope["path"] == admission.METRICS:
            await self._metrics(scope, receive, send)
        elif admission.counts(scope["path"]):
            await self._limited(scope, receive, send)
        else:
            await self._app(scope, receive, self._closing(send))

    async def _limited(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        exchange = self._recorder.begin(scope["method"], scope["path"], _headers(scope))
        if exchange is not None:
            receive, send = _recorded(exchange, receive, send)
        body = _Body(receive)
        if scope["method"] in _WITHOUT_BODY:
            await self._admitted(scope, body, send, exchange, None)
            return
        assert self._toll is not None
        whole = await body.whole()
        if whole is None:
            if exchange is not None:
                exchange.end("client_gone")
            return
        try:
            passage = self._toll.enter(_tenant(scope), scope["path"], whole, clamps=True)
        except toll.RefusedError as exc:
            if exchange is not None:
                exchange.end("rejected")
            await _overloaded(send, exc.limit, str(exc), exc.retry_after_seconds)
            return
        body.put(passage.body)
        if passage.body is not whole:
            scope = _of_length(scope, len(passage.body))
        try:
            await self._admitted(
                scope, body, _paid(passage, send) if passage.measured else send, exchange, passage
            )
        finally:
            passage.close()

    async def _admitted(
        self,
        scope: _Scope,
        body: _Body,
        send: _Send,
        exchange: Exchange | None,
        passage: toll.Passage | None,
    ) -> None:
        assert self._limiter is not None
        entered_ns = self._limiter.enter_at_once()
        if entered_ns is None:
            try:
                entered_ns = await body.unless_gone(self._limiter.enter())
            except limiter.RejectedError as exc:
                if exchange is not None:
                    exchange.end("rejected")
                await _overloaded(send, "in_flight", f"This replica is {exc}", exc.retry_after_seconds)
                return
            if entered_ns is None:
                if passage is not None:
                    passage.turned_away()
                if exchange is not None:
                    exchange.end("client_gone")
                return
        status, failed = 0, True
        closing = self._closing(send)

        async def watch(message: _Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await closing(message)

        if exchange is not None:
            exchange.entered()
        try:
            await self._app(scope, body.receive, watch)
            failed = status >= 500
        finally:
            self._limiter.leave(entered_ns, failed=failed)
            if exchange is not None:
                exchange.end("failed" if failed else "client_gone")  # unless its answer was whole before

    def _closing(self, send: _Send) -> _Send:
        """While the engine drains, tells clients to go elsewhere next time."""

        async def closing(message: _Message) -> None:
            if message["type"] == "http.response.start" and self._ledger.state is State.DRAINING:
                message["headers"] = [*message.get("headers", ()), _CLOSE]
            await send(message)

        return closing

    async def _metrics(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """The engine's metrics and, after them, the supervisor's. As plain text: two texts of the older
        format make one, two of OpenMetrics do not."""
        headers = [each for each in scope["headers"] if each[0] not in (b"accept", b"accept-encoding")]
        started: list[_Message] = []
        body = bytearray()

        async def collect(message: _Message) -> None:
            if message["type"] == "http.response.start":
                started.append(message)
            else:
                body.extend(message.get("body", b""))

        await self._app({**scope, "headers": [*headers, (b"accept", b"text/plain")]}, receive, collect)
        with contextlib.suppress(OSError):
            body += (self._directory / METRICS_NAME).read_bytes()
        kept = [each for each in started[0]["headers"] if each[0].lower() != b"content-length"]
        length = (b"content-length", str(len(body)).encode())
        await send({**started[0], "headers": [*kept, length]})
        await send({"type": "http.response.body", "body": bytes(body)})

    @contextlib.asynccontextmanager
    async def _serving(self, application: _App) -> AsyncIterator[None]:
        """While the application lives: claim a slot, beat, answer the supervisor."""
        import uvicorn

        async def unlimited(scope: _Scope, receive: _Receive, send: _Send) -> None:
            await application({**scope, _SUPERVISOR: True}, receive, send)

        self._limiter = limiter.Limiter(
            self._ledger, self._directory, lambda: int(self._tokens()), self._cache
        )
        self._toll = toll.Toll(self._budget, self._ledger, self._limiter.slot)
        await self._limiter.start()
        await self._recorder.start()
        path = server_socket(self._directory, self._limiter.slot)
        path.unlink(missing_ok=True)
        door = socket.socket(socket.AF_UNIX)
        os.fchmod(door.fileno(), 0o600)  # before the bind, which makes the file; uvicorn's are everybody's
        door.bind(os.fspath(path))
        config = uvicorn.Config(unlimited, lifespan="off", log_config=None, access_log=False)
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext  # signals belong to vLLM, whose process this is
        task = asyncio.create_task(server.serve(sockets=[door]))
        try:
            yield
        finally:
            server.should_exit = True
            await asyncio.gather(task, self._limiter.stop(), self._recorder.stop(), return_exceptions=True)


class _Body:
    """A request's `receive`: read whole if need be, exchanged, and listened to for a client that goes away
    while its request waits."""

    def __init__(self, receive: _Receive) -> None:
        self._receive = receive
        self._read: list[_Message] = []

    async def receive(self) -> _Message:
        return self._read.pop(0) if self._read else await self._receive()

    async def whole(self) -> bytes | None:
        """All of it, as the engine would have read it anyway; None when the client went first."""
        pieces = []
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                return None
            pieces.append(message.get("body", b""))
            if not message.get("more_body", False):
                return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def put(self, body: bytes) -> None:
        """What is to be received, after `whole`."""
        self._read.append({"type": "http.request", "body": body, "more_body": False})

    async def unless_gone(self, entering: Any) -> int | None:
        """What `entering` gives, or None when the client went first."""
        place = asyncio.ensure_future(entering)
        await asyncio.sleep(0)  # who is rejected at once is not read from
        if place.done():
            return place.result()  # type: ignore[no-any-return]
        listening = asyncio.ensure_future(self._gone())
        try:
            await asyncio.wait((place, listening), return_when=asyncio.FIRST_COMPLETED)
            return place.result() if place.done() else None
        finally:
            for task in (place, listening):
                task.cancel()
            await asyncio.gather(place, listening, return_exceptions=True)

    async def _gone(self) -> None:
        while True:
            message = await self._receive()
            self._read.append(message)
            if message["type"] == "http.disconnect":
                return


def _headers(scope: _Scope) -> Iterator[tuple[str, str]]:
    return ((name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"])


def _recorded(exchange: Exchange, receive: _Receive, send: _Send) -> tuple[_Receive, _Send]:
    """Both directions of a request, noted as they pass."""

    async def asked() -> _Message:
        message = await receive()
        if message["type"] == "http.request":
            exchange.asked(message.get("body", b""))
        return message

    async def answered(message: _Message) -> None:
        if message["type"] == "http.response.start":
            types = [value for name, value in message.get("headers", ()) if name.lower() == b"content-type"]
            exchange.answering(message["status"], types[0].decode("latin-1") if types else "")
        elif message["type"] == "http.response.body":
            exchange.answered(message.get("body", b""))
        await send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            exchange.end("whole")

    return asked, answered


def _paid(passage: toll.Passage, send: _Send) -> _Send:
    """An answer, measured as it passes."""

    async def paid(message: _Message) -> None:
        if message["type"] == "http.response.start":
            types = [value for name, value in message.get("headers", ()) if name.lower() == b"content-type"]
            passage.answer(message["status"], types[0].decode("latin-1") if types else "")
        elif message["type"] == "http.response.body":
            piece = passage.feed(message.get("body", b""))
            more = message.get("more_body", False)
            if not more:
                piece += passage.end()
                passage.close()  # before its client, who has the answer then, asks for something else
            elif not piece:
                return
            message = {**message, "body": piece}
        await send(message)

    return paid


def _tenant(scope: _Scope) -> str | None:
    """Whom the router took the client for."""
    found = [value for name, value in scope["headers"] if name == _TENANT]
    return found[0].decode("latin-1") if found else None


def _of_length(scope: _Scope, length: int) -> _Scope:
    """With another body: only who said a length says the new one."""
    headers = [
        (name, str(length).encode() if name == b"content-length" else value)
        for name, value in scope["headers"]
    ]
    return {**scope, "headers": headers}


async def _overloaded(send: _Send, limit: str, why: str, retry_after_seconds: int) -> None:
    after = (b"retry-after", str(retry_after_seconds).encode())
    await _respond(send, 429, admission.overload(limit, why), after)


async def _respond(send: _Send, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [_JSON, length, *headers]})
    await send({"type": "http.response.body", "body": body})


def _sum_of(name: str) -> Callable[[], float]:
    """Reads a metric that vLLM keeps anyway, over its engines: how many steps brought this process tokens,
    which grows during a long answer that is not streamed, when nothing is sent; or the KV cache in use."""
    import prometheus_client

    chosen = prometheus_client.REGISTRY.restricted_registry([name])

    def read() -> float:
        return float(sum(s.value for metric in chosen.collect() for s in metric.samples if s.name == name))

    return read
