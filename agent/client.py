"""The agent's API as the verbs use it: HTTP over its unix socket, errors of ours raised again.

Called on the command's own thread; a connection for each request, no state. The other end is `api.py`.
"""

from __future__ import annotations

import http.client
import json
import socket
import stat
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agent import errors as agent_errors
from imagefs import errors, unixsocket
from imagefs.fuse import controlmessage

_CONNECT_SECONDS = 5.0
_MAX_ANSWER_BYTES = 64 << 20


class AgentClient:
    """See the module. `timeout_seconds` is how long an answer may take; None as long as it takes (a pull)."""

    def __init__(self, socket_path: Path, timeout_seconds: float | None = 30.0) -> None:
        self._socket_path = socket_path
        self._timeout_seconds = timeout_seconds

    @classmethod
    def found(cls, socket_path: Path) -> AgentClient | None:
        """A client, if there is a socket; whether somebody listens shows with the first request."""
        try:
            return cls(socket_path) if stat.S_ISSOCK(socket_path.stat().st_mode) else None
        except OSError:
            return None

    def get(self, path: str, query: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The JSON object that GET answers. Raises the error that the agent answered, UnavailableError if
        there is no agent or it does not answer in time."""
        return self._ask("GET", f"{path}?{urllib.parse.urlencode(query)}" if query else path, None)

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """As `get`, with a JSON body."""
        return self._ask("POST", path, json.dumps(body or {}).encode())

    def delete(self, path: str) -> dict[str, Any]:
        """As `get`."""
        return self._ask("DELETE", path, None)

    def _ask(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        connection = _UnixConnection(self._socket_path, self._timeout_seconds)
        try:
            headers = {"Content-Type": "application/json"} if body is not None else {}
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            data = response.read(_MAX_ANSWER_BYTES)
        except (FileNotFoundError, ConnectionRefusedError) as exc:
            raise errors.UnavailableError(
                f"no agent listens on {self._socket_path}: start it (glowplug agent run), or name its --state"
            ) from exc
        except PermissionError as exc:
            raise errors.DeniedError(f"{self._socket_path}: only the agent's own user may ask it") from exc
        except (OSError, http.client.HTTPException) as exc:
            raise errors.UnavailableError(
                f"the agent at {self._socket_path} did not answer {method} {path}: "
                f"{exc or type(exc).__name__}"
            ) from exc
        finally:
            connection.close()
        return _decoded(data, response.status, f"{method} {path}")


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_seconds: float | None) -> None:
        super().__init__("localhost")
        self._path = path
        self._answer_seconds = timeout_seconds

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_CONNECT_SECONDS)
        unixsocket.connect(self.sock, self._path)
        self.sock.settimeout(self._answer_seconds)


def _decoded(data: bytes, status: int, what: str) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except ValueError as exc:
        raise errors.UnavailableError(f"the agent answered {what} with {status} and no JSON") from exc
    if not isinstance(document, dict):
        raise errors.UnavailableError(f"the agent answered {what} with {status} and no JSON object")
    if status < 400:
        return document
    kind = getattr(agent_errors, str(document.get("error")), None)
    if isinstance(kind, type) and issubclass(kind, errors.ImagefsError):
        raise kind(str(document.get("message")))
    raise controlmessage.decode_error(document)
