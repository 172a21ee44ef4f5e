"""Two binary heaps, compiled: a fleet's rows by when something happens at them next (`events`), and within a
row the requests being served by the virtual time at which they end (`served`)."""

from __future__ import annotations

from serving.autoscaler.simulate.compiled import compiled, inlined
from serving.autoscaler.simulate.fleet import Integers, Records


@compiled
def add_row(whole: Records, rows: Records, events: Integers, row: int, due_at: float) -> None:
    """A row that was not there."""
    place = whole[0].events
    whole[0].events = place + 1
    events[place] = row
    rows[row].due_at = due_at
    _up(rows, events, place)


@inlined
def move_row(whole: Records, rows: Records, events: Integers, row: int, due_at: float) -> None:
    """Something happens there at another time."""
    before = rows[row].due_at
    rows[row].due_at = due_at
    if due_at < before:
        _up(rows, events, rows[row].event_place)
    elif due_at > before:
        _down(whole, rows, events, rows[row].event_place)


@compiled
def remove_row(whole: Records, rows: Records, events: Integers, row: int) -> None:
    """Nothing happens there any more."""
    place = rows[row].event_place
    last = whole[0].events - 1
    whole[0].events = last
    if place != last:
        moved = events[last]
        events[place] = moved
        rows[moved].event_place = place
        _up(rows, events, place)
        _down(whole, rows, events, rows[moved].event_place)


@inlined
def _up(rows: Records, events: Integers, place: int) -> None:
    row = events[place]
    due_at = rows[row].due_at
    while place > 0:
        parent = (place - 1) >> 1
        above = events[parent]
        if rows[above].due_at <= due_at:
            break
        events[place] = above
        rows[above].event_place = place
        place = parent
    events[place] = row
    rows[row].event_place = place


@inlined
def _down(whole: Records, rows: Records, events: Integers, place: int) -> None:
    size = whole[0].events
    row = events[place]
    due_at = rows[row].due_at
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        if child + 1 < size and rows[events[child + 1]].due_at < rows[events[child]].due_at:
            child += 1
        below = events[child]
        if rows[below].due_at >= due_at:
            break
        events[place] = below
        rows[below].event_place = place
        place = child
    events[place] = row
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
        if child + 1 < size and served[row, child + 1].ends_at < served[row, child].ends_at:
            child += 1
        if served[row, child].ends_at >= ends_at:
            break
        served[row, place] = served[row, child]
        place = child
    if place != size:
        served[row, place] = served[row, size]
