"""What happens at a simulated endpoint, event by event, compiled.

`advance` is called once for each simulated second with the arrivals at hand; between its calls `run` creates
and drains replicas and changes the limit by the other functions here. Events at one moment: what happens at
replicas comes after an arrival of that very moment.

A request goes to the replica that `routing` chooses; there it is served if fewer than the limit are, else it
waits if fewer than the queue's limit do, else it is rejected. While no replica is ready it is held, by an
activator with a bound and a deadline, and sent when one is. What fails takes its requests with it.
"""

from __future__ import annotations

import math

from serving.autoscaler.simulate import heap, routing
from serving.autoscaler.simulate.compiled import compiled, inlined
from serving.autoscaler.simulate.fleet import (
    ABSENT,
    BUCKETS,
    BUCKETS_PER_DOUBLING,
    DRAINING,
    READY,
    SHORTEST_SECONDS,
    STARTING,
    Fleet,
    Floats,
    Integers,
    Records,
)


def advance(fleet: Fleet, at: Floats, work: Floats, key: Integers, first: int, until: float) -> int:
    """All that happens before `until`; the index of the first arrival that is not before it. `at` is
    ascending."""
    return _advance(*fleet, at, work, key, first, until)


def create(fleet: Fleet, row: int, now: float, ready_at: float, fails_at: float) -> None:
    """A replica starts; it is ready, and fails, when it is said."""
    fleet.rows[row] = 0
    replica = fleet.rows[row]
    replica["state"] = STARTING
    replica["created_at"], replica["ready_at"], replica["fails_at"] = now, ready_at, fails_at
    heap.add_row(fleet.whole, fleet.rows, fleet.events, row, ready_at)


def drain(fleet: Fleet, row: int) -> None:
    """It gets no more requests, and is gone when it has finished those that it has."""
    _drain(fleet.whole, fleet.rows, fleet.events, fleet.ready, row)


def set_limit(fleet: Fleet, limit: int, now: float) -> None:
    """How many requests each replica serves at once; those that wait begin where there is room now."""
    _set_limit(fleet.whole, fleet.rows, fleet.served, fleet.waiting, fleet.speed, fleet.events, limit, now)


@compiled
def _advance(
    whole: Records,
    rows: Records,
    served: Records,
    waiting: Records,
    held: Records,
    speed: Floats,
    events: Records,
    ready: Integers,
    histogram: Integers,
    table: Integers,
    at: Floats,
    work: Floats,
    key: Integers,
    first: int,
    until: float,
) -> int:
    index = first
    while True:
        due_at = events[0].due_at if whole[0].events else math.inf
        if index < at.size and at[index] <= due_at:
            now = at[index]
            if now >= until:
                break
            whole[0].arrived += 1
            row = routing.choose(whole, rows, ready, table, key[index], work[index])
            if row < 0:
                _hold(whole, held, now, work[index], key[index])
            else:
                _admit(whole, rows, served, waiting, speed, events, row, now, now, work[index])
            index += 1
            continue
        if due_at >= until:
            break
        row = events[0].row
        if rows[row].state == STARTING:
            _begin(whole, rows, events, ready, row, due_at)
            _let_go(whole, rows, served, waiting, held, speed, events, ready, table, due_at)
        elif rows[row].fails_at <= due_at:
            _fail(whole, rows, events, ready, row)
        else:
            _finish(whole, rows, served, waiting, speed, events, histogram, row, due_at)
    _expire(whole, held, until)
    return index


@compiled
def _begin(whole: Records, rows: Records, events: Records, ready: Integers, row: int, now: float) -> None:
    place = whole[0].ready
    whole[0].ready = place + 1
    whole[0].table_stale = 1
    ready[place] = row
    rows[row].ready_place = place
    rows[row].state = READY
    rows[row].touched_at = now
    heap.move_row(whole, rows, events, row, rows[row].fails_at)


@compiled
def _fail(whole: Records, rows: Records, events: Records, ready: Integers, row: int) -> None:
    if rows[row].state == READY:
        _without_traffic(whole, rows, ready, row)
    whole[0].lost += rows[row].serving + rows[row].waiting
    whole[0].load -= rows[row].load
    _gone(whole, rows, events, row)


@compiled
def _drain(whole: Records, rows: Records, events: Records, ready: Integers, row: int) -> None:
    if rows[row].state == READY:
        _without_traffic(whole, rows, ready, row)
    if rows[row].serving + rows[row].waiting == 0:
        _gone(whole, rows, events, row)
    else:
        rows[row].state = DRAINING


@compiled
def _set_limit(
    whole: Records,
    rows: Records,
    served: Records,
    waiting: Records,
    speed: Floats,
    events: Records,
    limit: int,
    now: float,
) -> None:
    whole[0].limit = limit
    for row in range(rows.size):
        if rows[row].state >= READY and rows[row].waiting:
            _get_on(rows, speed, row, now)
            _begin_waiting(whole, rows, served, waiting, row, now)
            _plan(whole, rows, served, speed, events, row, now)


