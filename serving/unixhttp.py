"""HTTP to a unix socket: one request, one connection, one answer.

Used on the caller's thread by the verbs (the endpoint's server), by providers (an engine's socket) and by the
server (Envoy's admin interface). OSError and http.client.HTTPException leave as they are: the caller knows
what it means that this peer does not answer.
"""

from __future__ import annotations

import http.client
import socket
from pathlib import Path

_MAX_ANSWER_BYTES = 64 << 20
_CONNECT_SECONDS = 5.0


def ask(
    path: Path, method: str, target: str, body: bytes | None = None, *, timeout_seconds: float
) -> tuple[int, bytes]:
    """Status and body."""
    connection = _Connection(path, timeout_seconds)
    try:
        connection.request(method, target, body, {"Content-Type": "application/json"} if body else {})
        response = connection.getresponse()
        return response.status, response.read(_MAX_ANSWER_BYTES)
    finally:
        connection.close()


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_seconds: float) -> None:
        super().__init__("localhost", timeout=timeout_seconds)
        self._path = path
        self._answer_seconds = timeout_seconds

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(min(_CONNECT_SECONDS, self._answer_seconds))
        self.sock.connect(str(self._path))
        self.sock.settimeout(self._answer_seconds)
