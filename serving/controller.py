"""Which version has the traffic, and how a new one gets it: `decide`, from what is wanted and what is there.

Pure; called by the server's loop a few times a second, with the time as an argument. It is level-triggered:
the `Rollout` is all it remembers, is stored after each call, and gives the same decisions after a restart.

    (no version) --first document--> stable
    stable --another version wanted--> STARTING: its replicas start beside the old ones, without traffic
    STARTING --all ready--> SHIFTING: the traffic goes over in steps, each for `step_seconds`
    SHIFTING --last step passed--> it is the stable version, the old one is removed

    STARTING, SHIFTING --starts fail, too slow, none ready, errors--> rolled back: the old version, which was
    never touched, has all the traffic again, the new one is removed

Invariants: whatever happens to the candidate, the stable version keeps all its replicas until the last step
has passed. A version has traffic only after all its replicas were ready. A version that is removed has no
weight in the same decision, so that the routes change before the replicas are told to stop.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any

from serving.endpoint import Update
from serving.replica import Replica, State

WHOLE = 100
"""The weights of a decision add up to this."""


class Phase(enum.Enum):
    """Where an update stands; STEADY is none."""

    STEADY = "steady"
    STARTING = "starting"
    SHIFTING = "shifting"


@dataclasses.dataclass(frozen=True, slots=True)
class Count:
    """Requests that a version got and of these the failed ones, since the counting began."""

    issued: int = 0
    errors: int = 0

    def since(self, base: Count) -> Count:
        """What came after `base`; all, where the counting began anew meanwhile."""
        if self.issued < base.issued or self.errors < base.errors:
            return self
        return Count(self.issued - base.issued, self.errors - base.errors)


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """What is wanted: this version, that many replicas, updated like this."""

    version: str
    replicas: int
    update: Update


@dataclasses.dataclass(frozen=True, slots=True)
class Rollout:
    """What is remembered between decisions. `since`: when this phase, or step, began."""

    stable: str | None = None
    candidate: str | None = None
    phase: Phase = Phase.STEADY
    step: int = 0
    since: float = 0.0
    base: Count = Count()

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {**dataclasses.asdict(self), "phase": self.phase.value}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Rollout:
        """What `to_json` gave."""
        return cls(**{**value, "phase": Phase(value["phase"]), "base": Count(**value["base"])})


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """What to do now: so many replicas of each version, these parts of the traffic, these versions no more.
    `rolled_back` says why the candidate was given up; `event` what else happened, for people."""

    rollout: Rollout
    scale: Mapping[str, int]
    weights: Mapping[str, int]
    remove: tuple[str, ...] = ()
    rolled_back: str | None = None
    event: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Observation:
    """What is there: replicas, and the requests of each version, cumulative, as of `reported_at`."""

    replicas: Sequence[Replica]
    counts: Mapping[str, Count] = dataclasses.field(default_factory=dict)
    reported_at: float = 0.0


def decide(rollout: Rollout, target: Target, seen: Observation, now: float) -> Decision:
    """The next state and what it asks for."""
    replicas = seen.replicas
    if rollout.stable is None:
        first = Rollout(stable=target.version, since=now)
        return _steady(first, target, replicas, event=f"serving version {target.version}")
    if target.version == rollout.stable:
        if rollout.candidate is None:
            return _steady(rollout, target, replicas)
        back = Rollout(stable=rollout.stable, since=now)
        return _steady(back, target, replicas, event=f"update to {rollout.candidate} was taken back")
    if rollout.candidate != target.version:
        started = Rollout(rollout.stable, target.version, Phase.STARTING, since=now)
        return _updating(started, target, replicas, event=f"starting version {target.version}")
    wrong = _wrong(rollout, target, seen, now)
    if wrong is not None:
        back = Rollout(stable=rollout.stable, since=now)
        return dataclasses.replace(_steady(back, target, replicas), rolled_back=wrong)
    return _advanced(rollout, target, seen, now)


def _advanced(rollout: Rollout, target: Target, seen: Observation, now: float) -> Decision:
    """An update that goes well: as far as it can go now."""
    replicas = seen.replicas
    if _ready(target.version, replicas) < target.replicas:
        return _updating(rollout, target, replicas)
    steps = target.update.steps_percent
    base = seen.counts.get(target.version, Count())
    if rollout.phase is Phase.STARTING:
        shifting = dataclasses.replace(rollout, phase=Phase.SHIFTING, step=0, since=now, base=base)
        text = f"version {target.version} is ready and gets {steps[0]} % of the traffic"
        return _updating(shifting, target, replicas, event=text)
    # Reports come late: a step passes by what was seen of all of it, not by the clock.
    if seen.reported_at - rollout.since < target.update.step_seconds:
        return _updating(rollout, target, replicas)
    if rollout.step + 1 < len(steps):
        further = dataclasses.replace(rollout, step=rollout.step + 1, since=now, base=base)
        text = f"version {target.version} gets {steps[further.step]} % of the traffic"
        return _updating(further, target, replicas, event=text)
    done = Rollout(stable=target.version, since=now)
    return _steady(
        done, target, replicas, event=f"version {target.version} has taken over from {rollout.stable}"
    )


def _steady(
    rollout: Rollout, target: Target, replicas: Sequence[Replica], *, event: str | None = None
) -> Decision:
    """All the traffic on the stable version, and nothing else about."""
    assert rollout.stable is not None
    others = {each.version for each in replicas} - {rollout.stable}
    return Decision(
        rollout,
        scale={rollout.stable: target.replicas},
        weights={rollout.stable: WHOLE},
        remove=tuple(sorted(others)),
        event=event,
    )


def _updating(
    rollout: Rollout, target: Target, replicas: Sequence[Replica], *, event: str | None = None
) -> Decision:
    """Both versions whole, the traffic as the step says."""
    assert rollout.stable is not None
    assert rollout.candidate is not None
    part = 0
    if rollout.phase is Phase.SHIFTING:
        # The document may have got fewer steps since.
        steps = target.update.steps_percent
        part = steps[min(rollout.step, len(steps) - 1)]
    others = {each.version for each in replicas} - {rollout.stable, rollout.candidate}
    return Decision(
        rollout,
        scale={rollout.stable: target.replicas, rollout.candidate: target.replicas},
        weights={rollout.stable: WHOLE - part, rollout.candidate: part},
        remove=tuple(sorted(others)),
        event=event,
    )


def _wrong(rollout: Rollout, target: Target, seen: Observation, now: float) -> str | None:
    """Why the candidate must not go on, if so."""
    replicas = seen.replicas
    update, version = target.update, target.version
    failed = [each for each in replicas if each.version == version and each.state is State.FAILED]
    if len(failed) >= update.max_failed_starts:
        last = max(failed, key=lambda each: each.created_at)
        return (
            f"{len(failed)} replicas of {version} failed (update.max_failed_starts); the last: {last.reason}"
        )
    ready = _ready(version, replicas)
    if ready < target.replicas and rollout.phase is Phase.STARTING:
        if now - rollout.since > update.ready_seconds:
            return (
                f"only {ready} of {target.replicas} replicas of {version} were ready after "
                f"{update.ready_seconds:g} s (update.ready_seconds)"
            )
        return None
    if rollout.phase is Phase.SHIFTING:
        if ready == 0 and target.replicas > 0:
            return f"no replica of {version} is ready any more"
        count = seen.counts.get(version, Count()).since(rollout.base)
        percent = 100 * count.errors / max(1, count.issued)
        if count.issued >= update.min_requests and percent > update.max_error_percent:
            return (
                f"{count.errors} of {count.issued} requests to {version} failed, {percent:.1f} % "
                f"(update.max_error_percent: {update.max_error_percent:g})"
            )
    return None


def _ready(version: str, replicas: Sequence[Replica]) -> int:
    return sum(each.version == version and each.state is State.READY for each in replicas)
