"""Where requests are served: chooses those to be logged, keeps their bodies, hands them to the writer.

One per server process, on its event loop: vLLM's API servers (`gate`) and the supervisor (`proxy`). Only
Python's library, because vLLM's interpreter imports it. Nothing here waits, and nothing raises: a request is
never slower or other for being logged. Held at most: `_HELD_BYTES` of bodies of requests under way,
`_QUEUE_BYTES` of records that the writer has not read; whatever is beyond is cut, or dropped and counted.

The writer says what to sample once it has taken the connection. A connection that nobody takes, because the
log is off, costs nothing: it waits in the supervisor's listening socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

from serving.engine.requestlog import record, sampling

SOCKET = "requests"
"""In the run directory."""
_QUEUE_BYTES = 8 << 20
_HELD_BYTES = 64 << 20
_READ_BYTES = 64 << 10
_AGAIN_SECONDS = 1.0


class Recorder:
    """`start` first, `stop` last."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / SOCKET
        self._sampling: record.Sampling | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None
        self._dropped = 0
        self._held_bytes = 0

    async def start(self) -> None:
        self._task = asyncio.create_task(self._connect())

    async def stop(self) -> None:
        """What is in the send buffer is sent, if the writer reads."""
        writer, self._sampling = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError, TimeoutError):
                self._tell_dropped(writer)
                await asyncio.wait_for(writer.drain(), _AGAIN_SECONDS)
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def begin(self, method: str, path: str, headers: Iterable[tuple[str, str]]) -> Exchange | None:
        """A request has come; None where it is not to be logged."""
        wanted = self._sampling
        if wanted is None:
            return None
        named = {name.lower(): value for name, value in headers}
        request_id, trace_id = sampling.identity(named)
        request_id = request_id or os.urandom(16).hex()
        if not sampling.chosen(request_id, wanted.rate):
            return None
        kept = {name: named[name] for name in wanted.headers if name in named}
        return Exchange(self, wanted.body_bytes, (request_id, trace_id, method, path), kept)

    def room(self, wanted_bytes: int) -> int:
        """Hold so many bytes more, or as many as there is room for."""
        given = max(0, min(wanted_bytes, _HELD_BYTES - self._held_bytes))
        self._held_bytes += given
        return given

    def release(self, held_bytes: int) -> None:
        """Hold so many bytes less."""
        self._held_bytes -= held_bytes

    def finish(self, done: record.Record) -> None:
        """An exchange is over; its bodies are held no more."""
        self.release(len(done.request_body) + len(done.response_body))
        writer = self._writer
        if writer is None or writer.transport.get_write_buffer_size() >= _QUEUE_BYTES:
            self._dropped += 1
            return
        self._tell_dropped(writer)
        writer.write(record.encode(done))

    def _tell_dropped(self, writer: asyncio.StreamWriter) -> None:
        if self._dropped:
            writer.write(record.dropped(self._dropped))
            self._dropped = 0

    async def _connect(self) -> None:
        while True:
            with contextlib.suppress(OSError, record.FrameError):
                reader, writer = await asyncio.open_unix_connection(self._path)
                try:
                    await self._listen(reader, writer)
                finally:
                    self._writer = self._sampling = None
                    writer.close()
            await asyncio.sleep(_AGAIN_SECONDS)

    async def _listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """What the writer says, until it ends."""
        frames = record.Frames()
        while data := await self._read(reader, writer):
            for kind, payload in frames.feed(data):
                if kind == record.SAMPLING:
                    self._sampling, self._writer = record.read_sampling(payload), writer

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        while True:
            # Drops are told when they have stopped, too.
            seconds = _AGAIN_SECONDS if self._writer is not None else None
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(reader.read(_READ_BYTES), seconds)
            if writer.transport.get_write_buffer_size() < _QUEUE_BYTES:
                self._tell_dropped(writer)


class Exchange:
    """One request that is logged, while it is under way. `end` once, whatever happens."""

    def __init__(
        self, recorder: Recorder, body_bytes: int, facts: tuple[str, str, str, str], kept: dict[str, str]
    ) -> None:
        self._recorder, self._facts, self._headers = recorder, facts, kept
        self._request, self._response = _Body(recorder, body_bytes), _Body(recorder, body_bytes)
        self._began_at, self._began = time.time(), time.monotonic()
        self._entered: float | None = None
        self._first: float | None = None
        self._status: int | None = None
        self._response_type = ""
        self._ended = False

    def entered(self) -> None:
        """It has a place in flight."""
        self._entered = time.monotonic()

    def asked(self, piece: bytes) -> None:
        """More of the request's body."""
        self._request.add(piece)

    def answering(self, status: int, content_type: str) -> None:
        """The answer begins."""
        self._status, self._response_type = status, content_type

    def answered(self, piece: bytes) -> None:
        """More of the answer's body."""
        if piece and self._first is None:
            self._first = time.monotonic()
        self._response.add(piece)

    def end(self, outcome: str) -> None:
        """It is over. A request that never got a place in flight is not logged: the metrics count those."""
        if self._ended:
            return
        self._ended = True
        if self._entered is None:
            self._request.give_back()
            return
        now = time.monotonic()
        request_id, trace_id, method, path = self._facts
        done = record.Record(
            request_id=request_id,
            trace_id=trace_id,
            began_at=self._began_at,
            method=method,
            path=path,
            status=self._status,
            outcome=outcome,
            queued_seconds=self._entered - self._began,
            first_byte_seconds=None if self._first is None else self._first - self._began,
            seconds=now - self._began,
            headers=self._headers,
            response_type=self._response_type,
            request_bytes=self._request.whole_bytes,
            response_bytes=self._response.whole_bytes,
            request_body=self._request.kept(),
            response_body=self._response.kept(),
        )
        self._recorder.finish(done)


class _Body:
    """The beginning of a body, and its whole length."""

    def __init__(self, recorder: Recorder, most_bytes: int) -> None:
        self._recorder, self._room_bytes = recorder, most_bytes
        self._pieces: list[bytes] = []
        self.whole_bytes = 0

    def add(self, piece: bytes) -> None:
        self.whole_bytes += len(piece)
        if piece and self._room_bytes:
            given = self._recorder.room(min(len(piece), self._room_bytes))
            # Once cut, it stays so: pieces with a hole between them would read as one text.
            self._room_bytes = self._room_bytes - given if given == len(piece) else 0
            self._pieces.append(bytes(piece[:given]))

    def kept(self) -> bytes:
        return b"".join(self._pieces)

    def give_back(self) -> None:
        """Held no more, without a record."""
        self._recorder.release(len(self.kept()))
