"""From what Envoys, activator and engines report to an `Observation`. Pure: no I/O, no clock.

Owned by one `shell.Autoscaler` a scaled endpoint, which calls `observe` about once a second. Load comes by
two ways. Load reports are pushed, within a second, and are what demand is made of: in flight by replica,
issued, turned away by the router. Engines are asked when they are probed, and say what Envoys cannot know:
how much waits in their queues, what they turned away themselves, how long requests took without waiting,
processor, GPU and memory. Where they are silent the rest still holds: the time that requests take is then
what is in flight by what is issued (Little's law), waiting included.

Invariants: an endpoint that no report names, while all reports are in, has a demand of zeros; where they are
not all in (`Pressure.unknown`) demand is None, whatever was read. A number that is not finite or is negative
never gets further than here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from serving.autoscaler import units
from serving.autoscaler.observation import Demand, Instance, Observation
from serving.replica import Replica, Vitals
from serving.router.reports import Pressure, Total

SERVICE_SECONDS = 10.0
"""The time over which the mean time in flight is taken; older requests fade with it."""
_LEAST = 1e-3
"""What is left of a sum that has faded: there is nothing lately to take a mean of."""
_SILENT_SECONDS = 10.0
"""What an engine said longer ago is not what it does now."""
_MOST = 1e12
_SHORTEST_SECONDS = 0.01
"""Over less than that there is no rate."""

Place = tuple[str, int]


@dataclasses.dataclass(slots=True)
class _Fading:
    """Two sums that fade alike, for the mean of one per the other."""

    amount: float = 0.0
    count: float = 0.0

    def add(self, amount: float, count: float, elapsed_seconds: float) -> None:
        kept = math.exp(-elapsed_seconds / SERVICE_SECONDS)
        self.amount = kept * self.amount + amount
        self.count = kept * self.count + count

    def mean(self) -> float | None:
        return self.amount / self.count if self.count > _LEAST else None


@dataclasses.dataclass(frozen=True, slots=True)
class _Rates:
    """One replica between two of its answers."""

    completed_per_second: float | None = None
    rejected_per_second: float = 0.0
    latency_seconds: float | None = None
    cpu: float | None = None


class Signals:
    """See the module. Remembers what was reported before, because reports are totals and demand is rates."""

    def __init__(self) -> None:
        self._at: float | None = None
        self._totals: dict[str, Total] = {}
        self._flows: dict[str, tuple[float, float]] = {}
        """By Envoy: requests issued and dropped a second, by its last reports."""
        self._vitals: dict[str, Vitals] = {}
        self._rates: dict[str, _Rates] = {}
        self._served = _Fading()
        self._passed = _Fading()
        self._costs = _Fading()

    def observe(
        self,
        pressure: Pressure,
        activator: Place | None,
        replicas: Sequence[Replica],
        version: str,
        now: float,
        quota: int | None = None,
        reference_units: float | None = None,
    ) -> Observation:
        """One look. `version` is the one that is scaled: demand is the whole endpoint's, instances are that
        version's. `replicas` are all that there are, on the clock of `now`. With `reference_units`, load is
        in model units: in requests of that cost (`units.weight`)."""
        elapsed = 0.0 if self._at is None else max(0.0, now - self._at)
        self._at = now
        # Who leaves is not asked any more: what it said last is no rate.
        replicas = [
            each if _fresh(each, now) else dataclasses.replace(each, vitals=None) for each in replicas
        ]
        self._hear(pressure.totals)
        self._ask(replicas, elapsed)
        by_place = {(each.address, each.port): _count(each.in_flight) for each in pressure.loads}
        demand = None
        if pressure.unknown is None:
            demand = self._demand(by_place, activator, replicas, elapsed)
        instances = tuple(
            self._instance(each, None if pressure.unknown is not None else by_place)
            for each in replicas
            if each.version == version
        )
        if reference_units is not None:
            weight = self._weight(elapsed, reference_units)
            demand = None if demand is None else _weighed(demand, weight)
            instances = tuple(_weighed_instance(each, weight) for each in instances)
        return Observation(now, demand, instances, quota)

    # -- what was said since the last look -----------------------------------------------------------

    def _hear(self, totals: Mapping[str, Total]) -> None:
        """Rates by the reports that came since; an Envoy that sent none goes on as before."""
        for node, total in totals.items():
            before = self._totals.get(node, Total())
            if total.seconds < before.seconds:  # it began anew
                before = Total()
            seconds = total.seconds - before.seconds
            if seconds >= _SHORTEST_SECONDS:
                issued, dropped = total.issued - before.issued, total.dropped - before.dropped
                self._flows[node] = (_count(issued) / seconds, _count(dropped) / seconds)
        self._totals = dict(totals)
        self._flows = {node: flow for node, flow in self._flows.items() if node in totals}

    def _ask(self, replicas: Iterable[Replica], elapsed: float) -> None:
        busy = finished = 0.0
        vitals, rates = {}, {}
        for each in replicas:
            if each.vitals is None:
                continue
            vitals[each.name] = each.vitals
            before = self._vitals.get(each.name)
            if before is None or each.vitals.at < before.at + _SHORTEST_SECONDS:
                rates[each.name] = self._rates.get(each.name, _Rates())
                continue
            rates[each.name] = _between(before, each.vitals)
            if each.vitals.finished >= before.finished and each.vitals.busy_seconds >= before.busy_seconds:
                busy += each.vitals.busy_seconds - before.busy_seconds
                finished += each.vitals.finished - before.finished
        self._served.add(busy, finished, elapsed)
        self._vitals, self._rates = vitals, rates

    # -- what it means -------------------------------------------------------------------------------

    def _demand(
        self,
        by_place: Mapping[Place, float],
        activator: Place | None,
        replicas: Sequence[Replica],
        elapsed: float,
    ) -> Demand:
        """What was in flight at a replica that is gone counts too: somebody will have to do it. What engines
        refused was given to them first, and is counted once."""
        held = by_place.get(activator, 0.0) if activator is not None else 0.0
        in_flight = sum(by_place.values()) - held
        issued = sum(issued for issued, _ in self._flows.values())
        dropped = sum(dropped for _, dropped in self._flows.values())
        refused = sum(each.rejected_per_second for each in self._rates.values())
        self._passed.add(in_flight * elapsed, issued * elapsed, elapsed)
        engines = self._served.mean()
        return Demand(
            in_flight=in_flight,
            held=held,
            # Engines were asked a moment ago, and cannot have more than there is now.
            queued=min(in_flight, sum(each.vitals.queued for each in replicas if each.vitals is not None)),
            issued_per_second=max(0.0, issued - refused),
            rejected_per_second=dropped + refused,
            service_seconds=engines if engines is not None else self._passed.mean(),
        )

    def _weight(self, elapsed: float, reference_units: float) -> float:
        """Of a request, by what is in flight now or was lately; 1 while nothing ever was."""
        said = self._vitals.values()
        requests = sum(each.in_flight + each.queued for each in said)
        in_flight = sum(each.units_in_flight for each in said)
        self._costs.add(in_flight * elapsed, requests * elapsed, elapsed)
        if requests and in_flight:
            return units.weight(in_flight, requests, reference_units)
        mean = self._costs.mean()
        return units.weight(mean, 1.0, reference_units) if mean else 1.0

    def _instance(self, replica: Replica, by_place: Mapping[Place, float] | None) -> Instance:
        """In flight by the reports, and by the engine itself where these are not to be had."""
        vitals = replica.vitals
        rates = self._rates.get(replica.name, _Rates())
        in_flight = None if vitals is None else float(vitals.in_flight + vitals.queued)
        if by_place is not None:
            in_flight = 0.0 if replica.address is None else by_place.get(replica.address, 0.0)
        return Instance(
            name=replica.name,
            state=replica.state,
            created_at=replica.created_at,
            ready_at=replica.ready_at,
            in_flight=in_flight,
            completed_per_second=rates.completed_per_second,
            latency_seconds=rates.latency_seconds,
            queued=float(vitals.queued) if vitals is not None else None,
            cpu=rates.cpu,
            gpu=vitals.gpu if vitals is not None else None,
            memory=vitals.memory if vitals is not None else None,
        )


def _weighed(demand: Demand, weight: float) -> Demand:
    return dataclasses.replace(
        demand,
        in_flight=demand.in_flight * weight,
        held=demand.held * weight,
        queued=demand.queued * weight,
        issued_per_second=demand.issued_per_second * weight,
        rejected_per_second=demand.rejected_per_second * weight,
    )


def _weighed_instance(instance: Instance, weight: float) -> Instance:
    def times(value: float | None) -> float | None:
        return None if value is None else value * weight

    return instance._replace(
        in_flight=times(instance.in_flight),
        queued=times(instance.queued),
        completed_per_second=times(instance.completed_per_second),
    )


def _fresh(replica: Replica, now: float) -> bool:
    return replica.vitals is not None and abs(now - replica.vitals.at) <= _SILENT_SECONDS


def _between(before: Vitals, after: Vitals) -> _Rates:
    """Sums that fell began anew: nothing is known of the time between."""
    seconds = after.at - before.at
    finished = after.finished - before.finished
    busy = after.busy_seconds - before.busy_seconds
    if finished < 0 or busy < 0 or after.rejected < before.rejected:
        return _Rates()
    cpu = None
    if after.cpu_seconds is not None and before.cpu_seconds is not None and after.cpus:
        used = after.cpu_seconds - before.cpu_seconds
        cpu = used / seconds / after.cpus if used >= 0 else None
    return _Rates(
        completed_per_second=finished / seconds,
        rejected_per_second=(after.rejected - before.rejected) / seconds,
        latency_seconds=busy / finished if finished else None,
        cpu=cpu,
    )


def _count(value: float) -> float:
    """A count as it can be; reports come over a network."""
    return min(float(value), _MOST) if math.isfinite(value) and value > 0 else 0.0
