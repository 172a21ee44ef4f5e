"""One policy in the world, event by event, compiled by numba. Pure.

At each look the pool is brought to its size: above `most` for longer than `patience` looks, nodes are let go,
those that would be warm last first, then warm ones; below `least`, new ones are asked for. Then events follow
in time: a node becomes warm, a node is asked for, a node is released.

A request is a hit if there is a warm node. Else it has a node of its own started at once, as without a pool,
and takes whatever comes first: its own, or a node of the pool that is on its way (the longest waiting request
gets it). So no request waits longer than it would without a pool; a node whose request was served by another
becomes the pool's. Own nodes' lead times belong to the request, and are the same whatever the policy.

Idle is the time of warm nodes. `booting` is the time of the pool's nodes on their way that no request waits
for: it is paid, too, and told apart.
"""

from __future__ import annotations

import dataclasses

import numba
import numpy as np

from warmpool.backtest.world import Ints
from warmpool.demand import Floats

_WARM, _WAITING, _NEXT_EVENT, _NEXT_DRAW, _HITS, _MISSES, _STARTED, _SURPLUS, _COMING, _REQUESTS = range(10)
_NOW, _IDLE, _BOOTING, _WAITED, _WORSE = range(5)
_NOBODY = -1


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a policy. `waits` are of all requests, in seconds, hits being 0; `worse` counts those that
    waited longer than they would have without a pool."""

    hits: int
    misses: int
    idle_hours: float
    booting_hours: float
    started: int
    worse: int
    waits: Floats

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)


class Simulation:
    """A pool that can be stepped look by look (`step`), or run through (`run`)."""

    def __init__(
        self, times: Floats, changes: Ints, begin: float, draws: tuple[Floats, Floats], *, returns: bool
    ) -> None:
        """`draws` are lead times: of requests' own nodes, one for each request, and of the pool's, used in
        turn. `returns`: whether released nodes come back to the pool."""
        self._times, self._changes = times, changes
        self._own, self._draws = draws
        self._returns = returns
        requests = int((changes > 0).sum())
        room = requests + 4_096
        self._count = np.zeros(10, np.int64)
        self._count[_NEXT_EVENT] = np.searchsorted(times, begin)
        self._count[_REQUESTS] = int((changes[: self._count[_NEXT_EVENT]] > 0).sum())
        self._first_request = int(self._count[_REQUESTS])
        self._sum = np.zeros(5)
        self._sum[_NOW] = begin
        self._ready = np.zeros(room)
        self._asked = np.zeros(room)
        self._owner = np.full(room, _NOBODY, np.int64)
        self._since = np.full(requests, np.nan)
        self._waits = np.full(requests, np.nan)
        self._warm_asked = np.zeros(room + len(times))
        self._warm_at = np.zeros(room + len(times))

    def run(self, looks: Floats, end: float, least: Ints, most: Ints, patience: int) -> None:
        """All looks, then on to `end`."""
        _run(
            self._times,
            self._changes,
            self._own,
            self._draws,
            looks,
            end,
            least,
            most,
            patience,
            self._returns,
            self._count,
            self._sum,
            self._ready,
            self._asked,
            self._owner,
            self._since,
            self._waits,
            self._warm_asked,
            self._warm_at,
        )

    def step(self, at: float, until: float, size: int) -> None:
        """One look at `at`: exactly `size` nodes, then on to `until`."""
        sizes = np.array([size], np.int64)
        self.run(np.array([at]), until, sizes, sizes, 0)

    @property
    def coming(self) -> Floats:
        """When the pool's nodes on their way were asked for; those that requests wait for are not the
        pool's."""
        spare = max(0, int(self._count[_COMING] - self._count[_WAITING]))
        return np.sort(self._asked[: self._count[_COMING]])[::-1][:spare].copy()

    @property
    def warm(self) -> tuple[Floats, Floats]:
        """When the warm nodes were asked for, and when they became warm."""
        count = self._count[_WARM]
        return self._warm_asked[:count].copy(), self._warm_at[:count].copy()

    def outcome(self) -> Outcome:
        """What came of it so far."""
        count, total = self._count, self._sum
        waits = self._waits[self._first_request : count[_REQUESTS]]
        return Outcome(
            int(count[_HITS]),
            int(count[_MISSES]),
            float(total[_IDLE]) / 3_600.0,
            float(total[_BOOTING]) / 3_600.0,
            int(count[_STARTED]),
            int(total[_WORSE]),
            waits[~np.isnan(waits)],
        )


