"""One API server, as this process may speak to it: address, certificates, credentials; requests and answers.

The kubernetes library knows where a cluster is and how one gets in (a pod's service account and its rotation,
kubeconfig files with contexts and exec plugins, proxies, client certificates); requests go through its
connection pool. What it would do to answers (models, whole answers in memory) is not used: here they are
bounded, and are JSON until a caller parses them.

Called by `api` and `watching`, from any thread. Invariants: a token goes to the API server only, over TLS or
to loopback; no header and no body of a request is part of a message or a log line; redirects are not
followed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import kubernetes.client
import kubernetes.config
import urllib3
import urllib3.exceptions
import yaml
from urllib3.connection import HTTPConnection

from cluster import errors, objects

_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 30.0
_MAX_ANSWER_BYTES = 64 << 20
_MAX_LINE_BYTES = 4 << 20
"""An object of etcd has at most 1.5 MB, JSON's escapes and managed fields included."""
_MAX_ERROR_BYTES = 64 << 10
_MAX_TOKEN_BYTES = 64 << 10
_PIECE_BYTES = 64 << 10
_POOLED = 8
# A node that lost its network notices within a minute, not after the two hours of the kernel's default.
_KEEPALIVE = [
    *HTTPConnection.default_socket_options,
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
]


@dataclasses.dataclass(frozen=True, slots=True)
class Where:
    """Which API server. `url` with its files; else `kubeconfig` (a file) and `context`; all None is what a
    pod is given or, outside of pods, what kubectl would use."""

    url: str | None = None
    ca_file: Path | None = None
    token_file: Path | None = None
    kubeconfig: Path | None = None
    context: str | None = None


class Connection:
    """Thread-safe. ConfigurationError where there is no way in."""

    def __init__(self, where: Where) -> None:
        configuration = kubernetes.client.Configuration()
        configuration.socket_options = _KEEPALIVE
        configuration.connection_pool_maxsize = _POOLED
        self._namespace = _configure(configuration, where)
        parts = urlsplit(configuration.host)
        if parts.scheme != "https" and parts.hostname not in ("127.0.0.1", "::1", "localhost"):
            raise errors.ConfigurationError(
                f"kubernetes: {parts.scheme}://{parts.hostname} is not https; plain HTTP is for loopback only"
            )
        self._host = configuration.host.rstrip("/")
        self._configuration = configuration
        self._lock = threading.Lock()  # the library's hooks that renew a token are not made for threads
        try:
            self._pool: urllib3.PoolManager = kubernetes.client.ApiClient(
                configuration
            ).rest_client.pool_manager
        except (OSError, ValueError, urllib3.exceptions.HTTPError) as exc:
            raise errors.ConfigurationError(f"kubernetes: {exc}") from exc

    @property
    def namespace(self) -> str:
        """The namespace that goes without saying: the pod's, or the context's."""
        return self._namespace

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
        self._pool.clear()

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
        headers = {"User-Agent": "glowplug", "Accept": accept, **self._credentials()}
        if body is not None:
            headers["Content-Type"] = content_type
        try:
            answer = self._pool.request(
                method,
                f"{self._host}{path}{'?' + urlencode(query) if query else ''}",
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

    def _credentials(self) -> dict[str, str]:
        with self._lock:
            try:
                found = self._configuration.auth_settings()
            except (OSError, ValueError, kubernetes.config.ConfigException) as exc:
                raise errors.ConfigurationError(f"kubernetes: no credentials: {exc}") from exc
        return {
            each["key"]: each["value"] for each in found.values() if each["in"] == "header" and each["value"]
        }


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


def _configure(configuration: kubernetes.client.Configuration, where: Where) -> str:
    """Fill in the library's configuration; the namespace that goes without saying."""
    try:
        if where.url is not None:
            configuration.host = where.url
            configuration.ssl_ca_cert = None if where.ca_file is None else str(where.ca_file)
            if where.token_file is not None:
                configuration.refresh_api_key_hook = _token_hook(where.token_file)
                configuration.refresh_api_key_hook(configuration)
            return "default"
        if where.kubeconfig is None and where.context is None and "KUBERNETES_SERVICE_HOST" in os.environ:
            kubernetes.config.load_incluster_config(client_configuration=configuration)
            return _pod_namespace()
        kubernetes.config.load_kube_config(
            config_file=None if where.kubeconfig is None else str(where.kubeconfig),
            context=where.context,
            client_configuration=configuration,
            persist_config=False,
        )
        return _context_namespace(where)
    except (kubernetes.config.ConfigException, OSError, ValueError, TypeError, yaml.YAMLError) as exc:
        raise errors.ConfigurationError(
            f"kubernetes: no way to an API server: {exc}; this is no pod, and no kubeconfig says it: name "
            "one, or url with ca_file and token_file"
        ) from exc


def _token_hook(file: Path) -> Any:
    """Others rotate the file: it is read for each request."""

    def read(configuration: kubernetes.client.Configuration) -> None:
        with file.open("rb") as opened:
            data = opened.read(_MAX_TOKEN_BYTES)
        token = data.decode("ascii", "replace").strip()
        if not token or not token.isascii() or not token.isprintable() or " " in token:
            raise ValueError(f"token_file: {file} holds no token")
        configuration.api_key["BearerToken"] = f"Bearer {token}"

    return read


def _pod_namespace() -> str:
    file = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
    try:
        return file.read_text().strip() or "default"
    except OSError:
        return "default"


def _context_namespace(where: Where) -> str:
    contexts, active = kubernetes.config.list_kube_config_contexts(
        None if where.kubeconfig is None else str(where.kubeconfig)
    )
    chosen = next((each for each in contexts if each["name"] == where.context), active)
    return str(chosen["context"].get("namespace") or "default")


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
