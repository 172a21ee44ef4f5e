"""Blocks from peers: what stands between the cache and the origin in a cluster.

Made by the device server, asked by the fetcher for every block that the cache lacks and that is worth
fetching; any thread. Each block has one home among the peers (`rendezvous.py`). Where that is another
node that is well (`peerhealth.py`), it is asked here; where it is this one, or nobody, the fetcher asks the
origin.

Invariants:

* Nothing from a peer is used before all of it hashed to the block's digest.
* Waiting for a peer takes none of the origin's connections, and a request that came from a peer goes to the
  origin or nowhere: so nodes that wait for each other cannot all wait for ever, and nothing goes in circles.
* Whoever waits is answered once: by the peer, or by the origin, to which the request goes when the peer
  fails, refuses, is found down, or has let a demand wait for `hedge_seconds` (and in any case for
  `longest_wait_seconds`).
* No lock is held while a socket, the cache, or a callback is busy.

Owned here: the threads that talk to peers (started as needed, ended when idle), one clock thread for hedges,
and one that probes peers that are down; all only once there are peers.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import heapq
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from imagefs import errors, fetchlog, peerhealth, plan, rendezvous
from imagefs.cache import BlockCache
from imagefs.lazylayer import LazyLayer
from imagefs.peersettings import PeerSettings
from imagefs.plan import Priority

if TYPE_CHECKING:
    from imagefs import peerhttp
    from imagefs.answering import Done

_log = logging.getLogger(__name__)

_IDLE_SECONDS = 20.0
_PIECE_BYTES = 256 * 1024
LONGEST_WAIT_SECONDS = 10.0
_KEPT_BUFFERS = 4
_SHARED_TRANSPORTS = ("docker://", "s3://")
"""A folder is this node's own: no peer could fetch from it."""

Key = tuple[str, int]
Target = Callable[[str, int, Priority], "str | None"]
"""What to ask a peer for, as the path of a request: of a layer's map digest and a block's index."""


@dataclasses.dataclass(frozen=True, slots=True)
class Policy:
    """`threads` bounds requests to peers in flight, `threads_per_peer` those to one; of both,
    `demand_threads` are for demands only."""

    threads: int = 16
    threads_per_peer: int = 6
    demand_threads: int = 2
    longest_wait_seconds: float = LONGEST_WAIT_SECONDS
    health: peerhealth.Policy = dataclasses.field(default_factory=peerhealth.Policy)


@dataclasses.dataclass(frozen=True, slots=True)
class _Fetcher:
    """What is used of the fetcher; see `Peers.bind`."""

    want: Callable[[str, int, Priority, Done | None, float], None]
    hand_out: Callable[[Done, int], None]
    refuse: Callable[[Done, Exception], None]
    log: fetchlog.FetchLog


class _Reader:
    """One who waits, and may be answered from two sides."""

    def __init__(self, done: Done, wanted_at: float) -> None:
        self.done = done
        self.wanted_at = wanted_at
        self._answered = threading.Lock()

    def first(self) -> bool:
        """Whether nobody answered before: true once."""
        return self._answered.acquire(blocking=False)


@dataclasses.dataclass(slots=True, eq=False)
class _Job:
    layer: LazyLayer
    index: int
    peer: str
    target: str
    reason: Priority
    priority: Priority
    wanted_at: float
    started_at: float = 0.0
    running: bool = False
    with_origin: bool = False
    """Its readers went to the origin, too (or only: then it is not known here any more)."""
    readers: list[_Reader] = dataclasses.field(default_factory=list)

    @property
    def key(self) -> Key:
        return self.layer.map_digest, self.index