@numba.njit(cache=True)
def _run(  # type: ignore[no-untyped-def]
    times, changes, own, draws, looks, end, least, most, patience, returns,
    count, total, ready, asked, owner, since, waits, warm_asked, warm_at,
):  # fmt: skip
    for look in range(len(looks)):
        now = looks[look]
        until = looks[look + 1] if look + 1 < len(looks) else end
        position = count[_WARM] + count[_COMING] - count[_WAITING]
        count[_SURPLUS] = count[_SURPLUS] + 1 if position > most[look] else 0
        if count[_SURPLUS] > patience:
            surplus = position - most[look]
            while surplus > 0 and count[_COMING] > count[_WAITING]:
                last = -1
                for each in range(count[_COMING]):
                    if owner[each] == _NOBODY and (last < 0 or ready[each] > ready[last]):
                        last = each
                if last < 0:
                    break
                _drop(last, count, ready, asked, owner)
                surplus -= 1
            count[_WARM] = max(0, count[_WARM] - max(0, surplus))
        for _ in range(least[look] - position):
            _start(now, draws[count[_NEXT_DRAW] % len(draws)], _NOBODY, count, ready, asked, owner)
            count[_NEXT_DRAW] += 1
        while True:
            first = -1
            moment = until
            for each in range(count[_COMING]):
                if ready[each] < moment:
                    first, moment = each, ready[each]
            event = count[_NEXT_EVENT]
            is_event = event < len(times) and times[event] <= moment and times[event] < until
            if is_event:
                moment = times[event]
            total[_IDLE] += count[_WARM] * (moment - total[_NOW])
            total[_BOOTING] += max(0, count[_COMING] - count[_WAITING]) * (moment - total[_NOW])
            total[_NOW] = moment
            if is_event:
                count[_NEXT_EVENT] += 1
                if changes[event] > 0:
                    _request(moment, own, count, ready, asked, owner, since, waits)
                elif returns:
                    _come(
                        moment, moment, _NOBODY, own, count, total, owner, since, waits, warm_asked, warm_at
                    )
            elif first >= 0:
                its, began = owner[first], asked[first]
                _drop(first, count, ready, asked, owner)
                _come(moment, began, its, own, count, total, owner, since, waits, warm_asked, warm_at)
            else:
                break


@numba.njit(cache=True)
def _start(now, lead, its, count, ready, asked, owner):  # type: ignore[no-untyped-def]
    place = count[_COMING]
    ready[place], asked[place], owner[place] = now + lead, now, its
    count[_COMING] += 1
    count[_STARTED] += 1


@numba.njit(cache=True)
def _drop(place, count, ready, asked, owner):  # type: ignore[no-untyped-def]
    last = count[_COMING] - 1
    ready[place], asked[place], owner[place] = ready[last], asked[last], owner[last]
    count[_COMING] = last


@numba.njit(cache=True)
def _request(now, own, count, ready, asked, owner, since, waits):  # type: ignore[no-untyped-def]
    number = count[_REQUESTS]
    count[_REQUESTS] += 1
    if count[_WARM] > 0:
        count[_WARM] -= 1
        count[_HITS] += 1
        waits[number] = 0.0
        return
    count[_MISSES] += 1
    count[_WAITING] += 1
    since[number] = now
    _start(now, own[number], number, count, ready, asked, owner)


@numba.njit(cache=True)
def _come(  # type: ignore[no-untyped-def]
    now, began, its, own, count, total, owner, since, waits, warm_asked, warm_at
):
    """A node is there: for who owns it, else for who waits longest, else for the pool."""
    taker = its
    if taker < 0 and count[_WAITING] > 0:
        for number in range(count[_REQUESTS]):
            if not np.isnan(since[number]) and (taker < 0 or since[number] < since[taker]):
                taker = number
    if taker < 0:
        place = count[_WARM]
        warm_asked[place], warm_at[place] = began, now
        count[_WARM] += 1
        return
    waits[taker] = now - since[taker]
    total[_WORSE] += waits[taker] > own[taker] + 1e-6
    since[taker] = np.nan
    count[_WAITING] -= 1
    if taker != its:  # its own node, still on its way, is the pool's now
        for each in range(count[_COMING]):
            if owner[each] == taker:
                owner[each] = _NOBODY
