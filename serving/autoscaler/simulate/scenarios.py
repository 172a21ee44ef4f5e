"""What the policies are judged on: traffic, the endpoint that takes it, and the points of each policy.

Called by `sweep` and the verb. All endpoints here have replicas of 16 slots: up to 16 requests are served at
full speed, more wait there, in a queue worth 10 s of service. A limit on requests served at once is enforced;
what is compared is the number of replicas (and, where the limit is set wrong on purpose, who finds that out).
A request is late if it takes longer than twice its own work plus
1 s.

Traces are scaled by 50, so that replicas matter: each request is replayed 50 times, each copy up to 2 s
before or after. ServeGen's rates are as they are, linear between the middles of their 10-minute bins, times a
factor that wanders (coefficient of variation 0.1, forgotten in 30 s): no policy sees the bins.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from serving.autoscaler import profiles
from serving.autoscaler.policy import Policy as Settings
from serving.autoscaler.simulate import fleet as fleets
from serving.autoscaler.simulate import hpa, knative, policies, tracefiles, traffic
from serving.autoscaler.simulate.fleet import Floats, Rules
from serving.autoscaler.simulate.policies import Maker
from serving.autoscaler.simulate.run import NO_FAULTS, SETTLE_SECONDS, Endpoint, Faults, Starts
from serving.autoscaler.simulate.traffic import Burstiness, Lognormal, TokenCost, Traffic

SLOTS = 16
QUEUE_SECONDS = 10.0
COPIES = 50
MODEL_STARTS = Starts(22.7, 51.8)
"""Real loads of a base model on a node that has its image."""
QUICK_STARTS = Starts(5.0, 5.0)
_BURSTY = Burstiness(0.1, 30.0)
_HOUR = 3_600
DAY_SECONDS = 24 * _HOUR
_THRASHING = "thrashing"
_WRONG_LIMIT = 40


@dataclasses.dataclass(frozen=True)
class Scenario:
    """One line of the comparison. `in_flight` is what a clairvoyant knows."""

    name: str
    traffic: Traffic
    endpoint: Endpoint
    in_flight: Floats
    seed: int


@dataclasses.dataclass(frozen=True)
class Point:
    """One policy with one setting of its parameters. `default`: the setting that it comes with."""

    policy: str
    parameters: str
    make: Maker
    default: bool = False


def names(traces: Path | None) -> list[str]:
    """Those that can be built: with a directory of traces, or without."""
    return [*_MADE, *(_TRACED if traces is not None else ())]


def usual(traces: Path | None) -> list[str]:
    """Of these, what is run where none is named: no run of it takes minutes."""
    return [each for each in names(traces) if each not in _LONG]


def build(
    name: str, traces: Path | None, seed: int, faults: Faults = NO_FAULTS, starts: Starts | None = None
) -> Scenario:
    """A scenario by its name, one of `names`; `starts` instead of its own."""
    if name in _MADE:
        found, usual_starts = _MADE[name]()
    else:
        assert traces is not None
        found, usual_starts = _TRACED[name](traces)
    in_flight = traffic.in_flight(found, seed)
    mean_work = _mean_work(found, seed)
    most = max(8, math.ceil(2.5 * in_flight.max() / SLOTS))
    limit, speed = SLOTS, np.ones(SLOTS + 1)
    if name == _THRASHING:
        limit = _WRONG_LIMIT
        speed = fleets.speeds(profiles.memory_bound(SLOTS, mean_work, 1.0), limit)
    endpoint = Endpoint(
        slots=SLOTS,
        speed=speed,
        rules=Rules(limit, max(1, round(QUEUE_SECONDS * SLOTS / mean_work))),
        starts=usual_starts if starts is None else starts,
        most=most,
        initial=max(1, math.ceil(_at_first(in_flight) / (0.7 * SLOTS))),
        faults=faults,
    )
    return Scenario(name, found, endpoint, in_flight, seed)


def points(scenario: Scenario, dense: bool = True) -> list[Point]:
    """Every policy with every setting; only the defaults if not `dense`."""
    every = [
        *_ours(scenario.endpoint),
        *(_reactive(scenario.endpoint) if scenario.traffic.seconds > DAY_SECONDS else []),
        *_published(scenario.endpoint.rules.limit),
        *_hpa(scenario.endpoint.rules.limit),
        *_knative(scenario.endpoint.rules.limit),
        *_bounds(scenario),
    ]
    return every if dense else [each for each in every if each.default]


def _at_first(in_flight: Floats) -> float:
    """The mean of what is in flight once it has settled, before a policy is asked."""
    return float(in_flight[SETTLE_SECONDS // 2 : SETTLE_SECONDS].mean())


def _mean_work(found: Traffic, seed: int) -> float:
    first = next(found.blocks(seed))
    return float(first.work.mean()) if first.work.size else 1.0


def _default(endpoint: Endpoint) -> Settings:
    limit = endpoint.rules.limit
    return Settings(
        minimum=1,
        maximum=endpoint.most,
        target=_OURS_DEFAULT_PART * limit,
        limit=limit,
        learn_limit=limit != endpoint.slots,
        limit_most=limit,
        start_seconds=endpoint.starts.p50_seconds,
    )


def _reactive(endpoint: Endpoint) -> list[Point]:
    """Ours without its forecast, which says something from the second day on."""
    settings = dataclasses.replace(_default(endpoint), predict=False)
    return [Point("reactive", "no forecast", functools.partial(policies.Ours, settings, "reactive"), True)]


def _ours(endpoint: Endpoint) -> list[Point]:
    """What a document can set: the target, and a manner."""
    limit, default = endpoint.rules.limit, _default(endpoint)
    made = [
        Point("ours", f"target {_OURS_DEFAULT_PART:.0%}", functools.partial(policies.Ours, default), True)
    ]
    for part, manner in itertools.product(_OURS_PARTS, _OURS_MANNERS):
        settings = dataclasses.replace(
            default,
            target=part * limit,
            headroom=0.0,
            tolerance=0.0,
            level_seconds=manner.level_seconds,
            lasting_seconds=manner.lasting_seconds,
            down_window_seconds=manner.down_window_seconds,
            drain_seconds=manner.drain_seconds,
        )
        label = f"{part:.0%}, {manner.name}"
        made.append(Point("ours", label, functools.partial(policies.Ours, settings)))
    return made


@dataclasses.dataclass(frozen=True, slots=True)
class _Manner:
    """How quick ours is, up and down. The settings are the document's."""

    name: str
    level_seconds: float
    lasting_seconds: float
    down_window_seconds: float
    drain_seconds: float


