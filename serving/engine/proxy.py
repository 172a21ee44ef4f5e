"""The front of a command engine: HTTP from the supervisor's port to the child's, within the in-flight limit.

Runs on the supervisor's event loop. Bodies and streams pass in pieces as they come, headers as they are, less
those that belong to one connection; a request that is traced gets a span of its own (`tracing`). Where tokens
are limited or units counted, a request's body is read whole first (`toll`). vLLM does not need it: its own
processes carry `gate`, which does the same without a second hop.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import multidict
from aiohttp import web

from serving import headers, service
from serving.engine import admission, limiter, toll, tracing
from serving.engine.budget import Budget
from serving.engine.ledger import Ledger
from serving.engine.requestlog.recorder import Exchange, Recorder
from serving.engine.state import State

_REPLACED = ("host", "content-length")
"""Set anew on this hop."""
_TRACEPARENT = "traceparent"
_KEEP_ALIVE_SECONDS = 1.0
"""Shorter than that of any server that we know: a request on a connection that is being closed is lost."""
_OPENAI_API = "/v1/"
"""Below it, fields of a body mean what they mean there."""
_METRICS_TIMEOUT = aiohttp.ClientTimeout(total=2.0)


class Proxy:
    """One per supervisor; which port it leads to changes with each start of the engine."""

    def __init__(
        self, ledger: Ledger, budget: Budget, directory: Path, tracer: tracing.Tracer | None = None
    ) -> None:
        self._ledger = ledger
        self.progress = 0
        """Grows with every piece that the engine has sent."""
        self._limiter = limiter.Limiter(ledger, directory, lambda: self.progress)
        self._toll = toll.Toll(budget, ledger, self._limiter.slot)
        self._recorder = Recorder(directory)
        self._tracer = tracer
        self._session: aiohttp.ClientSession | None = None
        self._port = 0

    async def start(self) -> None:
        await self._limiter.start()
        await self._recorder.start()
        if self._tracer is not None:
            await self._tracer.start()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_SECONDS),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
            skip_auto_headers=("user-agent", "content-type", "accept", "accept-encoding"),
        )

    async def close(self) -> None:
        await self._limiter.stop()
        await self._recorder.stop()
        if self._tracer is not None:
            await self._tracer.close()
        await self.session.close()

    def connect(self, port: int) -> None:
        """The engine listens there from now on."""
        self._port = port

    @property
    def session(self) -> aiohttp.ClientSession:
        assert self._session is not None
        return self._session

    def url(self, path: str) -> str:
        """A path of the engine's."""
        return f"http://127.0.0.1:{self._port}{path}"

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """One request, from its client and back."""
        if not admission.counts(request.path):
            return await self._forward(request, None, None, None)
        exchange = self._recorder.begin(request.method, request.path, request.headers.items())
        try:
            return await self._counted(request, exchange)
        finally:
            if exchange is not None:
                exchange.end("client_gone")  # unless it ended before

    async def _counted(self, request: web.Request, exchange: Exchange | None) -> web.StreamResponse:
        if not (self._toll.in_use and request.can_read_body):
            return await self._admitted(request, exchange, None)
        whole = await request.read()
        if exchange is not None:
            exchange.asked(whole)
        tenant = request.headers.get(service.TENANT_HEADER)
        try:
            passage = self._toll.enter(
                tenant, request.path, whole, clamps=request.path.startswith(_OPENAI_API)
            )
        except toll.RefusedError as exc:
            return _overloaded(exc.limit, str(exc), exc.retry_after_seconds)
        try:
            return await self._admitted(request, exchange, passage)
        finally:
            passage.close()

    async def _admitted(
        self, request: web.Request, exchange: Exchange | None, passage: toll.Passage | None
    ) -> web.StreamResponse:
        try:
            entered_ns = await self._limiter.enter()
        except limiter.RejectedError as exc:
            if passage is not None:
                passage.turned_away()
            return _overloaded("in_flight", f"This replica is {exc}", exc.retry_after_seconds)
        status, outcome = 500, "client_gone"
        span = None
        if self._tracer is not None:
            span = self._tracer.begin(request.headers.get(_TRACEPARENT, ""), request.method, request.path)
        if exchange is not None:
            exchange.entered()
        try:
            response = await self._forward(request, exchange, passage, span)
            status, outcome = response.status, "whole"
            return response
        finally:
            self._limiter.leave(entered_ns, failed=status >= 500)
            if exchange is not None:
                exchange.end(outcome)
            if self._tracer is not None and span is not None:
                self._tracer.end(span, status)

    async def metrics(self) -> bytes:
        """The engine's own, as text; nothing where it has none."""
        try:
            async with self.session.get(
                self.url(admission.METRICS), headers={"accept": "text/plain"}, timeout=_METRICS_TIMEOUT
            ) as upstream:
                if upstream.status != 200:
                    return b""
                text = await upstream.read()
        except (aiohttp.ClientError, OSError, TimeoutError):
            return b""
        return text if text.endswith(b"\n") or not text else text + b"\n"

    async def _forward(
        self,
        request: web.Request,
        exchange: Exchange | None,
        passage: toll.Passage | None,
        span: tracing.Open | None,
    ) -> web.StreamResponse:
        passed, data = _request(request, exchange, passage)
        if span is not None:
            passed[_TRACEPARENT] = span.header
        response: web.StreamResponse | None = None
        try:
            async with self.session.request(
                request.method,
                self.url(request.raw_path),
                headers=passed,
                data=data,
                allow_redirects=False,
            ) as upstream:
                response = self._opened(upstream)
                if passage is not None:
                    passage.answer(upstream.status, upstream.content_type)
                    if passage.alters:
                        response.content_length = None
                await response.prepare(request)
                if exchange is not None:
                    exchange.answering(upstream.status, upstream.content_type)
                async for piece in upstream.content.iter_any():
                    self.progress += 1
                    if exchange is not None:
                        exchange.answered(piece)
                    if passage is not None:
                        piece = passage.feed(piece)
                    if piece:  # an empty one would be the end of a chunked answer
                        await response.write(piece)
                await response.write_eof(b"" if passage is None else passage.end())
                self.progress += 1
                return response
        except (aiohttp.ClientError, OSError) as exc:
            if exchange is not None:
                exchange.end("failed")
            if response is None or not response.prepared:
                message = f"The engine did not answer: {exc or type(exc).__name__}."
                body = admission.refusal(502, message, "engine_error")
                return web.Response(status=502, body=body, content_type="application/json")
            # Half an answer must not look like a whole one.
            with contextlib.suppress(AttributeError):
                request.transport.abort()  # type: ignore[union-attr]
            return response

    def _opened(self, upstream: aiohttp.ClientResponse) -> web.StreamResponse:
        response = web.StreamResponse(status=upstream.status, reason=upstream.reason)
        response.headers.extend(headers.end_to_end(upstream.headers, _REPLACED))
        response.content_length = upstream.content_length
        if self._ledger.state is State.DRAINING:
            response.force_close()
        return response


def _request(
    request: web.Request, exchange: Exchange | None, passage: toll.Passage | None
) -> tuple[multidict.CIMultiDict[str], AsyncIterator[bytes] | bytes | None]:
    """Header fields and body for the engine."""
    passed = headers.end_to_end(request.headers, _REPLACED)
    if passage is not None:
        passed.popall("Accept-Encoding", None)  # an answer that is packed could not be read
        return passed, passage.body
    if not request.can_read_body:
        return passed, None
    if request.content_length is not None:
        passed["Content-Length"] = str(request.content_length)
    return passed, _pieces(request, exchange)


def _overloaded(limit: str, why: str, retry_after_seconds: int) -> web.Response:
    return web.Response(
        status=429,
        body=admission.overload(limit, why),
        content_type="application/json",
        headers={"Retry-After": str(retry_after_seconds)},
    )


async def _pieces(request: web.Request, exchange: Exchange | None) -> AsyncIterator[bytes]:
    """The request's body, as it comes."""
    async for piece in request.content.iter_any():
        if exchange is not None:
            exchange.asked(piece)
        yield piece
