"""Full copies: what is missing of an image is fetched when nothing else is to be done.

Owned by Layers in the device server; `start`, `stop`, `status` from control threads; one thread of its own
walks over the images, one after another, and asks the fetcher for missing blocks at Priority.FILL, a few
megabytes at a time. What has been asked for is kept in STATE/fills.json, so that a successor goes on.

A running container then outlives its origin. Rules:

* A demand goes first: the plan starts no fill while a demand is in flight at its origin, and a fill that is
  arriving gives way (`fetcher.py`).
* A copy never pushes out what an image in use has, nor what is pinned: `BlockCache.copy_room_bytes`. Without
  room it waits; how much is there can be asked for.
* A copy that is complete is pinned in the cache until the image is let go: reads of other images cannot take
  it apart, and what they need is the tenth of the cache that copies leave.
* An origin that fails is left alone for a while, longer each time.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from imagefs import errors
from imagefs.cache import BlockCache
from imagefs.fetcher import Fetcher, Priority
from imagefs.fuse.devices import write_atomically
from imagefs.lazylayer import LazyLayer

_log = logging.getLogger(__name__)

_WINDOW_BYTES = 8 << 20
"""Compressed bytes that are asked for and have not come: a few requests: none waits for this thread."""
_ROOM_BLOCKS = 64
"""After so many blocks the room is reckoned anew: demands use it up, too."""
_ROOM_SECONDS = 10.0
_LOOK_AGAIN_SECONDS = 600.0
"""A complete copy is looked at again: a damaged block may have been removed."""
_RETRY_SECONDS = 5.0
_LONGEST_RETRY_SECONDS = 300.0


class TokenBucket:
    """A cap on bytes per second, 0 for none; saves up one second's worth. Pure: `now` is an argument."""

    def __init__(self, bytes_per_second: int, now: float) -> None:
        self._rate = bytes_per_second
        self._saved = float(bytes_per_second)
        self._at = now

    def take(self, count: int, now: float) -> float:
        """Take `count` bytes; how many seconds to wait before they may be used. Never refuses: what is larger
        than a second's worth is paid off afterwards."""
        if not self._rate:
            return 0.0
        self._saved = min(float(self._rate), self._saved + (now - self._at) * self._rate) - count
        self._at = now
        return max(0.0, -self._saved / self._rate)


@dataclasses.dataclass(slots=True)
class _Fill:
    """One copy. `state` is for people: "waiting", "filling", "no room", "origin fails", "complete"."""

    owner: str
    state: str = "waiting"
    error: str | None = None
    next_at: float = 0.0
    pause_seconds: float = _RETRY_SECONDS


class _Pass:
    """What one walk over an image has asked for, and what came of it. Under the filler's lock."""

    def __init__(self) -> None:
        self.in_flight_bytes = 0
        self.in_flight_image_bytes = 0
        self.came = 0
        self.error: Exception | None = None
        self.skipped_layers: set[str] = set()

    def note(self, map_digest: str, error: Exception | None) -> None:
        """One block was answered."""
        if error is None:
            self.came += 1
            return
        self.error = error
        if not isinstance(error, errors.IntegrityError):
            self.skipped_layers.add(map_digest)


