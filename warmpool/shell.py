"""`glowplug warmpool run`: builds a pool from its settings, runs its rounds, shows what it does.

The composition root: provider, demand, agents, store, election and controller are made here and nowhere else.
Threads: the caller's runs the rounds; the status server (read-only: /metrics, /api/v1/status, /healthz, a
page) has a thread for each request, and reads only the last document, which is replaced whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
import signal
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

from warmpool import board, controller, demand_sources, election, errors, journal, nodeagents, view
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
        shown = board.Board(settings)
        if settings.status.listen is not None:
            port = stack.enter_context(board.serve(settings.status.listen, shown))
            _log.info("status on %s:%d", settings.status.listen.rpartition(":")[0], port)
        stack.enter_context(_until_signalled(stopping))
        parts.election.start()
        while not stopping.is_set():
            report = loop.step()
            shown.put(view.document(settings.name, report, loop.events, loop.errors_total))
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
