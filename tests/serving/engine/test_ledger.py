"""The ledger: one limit for several processes, whoever dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from serving.engine.ledger import SLOTS, Ledger
from serving.engine.state import Limits, State

LIMITS = Limits(in_flight=3, queue_requests=2, queue_seconds=1.5)
_SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    Ledger.create(tmp_path / "ledger", LIMITS).close()
    return tmp_path / "ledger"


def test_what_is_set_is_read_by_others(path: Path) -> None:
    one, other = Ledger(path), Ledger(path)
    assert other.limits == LIMITS
    assert other.state is State.STARTING
    one.set_limits(Limits(7, 0, 0.25))
    one.set_state(State.DRAINING)
    assert other.limits == Limits(7, 0, 0.25)
    assert other.state is State.DRAINING


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"glow")
    with pytest.raises(ValueError):
        Ledger(tmp_path / "short")
    (tmp_path / "other").write_bytes(bytes(16_384))
    with pytest.raises(ValueError, match="is not the ledger"):
        Ledger(tmp_path / "other")


def test_places_of_all_slots_count_against_one_limit(path: Path) -> None:
    ledger = Ledger(path)
    first, second = ledger.claim(11), ledger.claim(22)
    assert [ledger.enter(first), ledger.enter(second), ledger.enter(first)] == [True] * 3
    assert not ledger.enter(second)
    assert ledger.leave(first, 5, failed=True) is None  # nobody waits
    assert ledger.enter(second)
    assert ledger.in_flight() == 3
    counters = ledger.counters()
    assert (counters.admitted, counters.finished, counters.failed, counters.busy_nanoseconds) == (4, 1, 1, 5)


def test_who_has_not_waited_does_not_pass_those_who_do(path: Path) -> None:
    ledger = Ledger(path)
    first, second = ledger.claim(11), ledger.claim(22)
    ledger.queue(second, 1, 100)
    assert not ledger.enter(first)
    assert ledger.enter(second, queued=True)


def test_the_longest_waiting_is_next(path: Path) -> None:
    ledger = Ledger(path)
    slots = [ledger.claim(pid) for pid in (11, 22, 33)]
    assert ledger.enter(slots[0])
    ledger.queue(slots[1], 1, 200)
    ledger.queue(slots[2], 4, 100)
    assert ledger.leave(slots[0], 0, failed=False) == slots[2]


def test_reset_frees_slots_and_keeps_sums(path: Path) -> None:
    ledger = Ledger(path)
    slot = ledger.claim(11)
    ledger.enter(slot)
    ledger.reject(slot)
    ledger.beat(slot, 5, 6, cache=0.25)
    (claimed,) = ledger.slots()
    assert (claimed.heartbeat_ns, claimed.progress, claimed.cache_micros) == (5, 6, 250_000)
    ledger.reset()
    assert ledger.slots() == []
    assert ledger.in_flight() == 0
    assert (ledger.counters().admitted, ledger.counters().rejected) == (1, 1)
    assert ledger.limits == LIMITS


def test_slots_run_out_with_an_error(path: Path) -> None:
    ledger = Ledger(path)
    for pid in range(1, SLOTS + 1):
        ledger.claim(pid)
    with pytest.raises(OSError, match="at most"):
        ledger.claim(SLOTS + 1)


def _hammer(path: Path, rounds: int, most: multiprocessing.Queue[int]) -> None:
    ledger = Ledger(path)
    slot = ledger.claim(os.getpid())
    seen = entered = 0
    while entered < rounds:
        if ledger.enter(slot):
            entered += 1
            seen = max(seen, ledger.in_flight())
            ledger.leave(slot, 1, failed=False)
    most.put(seen)


def test_four_processes_at_once_never_pass_the_limit(path: Path) -> None:
    ledger = Ledger(path)
    ledger.set_limits(Limits(2, 0, 1))
    most: multiprocessing.Queue[int] = _SPAWN.Queue()
    processes = [_SPAWN.Process(target=_hammer, args=(path, 2_000, most)) for _ in range(4)]
    for process in processes:
        process.start()
    assert max(most.get(timeout=60) for _ in processes) <= 2
    for process in processes:
        process.join()
    assert ledger.in_flight() == 0
    assert ledger.counters().admitted == ledger.counters().finished == 8_000


def _hold(path: Path, holding: multiprocessing.synchronize.Event) -> None:
    ledger = Ledger(path)
    ledger.enter(ledger.claim(os.getpid()))
    with ledger._file.locked():
        holding.set()
        time.sleep(600)


def test_a_process_killed_with_the_lock_held_stops_nobody(path: Path) -> None:
    holding = _SPAWN.Event()
    process = _SPAWN.Process(target=_hold, args=(path, holding))
    process.start()
    assert holding.wait(60)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    ledger = Ledger(path)
    assert ledger.enter(ledger.claim(1))
    assert ledger.in_flight() == 2  # its place is freed by the supervisor's reset
