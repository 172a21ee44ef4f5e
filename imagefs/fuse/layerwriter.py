"""When a layer gets a file of its own (layerfiles.py), and which layers have one that may be mounted.

Owned by Layers in the device server; `mountable` from control threads; one thread of its own looks at the
attached layers every few seconds. Rules:

* A layer whose blocks are all here, and of which no read has missed the cache for a while, gets a file: the
  start that brought them is over.
* The file stands beside the blocks, so it is written only where there is room to spare: with it, what images
  in use have, and what is pinned, take half of what the cache can hold at most. It is written at half speed,
  and not while another image starts.
* Of a layer with a file the cache keeps the file, and the blocks are the first to go when room is needed:
  who still reads them through a device gets them from the file (`block`).
* A file from before a boot is hashed before it is handed out again; until then its layer's device is mounted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from imagefs import errors
from imagefs.cache import BlockCache
from imagefs.layerfiles import GaveUpError, LayerFiles
from imagefs.lazylayer import LazyLayer

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 5.0
_QUIET_SECONDS = 10.0
_CALM_SECONDS = 1.0
"""So long no read of any layer must have missed the cache for the next block to be written."""
_RETRY_SECONDS = 300.0
"""After a file could not be written."""
_ROOM_PERCENT = 50
_ROOM_SECONDS = 30.0
_SHARE = 0.5
"""Of the time that this thread works while it writes."""


class LayerWriter:
    """See the module. `layers` gives the attached ones, each once, `quiet_seconds` how long no read of one
    has missed the cache. Unless `enabled`, there are no layer files."""

    def __init__(
        self,
        cache: BlockCache,
        directory: Path,
        layers: Callable[[], Sequence[LazyLayer]],
        quiet_seconds: Callable[[str], float],
        *,
        enabled: bool,
    ) -> None:
        self._cache = cache
        self._files = LayerFiles(cache, directory)
        self._layers = layers
        self._enabled = enabled
        self._quiet_seconds = quiet_seconds
        self._digests: dict[str, bytes] = {}
        """Of the files that may be mounted."""
        self._not_before: dict[str, float] = {}
        self._room_bytes = 0
        self._room_until = 0.0
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="layer-writer", daemon=True)
        if enabled:
            self._thread.start()

    def mountable(self, layers: Iterable[LazyLayer]) -> dict[str, Path]:
        """Map digest -> file, of those layers that have one. It may be gone when it is opened; none is read
        for this."""
        found = {}
        for layer in layers if self._enabled else ():
            name = layer.map_digest
            digest = self._files.checked(name, layer.block_map.image_bytes)
            if digest is not None:
                self._digests[name] = digest
                found[name] = self._files.path(name)
        return found

    def block(self, layer: LazyLayer, index: int) -> int | None:
        """See LayerFiles; only from a file that was checked."""
        return self._files.block(layer, index) if layer.map_digest in self._digests else None

    def digest(self, map_digest: str) -> bytes | None:
        """The sha256 of a layer's file, if it has one that was checked."""
        return self._digests.get(map_digest)

    def close(self) -> None:
        """Stop; a half-written file goes."""
        self._closed = True
        self._wake.set()
        if self._enabled:
            self._thread.join()
        self._files.close()

    # -- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        tidied = False
        while not self._wake.wait(_LOOK_SECONDS):
            try:
                layers = self._layers()
                if not tidied:
                    self._files.tidy([layer.map_digest for layer in layers])
                    tidied = True
                self._look(layers)
            except Exception:
                # The next look may fare better, and nothing that reads depends on it.
                _log.exception("layer files: could not look around")

    def _look(self, layers: Sequence[LazyLayer]) -> None:
        attached = {layer.map_digest for layer in layers}
        for known in (self._digests, self._not_before):
            for map_digest in set(known) - attached:
                known.pop(map_digest, None)
        for layer in layers:
            if self._closed:
                return
            digest = self._digests.get(layer.map_digest)
            if digest is not None:
                # A file that is mounted is used, though nobody says so.
                if not self._cache.use(digest):
                    self._digests.pop(layer.map_digest, None)
            elif time.monotonic() >= self._not_before.get(layer.map_digest, 0.0):
                self._provide(layer)

    def _provide(self, layer: LazyLayer) -> None:
        image_bytes = layer.block_map.image_bytes
        digest = None
        try:
            digest = self._files.check(layer.map_digest, image_bytes, self._pacing())
            if digest is None and self._may_begin(layer):
                digest = self._files.write(layer.map_digest, layer.block_map, self._pacing())
                self._room_until = 0.0
                _log.info("layer %s: written to a file of %d bytes", layer.map_digest, image_bytes)
        except (errors.ImagefsError, OSError) as exc:
            self._not_before[layer.map_digest] = time.monotonic() + _RETRY_SECONDS
            if not isinstance(exc, GaveUpError):
                _log.warning("layer %s: gets no file of its own: %s", layer.map_digest, exc)
        if digest is not None:
            self._digests[layer.map_digest] = digest

    def _may_begin(self, layer: LazyLayer) -> bool:
        return (
            self._quiet_seconds(layer.map_digest) >= _QUIET_SECONDS
            and layer.block_map.image_bytes <= self._room()
            and all(block.zero or block.digest in self._cache for block in layer.block_map.blocks)
        )

    def _room(self) -> int:
        """What files may still take, as it was a moment ago: with many images it is dear to know."""
        now = time.monotonic()
        if now >= self._room_until:
            self._room_bytes = self._cache.copy_room_bytes(_ROOM_PERCENT)
            self._room_until = now + _ROOM_SECONDS
        return self._room_bytes

    def _pacing(self) -> Callable[[], bool]:
        """Called before each block: whether to go on, after a rest as long as the work was, once nothing is
        being started."""
        at = time.monotonic()

        def may_go_on() -> bool:
            nonlocal at
            self._wake.wait((time.monotonic() - at) * (1 / _SHARE - 1))
            while not self._closed and not self._is_calm():
                self._wake.wait(_CALM_SECONDS)
            at = time.monotonic()
            return not self._closed

        return may_go_on

    def _is_calm(self) -> bool:
        return all(self._quiet_seconds(layer.map_digest) >= _CALM_SECONDS for layer in self._layers())
