"""How much of everything an endpoint needs, in replicas and parts of them: the horizontal axis. Pure.

Used by `serving.autoscaler.decide` once an observation has been found sound. Nothing here knows of bounds or
of what is there: it says what demand asks for (`Need`), now and when a replica that is started now is ready.

Demand, in requests in flight, is the larger of what is in service and of arrivals times the time in service.
The first is what is true; the second comes sooner, by the length of a request, and sees through a limit:
rejected requests and those that wait are arrivals too. The time in service is learned while replicas have
room, because under overload it is a time in the queue.

    level   the mean of `level_seconds` (of two requests' time, if that is longer); but where a shorter
            window, down to a second, exceeds it by `evidence` standard deviations, what that one shows, less
            two of its own
    ahead   the level times the growth that is proven, for as long as a start takes, but no further ahead
            than the growth has been going on
    room    replicas hold their target in the mean, and `headroom` standard deviations more below their limit:
            at 4 in flight chance needs twice the room, at 4,000 a twentieth more
    drain   what waits already, worked off in `drain_seconds`, or in a start's time: sooner nothing can be
"""

from __future__ import annotations

import dataclasses
import math

from serving.autoscaler import windows
from serving.autoscaler.observation import Demand
from serving.autoscaler.policy import Policy

_LOOK_SECONDS = 1.0
"""Between two looks, on top of a start: what is decided now is next decided then."""
_DOUBT = 2.0
"""Standard deviations that are taken off what a short window shows."""
_MIN_SERVED = 5.0
"""Requests whose time in service makes a mean."""


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """What is remembered of demand. `service_seconds` is the last known time in service."""

    history: windows.History = ()
    service_seconds: float | None = None
    in_flight: float = 0.0
    held: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Capacity:
    """What is there: how many are ready, and what each holds, in the mean and at most."""

    ready: int
    target: float
    limit: float


@dataclasses.dataclass(frozen=True, slots=True)
class Need:
    """Replicas and parts of them. `steady` is what the demand of now needs, `ahead` what that of a start from
    now will, the backlog included. `window_seconds` is the one that gave the level."""

    steady: float
    ahead: float
    level: float
    window_seconds: float
    formula: str


def noted(load: Load, demand: Demand, capacity: Capacity, seconds: float) -> Load:
    """The load with `seconds` more of it; 0 seconds change nothing but the last values."""
    if seconds <= 0:
        return dataclasses.replace(load, in_flight=demand.in_flight, held=demand.held)
    room = capacity.ready * capacity.limit
    waiting = _waiting(demand, capacity)
    in_service = demand.in_flight - waiting
    # What the activator holds longer than before has arrived, though nobody issued it.
    arrivals = (demand.issued_per_second + demand.rejected_per_second) * seconds
    arrivals += max(0.0, demand.held - load.held)
    crowded = waiting > 0 or demand.rejected_per_second > 0 or demand.in_flight >= 0.9 * room
    # A request that has come and not gone has been served by half, in the mean.
    served = max(0.0, demand.issued_per_second * seconds - (demand.in_flight - load.in_flight) / 2)
    history = windows.appended(
        load.history,
        windows.Bucket(
            seconds,
            arrivals,
            in_service,
            0.0 if crowded else served,
            0.0 if crowded else in_service * seconds,
        ),
    )
    service_seconds = _service_seconds(history, load.service_seconds)
    if service_seconds is None and in_service > 0 and served > 0:
        service_seconds = in_service * seconds / served
    if service_seconds is None:
        service_seconds = demand.service_seconds
    return Load(history, service_seconds, demand.in_flight, demand.held)


def _waiting(demand: Demand, capacity: Capacity) -> float:
    """In flight, and in no replica's service."""
    surplus = demand.in_flight - capacity.ready * capacity.limit
    return min(demand.in_flight, max(demand.queued, surplus, 0.0))


