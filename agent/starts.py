"""Starts: what became of each image from its pull to the last read that had to wait: phases and a waterfall.

A listener of the observer (`on_pull`, `on_phase`), fed the device server's fetch events by `devicefeed.py`
(`absorb`). Any thread; one short lock; no I/O but `layers_of`, which is asked for an image's block maps once.
All times are CLOCK_MONOTONIC, which the device server and the agent share.

A start opens with the first pull or phase of its image. It runs once a layer was mounted, and has settled
when no demanded block missed the cache for `settle_seconds`, or after ten minutes: what a process needs to be
up is then in the cache. A miss later than that is one that made a running container wait, and is counted as
such. Between a pull and its first mount may lie hours (an image pulled ahead): that wait is left out of the
timeline, and told.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from agent import observer

PULL_PHASES = ("lookup", "metadata")
MOUNT = "mount"
FIRST_READ = "first_read"
READS = "reads"
_KEPT = 32
_MAX_BARS = 400
_NS = 1_000_000_000
_LONGEST_NS = 600 * _NS
"""What reads on and on is at work, not starting."""


@dataclasses.dataclass(slots=True)
class _Phase:
    begin_ns: int
    end_ns: int
    count: int
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class Bar:
    """One block that did not come from the cache. `layer` is its place in the image, bottom first. Its reader
    waited until `served_ns`; the whole block was there at `arrived_ns`."""

    layer: int
    block: int
    reason: str
    source: str
    wanted_ns: int
    started_ns: int
    served_ns: int
    arrived_ns: int
    compressed_bytes: int


@dataclasses.dataclass(slots=True)
class _Start:
    number: int
    reference: str
    at_seconds: float
    begin_ns: int
    phases: dict[str, _Phase]
    lazy: bool | None = None
    reason: str | None = None
    pulled_ns: int | None = None
    layers: dict[str, int] = dataclasses.field(default_factory=dict)
    first_read_ns: int | None = None
    last_miss_ns: int | None = None
    misses: int = 0
    hits: int = 0
    fetched_bytes: int = 0
    bars: list[Bar] = dataclasses.field(default_factory=list)
    bars_left_out: int = 0
    settled: bool = False

    def mounted_ns(self) -> int | None:
        mount = self.phases.get(MOUNT)
        return mount.end_ns if mount else None

    def owns(self, event: Mapping[str, Any]) -> bool:
        """Whether a fetch is part of it. What is fetched after its pull and before its first mount is for a
        container that had the image already."""
        if self.settled or event["map_digest"] not in self.layers or event["arrived_ns"] < self.begin_ns:
            return False
        mount = self.phases.get(MOUNT)
        pulling = self.pulled_ns is None or event["arrived_ns"] <= self.pulled_ns
        return pulling or (mount is not None and event["wanted_ns"] >= mount.begin_ns)

    def quiet_since_ns(self) -> int | None:
        """The end of its last activity, once it was mounted."""
        mounted = self.mounted_ns()
        return None if mounted is None else max(mounted, self.last_miss_ns or 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Settled:
    """What a start took: seconds of the phases that it derives, and in all (its wait left out)."""

    reference: str
    phases: Mapping[str, float]
    total_seconds: float
    misses: int


class Starts:
    """See the module. `layers_of` gives the map digests of a reference's block image, bottom first, empty if
    it is not known; `on_settled` and `on_running` are called without the lock: a start has settled, a start
    has begun to run (so that events should be fed)."""

    def __init__(
        self,
        *,
        settle_seconds: float = 10.0,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.layers_of: Callable[[str], Iterable[str]] = lambda reference: ()
        self.on_settled: Callable[[Settled], None] = lambda settled: None
        self.on_running: Callable[[], None] = lambda: None
        self._settle_ns = int(settle_seconds * _NS)
        self._clock_ns = clock_ns
        self._wall_clock = wall_clock
        self._lock = threading.Lock()
        self._numbered = 0
        self._starts: collections.deque[_Start] = collections.deque(maxlen=_KEPT)
        self._misses = {"start": 0, "running": 0}

    # -- the observer's listener -------------------------------------------------------------------

    def on_event(self, event: observer.Event) -> None:
        """Nothing of a start is in it."""

    def on_grpc(self, method: str, code: str, seconds: float) -> None:
        """Nothing of a start is in it."""

    def on_pull(self, reference: str, *, lazy: bool, seconds: float, layers: int, reason: str | None) -> None:
        """The pull of a start is over."""
        with self._lock:
            start = self._open(reference, seconds)
            start.lazy, start.reason, start.pulled_ns = lazy, reason, self._clock_ns()
            if not lazy:
                start.settled = True  # nothing of it comes through us

    def on_phase(self, reference: str, phase: str, seconds: float) -> None:
        """A phase of a start is over."""
        with self._lock:
            start = self._open(reference, seconds)
            end_ns = self._clock_ns()
            begin_ns = end_ns - int(seconds * _NS)
            known = start.phases.get(phase)
            if known is None:
                start.phases[phase] = _Phase(begin_ns, end_ns, 1, seconds)
            else:
                known.begin_ns, known.end_ns = min(known.begin_ns, begin_ns), max(known.end_ns, end_ns)
                known.count += 1
                known.seconds += seconds
            runs = phase == MOUNT
        if runs:
            self.on_running()

    def _open(self, reference: str, seconds: float) -> _Start:
        """The image's start that has not settled, or a new one that began `seconds` ago."""
        for start in reversed(self._starts):
            if start.reference == reference and not start.settled:
                return start
        self._numbered += 1
        begin_ns = self._clock_ns() - int(seconds * _NS)
        start = _Start(self._numbered, reference, self._wall_clock() - seconds, begin_ns, {})
        self._starts.append(start)
        return start

    # -- the device server's events ----------------------------------------------------------------

    def running(self) -> bool:
        """Whether a start waits for events: mounted, and not settled."""
        with self._lock:
            return any(not start.settled and start.mounted_ns() is not None for start in self._starts)

    def absorb(self, events: Iterable[Mapping[str, Any]]) -> None:
        """The fetch events since the last call, oldest first, as DeviceClient.events gives them."""
        self._resolve()
        settled = []
        with self._lock:
            for event in events:
                self._absorb(event)
            for start in self._starts:
                if not start.settled and self._is_over(start):
                    start.settled = True
                    settled.append(_summary(start))
        for summary in settled:
            self.on_settled(summary)

    def _is_over(self, start: _Start) -> bool:
        mounted, quiet = start.mounted_ns(), start.quiet_since_ns()
        if mounted is None or quiet is None:
            return False
        now = self._clock_ns()
        return now - quiet > self._settle_ns or now - mounted > _LONGEST_NS

    def _resolve(self) -> None:
        with self._lock:
            unknown = [start for start in self._starts if not start.layers and not start.settled]
        for start in unknown:
            layers = {digest: place for place, digest in enumerate(self.layers_of(start.reference))}
            with self._lock:
                start.layers = layers

    def _absorb(self, event: Mapping[str, Any]) -> None:
        demanded = event["priority"] == "demand"
        missed = event["outcome"] not in ("cache", "failed")
        owners = [start for start in self._starts if start.owns(event)]
        if demanded and missed:
            self._misses["start" if owners else "running"] += 1
        for start in owners:
            self._note(start, event, demanded=demanded, missed=missed)

    def _note(self, start: _Start, event: Mapping[str, Any], *, demanded: bool, missed: bool) -> None:
        mounted = start.mounted_ns()
        if demanded and mounted is not None and event["wanted_ns"] >= mounted:
            start.first_read_ns = min(start.first_read_ns or event["wanted_ns"], event["wanted_ns"])
        if not missed:
            start.hits += event["outcome"] == "cache"
            return
        start.fetched_bytes += event["compressed_bytes"]
        if demanded:
            start.misses += 1
            start.last_miss_ns = max(start.last_miss_ns or 0, event["served_ns"])
        if len(start.bars) >= _MAX_BARS:
            start.bars_left_out += 1
            return
        start.bars.append(
            Bar(
                layer=start.layers[event["map_digest"]],
                block=event["block"],
                reason=event["reason"],
                source=event["outcome"],
                wanted_ns=event["wanted_ns"],
                started_ns=event["started_ns"],
                served_ns=event["served_ns"],
                arrived_ns=event["arrived_ns"],
                compressed_bytes=event["compressed_bytes"],
            )
        )

    # -- what is asked -----------------------------------------------------------------------------

    def misses(self) -> dict[str, int]:
        """Demanded blocks that missed the cache: in a "start", or of a container that was "running"."""
        with self._lock:
            return dict(self._misses)

    def to_json(self) -> list[dict[str, Any]]:
        """The latest starts, newest first, as the API gives them; times in seconds from the start's begin."""
        with self._lock:
            return [_view(start) for start in reversed(self._starts)]


