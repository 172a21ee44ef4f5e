"""What a controller shows of itself: the last document, over HTTP, to whoever may reach the port.

Made by `shell`. Read-only: /metrics, /api/v1/status, /healthz and a page, by GET. A thread serves each
connection; connections and the time that one may take are bounded. The document is replaced whole, so readers
take no lock.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from pages import guard
from warmpool import errors, view
from warmpool.settings import Settings

_HEALTHY_ROUNDS = 20
"""A loop that has not come round for so many intervals hangs."""
_LEAST_HEALTHY_SECONDS = 300.0
_MAX_CONNECTIONS = 32
_REQUEST_SECONDS = 10.0


class Board:
    """The last document. Any thread."""

    def __init__(self, settings: Settings) -> None:
        self._document = view.document(settings.name, None, (), {})
        self._put_at = time.monotonic()
        self._healthy_seconds = max(_LEAST_HEALTHY_SECONDS, _HEALTHY_ROUNDS * settings.interval_seconds)

    def put(self, document: Mapping[str, Any]) -> None:
        self._document = dict(document)
        self._put_at = time.monotonic()

    @property
    def document(self) -> Mapping[str, Any]:
        return self._document

    @property
    def healthy(self) -> bool:
        """Whether rounds come round."""
        return time.monotonic() - self._put_at < self._healthy_seconds


@contextlib.contextmanager
def serve(listen: str, board: Board) -> Iterator[int]:
    """Show the board on ADDRESS:PORT; yields the port. ConfigurationError if it cannot be had."""
    host, separator, port = listen.rpartition(":")
    if not separator or not port.isdigit():
        raise errors.ConfigurationError(f"status.listen: {listen!r} is not ADDRESS:PORT")

    class Handler(_Handler):
        shown = board

    try:
        server = _Server((host.strip("[]"), int(port)), Handler)
    except (OSError, OverflowError) as exc:
        raise errors.ConfigurationError(f"status.listen: cannot listen on {listen}: {exc}") from exc
    thread = threading.Thread(target=server.serve_forever, name="status", daemon=True)
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], handler: type[_Handler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._places = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread was to be had
            self._places.release()
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()


class _Handler(http.server.BaseHTTPRequestHandler):
    server_version = "glowplug"
    sys_version = ""
    timeout = _REQUEST_SECONDS
    shown: Board

    def log_message(self, format: str, *args: object) -> None:
        """Scrapes are no news."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if not guard.is_this_host(self.headers.get("Host", ""), guard.own_names()):
            self._answer(421, "text/plain", f"{guard.REFUSAL}\n".encode())
        elif path == "/healthz":
            healthy = self.shown.healthy
            self._answer(200 if healthy else 503, "text/plain", b"ok\n" if healthy else b"no rounds\n")
        elif path == "/metrics":
            self._answer(200, "text/plain; version=0.0.4; charset=utf-8", view.metrics(self.shown.document))
        elif path == "/api/v1/status":
            self._answer(200, "application/json", json.dumps(self.shown.document).encode())
        elif path == "/":
            self._answer(200, "text/html; charset=utf-8", view.page(self.shown.document).encode())
        else:
            self._answer(404, "text/plain", b"there is /, /metrics, /api/v1/status and /healthz\n")

    def _answer(self, status: int, kind: str, data: bytes) -> None:
        self.send_response(status)
        told = {"Content-Type": kind, "Content-Length": str(len(data)), **guard.HEADERS}
        for name, value in told.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(data)