class Filler:
    """See the module. `layers_of` gives the layers of an owner, none when it let go of them."""

    def __init__(
        self,
        cache: BlockCache,
        fetcher: Fetcher,
        layers_of: Callable[[str], Sequence[LazyLayer]],
        state_dir: Path,
    ) -> None:
        self._cache = cache
        self._fetcher = fetcher
        self._layers_of = layers_of
        self._path = state_dir / "fills.json"
        self._pin_prefix = f"copy:{os.path.abspath(state_dir)}:"
        self._changed = threading.Condition()
        self._fills: dict[str, _Fill] = {}
        self._bandwidth = 0
        self._bucket = TokenBucket(0, 0.0)
        self._thread: threading.Thread | None = None
        self._closed = False
        self._load()

    # -- control -----------------------------------------------------------------------------------

    def start(self, owner: str, bandwidth_bytes_per_second: int) -> None:
        """Copy the owner's layers in the background. The cap holds for all copies together, the latest one
        counts."""
        with self._changed:
            self._fills.setdefault(owner, _Fill(owner))
            self._set_bandwidth(bandwidth_bytes_per_second)
            self._save()
            self._wake()

    def stop(self, owner: str) -> None:
        """No further copy for the owner; what is there is no longer kept from eviction. Called for every
        owner that lets go, because that makes room for others' copies."""
        with self._changed:
            known = self._fills.pop(owner, None) is not None
            if known:
                self._save()
            self._changed.notify_all()
        if known:
            self._unpin(owner)
        with self._changed:
            for fill in self._fills.values():
                if fill.state == "no room":
                    fill.next_at = 0.0
            self._changed.notify_all()

    def status(self) -> dict[str, Any]:
        """A JSON object: the cap, and each owner's state."""
        with self._changed:
            return {
                "bandwidth_bytes_per_second": self._bandwidth,
                "copies": [
                    {"owner": fill.owner, "state": fill.state, "error": fill.error}
                    for fill in self._fills.values()
                ],
            }

    def close(self) -> None:
        """Stop; a successor goes on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    # -- state -------------------------------------------------------------------------------------

    def _load(self) -> None:
        try:
            document = json.loads(self._path.read_bytes())
            owners = [str(owner) for owner in document["owners"] if self._layers_of(str(owner))]
            bandwidth = int(document["bandwidth_bytes_per_second"])
        except FileNotFoundError:
            owners, bandwidth = [], 0
        except (OSError, ValueError, KeyError, TypeError) as exc:
            _log.warning("%s: cannot be read, copies are not resumed: %s", self._path, exc)
            owners, bandwidth = [], 0
        with self._changed:
            self._fills = {owner: _Fill(owner) for owner in owners}
            self._set_bandwidth(bandwidth)
            if owners:
                self._wake()
        for name, _ in list(self._cache.pins()):
            # Of a predecessor that died with its devices: nobody would ever let go of them.
            if name.startswith(self._pin_prefix) and name.removeprefix(self._pin_prefix) not in owners:
                self._unpin(name.removeprefix(self._pin_prefix))

    def _save(self) -> None:
        document = {"bandwidth_bytes_per_second": self._bandwidth, "owners": list(self._fills)}
        try:
            write_atomically(self._path, json.dumps(document).encode())
        except OSError as exc:
            _log.warning("%s: cannot be written, copies will not be resumed: %s", self._path, exc)

    def _set_bandwidth(self, bandwidth_bytes_per_second: int) -> None:
        if bandwidth_bytes_per_second != self._bandwidth:
            self._bandwidth = bandwidth_bytes_per_second
            self._bucket = TokenBucket(bandwidth_bytes_per_second, time.monotonic())

    def _wake(self) -> None:
        """With the lock held."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="fill", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _unpin(self, owner: str) -> None:
        try:
            self._cache.unpin(self._pin_prefix + owner)
        except errors.UnavailableError as exc:
            _log.warning("%s", exc)

    # -- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                fill = self._next()
                while fill is None and not self._closed:
                    soonest = min((each.next_at for each in self._fills.values()), default=None)
                    self._changed.wait(None if soonest is None else max(0.0, soonest - time.monotonic()))
                    fill = self._next()
            if self._closed or fill is None:
                return
            try:
                self._copy(fill)
            except Exception as exc:
                # Other images' copies must go on.
                _log.exception("the full copy of %s failed", fill.owner)
                self._end_pass(fill, "waiting", _LONGEST_RETRY_SECONDS, str(exc))

    def _next(self) -> _Fill | None:
        now = time.monotonic()
        return next((fill for fill in self._fills.values() if fill.next_at <= now), None)

    def _copy(self, fill: _Fill) -> None:
        """One walk over what is missing."""
        missing = list(self._missing(fill.owner))
        if not missing:
            self._complete(fill)
            return
        with self._changed:
            fill.state = "filling"
        walk = _Pass()
        had_room = self._ask(fill, walk, missing)
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not walk.in_flight_bytes)
        if walk.error is not None:
            if walk.came:
                fill.pause_seconds = _RETRY_SECONDS
            self._end_pass(fill, "origin fails", fill.pause_seconds, str(walk.error))
            fill.pause_seconds = min(2 * fill.pause_seconds, _LONGEST_RETRY_SECONDS)
        elif had_room and not any(True for _ in self._missing(fill.owner)):
            self._complete(fill)
        else:
            self._end_pass(fill, "no room", _ROOM_SECONDS, None)

    def _missing(self, owner: str) -> Iterator[tuple[LazyLayer, int]]:
        for layer in self._layers_of(owner):
            for index, block in enumerate(layer.block_map.blocks):
                if not block.zero and not self._cache.present(block.digest):
                    yield layer, index

    def _ask(self, fill: _Fill, walk: _Pass, missing: Sequence[tuple[LazyLayer, int]]) -> bool:
        """Ask for the missing blocks as room, cap and window allow. Whether there was room for all."""
        room_bytes = 0
        for number, (layer, index) in enumerate(missing):
            length = layer.block_map.block_length(index)
            if number % _ROOM_BLOCKS == 0:
                room_bytes = self._cache.copy_room_bytes() - walk.in_flight_image_bytes
            if room_bytes < length:
                return False
            compressed_bytes = layer.block_map.blocks[index].compressed_bytes
            with self._changed:
                if layer.map_digest in walk.skipped_layers:
                    continue
                may_at = time.monotonic() + self._bucket.take(compressed_bytes, time.monotonic())
                if not self._may_ask(fill, walk, may_at):
                    return True
                walk.in_flight_bytes += compressed_bytes
                walk.in_flight_image_bytes += length
            room_bytes -= length
            done = self._answered(walk, layer, index)
            self._fetcher.request(layer.map_digest, index, Priority.FILL, done)
        return True

    def _may_ask(self, fill: _Fill, walk: _Pass, may_at: float) -> bool:
        """With the lock held: wait for cap and window. False when this walk is to end."""
        while not self._closed and self._fills.get(fill.owner) is fill:
            if isinstance(walk.error, errors.UnavailableError | errors.DeniedError):
                return False
            wait_seconds = may_at - time.monotonic()
            if walk.in_flight_bytes < _WINDOW_BYTES and wait_seconds <= 0:
                return True
            self._changed.wait(wait_seconds if wait_seconds > 0 else None)
        return False

    def _answered(self, walk: _Pass, layer: LazyLayer, index: int) -> Callable[[int | Exception], None]:
        def done(result: int | Exception) -> None:
            if isinstance(result, int):
                os.close(result)
            with self._changed:
                walk.in_flight_bytes -= layer.block_map.blocks[index].compressed_bytes
                walk.in_flight_image_bytes -= layer.block_map.block_length(index)
                walk.note(layer.map_digest, result if isinstance(result, Exception) else None)
                self._changed.notify_all()

        return done

    def _complete(self, fill: _Fill) -> None:
        """All is here: keep it, unless something went in the meantime."""
        digests = {
            block.digest
            for layer in self._layers_of(fill.owner)
            for block in layer.block_map.blocks
            if not block.zero
        }
        try:
            self._cache.pin(self._pin_prefix + fill.owner, digests)
        except errors.UnavailableError as exc:
            self._end_pass(fill, "waiting", _ROOM_SECONDS, str(exc))
            return
        with self._changed:
            let_go = self._fills.get(fill.owner) is not fill
        if let_go:
            self._unpin(fill.owner)
        elif any(True for _ in self._missing(fill.owner)):
            self._end_pass(fill, "waiting", 0.0, None)
        else:
            fill.pause_seconds = _RETRY_SECONDS
            self._end_pass(fill, "complete", _LOOK_AGAIN_SECONDS, None)

    def _end_pass(self, fill: _Fill, state: str, pause_seconds: float, error: str | None) -> None:
        with self._changed:
            fill.state, fill.error = state, error
            fill.next_at = time.monotonic() + pause_seconds