def _service_seconds(history: windows.History, known: float | None) -> float | None:
    served = sum([bucket.served for bucket in history])
    busy = sum([bucket.busy_seconds for bucket in history])
    return busy / served if served >= _MIN_SERVED and busy > 0 else known


def need(load: Load, demand: Demand, capacity: Capacity, policy: Policy, start_seconds: float) -> Need:
    """What the load asks for, now and a start ahead."""
    service = load.service_seconds or 0.0
    spread = windows.spread(load.history)
    level, window_seconds = _level(load.history, service, spread, policy)
    factor, going_seconds = windows.growth(load.history, policy.evidence, spread)
    horizon = min(start_seconds + _LOOK_SECONDS, going_seconds)
    coming = level * factor**horizon
    # Arrivals in bursts of b are requests in flight in bursts of less: they end one by one.
    deviation = policy.headroom * math.sqrt((1 + spread.over(service)) / 2)
    backlog = _waiting(demand, capacity) + demand.held
    if service:
        backlog *= service / max(service, policy.drain_seconds, start_seconds)
    steady = replicas(level, deviation, capacity)
    ahead = replicas(coming, deviation, capacity) + backlog / capacity.target
    formula = (
        f"{coming:.4g} in flight"
        + (f" (now {level:.4g}, growing {100 * (factor - 1):.1f}%/s for {horizon:.3g} s)" * (factor > 1))
        + f"; max({coming:.4g} / target {capacity.target:.4g}, "
        f"({coming:.4g} + {deviation:.3g} * sqrt({coming:.4g})) / limit {capacity.limit:.4g})"
        + f" + backlog {backlog:.4g} / target" * (backlog > 0)
        + f" = {ahead:.4g} replicas"
    )
    return Need(steady, ahead, level, window_seconds, formula)


def replicas(level: float, deviation: float, capacity: Capacity) -> float:
    """For so many in flight; `deviation` is that of one, which must fit below the limits, too."""
    return max(level / capacity.target, (level + deviation * math.sqrt(level)) / capacity.limit)


def _level(
    history: windows.History, service: float, spread: windows.Spread, policy: Policy
) -> tuple[float, float]:
    """Requests in flight, and the window that says so: the mean of `level_seconds`; but where a shorter
    window has more than the longer ones say, beyond chance, what it shows."""
    enough_seconds = windows.GRAIN_SECONDS * max(policy.level_seconds, 2 * service)
    looked = []
    for window in windows.newest(history):
        looked.append(window)
        if window.seconds >= enough_seconds:
            break
    if not looked:
        return 0.0, 0.0
    longest = looked.pop()
    level = max(longest.arrivals / longest.seconds * service, longest.in_service)
    level_seconds = longest.seconds
    for window in reversed(looked):
        shown = _shown(window, level, service, spread.over(window.seconds), policy.evidence)
        if shown > level:
            level, level_seconds = shown, window.seconds
    return level, level_seconds


def _shown(window: windows.Bucket, level: float, service: float, variance: float, evidence: float) -> float:
    """Requests in flight that a window shows where it exceeds `level` by `evidence` standard deviations of
    chance: its mean less a few of its own. Less than they are it says nothing, because the largest of several
    windows is mostly large by chance, too."""
    shown = 0.0
    if service and window.seconds >= service / 2:
        expected = max(1.0, level / service * window.seconds)
        if window.arrivals - expected > evidence * math.sqrt(variance * expected):
            arrivals = window.arrivals - _DOUBT * math.sqrt(variance * window.arrivals)
            shown = arrivals / window.seconds * service
    # Samples of what is in flight are alike for as long as a request takes.
    samples = 1 + window.seconds / (2 * service) if service else 1.0
    if window.in_service - level > evidence * math.sqrt(variance * max(1.0, level) / samples):
        in_service = window.in_service - _DOUBT * math.sqrt(variance * window.in_service / samples)
        shown = max(shown, in_service)
    return shown
