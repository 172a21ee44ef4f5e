"""The layers that the device server serves: table, block maps, origins, cache and fetcher as one thing. What
of them is on this machine, and stays there, is `local`'s.

Owned by the server process. `by_name`, `by_node`, `listing` and `block` are called by its worker threads
and do no I/O but the cache's; `attach` and `detach` by its control threads. A layer whose origin or map is
missing never stands in the way of the others.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from imagefs import blockmap, errors, eviction, peers, plan, reference
from imagefs.arrival import Part
from imagefs.cache import BlockCache
from imagefs.fetcher import Fetcher, FetchSettings, Priority
from imagefs.fuse import control, controlmessage, keptmaps, peering, statedirectory, superblocks, wire
from imagefs.fuse.devices import (
    DeviceTable,
    PackSpec,
    Record,
    Source,
    decode_pack,
    decode_spec,
)
from imagefs.fuse.fill import Filler
from imagefs.fuse.layerwriter import LayerWriter
from imagefs.fuse.localblocks import LocalBlocks
from imagefs.fuse.packs import Packs
from imagefs.fuse.startreadahead import StartReadAhead
from imagefs.lazylayer import LazyLayer
from imagefs.origin import Origin, connect
from imagefs.peersettings import PeerSettings

SAME_READ_SECONDS = 1.0
"""A read of several pages that failed is asked again by the kernel, page by page: within this time that is
the same read, and it must not wait for another deadline."""
_TAKE_UP_SECONDS = 10.0
"""How long eviction waits, at the start, to be told what is in use: an origin may be asked for a map."""
_FRAME_SHARE = 0.25
"""Of a read's deadline: how much later an error may come because a frame was waited for first."""

