"""What an endpoint's scaling is held to: `Policy`, all settings of `decide`, each with its unit. Pure.

Made by `of` from the endpoint document, or with keywords by whoever tries settings out (the simulator). A
policy is checked when it is made, so that `decide` need not: what contradicts itself is a ValueError.
"""

from __future__ import annotations

import dataclasses
import math

from serving import endpoint as document
from serving.endpoint import Endpoint, ReservedEngine

DAY_SECONDS = 86_400.0
_EPOCH_WEEKDAY = 3
"""1 January 1970 was a Thursday; Monday is 0."""


@dataclasses.dataclass(frozen=True, slots=True)
class Schedule:
    """A floor for a part of the day, in UTC. `days` are 0 (Monday) to 6; a span that ends before it begins
    goes over midnight, and belongs to the day on which it begins."""

    days: frozenset[int]
    from_seconds: float
    to_seconds: float
    minimum: int

    def holds(self, now: float) -> bool:
        """Whether `now` (seconds since the epoch) lies in it."""
        day, seconds = divmod(now, DAY_SECONDS)
        today = int(day + _EPOCH_WEEKDAY) % 7
        if self.from_seconds < self.to_seconds:
            return today in self.days and self.from_seconds <= seconds < self.to_seconds
        if seconds >= self.from_seconds:
            return today in self.days
        return (today - 1) % 7 in self.days and seconds < self.to_seconds


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The settings. Concurrency is in requests, or in model units where load is reported in them."""

    minimum: int = 1
    maximum: int = 1
    target: float = 8.0
    """In flight on a replica, in the mean."""
    limit: int = 16
    """In flight on a replica at most, to begin with."""
    learn_limit: bool = False
    """Learn the limit while it runs; the target keeps its ratio to it."""
    limit_least: int = 1
    limit_most: int = 1_000
    latency_seconds: float | None = None
    """What a request should take in service, in the mean; the limit is kept below what exceeds it."""
    headroom: float = 1.0
    """Standard deviations of the requests in flight, Poisson's, that must fit below the limits."""
    evidence: float = 5.0
    """Standard deviations by which growth must differ from chance before it counts; 4.5 at the least."""
    level_seconds: float = 30.0
    """The window whose mean is the demand, where no shorter one shows that there is more."""
    lasting_seconds: float = 5.0
    """How long demand must have been above that mean to be believed whole."""
    start_seconds: float = 30.0
    """A replica's start, until starts were measured."""
    drain_seconds: float = 10.0
    """In what time a backlog should be worked off."""
    down_window_seconds: float = 300.0
    """The size follows the largest demand of this long."""
    tolerance: float = 0.1
    """By how much demand must lie below the size before it is lowered."""
    up_factor: float = 4.0
    up_step: int = 4
    """In a second the size grows by at most this factor, plus this many."""
    down_factor: float = 0.5
    down_seconds: float = 10.0
    """Once in so many seconds the size falls, to this part of itself at the least."""
    idle_seconds: float = 600.0
    """Without a request for so long, an endpoint whose minimum is 0 has none."""
    start_patience_seconds: float = 600.0
    """A replica that has been starting for longer no longer keeps the size from being lowered."""
    provisioned: float = 0.0
    """In flight that there is always room for, whatever comes."""
    schedules: tuple[Schedule, ...] = ()
    predict: bool = True
    """Raise the floor ahead of what the time of day has brought before."""

    def __post_init__(self) -> None:
        numbers = [
            getattr(self, each.name) for each in dataclasses.fields(self) if each.name not in _NOT_NUMBERS
        ]
        if not all(math.isfinite(number) and number >= 0 for number in numbers if number is not None):
            raise ValueError("an autoscaling policy is made of finite numbers that are not negative")
        if self.maximum < self.minimum:
            raise ValueError(f"maximum ({self.maximum}) is below minimum ({self.minimum})")
        if not 0 < self.target <= self.limit:
            raise ValueError(f"target ({self.target:g}) must be above 0 and not above limit ({self.limit})")
        if not 1 <= self.limit_least <= self.limit_most:
            raise ValueError(f"limit_least ({self.limit_least}) must be 1 to limit_most ({self.limit_most})")
        if self.up_factor < 1 or self.up_step < 1 or not self.down_factor < 1:
            raise ValueError("up_factor and up_step must be 1 or more, down_factor below 1")
        for name in ("drain_seconds", "down_window_seconds", "down_seconds", "lasting_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0")

    @classmethod
    def of(cls, endpoint: Endpoint) -> Policy:
        """The policy of a document."""
        replicas, settings = endpoint.replicas, endpoint.autoscaling
        limit_least, limit_most = endpoint.limit_range
        assert not isinstance(endpoint.engine, ReservedEngine)  # no document has one
        return cls(
            minimum=replicas.min,
            maximum=replicas.most,
            target=replicas.target_concurrency,
            limit=replicas.limit,
            learn_limit=settings.limit.enabled,
            limit_least=limit_least,
            limit_most=limit_most,
            latency_seconds=_latency_seconds(endpoint),
            headroom=settings.headroom,
            level_seconds=settings.level_seconds,
            lasting_seconds=settings.lasting_seconds,
            start_seconds=settings.start_seconds,
            drain_seconds=settings.drain_seconds,
            down_window_seconds=settings.down_window_seconds,
            tolerance=settings.tolerance_percent / 100,
            idle_seconds=settings.idle_seconds,
            provisioned=settings.provisioned_concurrency,
            schedules=tuple(_schedule(each) for each in settings.schedules),
            predict=settings.predict,
            start_patience_seconds=endpoint.engine.start_timeout_seconds,
        )

    def target_at(self, limit: float) -> float:
        """The target beside a limit: their ratio is the document's."""
        return self.target * limit / self.limit


def _latency_seconds(endpoint: Endpoint) -> float | None:
    """The mean that a limit is held to. Of a 99th percentile, half: requests differ in length."""
    given, p99 = endpoint.autoscaling.limit.latency_seconds, endpoint.objectives.p99_seconds
    return given if given is not None or p99 is None else p99 / 2


def _schedule(given: document.Schedule) -> Schedule:
    return Schedule(
        frozenset(_DAYS.index(day) for day in given.days),
        _seconds(given.begins),
        _seconds(given.ends),
        given.min,
    )


def _seconds(clock_time: str) -> float:
    hours, minutes = clock_time.split(":")
    return 3_600.0 * int(hours) + 60.0 * int(minutes)


_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_NOT_NUMBERS = frozenset({"learn_limit", "schedules", "predict"})
