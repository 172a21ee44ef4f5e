"""Sends a schedule of requests, each at its moment, whatever became of those before. An adapter on aiohttp.

Answers that are event streams (text/event-stream) are read event by event: each but the last, [DONE], counts
as a token. Bounded: more than `MAX_IN_FLIGHT` requests without an answer count as failed at once.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

import aiohttp

from serving.stress.arrivals import Arrival, Tokens
from serving.stress.judgement import Sample

MAX_IN_FLIGHT = 20_000
_WORD = "word "


class Sender:
    """One endpoint's address and what is sent there. `body` None: a completion of as many tokens as the
    arrival says. Used inside one event loop."""

    def __init__(
        self,
        url: str,
        path: str,
        body: bytes | None,
        model: str,
        key: str | None,
        timeout_seconds: float,
    ) -> None:
        self._url = url.rstrip("/") + path
        self._body = body
        self._model = model
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        self._in_flight = 0

    async def send(self, schedule: Sequence[Arrival]) -> list[Sample]:
        """Every request of a step; returns when the last one was answered or timed out."""
        loop = asyncio.get_running_loop()
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=self._timeout) as session:
            began = loop.time()
            tasks = []
            for arrival in schedule:
                due = began + arrival.at_seconds
                if (wait := due - loop.time()) > 0:
                    await asyncio.sleep(wait)
                tasks.append(asyncio.create_task(self._one(session, arrival.tokens, due)))
            return list(await asyncio.gather(*tasks))

    async def _one(self, session: aiohttp.ClientSession, tokens: Tokens, due: float) -> Sample:
        loop = asyncio.get_running_loop()
        late = loop.time() - due
        if self._in_flight >= MAX_IN_FLIGHT:
            return Sample(0, 0.0, late_seconds=late)
        self._in_flight += 1
        try:
            body = self._body if self._body is not None else _completion(self._model, tokens)
            async with session.post(self._url, data=body, headers=self._headers) as answer:
                first = None
                last = 0.0
                events = 0
                streamed = answer.content_type == "text/event-stream"
                async for line in answer.content if streamed else answer.content.iter_any():
                    if first is None:
                        first = loop.time()
                    if streamed and line.startswith(b"data:") and line[5:].strip() != b"[DONE]":
                        events += 1
                        last = loop.time()
                return Sample(
                    status=answer.status,
                    seconds=loop.time() - due,
                    first_seconds=None if first is None else first - due,
                    tokens=events,
                    stream_seconds=last - first if first is not None and events else 0.0,
                    late_seconds=late,
                )
        except (aiohttp.ClientError, TimeoutError, ConnectionError, ValueError):
            return Sample(0, loop.time() - due, late_seconds=late)
        finally:
            self._in_flight -= 1


def _completion(model: str, tokens: Tokens) -> bytes:
    """A request of the OpenAI completions API whose answer has as many tokens as were asked for."""
    return json.dumps(
        {
            "model": model,
            "prompt": _WORD * max(1, tokens.prompt),
            "max_tokens": max(1, tokens.output),
            "ignore_eos": True,
            "stream": True,
        }
    ).encode()
