"""The spans of a command engine's requests, sent to a collector besides them.

Owned by the proxy, on its event loop. Only requests whose caller samples (`traceparent`, flag 01) have one:
the router in front decides. Spans wait in a bounded list and go in batches; what has no room, or cannot be
sent, is dropped and counted. vLLM sends its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import time

import aiohttp

from serving.engine import spans

_MOST_SPANS = 4_096
_BATCH_SECONDS = 1.0
_TIMEOUT = aiohttp.ClientTimeout(total=5.0)


class Tracer:
    """`start` first, `close` last. `url`: where spans are posted."""

    def __init__(self, url: str, service: str, instance: str) -> None:
        self._url, self._service, self._instance = url, service, instance
        self._waiting: list[spans.Span] = []
        self._session: aiohttp.ClientSession | None = None
        self._sending: asyncio.Task[None] | None = None
        self.dropped = 0

    async def start(self) -> None:
        self._session = aiohttp.ClientSession(timeout=_TIMEOUT)
        self._sending = asyncio.create_task(self._send_all())

    async def close(self) -> None:
        """What waits is sent, once."""
        if self._sending is not None:
            self._sending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sending
        if self._session is not None:
            await self._send()
            await self._session.close()

    def begin(self, traceparent: str, method: str, path: str) -> Open | None:
        """A request has come; None where it is not traced."""
        parent = spans.read(traceparent)
        if parent is None or not parent.sampled:
            return None
        own = dataclasses.replace(parent, span_id=os.urandom(8).hex())
        return Open(own, parent.span_id, method, path, time.time_ns())

    def end(self, span: Open, status: int) -> None:
        """It is answered."""
        if len(self._waiting) >= _MOST_SPANS:
            self.dropped += 1
            return
        done = spans.Span(
            span.context,
            span.parent_span_id,
            span.method,
            span.path,
            status,
            span.began_ns,
            max(span.began_ns, time.time_ns()),
        )
        self._waiting.append(done)

    async def _send_all(self) -> None:
        while True:
            await asyncio.sleep(_BATCH_SECONDS)
            await self._send()

    async def _send(self) -> None:
        batch, self._waiting = self._waiting, []
        if not batch:
            return
        assert self._session is not None
        body = spans.document(batch, self._service, self._instance)
        try:
            async with self._session.post(
                self._url, data=body, headers={"content-type": "application/json"}
            ) as answer:
                if answer.status < 300:
                    return
        except (aiohttp.ClientError, OSError):
            pass
        self.dropped += len(batch)


@dataclasses.dataclass(frozen=True, slots=True)
class Open:
    """A span under way."""

    context: spans.Context
    parent_span_id: str
    method: str
    path: str
    began_ns: int

    @property
    def header(self) -> str:
        """The `traceparent` for the engine."""
        return spans.write(self.context)
