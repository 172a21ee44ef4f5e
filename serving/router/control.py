"""The control plane: services in, every Envoy told, loads out.

`Router` owns one thread with one asyncio loop, and in it the gRPC server of `ads` and `lrs`. Its public
methods may be called from any thread; callbacks run in the loop and must not block it.

Invariants: nothing is told to an Envoy before the first `update`; a refused `update` (DocumentError) changes
nothing; an `update` with equal services sends nothing. Numbers of snapshots begin with the time of the start,
so that they grow over restarts.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import logging
import stat
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import grpc
import grpc.aio
from envoy.service.discovery.v3 import ads_pb2_grpc
from envoy.service.load_stats.v3 import lrs_pb2_grpc

from serving import errors
from serving import service as services
from serving.router import ads, lrs, reports, resources, tenants, versions, weights

_log = logging.getLogger(__name__)

T = TypeVar("T")

_GRPC_OPTIONS = (
    # An Envoy whose host is gone is noticed; its loads would be unknown for as long as it seems connected.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
    # An Envoy that comes back names all that it has.
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.so_reuseport", 0),
)
_STOP_SECONDS = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class ServerTls:
    """Files (PEM) of the control plane's own certificate and key, and of the CA of the Envoys'. They are read
    again when they change."""

    certificate: Path
    key: Path
    client_ca: Path


class Router:
    """`address`: `unix:PATH`, or HOST:PORT, which needs `tls`; port 0 takes a free one (see `port`)."""

    def __init__(
        self,
        address: str,
        tls: ServerTls | None = None,
        on_load: Callable[[reports.Report], None] | None = None,
    ) -> None:
        self._address = address
        self._tls = tls
        self._on_load = on_load
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._state = _State(self._arm_ramp)
        self._discovery = ads.Discovery(self)
        self._loads = reports.Loads()
        self._ramp: asyncio.TimerHandle | None = None
        self.port = 0

    def start(self) -> None:
        """Returns when Envoys can connect. ConfigurationError where the address cannot be bound."""
        started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, args=(started,), name="router", daemon=True)
        self._thread.start()
        started.result()

    def stop(self) -> None:
        """Envoys keep what they have, and look for the control plane until it is back."""
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()
            self._thread = self._loop = None

    def update(self, found: Sequence[services.Service]) -> None:
        """Route exactly these services. DocumentError where they contradict one another."""
        resources.check(found)
        self._call(lambda: self._changed(self._state.replace(found, time.time())))

    def set_max_requests(self, service: str, limit: int) -> None:
        """How many requests of a service each Envoy lets through at once. NotFoundError."""
        if limit < 1:
            raise errors.DocumentError(f"max_requests of {service}: {limit} must be at least 1")
        self._call(lambda: self._changed(self._state.limit(service, limit)))

    def loads(self) -> list[services.Load]:
        """Every backend's load by the last reports; empty while they are unknown."""
        return self._call(lambda: self._loads.current(self._state.services.values(), time.monotonic()))

    def pressure(self, service: str) -> reports.Pressure:
        """What one service is asked for, by all reports that came: the demand of whoever scales it.
        NotFoundError."""

        def find() -> reports.Pressure:
            found = self._state.services.get(service)
            if found is None:
                raise errors.NotFoundError(f"router: no service is called {service}")
            connected = [each.id for each in self._discovery.nodes()]
            return self._loads.pressure(found, connected, time.monotonic())

        return self._call(find)

    def nodes(self) -> list[ads.Node]:
        """The Envoys that are connected."""
        return self._call(self._discovery.nodes)

    # -- what ads and lrs call, in the loop --------------------------------------------------------

    def snapshot(self, node: str, zone: str) -> versions.Snapshot | None:
        return self._state.snapshot(node, zone, time.time())

    def membership_changed(self) -> None:
        zones = collections.Counter(zone for zone in self._discovery.zones() if zone)
        divided = self._state.divide(self._discovery.ids(), time.monotonic())
        self._changed(self._state.set_zones(zones) or divided)

    def reporting(self, node: str) -> None:
        self._loads.joined(node, time.monotonic())

    def reported(self, report: reports.Report) -> None:
        now = time.monotonic()
        self._loads.record(report, now)
        self._changed(self._state.passed(report, self._discovery.ids(), now))
        if self._on_load is not None:
            self._on_load(report)

    def silent(self, node: str) -> None:
        self._loads.left(node, time.monotonic())

    # -- the loop ----------------------------------------------------------------------------------

    def _changed(self, changed: bool) -> None:
        if changed:
            self._discovery.notify()

    def _arm_ramp(self, at: float | None) -> None:
        """Have the weights computed again at Unix time `at`."""
        if self._ramp is not None:
            self._ramp.cancel()
            self._ramp = None
        if at is not None and self._loop is not None:
            delay = max(0.0, at - time.time()) + 0.001
            self._ramp = self._loop.call_later(delay, lambda: self._changed(self._state.step(time.time())))

    def _call(self, function: Callable[[], T]) -> T:
        """Run in the loop, wait for the result."""
        if self._loop is None:
            raise errors.UnavailableError("router: it is not running; start it first")

        async def run() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result()

    def _run(self, started: concurrent.futures.Future[None]) -> None:
        asyncio.run(self._main(started))

    async def _main(self, started: concurrent.futures.Future[None]) -> None:
        self._stopping = asyncio.Event()
        server = grpc.aio.server(options=_GRPC_OPTIONS)
        ads_pb2_grpc.add_AggregatedDiscoveryServiceServicer_to_server(self._discovery, server)
        lrs_pb2_grpc.add_LoadReportingServiceServicer_to_server(lrs.Reporting(self), server)
        try:
            self.port = _bind(server, self._address, self._tls)
            await server.start()
        except errors.ServingError as exc:
            started.set_exception(exc)
            return
        self._loop = asyncio.get_running_loop()
        started.set_result(None)
        await self._stopping.wait()
        self._arm_ramp(None)
        await server.stop(_STOP_SECONDS)