def _waited_ns(start: _Start) -> tuple[int, int]:
    """Where the wait between pull and first mount begins, and how long it is."""
    mount = start.phases.get(MOUNT)
    pulled = [start.phases[name].end_ns for name in PULL_PHASES if name in start.phases]
    if mount is None or not pulled:
        return 0, 0
    return max(pulled), max(0, mount.begin_ns - max(pulled))


def _timeline(start: _Start) -> Callable[[int], float]:
    """From CLOCK_MONOTONIC to seconds of the start's own timeline, without its wait."""
    wait_begin_ns, wait_ns = _waited_ns(start)

    def offset(at_ns: int) -> float:
        if wait_ns and at_ns > wait_begin_ns:
            at_ns = max(wait_begin_ns, at_ns - wait_ns)
        return round((at_ns - start.begin_ns) / _NS, 4)

    return offset


def _derived(start: _Start) -> dict[str, tuple[int, int]]:
    """The phases that only the events show: until the first read, and until the last miss."""
    mounted, phases = start.mounted_ns(), {}
    if mounted is not None and start.first_read_ns is not None:
        phases[FIRST_READ] = (mounted, start.first_read_ns)
        if start.last_miss_ns is not None and start.last_miss_ns > start.first_read_ns:
            phases[READS] = (start.first_read_ns, start.last_miss_ns)
    return phases


