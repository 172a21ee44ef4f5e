"""One API server, as this process may speak to it: requests and answers.

How one gets in is `access`. Answers are bounded, and are JSON until a caller parses them.

Called by `api` and `watching`, from any thread. Invariants: no header and no body of a request is part of a
message or a log line; redirects are not followed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlencode

import urllib3
import urllib3.exceptions

from cluster import access, errors, objects
from cluster.access import Where as Where

_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 30.0
_MAX_ANSWER_BYTES = 64 << 20
_MAX_LINE_BYTES = 4 << 20
"""An object of etcd has at most 1.5 MB, JSON's escapes and managed fields included."""
_MAX_ERROR_BYTES = 64 << 10
_PIECE_BYTES = 64 << 10


class Connection:
    """Thread-safe. ConfigurationError where there is no way in."""

    def __init__(self, where: Where) -> None:
        self._access = access.find(where)

    @property
    def namespace(self) -> str:
        """The namespace that goes without saying: the pod's, or the context's."""
        return self._access.namespace

    def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: objects.Body | None = None,
        content_type: str = "application/json",
    ) -> Any:
        """The answer as JSON. The errors of `cluster.errors`."""
        with contextlib.closing(
            self._open(method, path, query, body, content_type, _ANSWER_SECONDS)
        ) as answer:
            data = _read(answer, path, _MAX_ANSWER_BYTES)
            answer.release_conn()
        return _json(data, path)

    def text(self, path: str, query: Mapping[str, str], most_bytes: int) -> str:
        """The beginning of an answer that is no JSON: logs."""
        with contextlib.closing(
            self._open("GET", path, query, None, "", _ANSWER_SECONDS, accept="*/*")
        ) as answer:
            try:
                return answer.read(most_bytes).decode("utf-8", "replace")
            except (urllib3.exceptions.HTTPError, OSError) as exc:
                raise _unavailable(path, exc) from exc

    def stream(self, path: str, query: Mapping[str, str], silence_seconds: float) -> Stream:
        """An answer of JSON lines that goes on."""
        return Stream(self._open("GET", path, query, None, "", silence_seconds), path)

    def close(self) -> None:
        """Let go of idle connections."""
        self._access.pool.clear()

    def _open(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: objects.Body | None,
        content_type: str,
        silence_seconds: float,
        accept: str = "application/json",
    ) -> urllib3.BaseHTTPResponse:
        headers = {"User-Agent": "glowplug", "Accept": accept, **self._access.headers()}
        if body is not None:
            headers["Content-Type"] = content_type
        try:
            answer = self._access.pool.request(
                method,
                f"{self._access.url}{path}{'?' + urlencode(query) if query else ''}",
                headers=headers,
                body=None if body is None else json.dumps(body).encode(),
                retries=False,
                redirect=False,
                preload_content=False,
                timeout=urllib3.Timeout(connect=_CONNECT_SECONDS, read=silence_seconds),
            )
        except (urllib3.exceptions.HTTPError, OSError) as exc:
            raise _unavailable(path, exc) from exc
        if answer.status not in (200, 201, 202):
            raise _refused(answer, method, path)
        return answer


class Stream:
    """JSON lines, iterated by one thread; `close` from any thread ends the iteration."""

    def __init__(self, answer: urllib3.BaseHTTPResponse, path: str) -> None:
        self._answer = answer
        self._path = path

    def __iter__(self) -> Iterator[Any]:
        kept = bytearray()
        while True:
            try:
                piece = self._answer.read1(_PIECE_BYTES)
            except (urllib3.exceptions.HTTPError, OSError, ValueError, AttributeError) as exc:
                # ValueError, AttributeError: closed by another thread between two reads.
                raise _unavailable(self._path, exc) from exc
            if not piece:
                return
            kept += piece
            *lines, rest = kept.split(b"\n")
            kept = bytearray(rest)
            if len(kept) > _MAX_LINE_BYTES:
                raise errors.InvalidError(f"{self._path}: an object of more than {_MAX_LINE_BYTES} bytes")
            for line in lines:
                if line.strip():
                    yield _json(line, self._path)

    def close(self) -> None:
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            self._answer.shutdown()  # only this wakes a reader that sleeps in recv
        self._answer.close()


def _read(answer: urllib3.BaseHTTPResponse, path: str, most_bytes: int) -> bytes:
    try:
        data = answer.read(most_bytes + 1)
    except (urllib3.exceptions.HTTPError, OSError) as exc:
        raise _unavailable(path, exc) from exc
    if len(data) > most_bytes:
        raise errors.InvalidError(f"{path}: an answer of more than {most_bytes} bytes")
    return data


def _json(data: bytes | bytearray, path: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        # Without the parser's words: they quote what they choke on.
        raise errors.InvalidError(f"{path}: the answer is not JSON") from None


def _refused(answer: urllib3.BaseHTTPResponse, method: str, path: str) -> errors.ClusterError:
    try:
        found = _json(_read(answer, path, _MAX_ERROR_BYTES), path)
    except errors.ClusterError:
        found = {}
    finally:
        answer.close()
    status = found if isinstance(found, dict) else {}
    text = f"{method} {path}: HTTP {answer.status}: {objects.explained(status, 'refused')}"
    wish = answer.headers.get("Retry-After", "")
    wait_seconds = float(wish) if wish.isascii() and wish.isdigit() and len(wish) < 6 else None
    match answer.status:
        case 401:
            return errors.ForbiddenError(f"{text}; is the token of this cluster, and not expired?")
        case 403 if "exceeded quota" in text:
            return errors.QuotaError(text)
        case 403:
            return errors.ForbiddenError(f"{text}; grant it in a Role of this service account")
        case 404:
            return errors.NotFoundError(text)
        case 409:
            return errors.ConflictError(text)
        case 410:
            return errors.ExpiredError(text)
        case 429 if path.endswith("/eviction"):
            return errors.DisruptionError(text, wait_seconds)
        case 408 | 429 | 500 | 502 | 503 | 504:
            return errors.UnavailableError(text, wait_seconds)
    return errors.InvalidError(text)


def _unavailable(path: str, exc: Exception) -> errors.UnavailableError:
    return errors.UnavailableError(f"{path}: {type(exc).__name__}: {exc}")
