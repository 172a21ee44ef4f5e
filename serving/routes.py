"""From an endpoint, its replicas and the weights of its versions to the router's `Service`. Pure.

Called by the server at each turn of its loop; the router sends only what differs. A replica is routed to
while it is ready; one that drains is named as draining, so that it leaves the endpoint set before it is told
to stop; one that is not ready yet, or failed, is not named at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from serving import errors, observability
from serving.activator import hold
from serving.endpoint import Endpoint
from serving.engine import settings as engine_settings
from serving.replica import Replica, State
from serving.service import Backend, Balancing, Key, Listen, RouteSettings, Service, Tracing

_ROUTED = (State.READY, State.DRAINING)


def service(
    wanted: Endpoint,
    replicas: Sequence[Replica],
    weights: Mapping[str, int],
    port: int,
    *,
    keys: tuple[Key, ...] = (),
    activator: tuple[str, int] | None = None,
) -> Service:
    """The endpoint as it is to be routed now. `port` is the document's, or the one that was found for 0;
    `activator` gets the requests while no replica is healthy."""
    backends = tuple(
        Backend(
            each.address[0],
            each.address[1],
            version=each.version,
            zone=each.zone,
            draining=each.state is State.DRAINING,
        )
        for each in replicas
        if each.address is not None and each.state in _ROUTED
    )
    routing = wanted.routing
    return Service(
        name=wanted.name,
        listen=Listen(port, routing.address, tracing=_tracing(wanted)),
        backends=backends,
        version_weights=dict(weights),
        keys=keys,
        activator=activator,
        settings=RouteSettings(
            balancing=Balancing(routing.balancing),
            sticky_header=routing.sticky_header,
            request_timeout_seconds=routing.request_timeout_seconds,
            stream_idle_seconds=routing.idle_timeout_seconds,
            retry_budget_percent=routing.retry_budget_percent,
            max_requests=max_requests(wanted),
            max_request_bytes=wanted.limits.request_bytes,
            health_path="/readyz",
        ),
    )


def _tracing(wanted: Endpoint) -> Tracing | None:
    if wanted.tracing is None:
        return None
    host, port = observability.collector_place(wanted.tracing.collector)
    return Tracing(host, port, f"{wanted.name}-router", wanted.tracing.sample_percent)


def max_requests(wanted: Endpoint) -> int:
    """What the router lets through at once: more than the replicas admit, so that they, who know better, say
    429 first."""
    most = max(1, wanted.replicas.most)
    return wanted.routing.max_requests or 2 * most * wanted.replicas.limit


def max_requests_at(wanted: Endpoint, replicas: int, limit: int) -> int:
    """The same where replicas and their limits come and go: what so many admit and queue, and what waits at
    the activator, which passes through the router as well. A number that the document gives stays."""
    queued = engine_settings.Queue().requests
    return wanted.routing.max_requests or hold.Limits().max_held + replicas * max(2 * limit, limit + queued)


def keys(text: str, where: str) -> tuple[Key, ...]:
    """API keys: `TENANT KEY [requests=N] [tokens=N | units=N] [priority=N]` a line, rates a second; `#`
    begins a comment. DocumentError."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.partition("#")[0].split()
        if not fields:
            continue
        try:
            if len(fields) < 2:
                raise errors.DocumentError(f"write TENANT KEY {_SHOWN_LIMITS}")
            found.append(Key(fields[0], fields[1], **_limits(fields[2:])))
        except errors.DocumentError as exc:
            raise errors.DocumentError(f"{where}:{number}: {exc}") from exc
    if not found:
        raise errors.DocumentError(f"{where}: no key in it; nobody could use the endpoint")
    return tuple(found)


_SHOWN_LIMITS = "[requests=N] [tokens=N | units=N] [priority=N]"
_LIMITS: Mapping[str, tuple[str, Callable[[str], float]]] = {
    "requests": ("requests_per_second", int),
    "tokens": ("tokens_per_second", float),
    "units": ("units_per_second", float),
    "priority": ("priority", int),
}


def _limits(fields: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in fields:
        name, _, value = field.partition("=")
        if name not in _LIMITS:
            raise errors.DocumentError(f"{field!r} is no limit; write {_SHOWN_LIMITS}")
        key, number = _LIMITS[name]
        if key in found:
            raise errors.DocumentError(f"{name} is given twice; keep one of them")
        try:
            found[key] = number(value)
        except ValueError as exc:
            raise errors.DocumentError(f"{name}: {value!r} is not a number") from exc
    return found