def _summary(start: _Start) -> Settled:
    offset = _timeline(start)
    derived = _derived(start)
    phases = {name: (end - begin) / _NS for name, (begin, end) in derived.items()}
    last = max([phase.end_ns for phase in start.phases.values()] + [end for _, end in derived.values()])
    return Settled(start.reference, phases, offset(last), start.misses)


def _view(start: _Start) -> dict[str, Any]:
    offset = _timeline(start)
    phases = [
        {"phase": name, "begin": offset(phase.begin_ns), "end": offset(phase.end_ns), "count": phase.count}
        for name, phase in start.phases.items()
    ]
    phases += [
        {"phase": name, "begin": offset(begin), "end": offset(end), "count": 1}
        for name, (begin, end) in _derived(start).items()
    ]
    return {
        "number": start.number,
        "reference": start.reference,
        "at_seconds": start.at_seconds,
        "lazy": start.lazy,
        "reason": start.reason,
        "state": _state(start),
        "waited_seconds": round(_waited_ns(start)[1] / _NS, 3),
        "total_seconds": _summary(start).total_seconds if start.phases else 0.0,
        "layers": len(start.layers),
        "misses": start.misses,
        "hits": start.hits,
        "fetched_bytes": start.fetched_bytes,
        "phases": phases,
        "bars": [
            {
                "layer": bar.layer,
                "block": bar.block,
                "reason": bar.reason,
                "source": bar.source,
                "wanted": offset(bar.wanted_ns),
                "started": offset(bar.started_ns),
                "served": offset(bar.served_ns),
                "arrived": offset(bar.arrived_ns),
                "compressed_bytes": bar.compressed_bytes,
            }
            for bar in start.bars
        ],
        "bars_left_out": start.bars_left_out,
    }


def _state(start: _Start) -> str:
    if start.lazy is False:
        return "ordinary"
    if start.settled:
        return "settled"
    return "pulled" if start.mounted_ns() is None else "running"
