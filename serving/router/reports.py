"""How busy each backend is, from what every Envoy reports once a second. Pure.

Called by `control` with what `lrs` received. A report says what is in flight and what was issued since the
one before; a backend that it does not name is idle. An Envoy that is connected and silent makes the load
unknown, not zero: nothing is said then.

For who decides by the load how much there shall be, more is unknown (`Loads.pressure`): an Envoy that ended
its stream a moment ago may be gone, or may be cut off from us and full of requests; and where only activators
report, nobody says what the replicas have.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Iterable, Mapping

from serving import service as services

INTERVAL_SECONDS = 1.0
LATE_SECONDS = 2.5
GONE_SECONDS = 10.0
"""An Envoy whose stream ended opens it again after five seconds; after so long it is gone."""
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


@dataclasses.dataclass(frozen=True, slots=True)
class Total:
    """Of one service at one Envoy, since it began to report: requests given to backends (activators are
    none), requests given to nobody for want of room, and the seconds that its reports cover. Whoever wants
    rates takes differences."""

    issued: int = 0
    dropped: int = 0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Pressure:
    """What one service is asked for: the load of its backends, and totals by Envoy (activators are none).
    `unknown` says why nothing is to be concluded from what is small in it; None where all of it counts."""

    loads: tuple[services.Load, ...]
    totals: Mapping[str, Total]
    unknown: str | None = None


class Loads:
    """The last report of each Envoy, and sums. Used from the control plane's loop only."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[float, Report | None]] = {}
        self._left: dict[str, float] = {}
        self._totals: dict[str, dict[str, Total]] = collections.defaultdict(dict)
        """By node, by service."""
        self._activators: dict[str, set[Place]] = collections.defaultdict(set)
        """By service, as they say of themselves."""

    def joined(self, node: str, now: float) -> None:
        """An Envoy began to report; its first report is awaited from now on."""
        self._last[node] = (now, None)
        self._left.pop(node, None)

    def left(self, node: str, now: float) -> None:
        """An Envoy ended its reports, and what it had in flight is no longer counted."""
        if self._last.pop(node, None) is not None:
            self._left[node] = now
        self._totals.pop(node, None)

    def record(self, report: Report, now: float) -> None:
        """One report that came."""
        self._last[report.node] = (now, report)
        self._left.pop(report.node, None)
        if report.node.startswith(ACTIVATOR_PREFIX):
            for service, counts in report.counts.items():
                self._activators[service] = set(counts)
            return
        totals = self._totals[report.node]
        for service, counts in report.counts.items():
            before = totals.get(service, Total())
            issued = [each.issued for place, each in counts.items() if place not in self._activators[service]]
            totals[service] = Total(
                before.issued + sum(issued),
                before.dropped + report.dropped.get(service, 0),
                before.seconds + report.seconds,
            )

    def pressure(self, service: services.Service, connected: Collection[str], now: float) -> Pressure:
        """See Pressure. `connected`: the nodes that have a stream to the control plane, reporting or not."""
        totals = {node: found[service.name] for node, found in self._totals.items() if service.name in found}
        return Pressure(tuple(self.current([service], now)), totals, self._unknown(connected, now))

    def _unknown(self, connected: Collection[str], now: float) -> str | None:
        self._left = {node: at for node, at in self._left.items() if now - at <= GONE_SECONDS}
        for node, (at, report) in self._last.items():
            if report is None:
                return f"the first report of {node} is awaited"
            if now - at > INTERVAL_SECONDS + LATE_SECONDS:
                return f"{node} has not reported for {now - at:.1f} s"
        for node, at in self._left.items():
            return f"{node} ended its reports {now - at:.1f} s ago"
        if silent := sorted(set(connected) - self._last.keys()):
            return f"{silent[0]} is connected and does not report"
        if all(node.startswith(ACTIVATOR_PREFIX) for node in self._last):
            return "no Envoy reports"
        return None

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
