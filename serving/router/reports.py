"""How busy each backend is, from what every Envoy reports once a second. Pure.

Called by `control` with what `lrs` received. A report says what is in flight and what was issued since the
one before; a backend that it does not name is idle. An Envoy that is connected and silent makes the load
unknown, not zero: nothing is said then.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping

from serving import service as services

INTERVAL_SECONDS = 1.0
LATE_SECONDS = 2.5
ACTIVATOR_PREFIX = "activator/"
"""Of the node ids of activators, which report on themselves alone."""

Place = tuple[str, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Counts:
    """One backend in one report."""

    in_flight: int = 0
    issued: int = 0
    errors: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """What one Envoy said. `seconds` since its report before; `counts` by service and place; `dropped` by
    service: requests that it gave to no backend."""

    node: str
    seconds: float
    counts: Mapping[str, Mapping[Place, Counts]]
    dropped: Mapping[str, int]


class Loads:
    """The last report of each Envoy. Used from the control plane's loop only."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[float, Report | None]] = {}

    def joined(self, node: str, now: float) -> None:
        """An Envoy began to report; its first report is awaited from now on."""
        self._last[node] = (now, None)

    def left(self, node: str) -> None:
        """An Envoy is gone, and what it had in flight with it."""
        self._last.pop(node, None)

    def record(self, report: Report, now: float) -> None:
        self._last[report.node] = (now, report)

    def dropped(self) -> dict[str, int]:
        """Requests of each service that were given to no backend, over the interval of the last reports."""
        total: collections.Counter[str] = collections.Counter()
        for _, report in self._last.values():
            if report is not None:
                total.update(report.dropped)
        return dict(total)

    def current(self, found: Iterable[services.Service], now: float) -> list[services.Load]:
        """Every backend's load, summed over the Envoys; empty while it is unknown."""
        reports = [report for at, report in self._last.values() if report is not None]
        if not reports or len(reports) < len(self._last):
            return []
        if any(now - at > INTERVAL_SECONDS + LATE_SECONDS for at, _ in self._last.values()):
            return []
        loads = []
        for service in found:
            places = {(each.address, each.port) for each in service.backends}
            if service.activator is not None:
                places.add(service.activator)
            for report in reports:  # also what has left, while it still works on something
                places |= report.counts.get(service.name, {}).keys()
            loads += [_sum(service.name, place, reports) for place in sorted(places)]
        return loads


def without_dropped(counts: Mapping[Place, Counts], dropped: int) -> dict[Place, Counts]:
    """Envoy counts a request that the limit of in-flight ones turned away as an error of the backend that it
    would have had: overload is not failure, so these are taken out, from each in proportion."""
    errors = sum(each.errors for each in counts.values())
    kept = max(0.0, 1.0 - dropped / errors) if errors else 1.0
    return {
        place: dataclasses.replace(each, errors=round(each.errors * kept)) for place, each in counts.items()
    }


def _sum(service: str, place: Place, reports: list[Report]) -> services.Load:
    """One backend's load. Requests at an activator are counted by it, at once, and by the Envoys, later: the
    same requests, so that the larger number counts."""
    by_envoys, by_itself = (
        [
            each.counts.get(service, {}).get(place, Counts())
            for each in reports
            if each.node.startswith(ACTIVATOR_PREFIX) == itself
        ]
        for itself in (False, True)
    )
    return services.Load(
        service,
        *place,
        in_flight=max(sum(each.in_flight for each in some) for some in (by_envoys, by_itself)),
        issued=max(sum(each.issued for each in some) for some in (by_envoys, by_itself)),
        errors=max(sum(each.errors for each in some) for some in (by_envoys, by_itself)),
        seconds=max(each.seconds for each in reports),
    )
