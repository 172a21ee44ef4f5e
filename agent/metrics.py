"""The agent's Prometheus metrics: what parts report (as a listener of the observer), and what a scrape reads.

`Metrics` owns its registry. Counters and histograms of what happens in this process are kept here; numbers of
the device server, of the store and of the starts are asked for at the scrape (`Sources`), so that they have
one home each. A source that fails leaves its metrics out and says so by an `_up` gauge; it never breaks the
scrape. Base units; labels come from small sets, never a digest or a name of an image. docs/metrics.md lists
all of them with what to conclude.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.metadata
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import prometheus_client
from prometheus_client import core
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from agent import observer
from agent.devicefeed import Look
from agent.starts import Settled

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST

_PULL_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_PHASE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_GRPC_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 1, 5, 10)
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9 _-]{0,39}\Z")
_MAX_WORDS = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Inventory:
    """What the store holds: snapshots by kind, quarantined ones, images and how many of them are pinned."""

    snapshots: Mapping[str, int]
    quarantined: int
    images: int
    pinned: int


@dataclasses.dataclass(frozen=True, slots=True)
class Sources:
    """What a scrape asks. `inventory` is None when the store does not answer."""

    device_server: Callable[[], Look]
    replaced: Callable[[], Mapping[str, int]]
    misses: Callable[[], Mapping[str, int]]
    inventory: Callable[[], Inventory | None]


class Metrics:
    """See the module."""

    def __init__(self) -> None:
        # A series more for each counter, which nobody asks for.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector(registry=self.registry)
        self._pulls = self._counter("glowplug_pulls", "Pulls, by how and why.", "kind", "reason")
        self._pull_seconds = self._histogram(
            "glowplug_pull_seconds", "Time of a pull in the agent.", _PULL_SECONDS, "kind"
        )
        self._phase_seconds = self._histogram(
            "glowplug_start_phase_seconds", "Phases of starts.", _PHASE_SECONDS, "phase"
        )
        self._start_seconds = self._histogram(
            "glowplug_start_seconds", "From an image's pull to its last miss.", _PULL_SECONDS
        )
        self._grpc_seconds = self._histogram(
            "glowplug_grpc_request_seconds", "Calls of containerd.", _GRPC_SECONDS, "method", "code"
        )
        self._events = self._counter("glowplug_events", "Events, by kind and level.", "kind", "level")
        self._words: dict[str, set[str]] = {}
        version = importlib.metadata.version("glowplug")
        build = prometheus_client.Gauge(
            "glowplug_build_info", "1, labelled by version.", ["version"], registry=self.registry
        )
        build.labels(version).set(1)

    def read_from(self, sources: Sources) -> None:
        """Ask these at each scrape."""
        self.registry.register(_Scrape(sources))

    def render(self) -> bytes:
        """The exposition text."""
        return prometheus_client.generate_latest(self.registry)

    # -- the observer's listener -------------------------------------------------------------------

    def on_event(self, event: observer.Event) -> None:
        """Counted."""
        self._events.labels(self._word("kind", event.kind), event.level).inc()

    def on_pull(self, reference: str, *, lazy: bool, seconds: float, layers: int, reason: str | None) -> None:
        """Counted and timed."""
        kind = "lazy" if lazy else "ordinary"
        self._pulls.labels(kind, self._word("reason", "" if lazy else reason or "unknown")).inc()
        self._pull_seconds.labels(kind).observe(seconds)

    def on_phase(self, reference: str, phase: str, seconds: float) -> None:
        """Timed."""
        self._phase_seconds.labels(self._word("phase", phase)).observe(seconds)

    def on_grpc(self, method: str, code: str, seconds: float) -> None:
        """Timed."""
        self._grpc_seconds.labels(self._word("method", method), self._word("code", code)).observe(seconds)

    def on_settled(self, settled: Settled) -> None:
        """A start's own phases, and its whole."""
        for phase, seconds in settled.phases.items():
            self._phase_seconds.labels(phase).observe(seconds)
        self._start_seconds.observe(settled.total_seconds)

    # -- making them -------------------------------------------------------------------------------

    def _word(self, label: str, value: str) -> str:
        """A label's value, if it is a word of a small set: whatever else came in would be a new time series
        each."""
        known = self._words.setdefault(label, set())
        if value in known:
            return value
        if len(known) >= _MAX_WORDS or (value and not _WORD.match(value)):
            return "other"
        known.add(value)
        return value

    def _counter(self, name: str, text: str, *labels: str) -> prometheus_client.Counter:
        return prometheus_client.Counter(name, text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], *labels: str
    ) -> prometheus_client.Histogram:
        return prometheus_client.Histogram(name, text, labels, buckets=buckets, registry=self.registry)


