"""The log of fetches: what is counted, what is kept, and that it can be read on from where one was."""

from __future__ import annotations

from imagefs import fetchlog, plan

_NONE_QUEUED = {priority.name.lower(): 0 for priority in plan.Priority}


def _answer(index: int, priority: plan.Priority = plan.Priority.DEMAND) -> plan.Answer[None]:
    return plan.Answer("layer", index, (None,), priority, priority, 1.0, 2.0, None)


def test_events_are_read_on_from_a_number() -> None:
    log = fetchlog.FetchLog(100)
    for index in range(5):
        log.note(_answer(index), "origin", 10)
    first = log.events()
    assert [event.block for event in first] == [0, 1, 2, 3, 4]
    log.note_hit("layer", 5, plan.Priority.DEMAND, 1.0, 4096)
    assert [event.block for event in log.events(first[-1].number)] == [5]
    assert [event.block for event in log.events(first[2].number)] == [3, 4, 5]
    assert log.events(log.events()[-1].number) == []


def test_numbers_go_on_in_the_next_process_and_past_what_the_ring_dropped() -> None:
    first = fetchlog.FetchLog(3)
    for index in range(10):
        first.note(_answer(index), "origin", 10)
    last = first.events()[-1].number
    assert [event.block for event in first.events(last - 100)] == [7, 8, 9]
    second = fetchlog.FetchLog(3)
    second.note(_answer(0), "origin", 10)
    assert [event.block for event in second.events(last)] == [0]


def test_misses_failed_reads_and_bytes_from_the_cache_are_counted() -> None:
    log = fetchlog.FetchLog(100)
    log.note(_answer(0), "origin", 10)
    log.note(_answer(1), "cache", 0)
    log.note(_answer(2), "failed", 0)
    log.note(_answer(3, plan.Priority.READ_AHEAD), "origin", 10)
    log.note(_answer(4, plan.Priority.FILL), "failed", 0)
    log.note_hit("layer", 5, plan.Priority.DEMAND, 1.0, 4096)
    stats = log.stats(3, {**_NONE_QUEUED, "fill": 2})
    assert (stats.demand_misses, stats.failed_reads) == (1, 1)
    assert (stats.cache_hits, stats.cache_bytes) == (1, 4096)
    assert (stats.threads, stats.queued["fill"]) == (3, 2)