@inlined
def _finish(
    whole: Records,
    rows: Records,
    served: Records,
    waiting: Records,
    speed: Floats,
    events: Records,
    histogram: Integers,
    row: int,
    now: float,
) -> None:
    _get_on(rows, speed, row, now)
    seconds = now - served[row, 0].came_at
    work = served[row, 0].work
    heap.pop_request(rows, served, row)
    weight = work if whole[0].by_work else 1.0
    rows[row].load -= weight
    whole[0].load -= weight
    whole[0].finished += 1
    if seconds > whole[0].late_factor * work + whole[0].late_seconds:
        whole[0].late += 1
    rows[row].done += 1
    rows[row].done_seconds += seconds
    bucket = int(BUCKETS_PER_DOUBLING * math.log2(max(seconds, SHORTEST_SECONDS) / SHORTEST_SECONDS))
    histogram[min(bucket, BUCKETS - 1)] += 1
    if rows[row].waiting:
        _begin_waiting(whole, rows, served, waiting, row, now)
    if rows[row].state == DRAINING and rows[row].serving == 0:
        _gone(whole, rows, events, row)
    else:
        _plan(whole, rows, served, speed, events, row, now)


@inlined
def _admit(
    whole: Records,
    rows: Records,
    served: Records,
    waiting: Records,
    speed: Floats,
    events: Records,
    row: int,
    now: float,
    came_at: float,
    work: float,
) -> None:
    if rows[row].serving < whole[0].limit:
        _get_on(rows, speed, row, now)
        heap.push_request(rows, served, row, came_at, work)
        _plan(whole, rows, served, speed, events, row, now)
    elif rows[row].waiting < whole[0].queue_limit:
        place = (rows[row].wait_head + rows[row].waiting) % waiting.shape[1]
        waiting[row, place].came_at = came_at
        waiting[row, place].work = work
        rows[row].waiting += 1
        whole[0].waited += 1
    else:
        whole[0].rejected += 1
        return
    weight = work if whole[0].by_work else 1.0
    rows[row].load += weight
    whole[0].load += weight
    whole[0].issued += 1


@compiled
def _hold(whole: Records, held: Records, now: float, work: float, key: int) -> None:
    if whole[0].held >= whole[0].hold_limit:
        _expire(whole, held, now)
    if whole[0].held >= whole[0].hold_limit:
        whole[0].rejected += 1
        return
    place = (whole[0].held_head + whole[0].held) % held.size
    held[place].came_at = now
    held[place].work = work
    held[place].key = key
    whole[0].held += 1


@compiled
def _expire(whole: Records, held: Records, now: float) -> None:
    while whole[0].held and held[whole[0].held_head].came_at + whole[0].hold_seconds < now:
        whole[0].held_head = (whole[0].held_head + 1) % held.size
        whole[0].held -= 1
        whole[0].rejected += 1


@compiled
def _let_go(
    whole: Records,
    rows: Records,
    served: Records,
    waiting: Records,
    held: Records,
    speed: Floats,
    events: Records,
    ready: Integers,
    table: Integers,
    now: float,
) -> None:
    _expire(whole, held, now)
    while whole[0].held:
        head = whole[0].held_head
        whole[0].held_head = (head + 1) % held.size
        whole[0].held -= 1
        row = routing.choose(whole, rows, ready, table, held[head].key, held[head].work)
        _admit(whole, rows, served, waiting, speed, events, row, now, held[head].came_at, held[head].work)


@inlined
def _begin_waiting(
    whole: Records, rows: Records, served: Records, waiting: Records, row: int, now: float
) -> None:
    """Those that wait are served as far as the limit allows; virtual time is up to date."""
    while rows[row].waiting and rows[row].serving < whole[0].limit:
        head = rows[row].wait_head
        came_at = waiting[row, head].came_at
        heap.push_request(rows, served, row, came_at, waiting[row, head].work)
        whole[0].wait_seconds += now - came_at
        rows[row].wait_head = (head + 1) % waiting.shape[1]
        rows[row].waiting -= 1


@inlined
def _get_on(rows: Records, speed: Floats, row: int, now: float) -> None:
    """Virtual time up to now."""
    rows[row].virtual += (now - rows[row].touched_at) * speed[rows[row].serving]
    rows[row].touched_at = now


@inlined
def _plan(
    whole: Records, rows: Records, served: Records, speed: Floats, events: Records, row: int, now: float
) -> None:
    """When something happens there next; virtual time is up to date."""
    due_at = rows[row].fails_at
    serving = rows[row].serving
    if serving:
        # Rounding must not put an end before now.
        left = max(0.0, served[row, 0].ends_at - rows[row].virtual)
        due_at = min(due_at, now + left / speed[serving])
    heap.move_row(whole, rows, events, row, due_at)


@compiled
def _without_traffic(whole: Records, rows: Records, ready: Integers, row: int) -> None:
    last = whole[0].ready - 1
    place = rows[row].ready_place
    moved = ready[last]
    ready[place] = moved
    rows[moved].ready_place = place
    whole[0].ready = last
    whole[0].table_stale = 1


@compiled
def _gone(whole: Records, rows: Records, events: Records, row: int) -> None:
    heap.remove_row(whole, rows, events, row)
    rows[row].state = ABSENT
    rows[row].serving = 0
    rows[row].waiting = 0