_OURS_DEFAULT_PART = 0.8
_OURS_PARTS = (0.6, 0.7, 0.8, 0.9, 1.0)
_OURS_MANNERS = (
    _Manner("quick up, slow down", 30.0, 5.0, 300.0, 10.0),
    _Manner("quick both ways", 30.0, 5.0, 20.0, 10.0),
    _Manner("mean of 8 s, slow down", 8.0, 8.0, 300.0, 60.0),
    _Manner("mean of 300 s", 300.0, 300.0, 10.0, 60.0),
)
_PARTS = (0.5, 0.7, 0.8, 1.0)
_SPARE_PART = 1.25
_CLAIRVOYANT_PART = 0.9
_HPA_DEFAULT_PART = 0.8
"""Its default for CPU; a Pods metric has none."""


def _published(limit: int) -> list[Point]:
    return [
        Point(
            "published",
            f"target {part:.0%}",
            functools.partial(policies.Published, part * limit),
            default=part == 0.8,
        )
        for part in _PARTS
    ]


def _hpa(limit: int) -> list[Point]:
    return [
        Point(
            "hpa",
            f"target {part:.0%}, stabilization {seconds:.0f} s",
            functools.partial(hpa.HorizontalPodAutoscaler, part * limit, 1, seconds),
            default=part == _HPA_DEFAULT_PART and seconds == hpa.STABILIZATION_SECONDS,
        )
        for part in _PARTS
        for seconds in (60.0, hpa.STABILIZATION_SECONDS)
    ]


def _knative(limit: int) -> list[Point]:
    return [
        Point(
            "kpa",
            f"target {part:.0%}, stable {seconds} s",
            functools.partial(knative.KnativePodAutoscaler, limit, 1, part, seconds),
            default=part == knative.UTILIZATION and seconds == knative.STABLE_SECONDS,
        )
        for part in _PARTS
        for seconds in (knative.STABLE_SECONDS, 300)
    ]


def _bounds(scenario: Scenario) -> list[Point]:
    peak = scenario.in_flight.max() / SLOTS
    ahead = math.ceil(scenario.endpoint.starts.p99_seconds) + 1
    known = scenario.in_flight.tolist()
    return [
        Point(
            "static peak",
            f"{part:.0%} of the peak",
            functools.partial(policies.Constant, max(1, math.ceil(part * peak))),
            default=part == _SPARE_PART,
        )
        for part in (1.0, _SPARE_PART)
    ] + [
        Point(
            "clairvoyant",
            f"target {_CLAIRVOYANT_PART:.0%}",
            functools.partial(policies.Clairvoyant, known, _CLAIRVOYANT_PART * SLOTS, ahead),
            default=True,
        )
    ]


def _ramp() -> tuple[Traffic, Starts]:
    """10 to 10,000 a second, exponentially in a minute."""
    rates = [(0, 10), (120, 10), (180, 10_000), (360, 10_000), (361, 10), (960, 10)]
    return traffic.shape("ramp", rates, Lognormal(0.5), exponential=True), QUICK_STARTS


def _step() -> tuple[Traffic, Starts]:
    """10 to 10,000 a second, at once."""
    rates = [(0, 10), (120, 10), (120.001, 10_000), (360, 10_000), (360.001, 10), (960, 10)]
    return traffic.shape("step", rates, Lognormal(0.5)), QUICK_STARTS


def _steady() -> tuple[Traffic, Starts]:
    """An hour of Poisson arrivals."""
    return traffic.shape("steady", [(0, 200), (_HOUR, 200)], Lognormal(2.0)), MODEL_STARTS


