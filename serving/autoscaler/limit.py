"""How many requests a replica should have in flight at most, learned while it runs: the vertical axis. Pure.

Used by `serving.autoscaler.decide`. Of the known families, the gradients of latency (Vegas, Gradient2) take
every rise of it for a queue, and so hold an engine that batches far below what it can do; AIMD needs failures
to learn from. What is compared here is throughput itself, as it was measured at each number in service:

    cells   completions and time by number in service, in steps of a tenth; old ones count less and less
    knee    the smallest number with (nearly) the best throughput of all that keep to the latency
    cycle   30 s after a change, once enough was seen at the limit:
            too slow, short of memory, no better than a smaller one   cut, to half at the most; without
                                                                      waiting for the 30 s when too slow
            nothing is known above                                    raise, by the more the better it paid
            nothing is known below, or the knee may lie between       try there

More is learned only while replicas are pressed, that is, have nearly as much as they may: what a limit that
nobody reaches does is unknown, and does no harm. Left out are samples of replicas that are not warm yet, and
those after a change, until the requests of before it are gone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from serving.autoscaler.observation import Instance
from serving.autoscaler.policy import Policy
from serving.replica import State as ReplicaState

CYCLE_SECONDS = 30.0
WARM_SECONDS = 30.0
"""A replica that has been ready for less is cold: caches fill, kernels compile."""
_CELLS_PER_DOUBLING = 8
_PRESSED = 0.8
"""Of the limit in service, from which a replica is pressed."""
_ENOUGH = 20.0
"""Completions that make a throughput."""
_REMEMBERED = 5_000.0
"""Completions that a cell holds, so that new ones count."""
_KEPT = 0.95
"""Of a cell's weight, cycle for cycle: what was not seen for half an hour is tried again."""
_NEARLY = 0.97
"""Of the best throughput is as good as the best."""
_CUT = 0.5
"""What a cycle leaves of a limit at the least."""
_PROBE = 0.6
_RAISES = ((0.5, 2.0), (0.0, 1.5))
"""(elasticity, factor): raised by this where the last raise brought that part of itself in throughput."""
_LINEAR = 0.9
"""An elasticity from which on there is no knee in between."""
_FINE_CELLS = 1
"""Between numbers this close there is nothing to look for."""
_PAID_CELLS = 3
"""How far apart two numbers are at the least, to say what a raise paid."""
_SETTLING_SECONDS = 5.0
_EVIDENCE = 2.0
"""Standard deviations by which a latency must exceed its bound for a cut within a cycle."""
_SAMPLED = 50
"""Replicas of which a decision takes samples: more tell nothing new, and take time."""
_BUSY: Mapping[str, float] = {"cpu": 0.98, "gpu": 0.995}
"""Utilisations from which a limit is raised only where the last raise paid. A GPU calls itself busy when any
part of it is, and an engine that batches keeps one so with a single request, as it does its processors."""
_PAID = 0.1
"""What of itself a raise brought in throughput, at the least, where it paid."""
_MEMORY_FULL = 0.9
"""From which nothing is raised."""
_MEMORY_SHORT = 0.95
"""From which the limit is cut."""
_SHORT_OF_MEMORY = 0.8


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    """What replicas did with about so many in service: for how long in all, with how many (times the
    seconds), and how many were completed."""

    index: int
    seconds: float = 0.0
    in_service_seconds: float = 0.0
    completed: float = 0.0

    @property
    def in_service(self) -> float:
        """The mean."""
        return self.in_service_seconds / self.seconds

    @property
    def rate(self) -> float:
        """Completions a second."""
        return self.completed / self.seconds

    @property
    def latency(self) -> float:
        """Seconds that a request took."""
        return self.in_service_seconds / self.completed if self.completed else math.inf

    def joined(self, other: Cell) -> Cell:
        """Both."""
        return Cell(
            self.index,
            self.seconds + other.seconds,
            self.in_service_seconds + other.in_service_seconds,
            self.completed + other.completed,
        )

    def times(self, part: float) -> Cell:
        """The same figures, resting on less."""
        return Cell(self.index, self.seconds * part, self.in_service_seconds * part, self.completed * part)

    def remembering(self, other: Cell) -> Cell:
        """With what is newer; of the old no more than is remembered."""
        return self.times(min(1.0, _REMEMBERED / max(1.0, self.completed))).joined(other)


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """Utilisations of pressed replicas in this cycle: sums of `seconds` samples' worth."""

    seconds: float = 0.0
    cpu: float = 0.0
    gpu: float = 0.0
    memory: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Learned:
    """What a limit rests on. `pressed` is what was seen at it since `since_seconds` ago: the last change, or
    the last cycle's end. Times are of observed time."""

    cells: tuple[Cell, ...] = ()
    pressed: Cell = dataclasses.field(default_factory=lambda: Cell(0))
    usage: Usage = dataclasses.field(default_factory=Usage)
    since_seconds: float = 0.0
    settling_seconds: float = _SETTLING_SECONDS

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Learned:
        """What `dataclasses.asdict` gave."""
        return cls(
            **{
                **value,
                "cells": tuple(Cell(**each) for each in value["cells"]),
                "pressed": Cell(**value["pressed"]),
                "usage": Usage(**value["usage"]),
            }
        )


