"""Watches over the server processes of a running engine: feeds `health` with what they do, and probes them.

Made by the supervisor for each run of the engine, on its event loop. `look` is called twice a second and
never waits: a probe is a task of its own, one at a time for each server process.
"""

from __future__ import annotations

import asyncio

from serving.engine import health
from serving.engine.kinds import Kind, Outcome

TICK_SECONDS = 0.5
_OVERSLEPT_SECONDS = 5.0


async def probe(kind: Kind, server: int, policy: health.Policy) -> tuple[Outcome, str]:
    """One probe, within its time, and why it failed."""
    try:
        async with asyncio.timeout(policy.probe_timeout_seconds):
            return await kind.probe(server)
    except TimeoutError:
        return Outcome.FAILED, f"no answer within {policy.probe_timeout_seconds:g} s"


class Watching:
    """One run of an engine that has just become ready."""

    def __init__(self, kind: Kind, policy: health.Policy, now: float) -> None:
        self._kind, self._policy = kind, policy
        self._looked_at = now
        self._watches = {number: health.begin(progress, now) for number, progress in kind.servers().items()}
        self._probes: dict[int, asyncio.Task[tuple[Outcome, str]]] = {}

    def look(self, now: float) -> str | None:
        """Which server process hangs, and why; None if all get on."""
        overslept = now - self._looked_at - TICK_SECONDS
        self._looked_at = now
        progress = self._kind.servers()
        for number, watch in self._watches.items():
            if overslept > _OVERSLEPT_SECONDS:
                watch = health.slept(watch, overslept)
            if number in progress:
                watch = health.observed(watch, progress[number], now)
            watch = self._ask(number, self._hear(number, watch, now), now)
            self._watches[number] = watch
            if (why := health.hung(watch, self._policy, now)) is not None:
                return f"server process {number} hangs: {why}"
        return None

    async def close(self) -> None:
        """Probes under way are of no interest any more."""
        for task in self._probes.values():
            task.cancel()
        await asyncio.gather(*self._probes.values(), return_exceptions=True)

    def _hear(self, number: int, watch: health.Watch, now: float) -> health.Watch:
        """What came of its probe, if that is over."""
        task = self._probes.get(number)
        if task is None or not task.done():
            return watch
        del self._probes[number]
        outcome, why = task.result()
        return health.unanswered(watch, why) if outcome is Outcome.FAILED else health.answered(watch, now)

    def _ask(self, number: int, watch: health.Watch, now: float) -> health.Watch:
        """Probe it, if it is time to."""
        if number in self._probes or not health.probe_due(watch, self._policy, now):
            return watch
        self._probes[number] = asyncio.create_task(probe(self._kind, number, self._policy))
        return health.probing(watch, now)
