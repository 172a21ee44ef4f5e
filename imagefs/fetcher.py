"""The fetcher: threads that carry out the plan. Ask for a block by layer and index; its descriptor comes.
Ask for some frames of it, and a descriptor comes as soon as those are valid.

Used inside the device server and by the file-level mount and `check`; every method from any thread. Owned
here: the connection threads (started as they are needed, ended when idle), one clock thread, and two threads
that hash cache files not used since boot. Not owned: the cache, and the origins, which stay open until the
last `detach` of their layers. What to fetch is decided by `plan.py`, under one lock that is never held during
I/O; one fetch is carried out by `carrier.py`.

Callbacks run in fetcher threads, or in the caller's when the block was cached; they must not block.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import os
import random
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

from imagefs import answering, blockreading, carrier, errors, fetchlog, framemask, frames, plan
from imagefs.answering import Done, PartDone
from imagefs.arrival import Arrival
from imagefs.cache import BlockCache
from imagefs.lazylayer import LazyLayer
from imagefs.origin import Origin
from imagefs.plan import Priority as Priority

if TYPE_CHECKING:  # what reads without a cluster need not load HTTP for peers
    from imagefs.peers import Peers

_log = logging.getLogger(__name__)

_IDLE_SECONDS = 30.0
_CHECK_THREADS = 2


@dataclasses.dataclass(frozen=True, slots=True)
class FetchSettings:
    """`read_deadline_seconds`: how long a demanded block waits for its origin before its reader gets an
    error. `events`: how many FetchEvents are kept. `policy`: see plan.Policy."""

    read_deadline_seconds: float = 60.0
    events: int = 16384
    policy: plan.Policy = dataclasses.field(default_factory=plan.Policy)


@dataclasses.dataclass(frozen=True, slots=True)
class _Request:
    """What somebody wants: `frames` of a block, or framemask.WHOLE."""

    map_digest: str
    index: int
    priority: Priority
    done: Done | None
    wanted_at: float
    patience_seconds: float
    from_peer: bool = False
    frames: int = framemask.WHOLE


@dataclasses.dataclass(slots=True)
class _Attached:
    layer: LazyLayer
    count: int
    origins: dict[str, Origin]
    missed_at: float
    patience_seconds: float | None


class Files(Protocol):
    """The layers that are here whole, in files of their own (fuse/layerwriter.py)."""

    def digest(self, map_digest: str) -> bytes | None:
        """The file's sha256, of a layer that has one."""

    def block(self, layer: LazyLayer, index: int) -> int | None:
        """A descriptor of a verified block of it."""


