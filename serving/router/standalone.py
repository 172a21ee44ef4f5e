"""The router on its own: `glowplug router run`. Builds sources, control plane and, if wanted, an Envoy.

Runs in the verb's thread until it is interrupted. Ports are kept open before Envoy is told of them, so
that one that is in use is an error and not a listener that silently shares it.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Sequence
from pathlib import Path

from serving import errors
from serving import service as services
from serving.router import bootstrap, control, envoy, sources

_log = logging.getLogger(__name__)

_NODES_SECONDS = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Here:
    """The Envoy of this machine: where its files lie, its zone, its worker threads (0: one per CPU), and how
    long its requests may take when it is stopped."""

    directory: Path
    zone: str = ""
    workers: int = 0
    drain_seconds: float = 30.0


def run(
    config: Path, address: str, tls: control.ServerTls | None, here: Here | None, stopping: threading.Event
) -> None:
    """Returns once `stopping` is set, or raises what is wrong with document, address or Envoy."""
    router = control.Router(address, tls)
    local = None if here is None else _envoy(here, address)
    failed: list[errors.ServingError] = []
    first = threading.Event()

    def update(found: Sequence[services.Service]) -> None:
        try:
            if local is not None:
                local.keep_open({(each.listen.address, each.listen.port) for each in found})
            router.update(found)
        except errors.ServingError as exc:
            if first.is_set():
                raise
            failed.append(exc)
        first.set()

    source = sources.Sources(config, update)
    router.start()
    source.start()
    try:
        while not first.wait(0.1) and not stopping.is_set():
            pass  # until Kubernetes was listed: an Envoy that runs keeps what it has
        if failed:
            raise failed[0]
        if local is not None and not stopping.is_set():
            local.start()
        _log.info("routing %d services", len(source.services))
        _watch_nodes(router, stopping)
    finally:
        source.stop()
        if local is not None and here is not None:
            local.stop(here.drain_seconds)
        router.stop()


def _envoy(here: Here, address: str) -> envoy.Envoy:
    if not address.startswith("unix:"):
        raise errors.ConfigurationError(
            "router: the Envoy of this machine is told over a unix socket; leave --listen out, or --envoy"
        )
    settings = bootstrap.Settings(
        node="local",
        control=address.removeprefix("unix:"),
        admin=str(here.directory / "admin.sock"),
        zone=here.zone,
    )
    return envoy.Envoy(here.directory, settings, here.workers)


def _watch_nodes(router: control.Router, stopping: threading.Event) -> None:
    """Say who comes and goes; what an Envoy refuses is said by `ads`, once."""
    before: set[str] = set()
    while not stopping.wait(_NODES_SECONDS):
        now = {node.id for node in router.nodes()}
        for node in sorted(now - before):
            _log.info("Envoy %s is connected", node)
        for node in sorted(before - now):
            _log.warning("Envoy %s is gone", node)
        before = now
