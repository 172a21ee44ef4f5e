"""What each Envoy lets a tenant have of its requests a second. Pure.

Owned by `control`, in whose loop it is used. A tenant's rate is one for all Envoys: it is divided
(`division`) by what each passed on for the service lately. Envoy's buckets begin full when their rate
changes, so that a change lets through a second's worth again; therefore shares are only told anew when one of
them is off by more than `SLACK`, or when an Envoy came or went. One that went keeps its share for
`GONE_SECONDS`, since it may be there and only cut off from us; it goes on with it, and if that lasts longer,
the others have it, too.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterable, Mapping

from serving import division
from serving import service as services
from serving.router import reports

SLACK = 0.25
_WEIGHT = 0.3
"""Of the latest report in the demand."""

Rates = Mapping[str, float]
"""By `routes.share_of`."""


def share_of(service: services.Service, key: services.Key) -> str:
    """The name of a tenant's bucket: all its keys draw from one."""
    return f"{service.name}/{key.tenant}"


class Tenants:
    """The rates of every Envoy, by its node's id. An activator has none."""

    def __init__(self) -> None:
        self._demand: dict[tuple[str, str], float] = collections.defaultdict(float)
        self._seen: dict[str, float] = {}
        self._limits: dict[str, tuple[str, float]] = {}
        self._rates: dict[str, dict[str, float]] = {}

    def of(self, node: str) -> Rates:
        """One Envoy's; empty while it has every rate whole, because it is the only one."""
        return self._rates.get(node, {})

    def passed(self, report: reports.Report) -> None:
        """What one Envoy gave to backends, or would have."""
        for name, counts in report.counts.items():
            asked = sum(each.issued for each in counts.values()) + report.dropped.get(name, 0)
            known = self._demand[report.node, name]
            self._demand[report.node, name] = known + _WEIGHT * (asked / max(report.seconds, 1e-3) - known)

    def divide(self, found: Iterable[services.Service], connected: Collection[str], now: float) -> bool:
        """Whether any Envoy's rates are others than before."""
        limits = {
            share_of(service, key): (service.name, float(key.requests_per_second))
            for service in found
            for key in service.keys
            if key.requests_per_second is not None
        }
        for node in connected:
            if not node.startswith(reports.ACTIVATOR_PREFIX):
                self._seen[node] = now
        self._seen = {
            node: at
            for node, at in self._seen.items()
            if node in connected or now - at < reports.GONE_SECONDS
        }
        fresh: dict[str, dict[str, float]] = {node: {} for node in self._seen} if len(self._seen) > 1 else {}
        if fresh:
            for share, (service, rate) in limits.items():
                demand = {node: self._demand[node, service] for node in fresh}
                for node, part in division.divide(rate, demand).items():
                    fresh[node][share] = part
        if limits == self._limits and not self._off(fresh):
            return False
        changed = fresh != self._rates
        self._limits, self._rates = limits, fresh
        self._demand = collections.defaultdict(
            float, {place: value for place, value in self._demand.items() if place[0] in self._seen}
        )
        return changed

    def _off(self, fresh: Mapping[str, Rates]) -> bool:
        if fresh.keys() != self._rates.keys():
            return True
        return any(
            abs(rate - self._rates[node].get(share, 0.0)) > SLACK * self._rates[node].get(share, 0.0)
            for node, rates in fresh.items()
            for share, rate in rates.items()
        )
