"""What the autoscaler decided in the last hour and why, with equal decisions folded into one. Pure.

Owned by a `shell.Autoscaler`, which records every decision, keeps the log beside the decision's state, and
shows it: `glowplug autoscale explain`, the status page. A decision a second is 3,600 an hour, most of which
say the same with another number in it; two of them are equal when they ask for the same and the same rules
made them so. What is kept of a run is its first and last moment, the range of its signal, and the last
explanation. Bounded by an hour and by `MOST_RUNS`, the oldest are dropped.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from serving.autoscaler.observation import Clamp, Explanation

KEPT_SECONDS = 3_600.0
MOST_RUNS = 1_000
_NUMBERS = re.compile(r"[\d.]+")


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """Equal decisions, one after the other. Times are Unix seconds; `low` and `high` are the signal's, None
    while it was unknown. `applied` is false in a dry run."""

    began_at: float
    ended_at: float
    count: int
    replicas: int
    limit: int
    target: float
    applied: bool
    low: float | None
    high: float | None
    because: Explanation

    def with_one_more(self, other: Run) -> Run:
        """This run, and an equal decision after it."""
        values = [each for each in (self.low, self.high, other.low, other.high) if each is not None]
        return dataclasses.replace(
            other,
            began_at=self.began_at,
            count=self.count + other.count,
            low=min(values, default=None),
            high=max(values, default=None),
        )

    def equals(self, other: Run) -> bool:
        """Whether they ask for the same, by the same rules."""
        return self._key() == other._key()

    def _key(self) -> tuple[object, ...]:
        why = self.because
        rules = tuple(each.rule for each in why.clamps)
        words = _NUMBERS.sub("#", why.note), _NUMBERS.sub("#", why.signal)
        return self.replicas, self.limit, self.applied, self.low is None, rules, words


def single(replicas: int, limit: int, target: float, because: Explanation, now: float, applied: bool) -> Run:
    """One decision as a run."""
    value = because.value
    return Run(now, now, 1, replicas, limit, target, applied, value, value, because)


class Log:
    """See the module. One thread."""

    def __init__(self, runs: Sequence[Run] = ()) -> None:
        self._runs: collections.deque[Run] = collections.deque(runs, MOST_RUNS)

    def __iter__(self) -> Iterator[Run]:
        """Oldest first."""
        return iter(self._runs)

    @property
    def last(self) -> Run | None:
        """The run that goes on."""
        return self._runs[-1] if self._runs else None

    def add(self, run: Run) -> bool:
        """Record a decision. Whether it differs from the one before."""
        last = self.last
        while self._runs and run.ended_at - self._runs[0].ended_at > KEPT_SECONDS:
            self._runs.popleft()
        if last is not None and last.equals(run) and self._runs:
            self._runs[-1] = last.with_one_more(run)
            return False
        self._runs.append(run)
        return True


def to_json(run: Run) -> dict[str, Any]:
    """As plain values."""
    return dataclasses.asdict(run)


def from_json(value: Mapping[str, Any]) -> Run:
    """What `to_json` gave. KeyError, TypeError for what it did not."""
    why = value["because"]
    clamps = tuple(Clamp(**each) for each in why["clamps"])
    return Run(**{**value, "because": Explanation(**{**why, "clamps": clamps})})
