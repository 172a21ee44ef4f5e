"""How much of everything an endpoint needs, in replicas and parts of them: the horizontal axis. Pure.

Used by `serving.autoscaler.decide` once an observation has been found sound. Nothing here knows of bounds or
of what is there: it says what demand asks for (`Need`), now and when a replica that is started now is ready.

Demand, in requests in flight, is the larger of what is in service and of arrivals times the time in service.
The first is what is true; the second comes sooner, by the length of a request, and sees through a limit:
rejected requests and those that wait are arrivals too. The time in service is learned while replicas have
room, because under overload it is a time in the queue.

    level   the mean of `level_seconds` (of two requests' time, if that is longer); or, where that is more,
            what each fifth of the last `lasting_seconds` (of two requests' time) has had at the least, and
            of twice that, and so on; or what a few seconds show, less twenty standard deviations of chance
    ahead   the level times the growth that is proven, up to now from when that was, and on until a start
            from now is ready, but each for no longer than the growth has been going on
    room    replicas hold their target in the mean, and `headroom` standard deviations more below their limit:
            at 4 in flight chance needs twice the room, at 4,000 a twentieth more
    drain   what waits already, worked off in `drain_seconds`, or in a start's time: sooner nothing can be

The level is monotone: more demand at any second that it looks back on, at the same time in service, never
makes it less. So it has no learned variance, which falls where a gap is filled: the least of several parts is
as far below their mean as they scatter, whatever they scatter by. Room and drain are monotone, too. Growth
cannot be: who has had as much all along does not grow.
"""

from __future__ import annotations

import dataclasses
import math

from serving.autoscaler import windows
from serving.autoscaler.observation import Demand
from serving.autoscaler.policy import Policy

_LOOK_SECONDS = 1.0
"""Between two looks, on top of a start: what is decided now is next decided then."""
_GROWING_PART = 0.7
"""Of the time that demand must have lasted, for growth: it is by itself some proof that more lasts."""
_LASTING_PARTS = 5
"""Each of which must show it. Of five counts of a steady load the least is 1.2 standard deviations below the
mean, and seldom above it."""
_LASTING_SERVICES = 2.0
"""Times in service that demand must have lasted: what is shorter is hardly felt, because requests of before
are still there."""
_SURE = 20.0
"""Standard deviations of a Poisson process that are taken off what a second or a few show alone: of requests
that come sixteen at a time these are five, because their variance is sixteen times as large."""
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


def noted(load: Load, demand: Demand, capacity: Capacity, seconds: float, level_seconds: float) -> Load:
    """The load with `seconds` more of it, as far back as a level of `level_seconds` wants; 0 seconds change
    nothing but the last values."""
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
        level_seconds,
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
    shown = _level(load.history, service, policy)
    level = shown.level
    factor, going_seconds = windows.growth(
        windows.recent(load.history), policy.evidence, _GROWING_PART * policy.lasting_seconds
    )
    horizon = min(start_seconds + _LOOK_SECONDS, going_seconds)
    coming = level * factor ** (min(shown.ago_seconds, going_seconds) + horizon)
    backlog = _waiting(demand, capacity) + demand.held
    if service:
        backlog *= service / max(service, policy.drain_seconds, start_seconds)
    steady = replicas(level, policy.headroom, capacity)
    ahead = replicas(coming, policy.headroom, capacity) + backlog / capacity.target
    formula = (
        f"{coming:.4g} in flight"
        + (f" (now {level:.4g}, growing {100 * (factor - 1):.1f}%/s for {horizon:.3g} s)" * (factor > 1))
        + f"; max({coming:.4g} / target {capacity.target:.4g}, "
        f"({coming:.4g} + {policy.headroom:.3g} * sqrt({coming:.4g})) / limit {capacity.limit:.4g})"
        + f" + backlog {backlog:.4g} / target" * (backlog > 0)
        + f" = {ahead:.4g} replicas"
    )
    return Need(steady, ahead, level, shown.window_seconds, formula)


def replicas(level: float, deviation: float, capacity: Capacity) -> float:
    """For so many in flight; `deviation` is that of one, which must fit below the limits, too."""
    return max(level / capacity.target, (level + deviation * math.sqrt(level)) / capacity.limit)


@dataclasses.dataclass(frozen=True, slots=True)
class _Shown:
    """Requests in flight, the window that shows them, and how long ago that was, for what grows."""

    level: float
    window_seconds: float
    ago_seconds: float


def _level(history: windows.History, service: float, policy: Policy) -> _Shown:
    """The most that the mean, what has lasted, or a short window shows."""
    enough_seconds = windows.GRAIN_SECONDS * max(policy.level_seconds, 2 * service)
    seconds = arrivals = in_service = 0.0
    found = []
    wanted_seconds = max(windows.GRAIN_SECONDS, service / 2)
    for bucket in reversed(history):
        seconds += bucket.seconds
        arrivals += bucket.arrivals
        in_service += bucket.in_service * bucket.seconds
        if seconds >= wanted_seconds:
            wanted_seconds = 2 * seconds
            sure = (arrivals - _SURE * math.sqrt(arrivals)) / seconds * service
            found.append(_Shown(sure, seconds, seconds / 2))
        if seconds >= enough_seconds:
            break
    if not seconds:
        return _Shown(0.0, 0.0, 0.0)
    # The mean counts as of now: where nothing that has lasted is more, little grows.
    found.append(_Shown(max(arrivals * service, in_service) / seconds, seconds, 0.0))
    lasting_seconds = max(policy.lasting_seconds, _LASTING_SERVICES * service)
    while lasting_seconds < min(seconds, enough_seconds):
        found.append(_lasted(history, lasting_seconds, service))
        lasting_seconds *= 2
    return max(found, key=lambda each: each.level)


def _lasted(history: windows.History, wanted_seconds: float, service: float) -> _Shown:
    """What each part of the last `wanted_seconds` showed at the least. Parts are of whole buckets, and so may
    be a little longer or shorter together. If demand grows, it is the oldest that showed the least."""
    part_seconds = windows.GRAIN_SECONDS * wanted_seconds / _LASTING_PARTS
    least_arrivals = least_in_service = math.inf
    together = seconds = arrivals = in_service = 0.0
    for bucket in reversed(history):
        seconds += bucket.seconds
        arrivals += bucket.arrivals
        in_service += bucket.in_service * bucket.seconds
        if seconds < part_seconds:
            continue
        least_arrivals = min(least_arrivals, arrivals / seconds)
        least_in_service = min(least_in_service, in_service / seconds)
        together += seconds
        if together >= windows.GRAIN_SECONDS * wanted_seconds:
            return _Shown(max(least_arrivals * service, least_in_service), together, together - seconds / 2)
        seconds = arrivals = in_service = 0.0
    return _Shown(0.0, together, 0.0)