class _State:
    """What is routed now, and the snapshots made of it: one per zone, made when an Envoy of it asks."""

    def __init__(self, arm: Callable[[float | None], None]) -> None:
        self.services: dict[str, services.Service] = {}
        self._arm = arm
        self._known = False
        self._limits: dict[str, int] = {}
        self._zones: Mapping[str, float] = {}
        self._start_milliseconds = int(time.time() * 1000)
        self._count = 0
        self._clusters: dict[str, tuple[services.Service, versions.Resource]] = {}
        self._shared: resources.Resources = {}
        self._endpoints: dict[tuple[str, str], versions.Resource] = {}
        """By zone and service."""
        self._tenants = tenants.Tenants()
        self._connected: frozenset[str] = frozenset()
        self._routes: dict[str, dict[str, versions.Resource]] = {}
        self._snapshots: dict[tuple[str, str], versions.Snapshot] = {}
        """As the routes by node (nobody: with whole rates), and by zone."""

    def replace(self, found: Sequence[services.Service], now: float) -> bool:
        new = {service.name: service for service in found}
        if self._known and new == self.services:
            return False
        stale = {
            name for name in self.services.keys() | new.keys() if self.services.get(name) != new.get(name)
        }
        routed = {name: _routing(service) for name, service in new.items()}
        if not self._known or routed != {n: _routing(s) for n, s in self.services.items()}:
            self._shared = resources.of_listeners(found)
            self._routes.clear()
        self.services, self._known = new, True
        self.divide(self._connected, time.monotonic())
        self._limits = {name: limit for name, limit in self._limits.items() if name in new}
        for name in stale:
            self._forget_endpoints(name)
        self._next(now)
        return True

    def limit(self, service: str, limit: int) -> bool:
        if service not in self.services:
            raise errors.NotFoundError(f"router: no service is called {service}")
        if self._limits.get(service) == limit:
            return False
        self._limits[service] = limit
        self._snapshots.clear()
        self._count += 1
        return True

    def passed(self, report: reports.Report, connected: Collection[str], now: float) -> bool:
        self._tenants.passed(report)
        return self.divide(connected, now)

    def divide(self, connected: Collection[str], now: float) -> bool:
        """Tenants' rates among the Envoys; `now` is monotonic."""
        self._connected = frozenset(connected)
        if not self._tenants.divide(self.services.values(), connected, now):
            return False
        self._routes.clear()
        self._snapshots.clear()
        self._count += 1
        return True

    def set_zones(self, envoys: Mapping[str, int]) -> bool:
        total = sum(envoys.values())
        zones = {zone: count / total for zone, count in envoys.items()} if total else {}
        if zones == self._zones:
            return False
        self._zones = zones
        by_zone = [name for name, service in self.services.items() if service.prefer_zone]
        for name in by_zone:
            self._forget_endpoints(name)
        if by_zone:
            self._next(time.time())
        return bool(by_zone)

    def step(self, now: float) -> bool:
        """A ramp takes its next step."""
        for name, service in self.services.items():
            if any(each.since is not None for each in service.backends):
                self._forget_endpoints(name)
        self._next(now)
        return True

    def snapshot(self, node: str, zone: str, now: float) -> versions.Snapshot | None:
        if not self._known:
            return None
        rates = self._tenants.of(node)
        key = (node if rates else "", zone)
        made = self._snapshots.get(key)
        if made is None:
            if key[0] not in self._routes:
                self._routes[key[0]] = resources.of_routes(self.services.values(), rates)
            made = self._snapshots[key] = versions.Snapshot(
                f"{self._start_milliseconds}.{self._count}", self._resources(key[0], zone, now)
            )
        return made

    def _resources(self, node: str, zone: str, now: float) -> resources.Resources:
        clusters, endpoints = resources.collectors(self.services.values()), {}
        for name, service in self.services.items():
            clusters[name] = self._cluster(service)
            key = (zone if service.prefer_zone else "", name)
            if key not in self._endpoints:
                self._endpoints[key] = resources.endpoints(service, now, zone, self._zones)
            endpoints[name] = self._endpoints[key]
        runtime = resources.runtime(self.services.values(), self._limits)
        return {
            **self._shared,
            versions.ROUTES: self._routes[node],
            versions.CLUSTER: clusters,
            versions.ENDPOINTS: endpoints,
            versions.RUNTIME: {runtime.name: runtime},
        }

    def _cluster(self, service: services.Service) -> versions.Resource:
        """Made again only where more than the backends changed: it is the dearest to make."""
        alike = dataclasses.replace(service, backends=(), version_weights={}, activator=None)
        before = self._clusters.get(service.name)
        if before is None or before[0] != alike:
            before = self._clusters[service.name] = (alike, resources.cluster(service))
        return before[1]

    def _forget_endpoints(self, name: str) -> None:
        for key in [key for key in self._endpoints if key[1] == name]:
            del self._endpoints[key]

    def _next(self, now: float) -> None:
        self._snapshots.clear()
        self._count += 1
        self._clusters = {name: each for name, each in self._clusters.items() if name in self.services}
        times = [weights.next_change(each, now) for each in self.services.values()]
        self._arm(min((at for at in times if at is not None), default=None))


