"""The endpoint's server as the verbs use it: HTTP over the unix socket in its folder, errors of ours raised
again.

Called on the command's thread; a connection for each request, no state. The other end is `statusapi`.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serving import errors, unixhttp

SOCKET = "control.sock"
_ANSWER_SECONDS = 120.0


class Client:
    """`directory` is the state directory that all endpoints share, `name` the endpoint's."""

    def __init__(self, directory: Path, name: str) -> None:
        self._name = name
        self._path = directory / name / SOCKET

    def get(self, path: str) -> dict[str, Any]:
        """What GET answers. The server's error is raised; UnavailableError where there is no server."""
        return self._ask("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """As `get`, with a JSON body."""
        return self._ask("POST", path, json.dumps(body or {}).encode())

    def _ask(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        try:
            status, data = unixhttp.ask(self._path, method, path, body, timeout_seconds=_ANSWER_SECONDS)
            document = json.loads(data)
        except (FileNotFoundError, ConnectionRefusedError) as exc:
            raise errors.UnavailableError(
                f"nobody serves an endpoint {self._name!r} here ({self._path}): start it with "
                "`glowplug serve`, or name its --state"
            ) from exc
        except (OSError, ValueError, http.client.HTTPException) as exc:
            raise errors.UnavailableError(
                f"the server of {self._name} did not answer {method} {path}: {exc or type(exc).__name__}"
            ) from exc
        if status < 400 and isinstance(document, dict):
            return document
        kind = getattr(errors, str(document.get("error")), None)
        if not (isinstance(kind, type) and issubclass(kind, errors.ServingError)):
            kind = errors.ServingError
        raise kind(str(document.get("message")))


def served(directory: Path) -> list[str]:
    """The names of the endpoints that have a folder, served at the moment or not."""
    if not directory.is_dir():
        return []
    return sorted(each.name for each in directory.iterdir() if (each / "journal.json").exists())
