"""The ledger: one small file in shared memory in which all processes of one engine count their requests.

Owns the file's layout (`wordfile` maps and locks it). The supervisor creates it and writes the header
(limits, state); each server process claims a slot and is the only one to write it. The rule that makes the
in-flight limit one limit for all processes: whoever enters does so under the file's lock, having added up
every slot. The lock is held for microseconds.

Words are native 64-bit ones (all processes run on one machine); times are nanoseconds of CLOCK_MONOTONIC,
which all processes share. Used by one thread of each process. Needs nothing but Python's library: the
engine's own interpreter imports it.

    header, 16 words: magic, limit, queue requests, queue nanoseconds, state, then what ended slots counted
    slot,   16 words: pid, in flight, waiting, oldest waiting since, heartbeat, progress, units in flight
                      (millionths), KV cache in use (millionths), then the counters
"""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path

from serving.engine import wordfile
from serving.engine.state import Counters, Limits, Slot, State

SLOTS = 64
_WORDS = 16
_MAGIC = 0x31676477_6F6C4731
_COUNT = _WORDS * (SLOTS + 1)

_LIMIT, _QUEUE, _QUEUE_NS, _STATE = 1, 2, 3, 4
_PID, _IN_FLIGHT, _WAITING, _OLDEST, _HEARTBEAT, _PROGRESS, _UNITS, _CACHE = range(8)
_COUNTERS = 8
"""Where the counters begin, in a slot and in the header."""
_MICRO = 1_000_000


class Ledger:
    """The mapped file."""

    def __init__(self, path: Path) -> None:
        """Map an existing ledger. OSError where there is none; ValueError where it is something else."""
        self._file = wordfile.WordFile(path, _MAGIC, _COUNT, "ledger")
        self._words = self._file.words

    @classmethod
    def create(cls, path: Path, limits: Limits) -> Ledger:
        """A new ledger, in state STARTING."""
        wordfile.create(path, _MAGIC, _COUNT)
        ledger = cls(path)
        ledger.set_limits(limits)
        return ledger

    def close(self) -> None:
        """Let go of the file. The slot, if one was claimed, stays until the supervisor resets it."""
        self._file.close()

    # -- the supervisor's side --------------------------------------------------------------------

    def set_limits(self, limits: Limits) -> None:
        """In force for the next request; what runs goes on."""
        with self._file.locked():
            self._words[_LIMIT] = limits.in_flight
            self._words[_QUEUE] = limits.queue_requests
            self._words[_QUEUE_NS] = int(limits.queue_seconds * 1e9)

    def set_state(self, state: State) -> None:
        """What probes are told from now on."""
        self._words[_STATE] = state

    def reset(self) -> None:
        """Free all slots, once their processes are gone. What they counted stays in the sums."""
        with self._file.locked():
            for slot in range(SLOTS):
                start = self._slot(slot)
                for word in range(_COUNTERS, _WORDS):
                    self._words[word] += self._words[start + word]
                for word in range(_WORDS):
                    self._words[start + word] = 0

    def slots(self) -> list[Slot]:
        """Every server process that has claimed one."""
        found = []
        for number in range(SLOTS):
            start = self._slot(number)
            pid, in_flight, waiting, _, heartbeat, progress, _, cache = self._words[start : start + _COUNTERS]
            if pid:
                found.append(Slot(number, pid, in_flight, waiting, heartbeat, progress, cache))
        return found

    def counters(self) -> Counters:
        """Over all slots, the ended ones too."""
        width = len(dataclasses.fields(Counters))
        starts = [0, *(self._slot(number) for number in range(SLOTS))]
        return Counters(*(sum(self._words[start + _COUNTERS + n] for start in starts) for n in range(width)))

    # -- both ----------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        return State(self._words[_STATE])

    @property
    def limits(self) -> Limits:
        return Limits(self._words[_LIMIT], self._words[_QUEUE], self._words[_QUEUE_NS] / 1e9)

    def in_flight(self) -> int:
        return self._sum(_IN_FLIGHT)

    def waiting(self) -> int:
        return self._sum(_WAITING)

    def units_in_flight(self) -> float:
        """What the requests in flight and in the queue are expected to cost, in model units
        (`serving.autoscaler.units`); 0 where they are not counted."""
        return self._sum(_UNITS) / _MICRO

    # -- a server process's side, by its own slot ------------------------------------------------

    def claim(self, pid: int) -> int:
        """A slot for this process. OSError where all are taken."""
        with self._file.locked():
            for number in range(SLOTS):
                start = self._slot(number)
                if self._words[start + _PID] == 0:
                    self._words[start + _PID] = pid
                    return number
        raise OSError(errno.EUSERS, f"an engine has at most {SLOTS} server processes")

    def enter(self, slot: int, *, queued: bool = False) -> bool:
        """Take a place in flight if there is one. Who has not waited does not pass those who do."""
        with self._file.locked():
            if self._sum(_IN_FLIGHT) >= self._words[_LIMIT] or (not queued and self._sum(_WAITING)):
                return False
            start = self._slot(slot)
            self._words[start + _IN_FLIGHT] += 1
            self._words[start + _COUNTERS] += 1
            return True

    def add_units(self, slot: int, units: float) -> None:
        """A request of so many model units has come."""
        self._words[self._slot(slot) + _UNITS] += round(units * _MICRO)

    def remove_units(self, slot: int, units: float, done: float) -> None:
        """That request has ended, and did cost `done`."""
        start = self._slot(slot)
        self._words[start + _UNITS] -= round(units * _MICRO)
        self._words[start + _COUNTERS + 5] += round(done * _MICRO)

    def queue(self, slot: int, waiting: int, oldest_ns: int) -> None:
        """Say how many wait in this process, and since when the first of them."""
        start = self._slot(slot)
        self._words[start + _OLDEST] = oldest_ns
        self._words[start + _WAITING] = waiting

    def reject(self, slot: int) -> None:
        self._words[self._slot(slot) + _COUNTERS + 1] += 1

    def leave(self, slot: int, busy_ns: int, *, failed: bool) -> int | None:
        """Give a place back. The slot that has waited longest, if somebody can be let in now."""
        with self._file.locked():
            start = self._slot(slot)
            self._words[start + _IN_FLIGHT] -= 1
            self._words[start + _COUNTERS + 2] += 1
            self._words[start + _COUNTERS + 3] += failed
            self._words[start + _COUNTERS + 4] += busy_ns
            return self._next()

    def next_waiting(self) -> int | None:
        """The slot that has waited longest, if somebody can be let in now."""
        with self._file.locked():
            return self._next()

    def beat(self, slot: int, now_ns: int, progress: int, cache: float = 0.0) -> None:
        """The process's event loop runs, this is how far it is, and so much of the KV cache is in use."""
        start = self._slot(slot)
        self._words[start + _PROGRESS] = progress
        self._words[start + _CACHE] = round(min(max(cache, 0.0), 1.0) * _MICRO)
        self._words[start + _HEARTBEAT] = now_ns

    def _next(self) -> int | None:
        if self._sum(_IN_FLIGHT) >= self._words[_LIMIT]:
            return None
        queues = [
            (self._words[self._slot(number) + _OLDEST], number)
            for number in range(SLOTS)
            if self._words[self._slot(number) + _WAITING]
        ]
        return min(queues)[1] if queues else None

    def _sum(self, word: int) -> int:
        # A stride over the mapping: 64 additions in C, not 64 look-ups in Python.
        return sum(self._words[_WORDS + word :: _WORDS])

    @staticmethod
    def _slot(number: int) -> int:
        return _WORDS * (number + 1)
