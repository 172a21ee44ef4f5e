"""The supervisor's listening socket, handed to the engine: both ends.

The engine's program asks on a unix socket in the run directory and is given the descriptor (SCM_RIGHTS): so
it comes to a program in a container, which inherits nothing, as it does to any other. `fetch` runs in the
engine's own interpreter, with Python's library only; `Giver` on the supervisor's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path

_NAME = "listener"


class Giver:
    """Gives it to whoever asks, which is whoever may enter the run directory."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / _NAME
        self._asked: socket.socket | None = None

    def give(self, listener: socket.socket) -> None:
        """From now on this one."""
        if self._asked is None:
            self._path.unlink(missing_ok=True)
            self._asked = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            os.fchmod(self._asked.fileno(), 0o600)
            self._asked.bind(os.fspath(self._path))
            self._asked.listen()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._asked, self._answer, self._asked, listener)

    @staticmethod
    def _answer(asked: socket.socket, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it went away before it was answered
            connection, _ = asked.accept()
            with connection:
                socket.send_fds(connection, [b"\0"], [listener.fileno()])

    def close(self) -> None:
        if self._asked is not None:
            asyncio.get_running_loop().remove_reader(self._asked)
            self._asked.close()


def fetch(directory: str) -> socket.socket:
    """OSError where nobody gives it."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(os.path.join(directory, _NAME))
        _, descriptors, _, _ = socket.recv_fds(asking, 1, 1)
    if not descriptors:
        raise ConnectionError("no socket came")
    return socket.socket(fileno=descriptors[0])