def _thrashing() -> tuple[Traffic, Starts]:
    """Replicas that fit 16 requests, and are said to take 40: beyond 16 each one more slows all."""
    rates = [(0, 100), (600, 100), (660, 300), (1_800, 300), (1_860, 100), (3_600, 100)]
    return traffic.shape(_THRASHING, rates, Lognormal(1.0)), MODEL_STARTS


def _diurnal() -> tuple[Traffic, Starts]:
    """A day whose peak is nine times its low."""
    return traffic.diurnal("diurnal", 60.0, 0.8, DAY_SECONDS, Lognormal(2.0), _BURSTY), MODEL_STARTS


def _day() -> tuple[Traffic, Starts]:
    """The same at 1,000 a second on the average, 86 million requests of a second each."""
    return traffic.diurnal("day", 1_000.0, 0.8, DAY_SECONDS, Lognormal(1.0), _BURSTY), MODEL_STARTS


def _crowds(name: str, hours: Sequence[int]) -> tuple[Traffic, Starts]:
    """Days with a crowd of an hour each, at that hour: in a minute from 20 a second to 200."""
    rates: list[tuple[float, float]] = [(0, 20)]
    for number, hour in enumerate(hours):
        begin = number * DAY_SECONDS + hour * _HOUR
        rates += [(begin, 20), (begin + 60, 200), (begin + _HOUR, 200), (begin + _HOUR + 60, 20)]
    rates.append((len(hours) * DAY_SECONDS, 20))
    return traffic.shape(name, rates, Lognormal(2.0), _BURSTY), MODEL_STARTS


def _daily() -> tuple[Traffic, Starts]:
    """Three days whose crowd comes at nine."""
    return _crowds("daily", (9, 9, 9))


def _shuffled() -> tuple[Traffic, Starts]:
    """Three days whose crowd comes at another hour each."""
    return _crowds("shuffled", (9, 15, 4))


def _flash() -> tuple[Traffic, Starts]:
    """Every half hour another crowd: in 20 s to 2, 3, 5 times the rate, for some minutes."""
    rates: list[tuple[float, float]] = [(0, 100)]
    for begin, peak in ((1_800, 200), (3_600, 300), (5_400, 500)):
        rates += [(begin, 100), (begin + 20, peak), (begin + 240, peak), (begin + 600, 100)]
    rates.append((7_200, 100))
    return traffic.shape("flash", rates, Lognormal(2.0), _BURSTY), MODEL_STARTS


def _azure_conv(traces: Path) -> tuple[Traffic, Starts]:
    path = traces / "azure_llm_2023_conv.csv.gz"
    return tracefiles.azure(path, "azure-conv", TokenCost(), COPIES), MODEL_STARTS


def _azure_code(traces: Path) -> tuple[Traffic, Starts]:
    path = traces / "azure_llm_2023_code.csv.gz"
    return tracefiles.azure(path, "azure-code", TokenCost(), COPIES), MODEL_STARTS


def _mooncake(traces: Path) -> tuple[Traffic, Starts]:
    path = traces / "mooncake_fast25_conversation.jsonl.gz"
    return tracefiles.mooncake(path, "mooncake", TokenCost(), COPIES), MODEL_STARTS


def _servegen(
    traces: Path, size: str, mean_work_seconds: float, begin_hour: int, hours: int
) -> traffic.Rates:
    path = traces / f"servegen_m-{size}_total_rate_10min.csv.gz"
    whole = tracefiles.rates(path, f"servegen-{size}", Lognormal(mean_work_seconds), _BURSTY)
    return tracefiles.window(whole, begin_hour * _HOUR, (begin_hour + hours) * _HOUR)


def _servegen_large(traces: Path) -> tuple[Traffic, Starts]:
    """Four hours of the second day, with its steepest rise."""
    return _servegen(traces, "large", 2.0, 24, 4), MODEL_STARTS


def _servegen_small(traces: Path) -> tuple[Traffic, Starts]:
    """Two hours of the second day, on the way up."""
    return _servegen(traces, "small", 0.5, 30, 2), MODEL_STARTS


def _servegen_days(traces: Path) -> tuple[Traffic, Starts]:
    """Three days, from the second on."""
    whole = _servegen(traces, "large", 2.0, 24, 72)
    return dataclasses.replace(whole, name="servegen-days"), MODEL_STARTS


_MADE: dict[str, Callable[[], tuple[Traffic, Starts]]] = {
    "ramp": _ramp,
    "step": _step,
    "steady": _steady,
    "flash": _flash,
    "diurnal": _diurnal,
    "day": _day,
    "daily": _daily,
    "shuffled": _shuffled,
    _THRASHING: _thrashing,
}
_TRACED: dict[str, Callable[[Path], tuple[Traffic, Starts]]] = {
    "azure-conv": _azure_conv,
    "azure-code": _azure_code,
    "mooncake": _mooncake,
    "servegen-large": _servegen_large,
    "servegen-small": _servegen_small,
    "servegen-days": _servegen_days,
}
_LONG = frozenset({"day", "daily", "shuffled", "servegen-days"})
