"""What the Envoys report, kept by replica and by version: for the update's decisions and for who watches.

`report` is called by the router's loop once a second for each Envoy, the rest by the server's thread and the
status API's; a lock is held for as long as the sums take. Counts only grow for as long as the server lives.
A replica that is gone keeps its place for the reports that are still under way.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Mapping, Sequence

from serving.controller import Count
from serving.replica import Replica
from serving.router.reports import ACTIVATOR_PREFIX, Report

_KEPT_SAMPLES = 300
_KEPT_PLACES = 1_000

Place = tuple[str, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Flow:
    """One replica's requests: in flight at the last report, per second over its interval, and in all."""

    in_flight: int = 0
    per_second: float = 0.0
    issued: int = 0
    errors: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """All replicas together at one report. `at` is Unix seconds."""

    at: float
    in_flight: int
    per_second: float
    errors_per_second: float


class Traffic:
    """See the module. `service` is the one whose reports count."""

    def __init__(self, service: str) -> None:
        self._service = service
        self._lock = threading.Lock()
        self._homes: collections.OrderedDict[Place, tuple[str, str]] = collections.OrderedDict()
        self._versions: dict[str, Count] = collections.defaultdict(Count)
        self._flows: dict[str, Flow] = {}
        self._held = 0
        self._samples: collections.deque[Sample] = collections.deque(maxlen=_KEPT_SAMPLES)

    def settle(self, replicas: Sequence[Replica]) -> None:
        """Who is where from now on."""
        with self._lock:
            for each in replicas:
                if each.address is not None:
                    self._homes[each.address] = (each.name, each.version)
            while len(self._homes) > _KEPT_PLACES:
                _, (name, _) = self._homes.popitem(last=False)
                self._flows.pop(name, None)

    def report(self, report: Report, at: float) -> None:
        """Add what one Envoy said; from an activator, how many requests wait there."""
        if report.node.startswith(ACTIVATOR_PREFIX):
            named = report.counts.get(self._service, {}).values()
            with self._lock:
                self._held = sum(each.in_flight for each in named)
            return
        seconds = max(report.seconds, 1e-3)
        in_flight = issued = failed = 0
        counts = report.counts.get(self._service, {})
        with self._lock:
            for place, (name, version) in self._homes.items():
                found = counts.get(place)
                before = self._flows.get(name, Flow())
                if found is None:
                    self._flows[name] = dataclasses.replace(before, in_flight=0, per_second=0.0)
                    continue
                self._flows[name] = Flow(
                    found.in_flight,
                    found.issued / seconds,
                    before.issued + found.issued,
                    before.errors + found.errors,
                )
                total = self._versions[version]
                self._versions[version] = Count(total.issued + found.issued, total.errors + found.errors)
                in_flight += found.in_flight
                issued += found.issued
                failed += found.errors
            self._samples.append(Sample(at, in_flight, issued / seconds, failed / seconds))

    def versions(self) -> Mapping[str, Count]:
        """Requests by version, since the server started."""
        with self._lock:
            return dict(self._versions)

    def reported_at(self) -> float:
        """When the last report came; 0 before the first."""
        with self._lock:
            return self._samples[-1].at if self._samples else 0.0

    def held(self) -> int:
        """Requests that wait for a replica to be up."""
        with self._lock:
            return self._held

    def of(self, name: str) -> Flow:
        """One replica's."""
        with self._lock:
            return self._flows.get(name, Flow())

    def samples(self) -> Sequence[Sample]:
        """The last minutes, oldest first."""
        with self._lock:
            return list(self._samples)