BlockDone = Callable[[int | Part | Exception | None], None]
"""Called once, from any thread: with a descriptor (the callee's to close), or one of a part, None for zeros,
or the error."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Served:
    device: wire.Device
    layer: LazyLayer
    record: Record


class Layers:
    """See the module."""

    def __init__(
        self, settings: control.ServerSettings, table: DeviceTable, is_recorded: Callable[[str], bool]
    ) -> None:
        """`is_recorded`: whether reads of an owner's devices are being recorded."""
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="glowplug server: %(message)s")
        self._settings = settings
        self._table = table
        self._maps = keptmaps.KeptMaps(settings.state_dir)
        self._taken_up = threading.Event()
        self._cache = BlockCache(
            settings.cache_dir, settings.cache_quota_bytes, settings.free_floor_bytes, self._blocks_in_use
        )
        self._files = LayerWriter(
            self._cache,
            settings.cache_dir,
            self._attached,
            self._quiet_seconds,
            enabled=settings.layer_files,
        )
        patience_seconds = min(peers.LONGEST_WAIT_SECONDS, settings.read_deadline_seconds / 2)
        self._peers = peers.Peers(
            self._cache, self._peer_target, peers.Policy(longest_wait_seconds=patience_seconds)
        )
        self._fetcher = Fetcher(
            self._cache,
            FetchSettings(
                read_deadline_seconds=settings.read_deadline_seconds,
                policy=plan.Policy(connections_per_origin=settings.connections),
            ),
            self._peers,
            self._files,
        )
        self._lock = threading.Lock()
        self._closed = False
        self._ended = False
        self._by_node: dict[int, _Served] = {}
        self._by_name: dict[bytes, _Served] = {}
        self._by_digest: dict[str, _Served] = {}
        """One of the devices of each layer: for what is checked against the block map, any will do."""
        self._origins: dict[str, Origin] = {}
        self._failed: dict[tuple[str, int], float] = {}
        self._last_errors: dict[str, tuple[float, str]] = {}
        self._packs = Packs(self._cache, self._fetcher, settings.read_deadline_seconds * _FRAME_SHARE)
        for record in table.records():
            try:
                origin = self._origin(next(iter(record.owners.values())))
                block_map, data = self._maps.read(record.spec, origin)
                self._serve(record, block_map)
                self._maps.files.keep(record.spec.map_digest, data)
            except errors.ImagefsError as exc:
                _log(f"layer {record.spec.map_digest} cannot be taken up again: {exc}")
        for owner, pack in table.packs().items():
            self._start_pack(owner, pack.spec, pack.origins)
        self._starts = StartReadAhead(
            settings.state_dir / "starts.json",
            table.token,
            statedirectory.device_directory(settings.state_dir),
            lambda owner: 0.0 if is_recorded(owner) else self._packs.quiet_seconds(owner),
        )
        self._taken_up.set()
        filler = Filler(self._cache, self._fetcher, self._layers_of, settings.state_dir)
        self.local = LocalBlocks(
            self._cache,
            self._files,
            filler,
            self._chosen,
            self._quiet_seconds,
            eviction.most_copied_bytes(settings.cache_quota_bytes),
        )

    # -- look-ups, by worker threads ---------------------------------------------------------------

    def pack_of(self, device: wire.Device) -> tuple[wire.Device, bytes] | None:
        """The boot pack that has pages of a device, and where (packlayout.py)."""
        served = self._by_node.get(device.node)
        if served is None:
            return None
        return self._packs.of_device(served.layer.map_digest, served.record.table_digest)

    def by_name(self, name: bytes) -> wire.Device:
        """Raises NotFoundError."""
        served = self._by_name.get(name)
        if served is None:
            raise errors.NotFoundError(f"no device {name!r}")
        return served.device

    def by_node(self, node: int) -> wire.Device:
        """Raises NotFoundError."""
        served = self._by_node.get(node)
        if served is None:
            raise errors.NotFoundError(f"no device with node id {node}")
        return served.device

    def listing(self, after: int, count: int) -> list[wire.Device]:
        """The devices with node ids above `after`, ascending, at most `count`."""
        nodes = sorted(node for node in list(self._by_node) if node > after)
        found = (self._by_node.get(node) for node in nodes[:count])
        return [served.device for served in found if served is not None]

    def nodes(self, owner: str) -> dict[int, str]:
        """Node id -> map digest of an owner's devices. NotFoundError if it has none."""
        found = {r.node: r.spec.map_digest for r in self._table.records() if owner in r.owners}
        if not found:
            raise errors.NotFoundError(f"no layer is attached for {owner}")
        return found

    def block(self, node: int, index: int, frames: int, done: BlockDone) -> None:
        """One block of a device, sooner if `frames` of it will do, or a frame of a pack, for a reader."""
        if node >= wire.FIRST_PACK_NODE:
            self._packs.frame(node, index, done)
            return
        served = self._by_node.get(node)
        if served is None:
            done(errors.NotFoundError(f"no device with node id {node}"))
            return
        layer = served.layer
        if index >= len(layer.block_map.blocks):
            done(errors.InvalidInputError(f"layer {layer.map_digest} has no block {index}"))
            return
        if layer.block_map.blocks[index].zero:
            done(None)
            return
        key = (layer.map_digest, index)
        failed_at = self._failed.get(key)
        if failed_at is not None and time.monotonic() - failed_at < SAME_READ_SECONDS:
            done(errors.UnavailableError(f"layer {key[0]}: block {index} has just failed"))
            return

        def arrived(result: int | Part | Exception) -> None:
            if index == 0 and served.record.table_digest is not None:
                result = superblocks.checked_block(result, layer.block_map)
            if isinstance(result, Exception) and not self._ended:
                self._note_failure(key, result)
            done(result)

        self._fetcher.request_frames(layer.map_digest, index, frames, arrived)

    def _note_failure(self, key: tuple[str, int], error: Exception) -> None:
        now = time.monotonic()
        if len(self._failed) > 1024:
            recent = {k: at for k, at in list(self._failed.items()) if now - at < SAME_READ_SECONDS}
            self._failed = recent
        self._failed[key] = now
        self._last_errors[key[0]] = (now, str(error))
        _log(f"read failed: {error}")

    # -- control -----------------------------------------------------------------------------------

    def attach(self, request: Mapping[str, Any]) -> list[int]:
        """Make layers into devices (`layers`, `origins`, `owner`, `pack`). All of them, or none. Returns the
        nodes that got a boot pack."""
        listed = request.get("layers")
        if not isinstance(listed, list):
            raise errors.InvalidInputError("control: attach without layers")
        specs = [decode_spec(value) for value in listed]
        pack = decode_pack(request["pack"]) if request.get("pack") is not None else None
        origins = connect.Options.from_json(request.get("origins") or {}).to_json()
        owner = controlmessage.string(request, "owner")
        maps: dict[str, blockmap.BlockMap] = {}
        encoded: dict[str, bytes] = {}
        for spec in specs:
            if spec.map_digest not in maps:
                # Outside the lock: it may ask the origin for the map.
                origin = self._origin(Source(spec.origin_ref, origins))
                maps[spec.map_digest], encoded[spec.map_digest] = self._maps.read(spec, origin)
            keptmaps.check_blob(spec, maps[spec.map_digest])
        with self._lock:
            if self._closed:
                raise controlmessage.StoppingError("the device server is stopping")
            for map_digest, data in encoded.items():
                # Under the lock: until then another owner's detach may remove it.
                self._maps.files.keep(map_digest, data)
            for record in self._table.attach(specs, origins, owner, pack):
                self._serve(record, maps[record.spec.map_digest], owner)
        return self._start_pack(owner, pack, origins) if pack is not None else []

    def detach(self, owner: str) -> tuple[list[int], list[int]]:
        """Remove an owner. Returns the nodes that lost a boot pack, and those that are gone, packs' as well;
        their pending reads have failed."""
        gone = []
        with self._lock:
            stopped = self._packs.stop(owner)
            changed = self._nodes_of(stopped.devices)
            for table_digest in stopped.table_digests:
                self._maps.files.remove(table_digest)
            lost = self._table.detach(owner)
            left = self._table.records()
            for record in lost:
                if record.node in self._by_node:
                    self._fetcher.detach(record.spec.map_digest)
                if not record.owners:
                    gone.append(record.node)
                    self._by_node.pop(record.node, None)
                    self._by_name.pop(record.name.encode(), None)
            for map_digest in {record.spec.map_digest for record in lost}:
                self._keep_for(map_digest, [each for each in left if each.spec.map_digest == map_digest])
            self._close_unused_origins()
            if not self._table.records():
                self._forget_all()
        self._starts.forget(owner)
        self.local.stop_fill(owner)
        return changed, gone + stopped.nodes

    def _keep_for(self, map_digest: str, records: Sequence[Record]) -> None:
        """These are the devices of a layer that are left: its origins are theirs, and without one it goes."""
        served = [self._by_node[each.node] for each in records if each.node in self._by_node]
        sources = [source for each in records for source in each.owners.values()]
        left = [self._origins.get(_key(source)) for source in sources]
        self._fetcher.replace_origins(map_digest, [each for each in left if each])
        if served:
            self._by_digest[map_digest] = served[0]
        else:
            self._by_digest.pop(map_digest, None)
        if not sources:
            self._last_errors.pop(map_digest, None)
            self._maps.files.remove(map_digest)

    def _forget_all(self) -> None:
        """With the last device gone: maps that failed attaches left behind."""
        self._maps.files.clear()
        self._last_errors.clear()

    def _close_unused_origins(self) -> None:
        """A node that always runs something would else keep connections to every place it ever read from."""
        used = {_key(source) for record in self._table.records() for source in record.owners.values()}
        used |= {_key(Source(pack.spec.origin_ref, pack.origins)) for pack in self._table.packs().values()}
        for key in [key for key in list(self._origins) if key not in used]:
            self._origins.pop(key).close()

    def started(self, owner: str, backing_devices: Sequence[str]) -> None:
        """An owner's layers were mounted: what backs the mounts reads ahead more once its start is over.
        NotFoundError if it has none attached."""
        self._required_layers(owner)
        self._starts.started(owner, backing_devices)

    def hold(self, owner: str) -> None:
        """Stay, also without a device, until `owner` is detached."""
        with self._lock:
            if self._closed:
                raise controlmessage.StoppingError("the device server is stopping")
            self._table.hold(owner)

    def close_if_idle(self) -> bool:
        """Refuse further attaches, if there is no device and no hold."""
        with self._lock:
            self._closed = self._closed or not (self._table.records() or self._table.holds())
            return self._closed

    def close(self) -> None:
        """Stop fetching, and let the cache write what it still holds."""
        self._ended = True  # whoever still waits is answered by our successor, or went before us
        self.local.close()
        self._starts.close()
        self._fetcher.close()
        self._files.close()
        self._cache.close()

    def status(self) -> dict[str, Any]:
        """A JSON object: devices, cache, fetch counters."""
        return {
            "devices": [
                {
                    "name": record.name,
                    "map_digest": record.spec.map_digest,
                    "table_digest": record.table_digest,
                    "blob_digest": record.spec.blob_digest,
                    "blob_bytes": record.spec.blob_size,
                    "image_bytes": served.device.size if (served := self._by_node.get(record.node)) else None,
                    "origins": sorted({source.origin_ref for source in record.owners.values()}),
                    "owners": sorted(record.owners),
                    "has_file": self._files.digest(record.spec.map_digest) is not None,
                    "last_error": self._last_error(record.spec.map_digest),
                }
                for record in self._table.records()
            ],
            "holds": sorted(self._table.holds()),
            "cache": {
                "directory": str(self._settings.cache_dir),
                **dataclasses.asdict(self._cache.stats()),
            },
            "fetch": dataclasses.asdict(self._fetcher.stats()),
            "peers": self._peers.status(),
            "boot_packs": self._packs.status(),
            "starting": self._starts.owners(),
            "fill": self.local.fills(),
        }

    def _last_error(self, map_digest: str) -> dict[str, Any] | None:
        at, message = self._last_errors.get(map_digest, (0.0, ""))
        return {"seconds_ago": round(time.monotonic() - at, 1), "message": message} if message else None

    def events(self, after: int) -> list[dict[str, Any]]:
        """The fetcher's events above that number, as JSON objects; priorities by name."""
        return [
            {**dataclasses.asdict(event), "priority": event.priority.name.lower()}
            for event in self._fetcher.events(after)
        ]

    # -- what is attached --------------------------------------------------------------------------

    def _blocks_in_use(self) -> set[bytes]:
        self._taken_up.wait(_TAKE_UP_SECONDS)
        used = self._packs.digests()
        for layer in self._attached():
            file = self._files.digest(layer.map_digest)
            used |= {block.digest for block in layer.block_map.blocks} if file is None else {file}
        return used

    def _attached(self) -> list[LazyLayer]:
        return [served.layer for served in list(self._by_digest.values())]

    def _quiet_seconds(self, map_digest: str) -> float:
        return self._fetcher.quiet_seconds(map_digest)

    def _chosen(self, owner: str | None) -> list[LazyLayer]:
        """An owner's layers, or all. NotFoundError if it has none."""
        return self._attached() if owner is None else self._required_layers(owner)

    def _layers_of(self, owner: str) -> list[LazyLayer]:
        served = [self._by_node.get(row.node) for row in self._table.records() if owner in row.owners]
        return [each.layer for each in served if each is not None]

    def _required_layers(self, owner: str) -> list[LazyLayer]:
        layers = self._layers_of(owner)
        if not layers:
            raise errors.NotFoundError(f"no layer is attached for {owner}")
        return layers

    # -- peers -------------------------------------------------------------------------------------

    def set_peers(self, document: object) -> None:
        """Who shares blocks with us (PeerSettings as JSON), or null for nobody."""
        if document is not None and not isinstance(document, dict):
            raise errors.InvalidInputError("control: peers: not an object")
        self._peers.configure(PeerSettings.from_json(document) if document is not None else None)

    def peer_block(self, map_digest: str, index: int, priority: Priority, done: peering.Done) -> None:
        """One block, or frame of a boot pack, for another node; NotFoundError where the layer is not
        attached."""
        served = self._by_digest.get(map_digest)
        layer = served.layer if served is not None else self._packs.layer(map_digest)
        if layer is None or not 0 <= index < len(layer.block_map.blocks):
            done(
                errors.NotFoundError(f"layer {map_digest}: block {index}: not attached, or no such block"), 0
            )
            return
        length = layer.block_map.block_length(index)

        def arrived(result: int | Exception) -> None:
            if isinstance(result, int):
                self._fetcher.count(served_blocks=1, served_bytes=length)
            done(result, length)

        self._fetcher.request(map_digest, index, priority, arrived, from_peer=True)

    def _peer_target(self, map_digest: str, index: int, priority: Priority) -> str | None:
        served = self._by_digest.get(map_digest)
        spec = served.record.spec if served is not None else self._packs.layer_spec(map_digest)
        return peering.encode_target(spec, index, priority) if spec is not None else None

    # -- layers ------------------------------------------------------------------------------------

    def _serve(self, record: Record, block_map: blockmap.BlockMap, owner: str | None = None) -> None:
        """Take up a row of the table: for one owner that was added, or for all of them after a restart."""
        spec = record.spec
        for source in [record.owners[owner]] if owner else record.owners.values():
            layer = LazyLayer(spec.map_digest, spec.blob_digest, block_map, self._origin(source))
            self._fetcher.attach(layer)
        name = record.name.encode()
        device = wire.Device(
            record.node, block_map.image_bytes, block_map.block_bytes, block_map.frame_bytes, name
        )
        for key in [key for key in self._failed if key[0] == spec.map_digest]:
            self._failed.pop(key, None)
        served = _Served(device, layer, record)
        self._by_node[record.node] = self._by_name[name] = self._by_digest[spec.map_digest] = served

    def _start_pack(self, owner: str, spec: PackSpec, origins: Mapping[str, Any]) -> list[int]:
        """Stream an owner's boot pack. The nodes that got it: none, if it cannot be used, because a start
        without one is slower and no worse."""
        try:
            origin = self._origin(Source(spec.origin_ref, origins))
            table = self._maps.read_table(spec, origin)
            block_maps = {layer.map_digest: layer.block_map for layer in self._layers_of(owner)}
            started = self._packs.start(owner, spec, table, block_maps, origin)
        except (errors.ImagefsError, OSError) as exc:
            _log(f"{owner}: its boot pack is not used: {exc}")
            return []
        return self._nodes_of(started)

    def _nodes_of(self, names: Iterable[str]) -> list[int]:
        served = (self._by_name.get(name.encode()) for name in names)
        return [each.device.node for each in served if each is not None]

    def _origin(self, source: Source) -> Origin:
        key = _key(source)
        origin = self._origins.get(key)
        if origin is None:
            options = connect.Options.from_json(source.origins)
            origin = connect.connect(reference.parse(source.origin_ref), options)
            origin = self._origins.setdefault(key, origin)
        return origin


def _key(source: Source) -> str:
    return json.dumps([source.origin_ref, source.origins], sort_keys=True)


def _log(message: str) -> None:
    logging.getLogger(__name__).warning("%s", message)
