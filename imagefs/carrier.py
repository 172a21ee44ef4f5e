"""Carries out one fetch of the plan: from an origin's stream to blocks in the cache.

Used by the fetcher, in its connection threads; no state but what it was made with. A range is decoded while
it arrives. Each block goes to those who wait as soon as it was verified, whole, and to the cache, which
writes; what fails is said block by block. Those who wait for frames of a block are looked for after each one.

A demanded block of frames begins at the frame that a reader waits for, and runs to its end; a second request
brings what lies before it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Protocol

from imagefs import errors, fetchlog, frames, plan
from imagefs.arrival import Arrival
from imagefs.cache import BlockCache
from imagefs.lazylayer import LazyLayer
from imagefs.origin import Origin


class Desk(Protocol):
    """Who is told what became of a fetch, and knows who waits."""

    def begun(self, arrival: Arrival) -> None:
        """Its frames will come, one after another."""

    def frame_came(self, arrival: Arrival) -> None:
        """One more frame is decoded. Raises IntegrityError for a wrong one that somebody waits for, and
        UnavailableError when no block is wanted any more."""

    def ended(self, arrival: Arrival) -> None:
        """No frame of it can be had any more."""

    def giving_way(self, fetch: plan.Fetch, stream: Iterator[bytes]) -> Iterator[bytes]:
        """The stream, at the speed that others leave to it."""

    def deliver(self, layer: LazyLayer, index: int, fd: int, outcome: str) -> None:
        """A block, whole and verified."""

    def fail(self, fetch: plan.Fetch, index: int, exc: Exception, *, more_origins: bool) -> None:
        """A block did not come."""


class Carrier:
    """See the module. `read_deadline_seconds` bounds each request."""

    def __init__(
        self, cache: BlockCache, desk: Desk, log: fetchlog.FetchLog, read_deadline_seconds: float
    ) -> None:
        self._cache = cache
        self._desk = desk
        self._log = log
        self._read_deadline_seconds = read_deadline_seconds

    def carry_out(
        self, fetch: plan.Fetch, layer: LazyLayer, origins: Sequence[Origin], buffer: memoryview
    ) -> None:
        """Deliver or fail each block of the fetch. `buffer` has room for one."""
        missing = self._missing(fetch, layer)
        if not missing:
            return
        origin = origins[fetch.attempt % len(origins)]
        more_origins = len(origins) > 1
        if fetch.first_frame:
            with contextlib.closing(self._arrival(layer, missing[0], buffer)) as arrival:
                with contextlib.closing(self._from_the_middle(fetch, arrival, origin)) as runs:
                    self._bring(fetch, arrival, runs, origin, more_origins)
            return
        blocks = layer.block_map.blocks
        last = blocks[missing[-1]]
        self._log.count(coalesced_blocks=len(missing) - 1)
        place = (blocks[missing[0]].offset, last.offset + last.compressed_bytes)
        with self._stream(fetch, layer, origin, *place) as pieces:
            for number, index in enumerate(missing):
                with contextlib.closing(self._arrival(layer, index, buffer)) as arrival:
                    in_order = [(range(arrival.count), pieces)]
                    error = self._bring(fetch, arrival, in_order, origin, more_origins)
                if error is not None and not isinstance(error, errors.IntegrityError):
                    for unread in missing[number + 1 :]:
                        self._desk.fail(fetch, unread, error, more_origins=more_origins)
                    break

    def _missing(self, fetch: plan.Fetch, layer: LazyLayer) -> list[int]:
        """The blocks that neither another layer nor another process has brought since they were asked for."""
        missing = []
        for index in fetch.indices:
            fd = self._cache.get(layer.block_map.blocks[index].digest, layer.block_map.block_length(index))
            if fd is None:
                missing.append(index)
            else:
                self._desk.deliver(layer, index, fd, "cache")
        return missing

    def _arrival(self, layer: LazyLayer, index: int, buffer: memoryview) -> Arrival:
        return Arrival(layer, index, buffer, self._cache.draft(layer.block_map.block_length(index)))

    @contextlib.contextmanager
    def _stream(
        self, fetch: plan.Fetch, layer: LazyLayer, origin: Origin, start: int, end: int
    ) -> Iterator[frames.Pieces]:
        """One request."""
        deadline = time.monotonic() + self._read_deadline_seconds
        self._log.count(origin_requests=1)
        stream = origin.stream_range(layer.blob_digest, start, end - start, deadline)
        pieces = frames.Pieces(self._desk.giving_way(fetch, stream), start)
        try:
            with contextlib.closing(stream):
                yield pieces
        finally:
            self._log.count(fetched_bytes=pieces.position - start)

    def _from_the_middle(
        self, fetch: plan.Fetch, arrival: Arrival, origin: Origin
    ) -> Generator[tuple[range, frames.Pieces], None, None]:
        for numbers in (range(fetch.first_frame, arrival.count), range(fetch.first_frame)):
            start, end = arrival.place(numbers.start), arrival.place(numbers.stop)
            with self._stream(fetch, arrival.layer, origin, start, end) as pieces:
                yield numbers, pieces

    def _bring(
        self,
        fetch: plan.Fetch,
        arrival: Arrival,
        runs: Iterable[tuple[range, frames.Pieces]],
        origin: Origin,
        more_origins: bool,
    ) -> Exception | None:
        """One block, from its frames as they come. Returns why it failed."""
        try:
            data = self._decoded(arrival, runs)
        except errors.IntegrityError as exc:
            origin.doubt(arrival.layer.blob_digest, exc)
            self._desk.fail(fetch, arrival.index, exc, more_origins=False)
            return exc
        except Exception as exc:
            self._desk.fail(fetch, arrival.index, exc, more_origins=more_origins)
            return exc
        self._keep(fetch, arrival, data)
        return None

    def _decoded(self, arrival: Arrival, runs: Iterable[tuple[range, frames.Pieces]]) -> memoryview:
        self._desk.begun(arrival)
        try:
            for numbers, pieces in runs:
                pieces.skip_to(arrival.place(numbers.start))
                for number in numbers:
                    arrival.decode(number, pieces)
                    self._desk.frame_came(arrival)
            return arrival.finish()
        finally:
            # Before anybody hears of it: the block may be on its way again at once.
            self._desk.ended(arrival)

    def _keep(self, fetch: plan.Fetch, arrival: Arrival, data: memoryview) -> None:
        """Cache a block that came, and answer those who wait for all of it."""
        try:
            fd = self._cache.put(arrival.layer.block_map.blocks[arrival.index].digest, arrival.draft, data)
        except Exception as exc:
            self._desk.fail(fetch, arrival.index, exc, more_origins=False)
        else:
            self._log.count(fetched_blocks=1, uncompressed_bytes=len(data))
            self._desk.deliver(arrival.layer, arrival.index, fd, "origin")
