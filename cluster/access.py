"""How one gets in to an API server: its address, a pool of connections, the credentials of each request.

Called by `connection`. A URL with its files, and what a pod is given, need nothing but urllib3, so that a
node's agent does not carry the kubernetes library; everything that a kubeconfig may say is the library's to
know (`kubeconfig`, imported where it is needed). URLs and pods are reached straight, whatever proxies the
environment names; a kubeconfig as kubectl does it.

Invariants: a token goes to the API server only, over TLS or to loopback; it is read again when its file
changed, because others rotate it.
"""

from __future__ import annotations

import dataclasses
import os
import re
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import urllib3
from urllib3.connection import HTTPConnection

from cluster import errors

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_MAX_TOKEN_BYTES = 64 << 10
POOLED = 8
# A node that lost its network notices within a minute, not after the two hours of the kernel's default.
KEEPALIVE = [
    *HTTPConnection.default_socket_options,
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
]


@dataclasses.dataclass(frozen=True, slots=True)
class Where:
    """Which API server. `url` with its files; else `kubeconfig` (a file) and `context`; all None is what a
    pod is given or, outside of pods, what kubectl would use. `token_may_come_later`: a token file that is not
    there yet is an error of each request, not of the start."""

    url: str | None = None
    ca_file: Path | None = None
    token_file: Path | None = None
    kubeconfig: Path | None = None
    context: str | None = None
    token_may_come_later: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Access:
    """`url` without a slash at its end; `namespace` is the one that goes without saying; `headers` are what
    lets a request in, and raise ConfigurationError. Thread-safe."""

    url: str
    namespace: str
    pool: urllib3.PoolManager
    headers: Callable[[], Mapping[str, str]]


def find(where: Where) -> Access:
    """The way in. ConfigurationError where there is none."""
    if where.url is not None:
        return _at(where, where.url, "default")
    if where.kubeconfig is None and where.context is None and "KUBERNETES_SERVICE_HOST" in os.environ:
        pod = in_pod()
        assert pod.url is not None
        return _at(pod, pod.url, _pod_namespace())
    from cluster import kubeconfig

    found = kubeconfig.find(where.kubeconfig, where.context)
    _check(found.url)
    return found


def in_pod(ca_file: Path | None = None, token_file: Path | None = None) -> Where:
    """What a pod is given, but for the files that are named. ConfigurationError where this is no pod."""
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        raise errors.ConfigurationError(
            "kubernetes: KUBERNETES_SERVICE_HOST is not set, this is no pod; name the API server's URL"
        )
    return Where(
        f"https://{f'[{host}]' if ':' in host else host}:{port}",
        ca_file or _SERVICE_ACCOUNT / "ca.crt",
        token_file or _SERVICE_ACCOUNT / "token",
    )


def _at(where: Where, url: str, namespace: str) -> Access:
    _check(url)
    options: dict[str, Any] = {}
    if url.startswith("https:"):
        try:
            options["ssl_context"] = ssl.create_default_context(cafile=where.ca_file)
        except (OSError, ValueError) as exc:
            raise errors.ConfigurationError(f"kubernetes: ca_file: {where.ca_file}: {exc}") from exc
    pool = urllib3.PoolManager(num_pools=2, maxsize=POOLED, socket_options=KEEPALIVE, **options)
    if where.token_file is None:
        return Access(url.rstrip("/"), namespace, pool, dict)
    token = _TokenFile(where.token_file)
    if not where.token_may_come_later:
        token.headers()
    return Access(url.rstrip("/"), namespace, pool, token.headers)


def _check(url: str) -> None:
    try:
        parts = urlsplit(url)
        host, named = parts.hostname, parts.username is not None
    except ValueError as exc:
        raise errors.ConfigurationError(f"kubernetes: the API server's URL: {exc}") from exc
    if named:
        raise errors.ConfigurationError(
            "kubernetes: the API server's URL holds a user; who asks is told by a token, not by the URL"
        )
    if not host or (parts.scheme != "https" and host not in ("127.0.0.1", "::1", "localhost")):
        raise errors.ConfigurationError(
            f"kubernetes: {parts.scheme}://{host or ''} is not https; plain HTTP is for loopback only"
        )
    if parts.scheme not in ("https", "http"):
        raise errors.ConfigurationError(f"kubernetes: {parts.scheme}://{host} is not https")


def _pod_namespace() -> str:
    try:
        return (_SERVICE_ACCOUNT / "namespace").read_text().strip() or "default"
    except OSError:
        return "default"


class _TokenFile:
    """A bearer token that others rotate on disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._stamp: tuple[int, int, int] | None = None
        self._headers: Mapping[str, str] = {}

    def headers(self) -> Mapping[str, str]:
        with self._lock:
            try:
                status = self._path.stat()
                stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
                if stamp != self._stamp:
                    self._headers, self._stamp = {"Authorization": f"Bearer {self._load()}"}, stamp
            except OSError as exc:
                raise errors.ConfigurationError(f"kubernetes: token_file: {self._path}: {exc}") from exc
            return self._headers

    def _load(self) -> str:
        with self._path.open("rb") as file:
            data = file.read(_MAX_TOKEN_BYTES)
        token = data.decode("ascii", "replace").strip()
        if not re.fullmatch(r"[!-~]+", token):
            raise errors.ConfigurationError(f"kubernetes: token_file: {self._path} holds no token")
        return token