_CACHE_GAUGES = {
    "quota_bytes": ("glowplug_cache_quota_bytes", "Bytes that the block cache may take."),
    "used_bytes": ("glowplug_cache_used_bytes", "Bytes that the block cache takes on disk."),
    "blocks": ("glowplug_cache_blocks", "Blocks in the cache."),
}
_CACHE_COUNTERS = {
    "evicted_blocks": ("glowplug_cache_evicted_blocks", "Blocks evicted."),
    "corrupt_blocks": ("glowplug_cache_corrupt_blocks", "Cached blocks whose bytes had changed."),
    "memory_bytes": ("glowplug_cache_memory_bytes", "Bytes of blocks kept in memory, for want of disk."),
    "disk_errors": ("glowplug_cache_disk_errors", "Failed writes of the cache."),
}
_FETCH_COUNTERS = {
    "origin_requests": ("glowplug_origin_requests", "Range requests to origins."),
    "failed_blocks": ("glowplug_fetch_failed_tries", "Tries to fetch a block that failed."),
    "corrupt_blocks": ("glowplug_fetch_corrupt_blocks", "Blocks refused because of their bytes."),
    "failed_reads": ("glowplug_read_errors", "Blocks whose readers got an I/O error."),
    "peer_requests": ("glowplug_peer_requests", "Blocks asked of other nodes."),
    "peer_failures": ("glowplug_peer_failures", "Blocks that another node did not give, or gave wrong."),
    "peer_hedges": ("glowplug_peer_hedges", "Blocks asked of the origin as well, because a peer was slow."),
    "served_blocks": ("glowplug_peer_served_blocks", "Blocks given to other nodes."),
    "served_bytes": ("glowplug_peer_served_bytes", "Bytes given to other nodes."),
    "boot_bytes": ("glowplug_boot_pack_bytes", "Of the origin's bytes, those of boot packs."),
    "frame_answers": ("glowplug_frame_answers", "Reads answered by frames, before their block was whole."),
    "boot_waits": ("glowplug_boot_pack_waits", "Reads that waited for a part of a boot pack on its way."),
    "expired_reads": ("glowplug_reads_expired", "Readers whose origin did not answer in time."),
}
_BYTES_BY_SOURCE = {"cache": "cache_bytes", "origin": "fetched_bytes", "peer": "peer_bytes"}
_BLOCKS_BY_SOURCE = {
    "cache": "cache_hits",
    "zero": "zero_hits",
    "origin": "fetched_blocks",
    "peer": "peer_blocks",
}


class _Scrape(Collector):
    """What is read at a scrape."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def describe(self) -> list[Metric]:
        """Nothing: a registration must not ask the device server."""
        return []

    def collect(self) -> Iterator[Metric]:
        """See the module."""
        look = self._sources.device_server()  # first: it is this look that notices a new server
        yield from self._inventory()
        yield _counters("glowplug_handovers", "Processes replaced.", "process", self._sources.replaced())
        yield _counters(
            "glowplug_demand_misses",
            "Blocks that a reader had to wait for, in a start or of a running container.",
            "when",
            self._sources.misses(),
        )
        yield core.GaugeMetricFamily(
            "glowplug_device_server_up", "Whether the device server answers.", value=look.status is not None
        )
        if look.status is not None:
            yield from _device_server(look.status)

    def _inventory(self) -> Iterator[Metric]:
        inventory = self._sources.inventory()
        yield core.GaugeMetricFamily(
            "glowplug_store_up", "Whether the database answers.", value=inventory is not None
        )
        if inventory is None:
            return
        yield _gauges("glowplug_snapshots", "Snapshots, by kind.", "kind", inventory.snapshots)
        yield core.GaugeMetricFamily(
            "glowplug_snapshots_quarantined", "Snapshots that cannot be used.", value=inventory.quarantined
        )
        yield core.GaugeMetricFamily("glowplug_images", "Block images in use.", value=inventory.images)
        yield core.GaugeMetricFamily("glowplug_images_pinned", "Pinned images.", value=inventory.pinned)


def _device_server(status: Mapping[str, Any]) -> Iterator[Metric]:
    cache, fetch = status["cache"], status["fetch"]
    yield core.GaugeMetricFamily("glowplug_devices", "Layers that can be read.", value=len(status["devices"]))
    for field, (name, text) in _CACHE_GAUGES.items():
        yield core.GaugeMetricFamily(name, text, value=cache[field])
    for field, (name, text) in _CACHE_COUNTERS.items():
        yield core.CounterMetricFamily(name, text, value=cache[field])
    for field, (name, text) in _FETCH_COUNTERS.items():
        yield core.CounterMetricFamily(name, text, value=fetch[field])
    moved = {source: fetch[field] for source, field in _BYTES_BY_SOURCE.items()}
    yield _counters(
        "glowplug_read_bytes", "Bytes by source: as moved, from the cache as read.", "source", moved
    )
    blocks = {source: fetch[field] for source, field in _BLOCKS_BY_SOURCE.items()}
    yield _counters("glowplug_read_blocks", "Blocks by source.", "source", blocks)
    yield _gauges(
        "glowplug_fetch_queue_blocks", "Blocks that wait for a connection.", "priority", fetch["queued"]
    )
    yield core.GaugeMetricFamily("glowplug_fetch_connections", "Fetch threads.", value=fetch["threads"])
    yield core.GaugeMetricFamily(
        "glowplug_workers", "FUSE worker processes.", value=len(status["processes"]["workers"])
    )
    peers = {"known": status["peers"]["members"], "down": len(status["peers"]["down"])}
    yield _gauges(
        "glowplug_peers",
        "Agents, this one included, and those that are not asked for a while.",
        "state",
        peers,
    )
    copies = collections.Counter(copy["state"] for copy in status["fill"]["copies"])
    yield _gauges("glowplug_fill_copies", "Full copies of images, by state.", "state", copies)


def _counters(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = core.CounterMetricFamily(name, text, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family


def _gauges(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = core.GaugeMetricFamily(name, text, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family
