"""When an engine hangs: a policy of progress, one watch per server process.

Pure; times are seconds of any steady clock, passed in. The supervisor feeds it and acts on what it says.

Progress is what counts: the engine's token counter has moved, or a 1-token probe was answered. A probe is
sent only when nothing has moved for a while, so that a busy engine is left alone and an idle one is asked. A
probe that was shed (429, 503) was answered by a living process. Nobody is called hung for being slow: the
counter must have stood still for the whole time and at least two probes, which pass in front of all other
requests, must have failed since. A server process that hangs while the engine works is seen by its own watch.
"""

from __future__ import annotations

import dataclasses

LEAST_FAILURES = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Policy:
    """A hang is seen at the latest after `stall_seconds` and one probe more."""

    stall_seconds: float
    probe_interval_seconds: float
    probe_timeout_seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class Watch:
    """What is known of one server process. `failures` counts the probes since it last got on."""

    progress: int
    moved_at: float
    probed_at: float
    failures: int = 0
    last_failure: str = ""


def begin(progress: int, now: float) -> Watch:
    """A process that has just answered its first probe."""
    return Watch(progress, now, now)


def observed(watch: Watch, progress: int, now: float) -> Watch:
    """The counter was read. One that went back belongs to a new process, which is progress, too."""
    if progress == watch.progress:
        return watch
    return dataclasses.replace(watch, progress=progress, moved_at=now, failures=0, last_failure="")


def probe_due(watch: Watch, policy: Policy, now: float) -> bool:
    """Whether to send a probe now; then call `probing`."""
    return now - max(watch.moved_at, watch.probed_at) >= policy.probe_interval_seconds


def probing(watch: Watch, now: float) -> Watch:
    """A probe is under way."""
    return dataclasses.replace(watch, probed_at=now)


def answered(watch: Watch, now: float) -> Watch:
    """The probe was answered, or shed."""
    return dataclasses.replace(watch, moved_at=now, failures=0, last_failure="")


def unanswered(watch: Watch, why: str) -> Watch:
    """The probe failed, or was not answered in its time."""
    return dataclasses.replace(watch, failures=watch.failures + 1, last_failure=why)


def slept(watch: Watch, seconds: float) -> Watch:
    """The supervisor itself did not run for that long (a suspended machine, a stopped process): nobody is to
    blame for what it did not see."""
    return dataclasses.replace(
        watch, moved_at=watch.moved_at + seconds, probed_at=watch.probed_at + seconds, failures=0
    )


def hung(watch: Watch, policy: Policy, now: float) -> str | None:
    """Why the process counts as hung, or None."""
    still = now - watch.moved_at
    if still <= policy.stall_seconds or watch.failures < LEAST_FAILURES:
        return None
    return f"no progress for {still:.0f} s, {watch.failures} probes unanswered ({watch.last_failure})"
