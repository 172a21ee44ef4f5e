"""Sampled traces: what the first starts of images on this node read, published beside their block images.

`recorded` is asked by images.py when a layer is about to be mounted, from any thread; `tick` by the daemon's
upkeep; what talks to a registry has a thread of its own. What is published are ranges of layers and times: no
data, no file names, no command.

Only a start that finds nothing of its image mounted is sampled, because the page cache hides the rest; only
of an image without a boot pack, each image once in an agent's life, one at a time. A layer that other images
have, too, may bring reads of theirs: `glowplug pack` merges several traces. The layers of a sampled start
are mounted with the read-ahead of a trace; what they have in the end is what the trace says. The metadata,
which was read before, is added.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Protocol

from agent import config
from agent.mounts import LayerMounts
from agent.observer import Observer
from agent.rows import ImageRow
from imagefs import blockmap, errors, reference, trace, tracestore
from imagefs.fuse.control import Recorded
from imagefs.fuse.mapfiles import MapFiles
from imagefs.origin import connect

_log = logging.getLogger(__name__)

_OWNER = "image:"


class Devices(Protocol):
    """What of the device client is used here; imagefs.fuse.control.DeviceClient."""

    def start_recording(self, owner: str) -> None:
        """See DeviceClient."""

    def stop_recording(self, owner: str) -> Recorded:
        """See DeviceClient."""
        ...


Publish = Callable[[ImageRow, trace.Trace], str | None]
"""Puts a trace beside its image; None where there are enough. Raises errors of imagefs."""


class Sampler:
    """See the module."""

    def __init__(
        self,
        settings: config.Traces,
        maps: MapFiles,
        mounts: LayerMounts,
        devices: Devices,
        observer: Observer,
        publish: Publish,
        chance: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._maps = maps
        self._mounts = mounts
        self._devices = devices
        self._observer = observer
        self._publish = publish
        self._chance = chance
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: set[str] = set()
        self._running: tuple[ImageRow, float] | None = None

    def recorded(self, row: ImageRow, fresh: Callable[[], bool]) -> bool:
        """Whether the start that is about to mount a layer of an attached image is recorded; `fresh` says
        whether no layer of it is mounted yet. Begins the recording."""
        digest = row.block_digest
        with self._lock:
            if self._running is not None:
                return self._running[0].block_digest == digest
            if row.boot_pack is not None or digest in self._seen:
                return False
            self._seen.add(digest)
            if self._chance() >= self._settings.share or not fresh():
                return False
            self._running = row, self._clock()
        try:  # without the lock: the device server may be on its way up, and others want to start
            self._devices.start_recording(_OWNER + digest)
        except errors.ImagefsError as exc:
            _log.warning("%s: its start is not traced: %s", row.reference, exc)
            with self._lock:
                self._running = None
            return False
        return True

    def tick(self) -> None:
        """End the recording that is due, and have it published."""
        with self._lock:
            if self._running is None or self._clock() - self._running[1] < self._settings.seconds:
                return
            (row, _), self._running = self._running, None
        read_ahead = (self._mounts.read_ahead_kib(layer.mount_number) for layer in row.layers)
        found_kib = {kib for kib in read_ahead if kib is not None}
        try:
            recorded = self._devices.stop_recording(_OWNER + row.block_digest)
        except errors.NotFoundError:
            return  # the image is gone already, or the device server was started again
        if len(found_kib) != 1:
            text = (
                f"{row.reference}: no trace of its start: its layers read ahead {found_kib or 'nothing'} KiB"
            )
            self._observer.event("trace_not_published", text, level="warning", image=row.reference)
            return
        found = self._trace(row, recorded, found_kib.pop())
        threading.Thread(target=self._send, args=(row, found), name="trace", daemon=True).start()

    def _trace(self, row: ImageRow, recorded: Recorded, read_ahead_kib: int) -> trace.Trace:
        digests = tuple(layer.map_digest for layer in row.layers)
        reads, sizes = [], {}
        for number, digest in enumerate(digests):
            data = self._maps.read(digest)
            if data is not None and digest not in sizes:
                value = blockmap.decode(data)
                sizes[digest] = value.image_bytes
                reads.append(trace.Read(number, value.metadata_offset, value.metadata_bytes, 0))
        room = trace.MAX_READS - len(reads)
        for number, offset, length, microseconds in recorded.reads[:room]:
            digest = recorded.map_digests[number]
            length = min(length, sizes.get(digest, 0) - offset)
            if length > 0:
                reads.append(trace.Read(digests.index(digest), offset, length, microseconds))
        return trace.Trace(row.source_digest, row.block_digest, digests, (), tuple(reads), read_ahead_kib)

    def _send(self, row: ImageRow, found: trace.Trace) -> None:
        try:
            digest = self._publish(row, found)
        except errors.ImagefsError as exc:
            text = f"{row.reference}: the trace of its start cannot be published: {exc}"
            self._observer.event("trace_not_published", text, level="warning", image=row.reference)
            return
        if digest is not None:
            text = f"{row.reference}: its start read {len(found.reads)} ranges: published as {digest}"
            self._observer.event("trace_published", text, image=row.reference, reads=len(found.reads))


def publisher(origins: connect.Options) -> Publish:
    """Publishes in the repository that the layers come from, with this node's credentials."""

    def publish(row: ImageRow, found: trace.Trace) -> str | None:
        with contextlib.closing(connect.connect(reference.parse(row.origin_ref), origins)) as origin:
            return tracestore.publish(origin, found)

    return publish
