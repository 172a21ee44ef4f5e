"""The agent's end of the device server's peer socket (imagefs/fuse/peering.py): blocks, as descriptors.

Owned by `peers.py`; everything on its event loop. `run` keeps the connection for as long as the agent lives:
a device server that was replaced is found again within moments, and whoever must tell it something is told
(`connected`). Questions that were under way when a connection ended get UnavailableError.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections.abc import Callable
from pathlib import Path

from imagefs import errors, plan, unixsocket
from imagefs.fuse import peering

_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS = 0.05, 2.0

Answer = tuple[int, int]
"""A descriptor, the receiver's to close, and the block's length."""


class BlockChannel:
    """See the module."""

    def __init__(self, state_dir: Path, connected: Callable[[], None]) -> None:
        self._path = state_dir / peering.SOCKET_NAME
        self._connected = connected
        self._connection: socket.socket | None = None
        self._ended = asyncio.Event()
        self._tags = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Answer]] = {}

    async def run(self) -> None:
        """Until cancelled."""
        retry_seconds = _FIRST_RETRY_SECONDS
        while True:
            connection = self._connect()
            if connection is None:
                await asyncio.sleep(retry_seconds)
                retry_seconds = min(2 * retry_seconds, _LAST_RETRY_SECONDS)
                continue
            retry_seconds = _FIRST_RETRY_SECONDS
            self._ended.clear()
            self._connection = connection
            loop = asyncio.get_running_loop()
            loop.add_reader(connection.fileno(), self._receive, connection)
            try:
                self._connected()
                await self._ended.wait()
            finally:
                loop.remove_reader(connection.fileno())
                self._connection = None
                connection.close()
                self._fail_all()

    async def block(self, map_digest: str, index: int, priority: plan.Priority) -> Answer:
        """One block of an attached layer; raises what the device server says: NotFoundError for a layer that
        is not attached (or whose blob is gone). A caller that is cancelled leaves no descriptor behind."""
        connection = self._connection
        if connection is None:
            raise errors.UnavailableError("the device server is not there")
        tag = next(self._tags)
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[tag] = future
        try:
            connection.send(peering.encode_question(tag, map_digest, index, priority))
            return await future
        except OSError as exc:
            raise errors.UnavailableError(f"the device server takes no questions: {exc}") from exc
        except asyncio.CancelledError:
            # The answer may have come at the same moment, and then it is in the future alone.
            if future.done() and not future.cancelled() and future.exception() is None:
                os.close(future.result()[0])
            raise
        finally:
            self._waiting.pop(tag, None)

    def _connect(self) -> socket.socket | None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.setblocking(False)
        try:
            unixsocket.connect(connection, self._path)
        except OSError:
            connection.close()
            return None
        return connection

    def _receive(self, connection: socket.socket) -> None:
        """Everything that has come."""
        while True:
            try:
                answer = peering.receive_answer(connection)
            except BlockingIOError:
                return
            except (OSError, ValueError, KeyError, IndexError):
                answer = None
            if answer is None:
                self._ended.set()
                return
            self._settle(*answer)

    def _settle(self, tag: int, result: int | errors.ImagefsError, length: int) -> None:
        future = self._waiting.pop(tag, None)
        if future is None or future.done():
            if isinstance(result, int):
                os.close(result)  # who asked has gone
        elif isinstance(result, int):
            future.set_result((result, length))
        else:
            future.set_exception(result)

    def _fail_all(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(errors.UnavailableError("the device server went away"))