def noted(learned: Learned, limit: int, instances: Sequence[Instance], seconds: float, now: float) -> Learned:
    """With the samples of one look, which stand for `seconds`."""
    since = learned.since_seconds + seconds
    if since < learned.settling_seconds or seconds <= 0:
        return dataclasses.replace(learned, since_seconds=since)
    sums: dict[int, Cell] = {}
    pressed, usage = Cell(0), learned.usage
    stride = max(1, len(instances) // _SAMPLED)
    for instance in instances[int(now) % stride :: stride]:
        found = _sample(instance, now)
        if found is None:
            continue
        in_service, rate = found
        if instance.queued is None:
            in_service = min(in_service, float(limit))
        elif in_service > limit + 1:  # requests of before the last cut
            continue
        index = _index(in_service)
        sample = Cell(index, seconds, in_service * seconds, rate * seconds)
        sums[index] = sums[index].joined(sample) if index in sums else sample
        if in_service >= _PRESSED * limit:
            pressed = pressed.joined(sample)
            usage = _used(usage, instance, seconds)
    cells = {each.index: each for each in learned.cells}
    cells |= {each.index: cells.get(each.index, Cell(each.index)).remembering(each) for each in sums.values()}
    return dataclasses.replace(
        learned,
        cells=tuple(cells[index] for index in sorted(cells)),
        pressed=learned.pressed.joined(pressed),
        usage=usage,
        since_seconds=since,
    )


def _sample(instance: Instance, now: float) -> tuple[float, float] | None:
    """In service and completed a second; None of a replica that is cold, idle, or says nothing sound."""
    if instance.state is not ReplicaState.READY or instance.ready_at is None:
        return None
    if not now - instance.ready_at >= WARM_SECONDS:
        return None
    if instance.in_flight is None or instance.completed_per_second is None:
        return None
    in_service = instance.in_flight - (instance.queued or 0.0)
    rate = instance.completed_per_second
    sound = math.isfinite(in_service) and math.isfinite(rate) and in_service >= 1 and rate >= 0
    return (in_service, rate) if sound else None


def _used(usage: Usage, instance: Instance, seconds: float) -> Usage:
    def sound(value: float | None) -> float:
        return seconds * value if value is not None and 0 <= value <= 1 else 0.0

    return Usage(
        usage.seconds + seconds,
        usage.cpu + sound(instance.cpu),
        usage.gpu + sound(instance.gpu),
        usage.memory + sound(instance.memory),
    )


def _index(in_service: float) -> int:
    return math.floor(_CELLS_PER_DOUBLING * math.log2(in_service) + 1e-9)


def adjusted(learned: Learned, limit: int, policy: Policy) -> tuple[Learned, int, str]:
    """What is remembered in the next cycle, its limit, and why it is another one; all the same while a cycle
    lasts."""
    pressed, bound = learned.pressed, policy.latency_seconds
    if pressed.completed < _ENOUGH:
        return learned, limit, ""
    surely = 1 + _EVIDENCE / math.sqrt(pressed.completed)
    late = bound is not None and pressed.latency > bound * surely
    if learned.since_seconds < CYCLE_SECONDS and not late:
        return learned, limit, ""
    wanted, why = _wanted(learned, limit, policy)
    wanted = max(math.ceil(limit * _CUT), min(math.floor(limit * _RAISES[0][1]), wanted))
    wanted = max(policy.limit_least, min(wanted, policy.limit_most))
    faded = (each.times(_KEPT) for each in learned.cells)
    cells = tuple(each for each in faded if each.completed >= 1)
    if wanted == limit:
        return Learned(cells, settling_seconds=0.0), limit, ""
    settling = min(max(_SETTLING_SECONDS, pressed.latency), CYCLE_SECONDS)
    return Learned(cells, settling_seconds=settling), wanted, f"limit {limit} -> {wanted}: {why}"


def _wanted(learned: Learned, limit: int, policy: Policy) -> tuple[int, str]:
    """The limit that what is known speaks for, without caps."""
    usage, bound = learned.usage, policy.latency_seconds
    if usage.memory >= _MEMORY_SHORT * usage.seconds:
        return math.floor(limit * _SHORT_OF_MEMORY), f"memory {usage.memory / usage.seconds:.0%}"
    here = _index(learned.pressed.in_service)
    known = [each for each in learned.cells if each.completed >= _ENOUGH]
    below = [each for each in known if each.index < here]
    if bound is not None and learned.pressed.latency > bound:
        fits = _within(bound, below, learned.pressed)
        return fits, f"{learned.pressed.latency:.3g} s in flight, {bound:.3g} wanted"
    current = next((each for each in known if each.index == here), learned.pressed)
    fair = [each for each in known if bound is None or each.latency <= bound]
    best = max((each.rate for each in fair), default=current.rate)
    knee = min(
        (each for each in fair if each.rate >= _NEARLY * best), key=lambda each: each.index, default=current
    )
    if knee.index < here:
        return math.ceil(knee.in_service), f"no more than at {knee.in_service:.3g}: {knee.rate:.3g} a second"
    above = [each for each in known if each.index > here]
    if knee.index > here:
        return math.ceil(knee.in_service), f"{knee.rate:.3g} a second at {knee.in_service:.3g}"
    held = _held(usage, _paid(current, below), _index(limit) - _index(policy.limit_least))
    if not above and not held and limit < policy.limit_most:
        return _raised(limit, current, below)
    wanted, why = _between(limit, current, below, above)
    return wanted, f"{held}; {why}" if held and why else why


def _held(usage: Usage, paid: float | None, cells_below: int) -> str:
    """What speaks against more: nothing, or how much of it is in use. Where there is no going down to see
    what the way up brings, up is the way to see it."""
    if usage.memory >= _MEMORY_FULL * usage.seconds:
        return f"memory {usage.memory / usage.seconds:.0%}"
    for name, threshold in _BUSY.items():
        used = getattr(usage, name)
        dear = cells_below >= _PAID_CELLS if paid is None else paid < _PAID
        if used >= threshold * usage.seconds and dear:
            return f"{name} {used / usage.seconds:.0%}"
    return ""


def _within(bound: float, below: Sequence[Cell], pressed: Cell) -> int:
    """How many keep to the latency: on the line from the last number that did."""
    fits = [each for each in below if each.latency <= bound and each.in_service < pressed.in_service]
    if not fits:
        return math.floor(pressed.in_service * bound / pressed.latency)
    last = fits[-1]
    part = (bound - last.latency) / (pressed.latency - last.latency)
    return math.floor(last.in_service + part * (pressed.in_service - last.in_service))


def _paid(current: Cell, below: Sequence[Cell]) -> float | None:
    """What the way up to here brought in throughput, as a part of itself; None where that is not known."""
    lower = [each for each in below if each.index <= current.index - _PAID_CELLS]
    return _elasticity(lower[-1], current) if lower else None


def _raised(limit: int, current: Cell, below: Sequence[Cell]) -> tuple[int, str]:
    paid = _paid(current, below) or 0.0
    factor = next((factor for least, factor in _RAISES if paid >= least), _RAISES[-1][1])
    return max(limit + 1, round(limit * factor)), f"{current.rate:.3g} a second and rising"


def _between(limit: int, current: Cell, below: Sequence[Cell], above: Sequence[Cell]) -> tuple[int, str]:
    """The current number is the knee of what is known, and what is above is known."""
    if not below:
        return math.floor(limit * _PROBE), "no more above; is it less below?"
    gap = current.in_service / below[-1].in_service
    if current.index - below[-1].index > _FINE_CELLS and _elasticity(below[-1], current) < _LINEAR:
        return math.ceil(current.in_service / math.sqrt(gap)), "is there a knee below?"
    if above and above[0].rate < current.rate and above[0].index - current.index > _FINE_CELLS:
        over = above[0]
        return math.ceil(math.sqrt(current.in_service * over.in_service)), "is there more before it falls?"
    return limit, ""


def _elasticity(lower: Cell, upper: Cell) -> float:
    """What part of more in service is more throughput: 1 is all, 0 none, below 0 it falls."""
    if not lower.rate or not upper.rate or upper.in_service <= lower.in_service:
        return 0.0
    return math.log(upper.rate / lower.rate) / math.log(upper.in_service / lower.in_service)