class Peers:
    """See the module. Without settings it has no peers and costs nothing."""

    def __init__(self, cache: BlockCache, target: Target, policy: Policy | None = None) -> None:
        self._cache = cache
        self._target = target
        self._policy = policy or Policy()
        self._fetcher: _Fetcher | None = None
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._time = threading.Condition(self._lock)
        self._settings: PeerSettings | None = None
        self._connections: peerhttp.Connections | None = None
        self._health = peerhealth.Health(self._policy.health)
        self._live: tuple[str, ...] = ()
        self._jobs: dict[Key, _Job] = {}
        self._queues: tuple[collections.OrderedDict[Key, _Job], ...] = tuple(
            collections.OrderedDict() for _ in Priority
        )
        self._busy: collections.Counter[str] = collections.Counter()
        self._hedges: list[tuple[float, int, bool, _Job]] = []
        self._numbers = itertools.count()
        self._buffers: list[bytearray] = []
        self._threads = 0
        self._idle = 0
        self._clock: threading.Thread | None = None
        self._prober: threading.Thread | None = None
        self._closed = False

    def bind(
        self,
        want: Callable[[str, int, Priority, Done | None, float], None],
        hand_out: Callable[[Done, int], None],
        refuse: Callable[[Done, Exception], None],
        log: fetchlog.FetchLog,
    ) -> None:
        """By the fetcher, before anything is asked: `want` has a block fetched from its origin, `hand_out`
        gives a waiter a descriptor of its own, `refuse` an error, `log` keeps the counters."""
        self._fetcher = _Fetcher(want, hand_out, refuse, log)

    # -- what there is -----------------------------------------------------------------------------

    def configure(self, settings: PeerSettings | None) -> None:
        """Who the peers are now; None for nobody. The same again changes nothing. Raises ConfigurationError
        for secrets that cannot be read: then there are no peers."""
        with self._lock:
            if settings == self._settings or self._closed:
                return
            self._settings = None
        connections = None
        if settings is not None:
            # An HTTP client is much to import for a device server that starts with a container.
            from imagefs import peerhttp

            connections = peerhttp.Connections(settings)
        with self._lock:
            old, self._connections = self._connections, connections
            self._settings = settings
            members = settings.members if settings else ()
            if settings is not None:
                health = dataclasses.replace(self._policy.health, down_seconds=settings.down_seconds)
                self._health.policy = health
            self._health.retain(members)
            self._refresh()
            left = self._hand_over([job for job in self._jobs.values() if job.peer not in members])
            if settings is not None and self._clock is None:
                self._clock = threading.Thread(target=self._run_clock, name="peer-clock", daemon=True)
                self._clock.start()
        if old is not None:
            old.close()
        self._to_origin(left)

    def status(self) -> dict[str, Any]:
        """A JSON object: this node's address, how many members, which are down and why, what is waited
        for."""
        with self._lock:
            settings = self._settings
            return {
                "address": settings.address if settings else None,
                "members": len(settings.members) if settings else 0,
                "down": {peer: why.value for peer, why in sorted(self._health.down().items())},
                "waiting": len(self._jobs),
            }

    # -- asking ------------------------------------------------------------------------------------

    def ask(
        self, layer: LazyLayer, index: int, priority: Priority, done: Done | None, wanted_at: float
    ) -> bool:
        """Have a block that the cache lacks fetched from its home, for `done` or for the cache alone. False:
        no peer is to be asked, and nothing was done."""
        if self._settings is None or not layer.origin.name.startswith(_SHARED_TRANSPORTS):
            return False
        key = (layer.map_digest, index)
        if key not in self._jobs:
            peer = rendezvous.home(layer.block_map.blocks[index].digest, self._live)
            target = self._target(layer.map_digest, index, priority)
        else:
            peer, target = None, None
        with self._lock:
            settings, job = self._settings, self._jobs.get(key)
            if settings is None or self._closed:
                return False
            now = time.monotonic()
            if job is None:
                known = peer is not None and peer in self._live and peer != settings.address
                if not known or target is None or self._health.refuses(str(peer), layer.map_digest, now):
                    return False
                job = _Job(layer, index, str(peer), target, priority, priority, wanted_at)
                self._jobs[key] = job
                self._queues[priority][key] = job
            elif job.with_origin and done is not None:
                return False  # whoever comes now joins those at the origin
            elif priority < job.priority:
                if not job.running:
                    del self._queues[job.priority][key]
                    self._queues[priority][key] = job
                job.priority = priority
            if done is not None:
                job.readers.append(_Reader(done, wanted_at))
            if priority is Priority.DEMAND:
                self._add_hedge(job, now + settings.hedge_seconds, False)
            self._start_worker()
        return True

    def forget(self, map_digest: str) -> list[Done]:
        """The layer is gone: nobody waits for it here any more. Those who did, to be refused."""
        with self._lock:
            jobs = [job for key, job in self._jobs.items() if key[0] == map_digest]
            readers = [reader for job in jobs for reader in self._take(job)]
        return [reader.done for reader in readers if reader.first()]

    def close(self) -> None:
        """Ask nobody any more. Threads that wait for a peer end by themselves."""
        with self._lock:
            self._closed = True
            connections, self._connections = self._connections, None
            readers = [reader for job in list(self._jobs.values()) for reader in self._take(job)]
            self._work.notify_all()
            self._time.notify_all()
        if connections is not None:
            connections.close()
        for reader in readers:
            if reader.first():
                self._bound().refuse(reader.done, errors.UnavailableError("the fetcher is closing"))

    # -- inside, with the lock held ----------------------------------------------------------------

    def _refresh(self) -> None:
        down = self._health.down()
        members = self._settings.members if self._settings else ()
        self._live = tuple(member for member in members if member not in down)

    def _start_worker(self) -> None:
        if self._idle:
            self._work.notify()
        elif self._threads < self._policy.threads:
            threading.Thread(target=self._run, name="peer", daemon=True).start()
            self._threads += 1

    def _add_hedge(self, job: _Job, at: float, last: bool) -> None:
        heapq.heappush(self._hedges, (at, next(self._numbers), last, job))
        if self._hedges[0][3] is job:
            self._time.notify()

    def _take(self, job: _Job) -> list[_Reader]:
        """Forget a job, if it is not forgotten; its readers, whom the caller answers."""
        if self._jobs.get(job.key) is not job:
            return []
        del self._jobs[job.key]
        self._queues[job.priority].pop(job.key, None)
        return job.readers

    def _hand_over(self, jobs: list[_Job]) -> list[_Job]:
        """Forget these jobs; those that the caller is to bring `_to_origin`: each once, whoever fails first,
        and not those that went there before."""
        out = [job for job in jobs if self._jobs.get(job.key) is job and not job.with_origin]
        for job in jobs:
            self._take(job)
        return out

    def _go_down(self, peer: str) -> list[_Job]:
        """A peer went down: what waits for it is handed over."""
        self._refresh()
        self._time.notify()
        return self._hand_over([job for job in self._jobs.values() if job.peer == peer])

    def _next_job(self) -> _Job | None:
        """Wait for work; None when this thread should end."""
        idle_until = time.monotonic() + _IDLE_SECONDS
        while not self._closed:
            job = self._startable()
            now = time.monotonic()
            if job is not None:
                del self._queues[job.priority][job.key]
                job.running = True
                job.started_at = now
                self._busy[job.peer] += 1
                self._start_worker()
                return job
            if now >= idle_until:
                return None
            self._idle += 1
            self._work.wait(idle_until - now)
            self._idle -= 1
        return None

    def _startable(self) -> _Job | None:
        policy = self._policy
        for priority, queue in zip(Priority, self._queues, strict=True):
            reserved = 0 if priority is Priority.DEMAND else policy.demand_threads
            if self._busy.total() >= policy.threads - reserved:
                continue
            for job in queue.values():
                if self._busy[job.peer] < policy.threads_per_peer - reserved:
                    return job
        return None

    # -- threads -----------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._lock:
                job = self._next_job()
                connections = self._connections
                if job is None:
                    self._threads -= 1
                    return
            try:
                self._carry_out(job, connections)
            finally:
                with self._lock:
                    self._busy[job.peer] -= 1
                    if not self._busy[job.peer]:
                        del self._busy[job.peer]

    def _run_clock(self) -> None:
        while True:
            due: list[tuple[float, int, bool, _Job]] = []
            with self._lock:
                if self._closed:
                    return
                now = time.monotonic()
                while self._hedges and self._hedges[0][0] <= now:
                    due.append(heapq.heappop(self._hedges))
                if not due:
                    self._start_prober(now)
                    moments = [self._hedges[0][0]] if self._hedges else []
                    probe_at = self._health.next_probe_at()
                    if probe_at is not None and self._prober is None:
                        moments.append(probe_at)
                    self._time.wait(max(0.0, min(moments) - now) if moments else None)
            for _, _, last, job in due:
                self._hedge(job, last)

    def _start_prober(self, now: float) -> None:
        """With the lock held."""
        at = self._health.next_probe_at()
        if self._prober is None and at is not None and at <= now and self._connections is not None:
            self._prober = threading.Thread(target=self._run_prober, name="peer-probe", daemon=True)
            self._prober.start()

    def _run_prober(self) -> None:
        """One peer after another, as long as there are any whose time is over."""
        while True:
            with self._lock:
                connections, settings = self._connections, self._settings
                peer = self._health.next_probe(time.monotonic()) if connections and settings else None
                if peer is None or connections is None or settings is None:
                    self._prober = None
                    self._time.notify()
                    return
            well = connections.probe(peer, time.monotonic() + 2 * settings.connect_timeout_seconds)
            with self._lock:
                self._health.probed(peer, well, time.monotonic())
                self._refresh()
            if well:
                _log.warning("peer %s answers again", peer)

    # -- one job -----------------------------------------------------------------------------------

    def _carry_out(self, job: _Job, connections: peerhttp.Connections | None) -> None:
        block = job.layer.block_map.blocks[job.index]
        length = job.layer.block_map.block_length(job.index)
        # Another layer may have brought it since it was asked for.
        fd = self._cache.get(block.digest, length)
        outcome = "cache"
        try:
            if fd is None:
                if connections is None:
                    raise errors.UnavailableError("there are no peers any more")
                fd = self._fetch(job, connections, block.digest, length)
                outcome = "peer"
        except Exception as exc:
            self._failed(job, exc)
            return
        self._deliver(job, fd, outcome, length)

    def _fetch(self, job: _Job, connections: peerhttp.Connections, digest: bytes, length: int) -> int:
        """A descriptor of the block, verified."""
        deadline = job.started_at + self._policy.longest_wait_seconds
        self._bound().log.count(peer_requests=1)
        with contextlib.closing(connections.open(job.peer, job.target, length, deadline)) as body:
            buffer = self._take_buffer(length)
            try:
                view = memoryview(buffer)[:length]
                with contextlib.closing(self._cache.draft(length)) as draft:
                    hasher = hashlib.sha256()
                    at = 0
                    while at < length:
                        piece = body.read_piece(min(_PIECE_BYTES, length - at))
                        end = at + len(piece)
                        view[at:end] = piece
                        hasher.update(piece)
                        draft.write(view[at:end], at)
                        at = end
                    if hasher.digest() != digest:
                        raise errors.IntegrityError(
                            f"peer {job.peer}: layer {job.layer.map_digest}: block {job.index}: "
                            "the bytes differ from the block's digest"
                        )
                    return self._cache.put(digest, draft, view)
            finally:
                self._give_buffer(buffer)

    def _deliver(self, job: _Job, fd: int, outcome: str, length: int) -> None:
        fetcher = self._bound()
        with self._lock:
            if outcome == "peer":
                self._health.answered(job.peer)
            readers = self._take(job)
        if outcome == "peer":
            fetcher.log.count(peer_blocks=1, peer_bytes=length)
        answer: plan.Answer[Done] = plan.Answer(
            job.layer.map_digest, job.index, (), job.reason, job.priority, job.wanted_at, job.started_at, None
        )
        fetcher.log.note(answer, outcome, 0)
        for reader in readers:
            if reader.first():
                fetcher.hand_out(reader.done, fd)
        os.close(fd)

    def _failed(self, job: _Job, exc: Exception) -> None:
        """The peer did not give the block: note why, and have the origin asked."""
        news, now = False, time.monotonic()
        with self._lock:
            dropped = self._hand_over([job])
            if self._settings is None or job.peer not in self._settings.members:
                pass  # it left meanwhile
            elif isinstance(exc, peerhealth.RefusedError):
                if exc.whole_layer:
                    self._health.refused(job.peer, job.layer.map_digest, now)
            elif isinstance(exc, errors.IntegrityError):
                news = self._health.lied(job.peer, now)
            else:
                news = self._health.failed(job.peer, now)
            if news:
                dropped += self._go_down(job.peer)
        lied = isinstance(exc, errors.IntegrityError)
        self._bound().log.count(peer_failures=1, corrupt_blocks=int(lied))
        if news:
            unexpected = None if isinstance(exc, errors.ImagefsError) else exc
            _log.warning("peer not asked for now: %s", exc, exc_info=unexpected)
        self._to_origin(dropped)

    # -- the other side ----------------------------------------------------------------------------

    def _hedge(self, job: _Job, last: bool) -> None:
        """A demand has waited long enough for its peer alone."""
        with self._lock:
            if self._jobs.get(job.key) is not job or job.with_origin or self._settings is None:
                return
            if not last and not self._health.may_hedge():
                wait_seconds = self._policy.longest_wait_seconds - self._settings.hedge_seconds
                self._add_hedge(job, time.monotonic() + max(0.0, wait_seconds), True)
                return
            job.with_origin = True
            readers = list(job.readers)
        self._bound().log.count(peer_hedges=1)
        for reader in readers:
            done = functools.partial(self._origin_answered, job, reader)
            self._bound().want(job.layer.map_digest, job.index, job.priority, done, reader.wanted_at)

    def _origin_answered(self, job: _Job, reader: _Reader, result: int | Exception) -> None:
        """Both were asked, and this is the origin."""
        if not reader.first():
            if isinstance(result, int):
                os.close(result)
            return
        dropped: list[_Job] = []
        with self._lock:
            beaten = isinstance(result, int) and self._jobs.get(job.key) is job
            self._take(job)
            if beaten and self._health.lost_race(job.peer, time.monotonic()):
                dropped = self._go_down(job.peer)
        if dropped:
            _log.warning("peer not asked for now: peer %s: slower than the origin", job.peer)
        reader.done(result)
        self._to_origin(dropped)

    def _to_origin(self, jobs: list[_Job]) -> None:
        """What was handed over: nobody waits for its peer any more."""
        want = self._bound().want
        for job in jobs:
            for reader in job.readers:
                want(job.layer.map_digest, job.index, job.priority, reader.done, reader.wanted_at)
            if not job.readers:
                want(job.layer.map_digest, job.index, job.priority, None, job.wanted_at)

    def _bound(self) -> _Fetcher:
        assert self._fetcher is not None
        return self._fetcher

    # -- buffers -----------------------------------------------------------------------------------

    def _take_buffer(self, length: int) -> bytearray:
        """Memory that is new to the process costs more than receiving into it."""
        with self._lock:
            while self._buffers:
                buffer = self._buffers.pop()
                if len(buffer) >= length:
                    return buffer
        return bytearray(length)

    def _give_buffer(self, buffer: bytearray) -> None:
        with self._lock:
            if len(self._buffers) < _KEPT_BUFFERS:
                self._buffers.append(buffer)
