"""The boot packs that the device server streams, and gives to workers as devices of frames.

Owned by Layers; `start` and `stop` from control threads, `of_device` and `frame` from worker ones, callbacks
in fetcher threads. A pack is a layer to fetcher and cache (bootstream.py); what is added here is when its
frames are asked for, and when they are not.

* A pack's pages are what its author says, and not checked against the block maps: they appear in the devices
  of those who brought that pack, and in no others (devices.py). Of what the kernel parses, the superblocks
  among them are checked (superblocks.py).
* All frames that bring something new are wanted, in order of first read, at Priority.BOOT, from the moment
  that the pack is attached: before the first reader. A demand overtakes; a reader of an expected page waits
  for its frame, which goes to the front.
* A peer is asked for a frame as for a block, and knows the pack as a layer whose block map is the table: each
  frame has its home among the nodes, whichever of them start the image.
* No pack is in the way of a read: a frame that failed once, or whose blocks are all here, is refused, and the
  worker reads blocks instead. A pack whose data is gone, or forbidden, is given up as a whole.
* Nothing is kept about what has arrived but the cache itself: a successor asks for what that lacks.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from imagefs import blockmap, bootpack, bootstream, errors
from imagefs.cache import BlockCache
from imagefs.fetcher import Fetcher, Priority
from imagefs.fuse import packlayout, superblocks, wire
from imagefs.fuse.devices import LayerSpec, PackSpec, device_name
from imagefs.fuse.packlayout import Extent
from imagefs.lazylayer import LazyLayer
from imagefs.origin import Origin

_log = logging.getLogger(__name__)

FrameDone = Callable[[int | Exception | None], None]
"""Called once, from any thread: with a descriptor (the callee's to close), or the error."""


@dataclasses.dataclass(frozen=True, slots=True)
class Stopped:
    """The packs that went, and the names of the devices that lost one."""

    devices: list[str]
    table_digests: list[str]
    nodes: list[int]


@dataclasses.dataclass(slots=True)
class _Pack:
    """One table. `failed` are frames that are not asked for again; `error` is why the whole is given up.
    `asked` are frames that a reader has asked for, the last new one at `used_at` (monotonic seconds);
    `coming` is how many are being streamed."""

    device: wire.Device
    layer: LazyLayer
    spec: LayerSpec
    worth: bootstream.Worth
    extents: Mapping[str, list[Extent]]
    first_pages: Mapping[int, Sequence[bootstream.FirstPage]]
    owners: set[str]
    failed: set[int]
    asked: set[int]
    used_at: float
    coming: int = 0
    error: str | None = None


class Packs:
    """See the module. `patience_seconds`: how long a reader waits for a frame before it goes for blocks."""

    def __init__(self, cache: BlockCache, fetcher: Fetcher, patience_seconds: float) -> None:
        self._cache = cache
        self._fetcher = fetcher
        self._patience_seconds = patience_seconds
        self._lock = threading.Lock()
        self._nodes = itertools.count(wire.FIRST_PACK_NODE)
        self._by_digest: dict[str, _Pack] = {}
        self._by_node: dict[int, _Pack] = {}

    # -- control -----------------------------------------------------------------------------------

    def start(
        self,
        owner: str,
        spec: PackSpec,
        table: bootpack.Table,
        block_maps: Mapping[str, blockmap.BlockMap],
        origin: Origin,
    ) -> list[str]:
        """Stream a pack for an owner; `block_maps` are those of its layers, by map digest. Returns the names
        of the devices that got it. InvalidInputError and IntegrityError for a table that does not
        belong to them."""
        with self._lock:
            known = self._by_digest.get(spec.table_digest)
            if known is not None:
                known.owners.add(owner)
                return []
            bootpack.check_layers(table, block_maps)
            pack = self._made(spec, table, block_maps, origin)
            pack.owners.add(owner)
            self._fetcher.attach(pack.layer, self._patience_seconds)
            self._by_digest[spec.table_digest] = self._by_node[pack.device.node] = pack
        self._stream(pack)
        return _devices(pack)

    def stop(self, owner: str) -> Stopped:
        """Forget an owner; packs without owners go."""
        with self._lock:
            gone = []
            for pack in self._by_digest.values():
                pack.owners.discard(owner)
                if not pack.owners:
                    gone.append(pack)
            for pack in gone:
                del self._by_digest[pack.layer.map_digest], self._by_node[pack.device.node]
        for pack in gone:
            if pack.error is None:  # else it was detached then
                self._fetcher.detach(pack.layer.map_digest)
        return Stopped(
            devices=[name for pack in gone for name in _devices(pack)],
            table_digests=[pack.layer.map_digest for pack in gone],
            nodes=[pack.device.node for pack in gone],
        )

    def layer(self, table_digest: str) -> LazyLayer | None:
        """The pack as the layer that peers ask for, its frames being the blocks; None if it is not here."""
        pack = self._by_digest.get(table_digest)
        return None if pack is None or pack.error is not None else pack.layer

    def layer_spec(self, table_digest: str) -> LayerSpec | None:
        """What a peer is told of it, which may have to fetch for us."""
        pack = self._by_digest.get(table_digest)
        return None if pack is None else pack.spec

    def digests(self) -> set[bytes]:
        """Of all frames of all packs: the cache lets go of them last."""
        packs = list(self._by_digest.values())
        return {block.digest for pack in packs for block in pack.layer.block_map.blocks}

    def quiet_seconds(self, owner: str) -> float:
        """How long a start has made no use of the owner's pack: since it came, or since a reader asked for a
        frame that none had asked for before. 0 while it comes; infinite without a pack."""
        now = time.monotonic()
        with self._lock:
            found = [pack for pack in self._by_digest.values() if owner in pack.owners]
            return min((0.0 if pack.coming else now - pack.used_at for pack in found), default=float("inf"))

    def status(self) -> list[dict[str, Any]]:
        """A JSON object for each pack."""
        return [
            {
                "table_digest": pack.layer.map_digest,
                "owners": sorted(pack.owners),
                "bytes": pack.layer.block_map.blob_bytes,
                "frames": len(pack.layer.block_map.blocks),
                "present_frames": sum(self._cache.present(b.digest) for b in pack.layer.block_map.blocks),
                "failed_frames": len(pack.failed),
                "error": pack.error,
            }
            for pack in list(self._by_digest.values())
        ]

    # -- workers -----------------------------------------------------------------------------------

    def of_device(self, map_digest: str, table_digest: str | None) -> tuple[wire.Device, bytes] | None:
        """The pack that a device shows, for a worker, and the layer's extents in it (packlayout.py); None if
        it has no page of it."""
        pack = self._by_digest.get(table_digest or "")
        if pack is None or pack.error is not None or map_digest not in pack.extents:
            return None
        return pack.device, packlayout.encode(pack.extents[map_digest])

    def frame(self, node: int, index: int, done: FrameDone) -> None:
        """One frame for a reader that waits; an error means that blocks are the way."""
        pack = self._by_node.get(node)
        if pack is None or index >= len(pack.layer.block_map.blocks):
            done(errors.NotFoundError(f"no boot pack with node id {node}, or no frame {index} in it"))
            return
        self._note_use(pack, index)
        digest = pack.layer.block_map.blocks[index].digest
        if not self._cache.present(digest) and (
            index in pack.failed or not pack.worth.fetching(index, self._cache.present)
        ):
            done(errors.NotFoundError(f"boot pack {pack.layer.map_digest}: frame {index} is not fetched"))
            return

        def arrived(result: int | Exception) -> None:
            result = superblocks.checked_frame(result, pack.first_pages.get(index, ()))
            if isinstance(result, Exception):
                self._note_failure(pack, index, result)
            done(result)

        self._fetcher.request(
            pack.layer.map_digest,
            index,
            Priority.DEMAND,
            arrived,
        )

    # -- inside ------------------------------------------------------------------------------------

    def _made(
        self,
        spec: PackSpec,
        table: bootpack.Table,
        block_maps: Mapping[str, blockmap.BlockMap],
        origin: Origin,
    ) -> _Pack:
        value = bootstream.block_map(table)
        return _Pack(
            device=_device(next(self._nodes), value),
            layer=LazyLayer(spec.table_digest, table.data_digest, value, origin),
            spec=_layer_spec(spec),
            worth=bootstream.Worth(table, block_maps),
            extents={
                map_digest: [Extent(record.first_page, record.pages, at) for record, at in records]
                for map_digest, records in bootstream.records_by_layer(table).items()
                if records
            },
            first_pages=bootstream.first_pages(table, block_maps),
            owners=set(),
            failed=set(),
            asked=set(),
            used_at=time.monotonic(),
        )

    def _stream(self, pack: _Pack) -> None:
        wanted = [
            index
            for index, block in enumerate(pack.layer.block_map.blocks)
            if not self._cache.present(block.digest) and pack.worth.fetching(index, self._cache.present)
        ]
        with self._lock:
            pack.coming += len(wanted)
        for index in wanted:
            self._fetcher.request(pack.layer.map_digest, index, Priority.BOOT, self._arrived(pack, index))

    def _note_use(self, pack: _Pack, index: int) -> None:
        if index not in pack.asked:
            with self._lock:
                pack.asked.add(index)
                pack.used_at = time.monotonic()

    def _arrived(self, pack: _Pack, index: int) -> Callable[[int | Exception], None]:
        def done(result: int | Exception) -> None:
            with self._lock:
                pack.coming -= 1
                pack.used_at = time.monotonic()
            if isinstance(result, int):
                os.close(result)
            else:
                self._note_failure(pack, index, result)

        return done

    def _note_failure(self, pack: _Pack, index: int, error: Exception) -> None:
        if pack.error is not None or not pack.owners:
            return  # said already, or detached
        if not pack.failed:
            text = "boot pack %s: frame %d: %s; its pages come by blocks"
            _log.warning(text, pack.layer.map_digest, index, error)
        pack.failed.add(index)
        if isinstance(error, errors.NotFoundError | errors.DeniedError):
            # Else every frame of hundreds would be asked for, to hear the same.
            pack.error = str(error)
            pack.failed.update(range(len(pack.layer.block_map.blocks)))
            self._fetcher.detach(pack.layer.map_digest)


def _layer_spec(spec: PackSpec) -> LayerSpec:
    return LayerSpec(spec.origin_ref, spec.table_digest, spec.table_size, spec.data_digest, spec.data_size)


def _devices(pack: _Pack) -> list[str]:
    """The names of the devices that show pages of it."""
    return [device_name(map_digest, pack.layer.map_digest) for map_digest in pack.extents]


def _device(node: int, frames: blockmap.BlockMap) -> wire.Device:
    return wire.Device(node, frames.image_bytes, frames.block_bytes, frames.frame_bytes, b"boot pack")
