"""The process that writes: records from unix sockets in, Parquet files out.

`python -m serving.engine.requestlog.writer FD`, started by `keeper` with the listening socket that recorders
connect to. On standard input, a JSON document a line: what to do from now on (the document's `request_log`
with `service`, `instance`, `spool`); at its end, or its supervisor's, what is under way is finished and the
process ends. On standard output, a JSON line of totals whenever they have changed.

One thread with one event loop receives and writes: while the disk is slow nothing is read, the recorders'
buffers fill, and they drop. Uploads have a thread of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.engine.requestlog import files, record
from serving.observability import RequestLog

if TYPE_CHECKING:
    from serving.engine.requestlog import upload

_TURN_SECONDS = 0.5
_READ_BYTES = 1 << 20
_CLOSE_SECONDS = 8.0
"""For the last uploads."""
_LINE_BYTES = 1 << 20


class Writer:
    """See the module."""

    def __init__(self) -> None:
        self._totals = files.Totals()
        self._told: files.Totals | None = None
        self._files: files.Files | None = None
        self._uploader: upload.Uploader | None = None
        self._sampling: record.Sampling | None = None
        self._clients: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, listener: socket.socket) -> None:
        """Until standard input ends."""
        loop = asyncio.get_running_loop()
        lines = asyncio.StreamReader(limit=_LINE_BYTES)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
        first = await lines.readline()
        if not first:
            return
        self._settle(first)
        tasks = [asyncio.create_task(self._accept(listener)), asyncio.create_task(self._turn())]
        while line := await lines.readline():
            self._settle(line)
        tasks[0].cancel()
        await self._rest()
        tasks[1].cancel()
        self._end()
        self._tell()

    def _settle(self, line: bytes) -> None:
        """What to do from now on."""
        document: dict[str, Any] = json.loads(line)
        service, instance = document.pop("service"), document.pop("instance")
        spool = Path(document.pop("spool"))
        wanted = RequestLog.model_validate(document)
        self._end()
        directory, settled = Path(wanted.destination), None
        if wanted.destination.startswith("s3://"):
            from serving.engine.requestlog import upload

            directory = spool
            self._uploader = upload.Uploader(wanted.destination, spool, wanted.spool_bytes)
            settled = self._uploader.put
            for path, records in files.whole(spool):  # of a writer before this one, which was killed
                self._uploader.put(path, records)
        settings = files.Settings(directory, service, instance, wanted.file_bytes, wanted.file_seconds)
        self._files = files.Files(settings, self._totals, settled)
        self._sampling = record.Sampling(wanted.sample_rate, wanted.body_bytes, wanted.headers)
        for client in self._clients:
            client.write(record.sampling(self._sampling))

    def _end(self) -> None:
        """Finish what is under way."""
        if self._files is not None:
            self._files.close()
            self._files = None
        if self._uploader is not None:
            self._uploader.close(_CLOSE_SECONDS)
            self._totals = files.add(self._totals, self._uploader.totals())
            self._uploader = None

    async def _accept(self, listener: socket.socket) -> None:
        # No asyncio server: closing one may remove the socket's file, which is the supervisor's.
        listener.setblocking(False)
        while True:
            connection, _ = await asyncio.get_running_loop().sock_accept(listener)
            task = asyncio.create_task(self._client(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _client(self, connection: socket.socket) -> None:
        reader, writer = await asyncio.open_unix_connection(sock=connection)
        assert self._sampling is not None
        self._clients.add(writer)
        writer.write(record.sampling(self._sampling))
        frames = record.Frames()
        try:
            while data := await reader.read(_READ_BYTES):
                for kind, payload in frames.feed(data):
                    self._take(kind, payload)
        except (OSError, record.FrameError) as exc:
            print(f"request log: a recorder is let go: {exc}", file=sys.stderr)
        finally:
            self._clients.discard(writer)
            writer.close()

    def _take(self, kind: bytes, payload: bytes) -> None:
        if kind == record.DROPPED:
            self._totals.dropped += record.read_dropped(payload)
        elif kind == record.RECORD and self._files is not None:
            self._files.add(record.decode(payload))

    async def _rest(self) -> None:
        """What recorders have sent by now is taken; none of them is waited for."""
        await asyncio.sleep(0)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_TURN_SECONDS)

    async def _turn(self) -> None:
        while True:
            if self._files is not None:
                self._files.turn()
            self._tell()
            await asyncio.sleep(_TURN_SECONDS)

    def _tell(self) -> None:
        now = self._totals if self._uploader is None else files.add(self._totals, self._uploader.totals())
        if now != self._told:
            self._told = dataclasses.replace(now)
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps(dataclasses.asdict(now)), flush=True)


def main(descriptor: int) -> None:
    """The process."""
    # The terminal's Ctrl-C is the supervisor's to act on: it ends this by closing the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.umask(0o077)
    asyncio.run(Writer().run(socket.socket(fileno=descriptor)))


if __name__ == "__main__":
    main(int(sys.argv[1]))
