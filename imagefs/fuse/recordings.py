"""Recordings: what is read of an owner's devices, gathered from all workers. The account behind traces.

Owned by the server, in memory only: a server that is started again records nothing, and says so. `arrived`
and `current` are called by the threads that tend workers, the rest by control threads.

Several owners may be recorded at once, and a device that two of them have counts for both: what the kernel
asks for does not say for whom. Who wants a start alone gives it a device server of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from imagefs import errors
from imagefs.fuse import wire

MAX_READS = 1 << 20
"""Of one recording: 28 MiB here. What comes after is left out, and `stop` says so."""
MAX_NODES = wire.MAX_WATCHED
_ANSWER_SECONDS = 2.0
"""How long a worker may take to send what it has noted; one that is being replaced never will."""

Tell = Callable[[wire.Watch], int]
"""Sends a message to every worker; returns how many there are."""


@dataclasses.dataclass(slots=True)
class _Recording:
    started_microseconds: int
    nodes: Mapping[int, str]
    packed: list[bytes] = dataclasses.field(default_factory=list)
    reads: int = 0
    left_out: int = 0


class Recordings:
    """See the module."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._recordings: dict[str, _Recording] = {}
        self._answers: dict[int, int] = {}
        self._tags = itertools.count(1)
        self._changed = threading.Condition()
        self._turn = threading.Lock()  # workers must hear of changes in the order in which they were made

    def start(self, owner: str, nodes: Mapping[int, str]) -> None:
        """Record these devices (node id -> map digest) for `owner`, from nothing. On return every worker
        does."""
        with self._turn:
            if self._recordings:
                self._say()  # what is noted so far is the others'
            with self._changed:
                now = time.monotonic_ns() // 1000
                wanted = {**self._recordings, owner: _Recording(now, dict(nodes))}
                if len(_nodes(wanted)) > MAX_NODES:
                    raise errors.BusyError(f"{len(_nodes(wanted))} devices to record, at most {MAX_NODES}")
                self._recordings = wanted
            self._say()

    def stop(self, owner: str) -> dict[str, Any]:
        """End a recording. A JSON object: `layers`, map digests; `reads`, a list of [number in `layers`,
        offset, length, microseconds since the start] in order of time; `left_out`, how many there was no
        room for. NotFoundError if it was not recorded."""
        with self._turn:
            if owner in self._recordings:
                self._say()
            with self._changed:
                recording = self._recordings.pop(owner, None)
            if recording is None:
                raise errors.NotFoundError(
                    f"nothing is recorded for {owner}: the device server may have been started again"
                )
            self._say()
        return _document(recording)

    def forget(self, owner: str) -> None:
        """Drop a recording, if there is one: its owner is gone."""
        if owner in self._recordings:
            self.stop(owner)

    def arrived(self, message: wire.Reads) -> None:
        """What a worker sent."""
        with self._changed:
            for recording in self._recordings.values():
                _keep(recording, message.reads)
            if message.tag in self._answers:
                self._answers[message.tag] -= 1
                self._changed.notify_all()

    def cover(self, nodes: Iterable[int]) -> bool:
        """Whether one of these devices is being recorded."""
        recorded = {node for recording in self._recordings.values() for node in recording.nodes}
        return not recorded.isdisjoint(nodes)

    def current(self) -> wire.Watch | None:
        """What a worker that was just started must be told; None when nothing is recorded."""
        with self._changed:
            nodes = _nodes(self._recordings)
        return wire.Watch(0, nodes) if nodes else None

    def _say(self) -> None:
        """Tell the workers what to record, and wait until all have said what they noted up to now."""
        with self._changed:
            tag = next(self._tags) & 0xFFFFFFFF
            self._answers[tag] = 0
            nodes = _nodes(self._recordings)
        told = self._tell(wire.Watch(tag, nodes))
        with self._changed:
            self._answers[tag] += told
            self._changed.wait_for(lambda: self._answers[tag] <= 0, _ANSWER_SECONDS)
            del self._answers[tag]


def _nodes(recordings: Mapping[str, _Recording]) -> tuple[int, ...]:
    return tuple(sorted({node for recording in recordings.values() for node in recording.nodes}))


def _keep(recording: _Recording, reads: tuple[wire.Access, ...]) -> None:
    ours = [read for read in reads if read.node in recording.nodes]
    room = ours[: MAX_READS - recording.reads]
    recording.left_out += len(ours) - len(room)
    recording.reads += len(room)
    if room:
        recording.packed.append(wire.pack_accesses(room))


def _document(recording: _Recording) -> dict[str, Any]:
    layers = sorted(set(recording.nodes.values()))
    numbers = {node: layers.index(digest) for node, digest in recording.nodes.items()}
    started = recording.started_microseconds
    reads = [
        [numbers[read.node], read.offset, read.length, max(0, read.microseconds - started)]
        for packed in recording.packed
        for read in wire.unpack_accesses(packed)
    ]
    reads.sort(key=lambda read: read[3])
    return {"layers": layers, "reads": reads, "left_out": recording.left_out}