class Fetcher:
    """See the module. What `files` have is not fetched."""

    def __init__(
        self,
        cache: BlockCache,
        settings: FetchSettings,
        peers: Peers | None = None,
        files: Files | None = None,
    ) -> None:
        self._cache = cache
        self._peers = peers
        self._settings = settings
        self._plan: plan.Plan[Done] = plan.Plan(settings.policy)
        self._layers: dict[str, _Attached] = {}
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._time = threading.Condition(self._lock)
        self._calm = threading.Condition(self._lock)
        self._threads = 0
        self._idle = 0
        self._clock_until = 0.0
        self._closed = False
        self._arrivals: dict[tuple[str, int], Arrival] = {}
        self._log = fetchlog.FetchLog(settings.events)
        self._carrier = carrier.Carrier(cache, self, self._log, settings.read_deadline_seconds)
        self._files = files
        self._zeros = answering.zeros()
        self._checkers = concurrent.futures.ThreadPoolExecutor(_CHECK_THREADS, "block-check")
        self._clock = threading.Thread(target=self._run_clock, name="fetch-clock", daemon=True)
        self._clock.start()
        if peers is not None:
            peers.bind(self._want_in_place_of_peer, answering.hand_out, answering.call, self._log)

    # -- layers ------------------------------------------------------------------------------------

    def attach(self, layer: LazyLayer, patience_seconds: float | None = None) -> None:
        """Make a layer readable; as often as `detach`. The same layer from another origin adds that origin
        as a second source. With `patience_seconds`, its readers have another way to the bytes: a demand waits
        no longer than that, and nothing is read ahead. InvalidInputError for a block map that claims
        impossible sizes."""
        frames.check_sizes(layer.block_map, layer.map_digest)
        with self._lock:
            known = self._layers.get(layer.map_digest)
            if known is None:
                self._layers[layer.map_digest] = _Attached(
                    layer, 1, {layer.origin.name: layer.origin}, time.monotonic(), patience_seconds
                )
                self._plan.add_layer(layer.map_digest, layer.origin.name, layer.block_map)
            else:
                known.count += 1
                known.patience_seconds = known.patience_seconds or patience_seconds
                known.origins[layer.origin.name] = layer.origin

    def replace_origins(self, map_digest: str, origins: Iterable[Origin]) -> None:
        """The origins that a layer has from now on, if these are any; fetches under way keep theirs."""
        with self._lock:
            known = self._layers.get(map_digest)
            if known is not None:
                known.origins = {origin.name: origin for origin in origins} or known.origins

    def detach(self, map_digest: str) -> None:
        """Undo one `attach`. After the last one, pending requests get NotFoundError at once."""
        with self._lock:
            known = self._layers.get(map_digest)
            if known is None:
                return
            known.count -= 1
            if known.count:
                return
            del self._layers[map_digest]
            answers = self._plan.remove_layer(map_digest)
        gone = errors.NotFoundError(f"layer {map_digest} was detached")
        for answer in answers:
            self._refuse(answer, gone)
        for done in self._peers.forget(map_digest) if self._peers else ():
            answering.call(done, gone)

    # -- reading -----------------------------------------------------------------------------------

    def request(
        self,
        map_digest: str,
        index: int,
        priority: Priority,
        done: Done,
        *,
        from_peer: bool = False,
    ) -> None:
        """Ask for one block. `done` gets a descriptor of the uncompressed block from offset 0 (that of a
        zero block may be longer than the block), or an error: NotFoundError (layer not attached, blob gone),
        IntegrityError, or UnavailableError when the origin did not answer before the deadline. What is not
        a demand is not retried: it gets the first error. So does another node (`from_peer`), which has the
        origin itself; that neither goes to a peer nor says anything about what will be read next."""
        patience = 0.0 if from_peer else self._patience_seconds(map_digest)
        wanted_at = time.monotonic()
        self._request(_Request(map_digest, index, priority, done, wanted_at, patience, from_peer))

    def request_frames(self, map_digest: str, index: int, frames: int, done: PartDone) -> None:
        """As `request` at demand priority, of one who can do with these frames (framemask.py) of the block:
        `done` may get a Part that has them, while the rest of the block is on its way to the cache."""
        wanted_at, patience = time.monotonic(), self._settings.read_deadline_seconds
        self._request(_Request(map_digest, index, Priority.DEMAND, done, wanted_at, patience, frames=frames))

    def _request(self, request: _Request) -> None:
        map_digest, index = request.map_digest, request.index
        known = self._layers.get(map_digest)
        if known is None or not 0 <= index < len(known.layer.block_map.blocks):
            error = errors.NotFoundError(f"layer {map_digest}: block {index}: not attached, or no such block")
            answering.call(request.done, error)
            return
        block = known.layer.block_map.blocks[index]
        if block.zero:
            self._log.count(zero_hits=1)
            answering.hand_out(request.done, self._zeros)
            return
        length = known.layer.block_map.block_length(index)
        fd = self._cache.get_checked(block.digest, length)
        missing = False
        if fd is not None:
            self._log.note_hit(map_digest, index, request.priority, request.wanted_at, length)
            answering.call(request.done, fd)
        elif self._is_here(map_digest, block.digest):
            # Read in a thread of its own: a dead origin must not stand between a reader and the disk.
            self._checkers.submit(self._check, request)
        else:
            missing = True
        if request.priority is Priority.DEMAND and not request.from_peer and known.patience_seconds is None:
            self._read_ahead(map_digest, index, request.frames)
        if missing:
            # Last, so that its request may take along what is to be read ahead.
            self._miss(known.layer, request)

    def read(self, map_digest: str, offset: int, length: int) -> bytes:
        """Bytes of a layer image, at demand priority; raises what `request` answers."""
        with self._lock:
            known = self._layers.get(map_digest)
        if known is None:
            raise errors.NotFoundError(f"layer {map_digest} is not attached")
        block_map = known.layer.block_map
        if offset < 0 or length < 0 or offset + length > block_map.image_bytes:
            raise errors.InvalidInputError(
                f"layer {map_digest}: bytes {offset}+{length} lie outside its {block_map.image_bytes}"
            )
        if length == 0:
            return b""
        return blockreading.read(
            block_map, offset, length, functools.partial(self.request_frames, map_digest)
        )

    def quiet_seconds(self, map_digest: str) -> float:
        """How long no read of the layer has missed the cache, or it has been attached. 0 if it is not."""
        with self._lock:
            known = self._layers.get(map_digest)
            return 0.0 if known is None else time.monotonic() - known.missed_at

    def events(self, after: int = 0) -> list[fetchlog.FetchEvent]:
        """The latest events with numbers above `after`, oldest first."""
        return self._log.events(after)

    def stats(self) -> fetchlog.FetchStats:
        """Counters; see FetchStats."""
        with self._lock:
            queued = self._plan.queued()
        return self._log.stats(self._threads, {p.name.lower(): count for p, count in queued.items()})

    def count(self, **counts: int) -> None:
        """Add to the counters of FetchStats what only the caller sees."""
        self._log.count(**counts)

    def close(self) -> None:
        """Fail what is pending, and stop. Threads that hang in an origin are left to end by themselves."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            layers = list(self._layers)
            self._layers.clear()
            answers = [answer for name in layers for answer in self._plan.remove_layer(name)]
            self._work.notify_all()
            self._time.notify_all()
            self._calm.notify_all()
        for answer in answers:
            self._refuse(answer, answering.closing())
        if self._peers is not None:
            self._peers.close()
        self._checkers.shutdown(wait=True)
        self._clock.join()
        os.close(self._zeros)

    # -- queueing ----------------------------------------------------------------------------------

    def _miss(self, layer: LazyLayer, request: _Request) -> None:
        """The cache lacks it: the block's home among the peers is asked, or the origin."""
        peers = None if request.from_peer else self._peers
        wanted = (request.index, request.priority, request.done, request.wanted_at)
        if peers is None or not peers.ask(layer, *wanted):
            self._want(request)
        elif request.priority is Priority.DEMAND:
            with self._lock:
                known = self._layers.get(layer.map_digest)
                if known is not None:
                    known.missed_at = request.wanted_at

    def _want_in_place_of_peer(
        self, map_digest: str, index: int, priority: Priority, done: Done | None, wanted_at: float
    ) -> None:
        patience = self._patience_seconds(map_digest)
        self._want(_Request(map_digest, index, priority, done, wanted_at, patience))

    def _patience_seconds(self, map_digest: str) -> float:
        """How long a demand waits for a block of the layer before its reader is told why."""
        known = self._layers.get(map_digest)
        own = None if known is None else known.patience_seconds
        return self._settings.read_deadline_seconds if own is None else own

    def _want(self, request: _Request) -> None:
        """The origin is asked. Only demands have any patience."""
        map_digest, wanted_at = request.map_digest, request.wanted_at
        deadline = None
        if request.priority is Priority.DEMAND and request.patience_seconds:
            deadline = wanted_at + request.patience_seconds
        arrival = None
        with self._lock:
            known = self._layers.get(map_digest)
            if known is not None:
                frames_wanted = request.frames if known.layer.block_map.blocks[request.index].frames else 0
                if deadline is not None:
                    known.missed_at = wanted_at
                    self._calm.notify_all()  # it may be for what another fetch is bringing, and holds back
                self._plan.want(
                    map_digest,
                    request.index,
                    request.priority,
                    wanted_at,
                    request.done,
                    deadline,
                    frames_wanted,
                )
                self._start_worker()
                arrival = self._arrivals.get((map_digest, request.index)) if frames_wanted else None
                # A layer whose origin failed, with nothing queued, had no pause that the clock could see.
                paused = self._plan.is_paused(map_digest, wanted_at)
                if paused or (deadline is not None and deadline < self._clock_until):
                    self._time.notify()
        if known is None:
            answering.call(request.done, errors.NotFoundError(f"layer {map_digest} is not attached"))
        elif arrival is not None:
            # The thread that brings it has looked for its waiters already. It will find the same wrong frame.
            with contextlib.suppress(errors.ImagefsError):
                self.frame_came(arrival)

    def _start_worker(self) -> None:
        """With the lock held: let one more thread look at the plan."""
        if self._idle:
            self._work.notify()
        elif self._threads < self._settings.policy.connections:
            threading.Thread(target=self._run, name="fetch", daemon=True).start()
            self._threads += 1

    def _check(self, request: _Request) -> None:
        known = self._layers.get(request.map_digest)
        fd = None
        if known is not None:
            block_map = known.layer.block_map
            length = block_map.block_length(request.index)
            fd = self._cache.get(block_map.blocks[request.index].digest, length)
            if fd is None and self._files is not None:
                fd = self._files.block(known.layer, request.index)
        if known is None:
            answering.call(request.done, errors.NotFoundError(f"layer {request.map_digest} is not attached"))
        elif fd is None:
            self._miss(known.layer, request)
        else:
            self._log.note_hit(request.map_digest, request.index, request.priority, request.wanted_at, length)
            answering.call(request.done, fd)

    def _is_here(self, map_digest: str, digest: bytes) -> bool:
        """Whether a block is on this machine's disk: in a file of its own, or in its layer's."""
        in_file = self._files is not None and self._files.digest(map_digest) is not None
        return in_file or self._cache.present(digest)

    def _read_ahead(self, map_digest: str, index: int, frames_demanded: int) -> None:
        with self._lock:
            known = self._layers.get(map_digest)
            proposed = self._plan.demanded(map_digest, index, frames_demanded) if known else range(0)
        for ahead in proposed:
            block = known.layer.block_map.blocks[ahead] if known else None
            if known and block is not None and not block.zero and not self._is_here(map_digest, block.digest):
                now = time.monotonic()
                self._miss(known.layer, _Request(map_digest, ahead, Priority.READ_AHEAD, None, now, 0.0))

    # -- threads -----------------------------------------------------------------------------------

    def _run(self) -> None:
        """One connection: take a fetch, carry it out, until there was none for a while."""
        buffer = bytearray()
        while True:
            with self._lock:
                fetch = self._next_fetch()
                if fetch is None:
                    self._threads -= 1
                    return
                known = self._layers[fetch.layer]
                origins = list(known.origins.values())
            try:
                # Kept for the next fetch: memory that is new to the process costs more than decoding into it.
                if len(buffer) < known.layer.block_map.block_bytes:
                    buffer = bytearray(known.layer.block_map.block_bytes)
            except MemoryError as exc:
                for index in fetch.indices:
                    self.fail(fetch, index, exc, more_origins=False)
            else:
                self._carrier.carry_out(fetch, known.layer, origins, memoryview(buffer))
            finally:
                with self._lock:
                    self._plan.finished(fetch)
                    self._calm.notify_all()

    def _next_fetch(self) -> plan.Fetch | None:
        """With the lock held: wait for work; None when this thread should end."""
        idle_until = time.monotonic() + _IDLE_SECONDS
        while not self._closed:
            now = time.monotonic()
            fetch = self._plan.next_fetch(now)
            if fetch is not None:
                self._start_worker()  # the next one, if there is more to do: no wake-up can be lost
                return fetch
            if now >= idle_until:
                return None
            self._idle += 1
            self._work.wait(idle_until - now)
            self._idle -= 1
        return None

    def _run_clock(self) -> None:
        """Wake a worker when a pause ends, and answer readers whose deadline has passed."""
        while True:
            with self._lock:
                if self._closed:
                    return
                now = time.monotonic()
                expired = self._plan.expire(now)
                self._start_worker()
                until = self._plan.next_time(now)
                self._clock_until = float("inf") if until is None else until
                if not expired:
                    self._time.wait(None if until is None else max(0.0, until - now))
                self._clock_until = 0.0
            for answer in expired:
                self._log.count(expired_reads=len(answer.waiters))
                self._refuse(answer, self._timed_out(answer))

    def _timed_out(self, answer: plan.Answer[Done]) -> errors.ImagefsError:
        return errors.UnavailableError(
            f"layer {answer.layer}: block {answer.index} did not come within "
            f"{self._settings.read_deadline_seconds:g} s: {answer.error or 'its origin does not answer'}"
        )

    # -- what the carrier says ---------------------------------------------------------------------

    def begun(self, arrival: Arrival) -> None:
        """See carrier.Desk, here and below."""
        self._arrivals[arrival.key] = arrival

    def frame_came(self, arrival: Arrival) -> None:
        """By the thread that brings the block, or by that of one who wants what came before."""
        if self._closed:
            raise answering.closing()
        with self._lock:
            wanted = self._plan.awaited_frames(*arrival.key, arrival.decoded)
        part = arrival.part(wanted) if wanted else None
        if part is None:
            return
        with self._lock:
            served = self._plan.frames_arrived(*arrival.key, part.frames, time.monotonic())
            self._calm.notify_all()
        self._log.count(frame_answers=len(served))
        for done in served:
            answering.hand_out_part(done, part)
        os.close(part.fd)

    def ended(self, arrival: Arrival) -> None:
        del self._arrivals[arrival.key]

    def giving_way(self, fetch: plan.Fetch, stream: Iterator[bytes]) -> Iterator[bytes]:
        """The stream, which stands still while the plan says so: neither link nor processor is for what
        nobody waits for while somebody waits. Not for ever, because an origin takes a reader that never reads
        for dead."""
        until = time.monotonic() + self._settings.read_deadline_seconds / 2
        while True:
            # Before the first piece, too: that is when the request is made.
            with self._lock:
                while not self._closed and self._plan.gives_way(fetch) and time.monotonic() < until:
                    self._calm.wait(until - time.monotonic())
            piece = next(stream, b"")
            if not piece:
                return
            yield piece

    def deliver(self, layer: LazyLayer, index: int, fd: int, outcome: str) -> None:
        with self._lock:
            answer, recovered = self._plan.arrived(layer.map_digest, index)
        self._log.note(answer, outcome, layer.block_map.blocks[index].compressed_bytes)
        if recovered:
            _log.warning("layer %s: its origin answers again", layer.map_digest)
        if not answer.waiters:
            os.close(fd)
            return
        first, *others = answer.waiters
        for waiter in others:
            answering.hand_out(waiter, fd)
        answering.call(first, fd)  # the descriptor itself, to a reader: there may be none left to be had

    def fail(self, fetch: plan.Fetch, index: int, exc: Exception, *, more_origins: bool) -> None:
        failure, error = answering.classify(exc)
        if failure is plan.Failure.FINAL and more_origins:
            failure = plan.Failure.UNAVAILABLE
        retry_after = error.retry_after_seconds if isinstance(error, errors.UnavailableError) else None
        jitter = random.random()  # noqa: S311 - it spreads retries, it hides nothing
        with self._lock:
            answer, began = self._plan.failed(
                fetch.layer, index, failure, error, time.monotonic(), jitter, retry_after
            )
            self._time.notify()
        self._log.count(failed_blocks=1, corrupt_blocks=int(failure is plan.Failure.CORRUPT))
        if began:
            # A traceback only for what no origin should raise.
            unexpected = None if error is exc else exc
            text = "layer %s: its origin fails; reads wait and retry: %s"
            _log.warning(text, fetch.layer, error, exc_info=unexpected)
        elif failure is plan.Failure.CORRUPT:
            _log.warning("refused wrong bytes from %s: %s", fetch.origin, error)
        self._refuse(answer, error)

    # -- answering ---------------------------------------------------------------------------------

    def _refuse(self, answer: plan.Answer[Done], error: Exception) -> None:
        if answer.waiters:
            self._log.note(answer, "failed", 0)
        for waiter in answer.waiters:
            answering.call(waiter, error)
