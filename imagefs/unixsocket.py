"""Unix sockets by paths of any length: the kernel's address has room for 107 bytes, directories have more.

Used by everything of ours that listens or connects on a unix socket (gRPC has its own way). A longer path is
reached through a descriptor of its directory, which needs /proc; a shorter one is used as it is.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

_MAX_BYTES = 107
"""sun_path less its final zero byte."""


def connect(connection: socket.socket, path: Path) -> None:
    """Connect an AF_UNIX socket. OSError as socket.connect raises it."""
    with _address(path) as address:
        connection.connect(address)


def bind(listener: socket.socket, path: Path) -> None:
    """Bind an AF_UNIX socket. OSError as socket.bind raises it."""
    with _address(path) as address:
        listener.bind(address)


@contextlib.contextmanager
def _address(path: Path) -> Iterator[str]:
    if len(os.fsencode(path)) <= _MAX_BYTES:
        yield os.fspath(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