def _routing(service: services.Service) -> services.Service:
    """What listeners and routes are made of."""
    return dataclasses.replace(service, backends=(), version_weights={}, activator=None)


def _bind(server: grpc.aio.Server, address: str, tls: ServerTls | None) -> int:
    unix = address.removeprefix("unix:") if address.startswith("unix:") else None
    if unix is None and tls is None and not address.startswith(("127.0.0.1:", "[::1]:", "localhost:")):
        raise errors.ConfigurationError(
            f"router: {address} would take anybody's word and tell keys to anybody; give it a certificate, "
            "a key and the CA of its Envoys, or a unix socket"
        )
    if unix is not None:
        _require_private(Path(unix))
    try:
        if tls is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, _credentials(tls))
    except (RuntimeError, OSError) as exc:
        raise errors.ConfigurationError(
            f"router: cannot listen at {address}: {exc}; is it in use, or its directory missing?"
        ) from exc


def _require_private(socket: Path) -> None:
    """gRPC makes the socket with the umask's mode, so its directory must be ours alone."""
    try:
        found = socket.parent.stat()
    except OSError as exc:
        raise errors.ConfigurationError(
            f"router: {socket.parent}: {exc.strerror}; make it, mode 0700"
        ) from exc
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise errors.ConfigurationError(
            f"router: {socket.parent} is open to others; chmod 700 {socket.parent}"
        )
    with contextlib.suppress(FileNotFoundError):
        socket.unlink()


def _credentials(tls: ServerTls) -> grpc.ServerCredentials:
    def stamp() -> tuple[int, ...]:
        return tuple(each.stat().st_mtime_ns for each in (tls.certificate, tls.key, tls.client_ca))

    def read() -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration(
            [(tls.key.read_bytes(), tls.certificate.read_bytes())], tls.client_ca.read_bytes()
        )

    try:
        last = [stamp()]
        first = read()
    except OSError as exc:
        raise errors.ConfigurationError(f"router: {exc.filename}: {exc.strerror}") from exc

    def at_handshake() -> grpc.ServerCertificateConfiguration | None:
        """None keeps what is there."""
        try:
            now = stamp()
            if now == last[0]:
                return None
            last[0] = now
            return read()
        except OSError as exc:
            _log.warning("router: certificate not read again: %s", exc)
            return None

    return grpc.dynamic_ssl_server_credentials(
        first,
        at_handshake,  # type: ignore[arg-type]  # the stubs know no None
        require_client_authentication=True,
    )
