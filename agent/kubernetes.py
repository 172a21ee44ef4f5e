"""A small client of the Kubernetes API: get, create, and collections that are listed and then watched.

Used for pull secrets (pullsecrets.py), EndpointSlices (membership.py) and events (observer.py). `Client` is
thread-safe and blocks its caller; a `Watcher` owns one thread. Nothing here knows what a Secret is: a watcher
is given a function that turns an object into a value, so that no secret's text is kept longer than needed.

Invariants: answers and watch lines are bounded; a token goes only to the API server, over TLS or to loopback,
and is read again when its file changed; no body of a request or an answer is ever part of a message, but for
the API's own explanation of a refusal. While the API server is away a watcher keeps what it last knew.

Kubernetes API conventions: resourceVersion, `limit` and `continue`, watch with bookmarks, 410 Gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import random
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import urlencode, urlsplit

import urllib3
import urllib3.exceptions
from urllib3.connection import HTTPConnection

from agent import config
from agent import errors as agent_errors
from imagefs import errors
from imagefs.origin import headers, transport

_log = logging.getLogger(__name__)

T = TypeVar("T")
Object = Mapping[str, Any]

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_CONNECT_TIMEOUT_SECONDS = 5.0
_READ_TIMEOUT_SECONDS = 30.0
_WATCH_SECONDS = 240
"""How long the API server is asked to keep one watch open."""
_WATCH_SILENCE_SECONDS = 300.0
_MAX_ANSWER_BYTES = 64 << 20
_MAX_LINE_BYTES = 4 << 20
"""An object of etcd has at most 1.5 MB, JSON's escapes and both forms of its managed fields included."""
_MAX_ERROR_BYTES = 64 << 10
_MAX_TOKEN_BYTES = 64 << 10
_PAGE_OBJECTS = 500
_MAX_OBJECTS = 20_000
_FIRST_DELAY_SECONDS, _MAX_DELAY_SECONDS = 0.5, 60.0
_PIECE_BYTES = 64 << 10

# A node that lost its network notices within a minute, not after the two hours of the kernel's default.
_KEEPALIVE = [
    *HTTPConnection.default_socket_options,
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
]


class ExpiredError(errors.UnavailableError):
    """The resourceVersion is too old (410 Gone): the collection is to be listed again."""


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """One line of a watch: `kind` is ADDED, MODIFIED, DELETED or BOOKMARK."""

    kind: str
    object: Object


