"""Registry credentials that the node agent looks up: one question over its unix socket, the last answer kept.

Used by the registry client of every process of a node that is given `Options.credentials_socket`. The agent
knows more than files: kubelet's provider plugins, pull secrets. It may be away (restart, upgrade, OOM kill)
while containers read: then the last answer counts, and docker's files where there was none yet. A process
that is the agent itself answers itself (`answer_here`), without a connection to its own socket.

    POST /api/v1/credentials {"host": ..., "repository": ..., "refused": [FINGERPRINT, ...]}
    200 {"credential": {...} or null, "sources": "where it was looked for"}

The socket has mode 0600 in a directory of this user's: what comes from it is as good as a file of his.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Callable, Set
from pathlib import Path

from imagefs import artifact, errors, unixsocket
from imagefs.origin import credentials

PATH = "/api/v1/credentials"
_TIMEOUT_SECONDS = 75.0
"""More than the minute that the agent gives a plugin."""
_MAX_ANSWER_BYTES = 1 << 20

LookUp = Callable[[str, str, Set[str]], "tuple[credentials.Credential | None, str]"]
"""(host, repository, refused fingerprints) -> the credential, and where it was looked for."""

_here: dict[Path, LookUp] = {}


def answer_here(agent_socket: Path, look_up: LookUp | None) -> None:
    """Answer questions to `agent_socket` in this process, by `look_up`; None ends it. The agent's own pulls
    must not wait for a free thread of the API that they themselves occupy."""
    if look_up is None:
        _here.pop(agent_socket, None)
    else:
        _here[agent_socket] = look_up


class AgentSource:
    """A credentials.Source: the agent, then `otherwise` while there is no agent and was no answer."""

    def __init__(self, agent_socket: Path, host: str, repository: str, otherwise: credentials.Source) -> None:
        self._socket = agent_socket
        self._host = host
        self._repository = repository
        self._otherwise = otherwise
        self._lock = threading.Lock()
        self._asked = False
        self._kept: credentials.Credential | None = None
        self._sources = ""

    def describe(self) -> str:
        return self._sources or f"the agent at {self._socket}, {self._otherwise.describe()}"

    def look_up(self, refused: Set[str] = frozenset()) -> credentials.Credential | None:
        try:
            found, sources = self._ask(refused)
        except errors.UnavailableError as exc:
            return self._without_agent(refused, exc)
        with self._lock:
            self._asked, self._kept, self._sources = True, found, sources
        return found

    def _without_agent(
        self, refused: Set[str], why: errors.UnavailableError
    ) -> credentials.Credential | None:
        with self._lock:
            asked, kept = self._asked, self._kept
        if kept is not None and kept.fingerprint not in refused:
            return kept
        found = self._otherwise.look_up(refused)
        if found is None and not (asked and kept is None):
            # Not anonymous access: the reader waits until the agent is back, instead of being refused.
            raise why
        return found

    def _ask(self, refused: Set[str]) -> tuple[credentials.Credential | None, str]:
        here = _here.get(self._socket)
        if here is not None:
            return here(self._host, self._repository, refused)
        question = {"host": self._host, "repository": self._repository, "refused": sorted(refused)}
        where = f"credentials for {self._host}/{self._repository} from the agent at {self._socket}"
        connection = _UnixConnection(self._socket)
        try:
            connection.request(
                "POST", PATH, json.dumps(question).encode(), {"Content-Type": "application/json"}
            )
            answer = connection.getresponse()
            data = answer.read(_MAX_ANSWER_BYTES + 1)
        except (OSError, http.client.HTTPException) as exc:
            raise errors.UnavailableError(f"{where}: {type(exc).__name__}: {exc}") from exc
        finally:
            connection.close()
        if answer.status != 200:
            raise errors.UnavailableError(f"{where}: HTTP {answer.status}")
        try:
            return _decode(data, where)
        except errors.InvalidInputError as exc:
            raise errors.UnavailableError(str(exc)) from exc


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("agent", timeout=_TIMEOUT_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        unixsocket.connect(self.sock, self._path)


def _decode(data: bytes, where: str) -> tuple[credentials.Credential | None, str]:
    if len(data) > _MAX_ANSWER_BYTES:
        raise errors.InvalidInputError(f"{where}: answer of more than {_MAX_ANSWER_BYTES} bytes")
    try:
        document = artifact.parse_json_object(data, where)
    except errors.InvalidInputError:
        # Without the parser's words: they quote what they choke on.
        raise errors.InvalidInputError(f"{where}: the answer is not a JSON object") from None
    sources = document.get("sources")
    found = document.get("credential")
    credential = None if found is None else credentials.decode(found, where)
    return credential, sources if isinstance(sources, str) else ""
