"""`glowplug operator run`: the lease, the router, kopf, and a loop for each ModelEndpoint of the namespace.

kopf knows which resources there are, holds them back from being deleted until their replicas have drained,
and keeps a thread for each (a daemon, in its words); what happens in it is `tending`'s. Until it leads, an
operator only waits; one that loses the lease ends, and whoever started it starts it again. It leaves
replicas, routes and Envoys as they are: they need it for changes only.

Threads: `run` is the caller's; kopf's loop has one, and one for each resource; the lease, the router, the
metrics' port and the providers have theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import kopf

from cluster import errors as cluster_errors
from cluster import objects
from cluster.api import Api
from cluster.connection import Connection, Where
from cluster.events import About
from cluster.leader import Leader
from cluster.lease import Timing
from cluster.objects import Body
from serving import endpointmetrics, errors
from serving.operator import definition, metricsport
from serving.operator.board import Board
from serving.operator.tending import Tender
from serving.router import control, reports

_TURN_SECONDS = 0.25
_END_SECONDS = 1.0
_MOST_ENDPOINTS = 512
_EXIT_SECONDS = 20.0
_PREFIX = "operator.glowplug.dev"
_LEASE = "glowplug-operator"

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """`listen` and `tls`: the control plane for the Envoys. `namespace`: None is the one that the operator
    runs in. `metrics`: where /metrics is, None for nowhere."""

    listen: str
    tls: control.ServerTls | None
    state_dir: Path
    namespace: str | None = None
    metrics: tuple[str, int] | None = None
    lease: Timing = dataclasses.field(default_factory=Timing)


def run(options: Options, stopping: threading.Event) -> None:
    """Until `stopping` is set. UnavailableError when the lease is lost; ConfigurationError."""
    try:
        api = Api(Connection(Where()), options.namespace)
        api.list(definition.KIND)
    except cluster_errors.NotFoundError as exc:
        raise errors.ConfigurationError(
            f"the cluster knows no {definition.KIND.plural}: apply deploy/kustomize/serving/crd.yaml"
        ) from exc
    except cluster_errors.UnavailableError as exc:
        raise errors.UnavailableError(str(exc)) from exc
    except cluster_errors.ClusterError as exc:
        raise errors.ConfigurationError(str(exc)) from exc
    leader = Leader(api, _LEASE, timing=options.lease)
    tenders: dict[str, Tender] = {}
    with _metrics(options.metrics, leader, tenders):
        leader.start()
        try:
            while not leader.holds():
                if stopping.wait(_TURN_SECONDS):
                    return
            _Operator(options, api, leader, tenders).run(stopping)
        finally:
            leader.stop()


@contextlib.contextmanager
def _metrics(listen: tuple[str, int] | None, leader: Leader, tenders: Mapping[str, Tender]) -> Iterator[None]:
    """Shown for as long as the block runs, also by an operator that only waits."""
    if listen is None:
        yield
        return

    def render() -> bytes:
        leads = endpointmetrics.gauge(
            "glowplug_operator_leading", "1 where this operator holds the lease.", int(leader.holds())
        )
        found = [each.numbers for each in list(tenders.values())]
        return endpointmetrics.render([each for each in found if each is not None], [leads])

    port = metricsport.MetricsPort(listen, render)
    _log.info("metrics: http://%s:%d/metrics", *port.start())
    try:
        yield
    finally:
        port.stop()


class _Stopped(Protocol):
    """kopf's word to a daemon's thread."""

    reason: kopf.DaemonStoppingReason | None

    def __bool__(self) -> bool: ...

    def wait(self, timeout: float) -> object: ...


class _Operator:
    """While it leads."""

    def __init__(self, options: Options, api: Api, leader: Leader, tenders: dict[str, Tender]) -> None:
        """`tenders` is filled here, by name."""
        self._options = options
        self._api = api
        self._leader = leader
        self._tenders = tenders
        self._router = control.Router(options.listen, options.tls, on_load=self._loaded)
        self._ending = threading.Event()
        self._failed: BaseException | None = None

    def run(self, stopping: threading.Event) -> None:
        try:
            there = [each.meta.name for each in self._api.list(definition.KIND).objects]
        except cluster_errors.ClusterError as exc:
            raise errors.UnavailableError(str(exc)) from exc
        self._router.start()
        self._board = Board(self._router.update, there)
        if not there:
            self._router.update([])
        thread = threading.Thread(target=self._kopf, name="kopf", daemon=True)
        thread.start()
        try:
            while thread.is_alive() and self._leader.holds() and not stopping.wait(_TURN_SECONDS):
                pass
            if not stopping.is_set() and not self._leader.holds():
                raise errors.UnavailableError("the lease is lost: another operator may lead; this one ends")
        finally:
            self._ending.set()
            thread.join(_EXIT_SECONDS)
            self._router.stop()
        if self._failed is not None:
            raise errors.UnavailableError(f"kopf ended: {self._failed}") from self._failed

    def _loaded(self, report: reports.Report) -> None:
        for tender in list(self._tenders.values()):
            tender.traffic.report(report, tender.clock())

    def _kopf(self) -> None:
        try:
            asyncio.run(
                kopf.operator(
                    registry=self._registry(),
                    settings=_settings(),
                    namespaces=[self._api.namespace],
                    standalone=True,
                    stop_flag=self._ending,
                )
            )
        except Exception as exc:
            self._failed = exc

    def _registry(self) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()
        kopf.on.login(registry=registry)(kopf.login_via_client)
        kopf.daemon(
            definition.GROUP,
            definition.VERSION,
            definition.KIND.plural,
            registry=registry,
            errors=kopf.ErrorsMode.TEMPORARY,
            backoff=_END_SECONDS,
        )(lambda **given: self._tend(given["body"], given["spec"], given["meta"], given["stopped"]))
        return registry

    def _tend(self, body: Body, spec: Body, meta: Body, stopped: _Stopped) -> None:
        """One resource, until it is deleted or the operator ends. kopf keeps what it gives current."""
        found = objects.parse({**body, "metadata": dict(meta)}, "modelendpoint")
        name = found.meta.name
        status = body.get("status")
        tender = Tender(
            About(definition.KIND, found.meta),
            dict(status) if isinstance(status, Mapping) else {},
            self._api,
            self._router,
            self._board,
            self._options.state_dir / name,
            self._leader.holds,
        )
        self._tenders[name] = tender
        try:
            while not stopped:
                tender.turn(dict(spec), int(meta.get("generation", 0)))
                stopped.wait(_TURN_SECONDS)
            deleted = kopf.DaemonStoppingReason.RESOURCE_DELETED
            while stopped.reason is not None and deleted in stopped.reason and not self._ending.is_set():
                if tender.end():
                    return
                self._ending.wait(_END_SECONDS)
        finally:
            del self._tenders[name]
            tender.close()


def _settings() -> kopf.OperatorSettings:
    """kopf's, where its defaults are not ours."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False  # we say what happens ourselves
    settings.persistence.finalizer = "glowplug.dev/drain"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=_PREFIX)
    settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=_PREFIX)
    settings.scanning.disabled = True  # or it wants to watch namespaces and definitions
    settings.execution.max_workers = _MOST_ENDPOINTS  # a thread is kept for each
    settings.background.cancellation_polling = _END_SECONDS
    settings.process.ultimate_exiting_timeout = _EXIT_SECONDS
    return settings
