"""`glowplug warmpool run`: builds a pool from its settings, runs its rounds, shows what it does.

The composition root: provider, demand, agents, store, election and controller are made here and nowhere else.
Threads: the caller's runs the rounds; the status server (read-only: /metrics, /api/v1/status, /healthz, a
page) has a thread for each request, and reads only the last document, which is replaced whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import ipaddress
import json
import logging
import random
import signal
import socket
import threading
import time
import types
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from warmpool import controller, demand_sources, election, errors, journal, nodeagents, view
from warmpool.controller import Controller
from warmpool.provider import Provider
from warmpool.providers import simulated
from warmpool.report import Report
from warmpool.settings import (
    Ec2Provider,
    FileDemand,
    KubernetesProvider,
    ServeDemand,
    Settings,
    SimulatedProvider,
)

_log = logging.getLogger(__name__)

_HEALTHY_ROUNDS = 20
"""A loop that has not come round for so many intervals hangs."""
_LEAST_HEALTHY_SECONDS = 300.0
_MAX_CONNECTIONS = 32
_REQUEST_SECONDS = 10.0


@dataclasses.dataclass(frozen=True, slots=True)
class Parts:
    """A pool, built. `close` ends what it holds; machines stay."""

    provider: Provider
    source: demand_sources.Source
    agents: nodeagents.NodeAgents | None
    store: journal.Store
    election: election.Election

    def close(self) -> None:
        self.election.stop()
        self.source.close()
        if self.agents is not None:
            self.agents.close()
        self.provider.close()


def build(settings: Settings) -> Parts:
    """All parts. ConfigurationError names the key that is to be changed."""
    agents = None if settings.warmth.agents is None else nodeagents.NodeAgents(settings.warmth.agents)
    provider: Provider
    if isinstance(settings.provider, KubernetesProvider):
        from warmpool.providers import kubernetes

        cluster = kubernetes.connect(settings.provider.access, settings.provider.namespace)
        held_by_pods = kubernetes.Kubernetes(cluster, settings.provider, settings.name)
        provider = held_by_pods
        if settings.election.kind == "lease":
            name = f"glowplug-warmpool-{settings.name}"
            return Parts(
                provider,
                _source(settings, held_by_pods),
                agents,
                journal.ConfigMapStore(cluster, name),
                election.LeaseElection(cluster, name, settings.election.lease_seconds),
            )
        source = _source(settings, held_by_pods)
    else:
        provider = _made(settings.provider)
        source = _source(settings, None)
    directory = _directory(settings)
    return Parts(
        provider,
        source,
        agents,
        journal.FileStore(directory / "state.json.gz"),
        election.LockElection(directory / "lock"),
    )


def _made(settings: Ec2Provider | SimulatedProvider) -> Provider:
    if isinstance(settings, SimulatedProvider):
        natures = {
            name: simulated.Nature(
                each.provision_seconds, each.boot_seconds, each.failure_share, each.capacity
            )
            for name, each in settings.classes.items()
        }
        return simulated.Simulated(simulated.World(natures, settings.seed, time.time))
    from warmpool.providers import ec2

    return ec2.Ec2(settings)


def _source(settings: Settings, cluster: demand_sources.Cluster | None) -> demand_sources.Source:
    classes = tuple(settings.policy.classes)
    if isinstance(settings.demand, ServeDemand):
        return demand_sources.ServeSource(settings.demand)
    if isinstance(settings.demand, FileDemand):
        return demand_sources.FileSource(settings.demand, classes)
    assert cluster is not None, "the settings were checked"
    return demand_sources.KubernetesSource(cluster, classes)


def _directory(settings: Settings) -> Path:
    directory = Path(settings.state_directory) / settings.name
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise errors.ConfigurationError(f"state_directory: {directory}: {exc.strerror}") from exc
    return directory


# -- running -------------------------------------------------------------------------------------------


def run(settings: Settings, *, dry_run: bool) -> None:
    """Rounds until SIGTERM or SIGINT. Nothing is let go of at the end."""
    stopping = threading.Event()
    parts = build(settings)
    with contextlib.ExitStack() as stack:
        stack.callback(parts.close)
        loop = _controller(settings, parts, dry_run)
        board = Board(settings)
        if settings.status.listen is not None:
            port = stack.enter_context(serve(settings.status.listen, board))
            _log.info("status on %s:%d", settings.status.listen.rpartition(":")[0], port)
        stack.enter_context(_until_signalled(stopping))
        parts.election.start()
        while not stopping.is_set():
            report = loop.step()
            board.put(view.document(settings.name, report, loop.events, loop.errors_total))
            # Pools of one provider do not all ask it in the same second.
            stopping.wait(settings.interval_seconds * (0.9 + 0.2 * random.random()))  # noqa: S311


def once(settings: Settings) -> Report:
    """One round that acts on nothing, with what is remembered: what `run` would do now."""
    parts = build(settings)
    try:
        return _controller(settings, dataclasses.replace(parts, election=_Alone()), dry_run=True).step()
    finally:
        parts.close()


def _controller(settings: Settings, parts: Parts, dry_run: bool) -> Controller:
    return controller.Controller(
        settings,
        parts.provider,
        parts.source,
        parts.agents,
        parts.store,
        parts.election,
        dry_run=dry_run,
    )


class _Alone:
    """The election of somebody who only looks."""

    def start(self) -> None: ...

    def holds(self) -> bool:
        return True

    def holder(self) -> str:
        return ""

    def stop(self) -> None: ...


@contextlib.contextmanager
def _until_signalled(stopping: threading.Event) -> Iterator[None]:
    def stop(signum: int, frame: types.FrameType | None) -> None:
        stopping.set()

    before = {each: signal.signal(each, stop) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


# -- being seen ----------------------------------------------------------------------------------------


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
        if not _is_this_host(self.headers.get("Host", "")):
            # A page of somebody else's must not read ours through a name of its own.
            self._answer(421, "text/plain", b"ask for this host by its address or its name\n")
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
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(data))),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            (
                "Content-Security-Policy",
                "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
            ),
        ):
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(data)


def _is_this_host(header: str) -> bool:
    try:
        host = urllib.parse.urlsplit(f"//{header}").hostname or ""
        ipaddress.ip_address(host)
    except ValueError:
        return header.partition(":")[0].lower() in ("localhost", socket.gethostname().lower())
    return True
