"""Two binary heaps, compiled: a fleet's rows by when something happens at them next (`events`), and within a
row the requests being served by the virtual time at which they end (`served`)."""

from __future__ import annotations

from serving.autoscaler.simulate.compiled import compiled, inlined
from serving.autoscaler.simulate.fleet import Records


@compiled
def add_row(whole: Records, rows: Records, events: Records, row: int, due_at: float) -> None:
    """A row that was not there."""
    place = whole[0].events
    whole[0].events = place + 1
    _up(rows, events, place, row, due_at)


@inlined
def move_row(whole: Records, rows: Records, events: Records, row: int, due_at: float) -> None:
    """Something happens there at another time."""
    place = rows[row].event_place
    before = events[place].due_at
    if due_at < before:
        _up(rows, events, place, row, due_at)
    elif due_at > before:
        _down(whole, rows, events, place, row, due_at)


@compiled
def remove_row(whole: Records, rows: Records, events: Records, row: int) -> None:
    """Nothing happens there any more."""
    place = rows[row].event_place
    last = whole[0].events - 1
    whole[0].events = last
    if place != last:
        moved, due_at = events[last].row, events[last].due_at
        _up(rows, events, place, moved, due_at)
        _down(whole, rows, events, rows[moved].event_place, moved, due_at)


@inlined
def _up(rows: Records, events: Records, place: int, row: int, due_at: float) -> None:
    """From a place that is free."""
    while place > 0:
        parent = (place - 1) >> 1
        if events[parent].due_at <= due_at:
            break
        _put(rows, events, place, events[parent].row, events[parent].due_at)
        place = parent
    _put(rows, events, place, row, due_at)


@inlined
def _down(whole: Records, rows: Records, events: Records, place: int, row: int, due_at: float) -> None:
    """From a place that is free."""
    size = whole[0].events
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        if child + 1 < size:
            child += events[child + 1].due_at < events[child].due_at
        if events[child].due_at >= due_at:
            break
        _put(rows, events, place, events[child].row, events[child].due_at)
        place = child
    _put(rows, events, place, row, due_at)


@inlined
def _put(rows: Records, events: Records, place: int, row: int, due_at: float) -> None:
    events[place].row = row
    events[place].due_at = due_at
    rows[row].event_place = place


@inlined
def push_request(rows: Records, served: Records, row: int, came_at: float, work: float) -> None:
    """A request begins to be served; the row's virtual time is up to date."""
    ends_at = rows[row].virtual + work
    place = rows[row].serving
    rows[row].serving = place + 1
    while place > 0:
        parent = (place - 1) >> 1
        if served[row, parent].ends_at <= ends_at:
            break
        served[row, place] = served[row, parent]
        place = parent
    served[row, place].ends_at = ends_at
    served[row, place].came_at = came_at
    served[row, place].work = work


@inlined
def pop_request(rows: Records, served: Records, row: int) -> None:
    """The request that ends first is served no more."""
    size = rows[row].serving - 1
    rows[row].serving = size
    ends_at = served[row, size].ends_at
    place = 0
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        if child + 1 < size:
            child += served[row, child + 1].ends_at < served[row, child].ends_at
        if served[row, child].ends_at >= ends_at:
            break
        served[row, place] = served[row, child]
        place = child
    if place != size:
        served[row, place] = served[row, size]