class Client:
    """One API server. Thread-safe."""

    def __init__(self, url: str, ca_file: Path | None = None, token_file: Path | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("https", "http") or not parts.hostname or parts.username is not None:
            raise errors.ConfigurationError(
                f"kubernetes.api_url: {transport.shown(url)} is not an https: URL"
            )
        if parts.scheme == "http" and not transport.is_loopback(parts.netloc):
            raise errors.ConfigurationError(
                f"kubernetes.api_url: {transport.shown(url)}: plain HTTP goes to loopback only"
            )
        self._url = url.rstrip("/")
        self._token = None if token_file is None else _TokenFile(token_file)
        options: dict[str, Any] = {}
        if parts.scheme == "https":
            try:
                options["ssl_context"] = ssl.create_default_context(cafile=ca_file)
            except (OSError, ValueError) as exc:
                raise errors.ConfigurationError(f"kubernetes.ca_file: {ca_file}: {exc}") from exc
        self._pool = urllib3.PoolManager(
            num_pools=2, maxsize=8, block=False, retries=False, socket_options=_KEEPALIVE, **options
        )

    def get(self, path: str, query: Mapping[str, str] | None = None) -> Object:
        """One object, or one page of a list."""
        return self._json(self._open("GET", path, query, None, _READ_TIMEOUT_SECONDS), path)

    def create(self, path: str, document: Object) -> Object:
        """POST to a collection. AlreadyExistsError if there is one of that name."""
        body = json.dumps(document).encode()
        return self._json(self._open("POST", path, None, body, _READ_TIMEOUT_SECONDS), path)

    def list(self, path: str, query: Mapping[str, str] | None = None) -> tuple[list[Object], str]:
        """All objects of a collection, page by page, and the resourceVersion to watch from."""
        out: list[Object] = []
        wanted = {**(query or {}), "limit": str(_PAGE_OBJECTS)}
        while True:
            page = self.get(path, wanted)
            items = page.get("items")
            if items is not None and not (
                isinstance(items, list) and all(isinstance(i, dict) for i in items)
            ):
                raise errors.InvalidInputError(f"Kubernetes API {path}: items is not a list of objects")
            out += items or []
            if len(out) > _MAX_OBJECTS:
                raise errors.InvalidInputError(
                    f"Kubernetes API {path}: more than {_MAX_OBJECTS} objects; name namespaces or a selector"
                )
            metadata = _metadata(page)
            token = metadata.get("continue")
            if not token:
                return out, str(metadata.get("resourceVersion") or "")
            wanted["continue"] = str(token)

    def watch(self, path: str, query: Mapping[str, str] | None, version: str) -> Watch:
        """The changes since `version`, as they come. ExpiredError, here or while reading: list again."""
        wanted = {
            **(query or {}),
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(_WATCH_SECONDS),
        }
        return Watch(self._open("GET", path, wanted, None, _WATCH_SILENCE_SECONDS), path)

    def close(self) -> None:
        self._pool.clear()

    def _open(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: bytes | None,
        read_timeout_seconds: float,
    ) -> urllib3.BaseHTTPResponse:
        fields = {"User-Agent": "glowplug", "Accept": "application/json"}
        if body is not None:
            fields["Content-Type"] = "application/json"
        if self._token is not None:
            fields["Authorization"] = f"Bearer {self._token.read()}"
        try:
            response = self._pool.request(
                method,
                f"{self._url}{path}{'?' + urlencode(query) if query else ''}",
                headers=fields,
                body=body,
                redirect=False,
                preload_content=False,
                timeout=urllib3.Timeout(connect=_CONNECT_TIMEOUT_SECONDS, read=read_timeout_seconds),
            )
        except (urllib3.exceptions.HTTPError, OSError) as exc:
            raise _unavailable(path, exc) from exc
        if response.status not in (200, 201, 202):
            raise _status_error(response, path)
        return response

    def _json(self, response: urllib3.BaseHTTPResponse, path: str) -> Object:
        try:
            data = response.read(_MAX_ANSWER_BYTES + 1)
        except (urllib3.exceptions.HTTPError, OSError) as exc:
            raise _unavailable(path, exc) from exc
        if len(data) > _MAX_ANSWER_BYTES:
            response.close()
            raise errors.InvalidInputError(
                f"Kubernetes API {path}: answer of more than {_MAX_ANSWER_BYTES} bytes"
            )
        response.release_conn()
        return _parsed(data, path)


class Watch:
    """An open watch: iterate it in one thread, `close` it from any."""

    def __init__(self, response: urllib3.BaseHTTPResponse, path: str) -> None:
        self._response = response
        self._path = path
        connection = getattr(response, "connection", None)
        self._socket: socket.socket | None = getattr(connection, "sock", None)

    def __iter__(self) -> Iterator[Change]:
        for line in self._lines():
            document = _parsed(line, self._path)
            kind, item = document.get("type"), document.get("object")
            if not isinstance(kind, str) or not isinstance(item, dict):
                raise errors.InvalidInputError(
                    f"Kubernetes API {self._path}: a watch event without type and object"
                )
            if kind == "ERROR":
                if item.get("code") == 410:
                    raise ExpiredError(f"Kubernetes API {self._path}: the watch is too far behind")
                raise errors.UnavailableError(
                    f"Kubernetes API {self._path}: {_explained(item, 'watch failed')}"
                )
            yield Change(kind, item)

    def close(self) -> None:
        # A reader in another thread sleeps in recv: only this wakes it.
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        self._response.close()

    def _lines(self) -> Iterator[bytes]:
        kept = bytearray()
        while True:
            try:
                piece = self._response.read1(_PIECE_BYTES)
            except (urllib3.exceptions.HTTPError, OSError, ValueError, AttributeError) as exc:
                # ValueError, AttributeError: closed by another thread between two reads.
                raise _unavailable(self._path, exc) from exc
            if not piece:
                return
            kept += piece
            *lines, rest = kept.split(b"\n")
            kept = bytearray(rest)
            if len(kept) > _MAX_LINE_BYTES:
                raise errors.InvalidInputError(
                    f"Kubernetes API {self._path}: an object of more than {_MAX_LINE_BYTES} bytes"
                )
            yield from (bytes(line) for line in lines if line.strip())


class Watcher(Generic[T]):
    """The values of one collection's objects, kept current by a thread of its own.

    `parse` turns an object into a value, None for one that is not wanted; ImagefsError from it is logged with
    the object's name and the object left out. `changed` is called in the watcher's thread after every change
    with all values by "namespace/name".
    """

    def __init__(
        self,
        client: Client,
        path: str,
        query: Mapping[str, str],
        parse: Callable[[Object], T | None],
        changed: Callable[[Mapping[str, T]], None] | None = None,
    ) -> None:
        self._client = client
        self._path = path
        self._query = query
        self._parse = parse
        self._changed = changed
        self._lock = threading.Lock()
        self._values: dict[str, T] = {}
        self._watch: Watch | None = None
        self._stopped = threading.Event()
        self._listed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"watch {path}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; `current` keeps answering."""
        self._stopped.set()
        with self._lock:
            watch = self._watch
        if watch is not None:
            watch.close()
        if self._thread.is_alive():
            self._thread.join()

    def current(self) -> Mapping[str, T]:
        """The values as last known, by "namespace/name"; empty before the first list."""
        with self._lock:
            return dict(self._values)

    def wait(self, timeout_seconds: float) -> bool:
        """Whether the collection has been listed once, waiting that long for it."""
        return self._listed.wait(timeout_seconds)

    def _run(self) -> None:
        failures = 0
        version = ""
        while not self._stopped.is_set():
            try:
                if not version:
                    version = self._list()
                for reached in self._follow(version):
                    version, failures = reached, 0
            except ExpiredError:
                version = ""
            except errors.ImagefsError as exc:
                if self._stopped.is_set():
                    return
                failures += 1
                if failures == 1:
                    _log.warning("cannot watch: %s; going on with what was known", exc)
                if not isinstance(exc, errors.UnavailableError):
                    version = ""
            nominal = min(_MAX_DELAY_SECONDS, _FIRST_DELAY_SECONDS * 2.0 ** min(failures, 10))
            # Every node of a cluster comes back to the API server at once when it returns.
            self._stopped.wait(nominal * (0.5 + random.random()) if failures else 0.05)  # noqa: S311

    def _list(self) -> str:
        items, version = self._client.list(self._path, self._query)
        values = {}
        for item in items:
            value = self._value(item)
            if value is not None:
                values[object_name(item)] = value
        self._replace(values)
        self._listed.set()
        return version

    def _follow(self, version: str) -> Iterator[str]:
        """Apply one watch's changes; yields each resourceVersion reached."""
        watch = self._client.watch(self._path, self._query, version)
        with self._lock:
            self._watch = watch
        try:
            if self._stopped.is_set():
                return
            for change in watch:
                if change.kind != "BOOKMARK":
                    self._apply(change)
                yield str(_metadata(change.object).get("resourceVersion") or version)
        finally:
            with self._lock:
                self._watch = None
            watch.close()

    def _apply(self, change: Change) -> None:
        name = object_name(change.object)
        value = None if change.kind == "DELETED" else self._value(change.object)
        values = dict(self._values)  # only this thread writes
        values.pop(name, None)
        if value is not None:
            values[name] = value
        self._replace(values)

    def _value(self, item: Object) -> T | None:
        try:
            return self._parse(item)
        except errors.ImagefsError as exc:
            _log.warning("%s in %s is left out: %s", object_name(item), self._path, exc)
            return None

    def _replace(self, values: dict[str, T]) -> None:
        with self._lock:
            if values == self._values and self._listed.is_set():
                return
            self._values = values
        if self._changed is not None:
            self._changed(values)


def connect(settings: config.Kubernetes) -> Client | None:
    """The client that the settings describe, None where they name no API server."""
    if settings.api_url is not None:
        return Client(settings.api_url, settings.ca_file, settings.token_file)
    if not settings.in_cluster:
        return None
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        raise errors.ConfigurationError(
            "kubernetes.in_cluster: KUBERNETES_SERVICE_HOST is not set, this is no pod: set api_url"
        )
    url = f"https://{f'[{host}]' if ':' in host else host}:{port}"
    return Client(
        url,
        settings.ca_file or _SERVICE_ACCOUNT / "ca.crt",
        settings.token_file or _SERVICE_ACCOUNT / "token",
    )


def collection(group: str, resource: str, namespace: str | None) -> str:
    """The path of a collection; `group` is "v1" or "GROUP/VERSION", no namespace means all."""
    root = f"/api/{group}" if "/" not in group else f"/apis/{group}"
    return f"{root}/namespaces/{namespace}/{resource}" if namespace else f"{root}/{resource}"


def object_name(item: Object) -> str:
    """ "namespace/name" of an object."""
    metadata = _metadata(item)
    return f"{metadata.get('namespace') or ''}/{metadata.get('name') or ''}"


class _TokenFile:
    """A bearer token that others rotate on disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._stamp: tuple[int, int, int] | None = None
        self._token = ""

    def read(self) -> str:
        with self._lock:
            try:
                status = self._path.stat()
                stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
                if stamp != self._stamp:
                    self._token, self._stamp = self._load(), stamp
            except OSError as exc:
                raise errors.ConfigurationError(f"kubernetes.token_file: {self._path}: {exc}") from exc
            return self._token

    def _load(self) -> str:
        with self._path.open("rb") as file:
            data = file.read(_MAX_TOKEN_BYTES)
        token = data.decode("ascii", "replace").strip()
        if not re.fullmatch(r"[!-~]+", token):
            raise errors.ConfigurationError(f"kubernetes.token_file: {self._path} holds no token")
        return token


def _metadata(item: Object) -> Mapping[str, Any]:
    metadata = item.get("metadata")
    return metadata if isinstance(metadata, dict) else {}


def _parsed(data: bytes, path: str) -> Object:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        # Without the parser's words: they quote what they choke on.
        raise errors.InvalidInputError(f"Kubernetes API {path}: the answer is not JSON") from None
    if not isinstance(document, dict):
        raise errors.InvalidInputError(f"Kubernetes API {path}: the answer is not a JSON object")
    return document


def _status_error(response: urllib3.BaseHTTPResponse, path: str) -> errors.ImagefsError:
    try:
        document = _parsed(response.read(_MAX_ERROR_BYTES), path)
    except (urllib3.exceptions.HTTPError, OSError, errors.InvalidInputError):
        document = {}
    response.close()
    text = f"Kubernetes API {path}: HTTP {response.status}: {_explained(document, 'refused')}"
    match response.status:
        case 401 | 403:
            return errors.DeniedError(text)
        case 404:
            return errors.NotFoundError(text)
        case 409:
            return agent_errors.AlreadyExistsError(text)
        case 410:
            return ExpiredError(text)
        case 408 | 429 | 500 | 502 | 503 | 504:
            wish = response.headers.get("Retry-After", "")
            return errors.UnavailableError(
                text, headers.retry_after_seconds(wish, 0.0) if wish.isdigit() else None
            )
    return errors.InvalidInputError(text)


def _explained(status: Object, otherwise: str) -> str:
    message = status.get("message")
    if not isinstance(message, str) or not message:
        return otherwise
    return "".join(c if c.isprintable() else " " for c in message[:300])


def _unavailable(path: str, exc: Exception) -> errors.UnavailableError:
    return errors.UnavailableError(f"Kubernetes API {path}: {type(exc).__name__}: {exc}")
