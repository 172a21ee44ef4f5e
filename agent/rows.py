"""What the agent's database holds, as values: snapshots, block images, their layers and boot packs.

Made by store.py of rows (schema.py has the tables), read by whoever decides about them. No I/O.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence

from agent import snapshots
from agent.database import CorruptStoreError
from agent.snapshots import Kind, Usage
from imagefs.fuse.devices import device_name


@dataclasses.dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer of a block image. `mount_number`: its mount point below root/layers, the same for every
    image with the same device of it (`ImageRow.device`); given by `Store.put_image` (what is passed in there
    does not matter)."""

    chain_id: str
    diff_id: str
    map_digest: str
    map_size: int
    blob_digest: str
    blob_size: int
    mount_number: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class BootPackRow:
    """Where the boot pack of a block image is, in the image's origin."""

    table_digest: str
    table_size: int
    data_digest: str
    data_size: int


@dataclasses.dataclass(frozen=True, slots=True)
class ImageRow:
    """A block image that is in use, wanted or prefetched. `block_digest` (of its manifest) is the key,
    `source_digest` the ordinary image's manifest, `reference` what was asked for, `origin_ref` the REF where
    the layer blobs lie; layers bottom first."""

    block_digest: str
    source_digest: str
    reference: str
    origin_ref: str
    layers: tuple[LayerRow, ...]
    created_ns: int
    pinned: bool = False
    prefetched: bool = False
    boot_pack: BootPackRow | None = None

    def device(self, layer: LayerRow) -> str:
        """The name of the device of one of its layers: the layer as this image's boot pack shows it."""
        return device_name(layer.map_digest, self.boot_pack.table_digest if self.boot_pack else None)


@dataclasses.dataclass(frozen=True, slots=True)
class SnapshotRow:
    """A snapshot. `parent` is the name of `parent_id`, empty for none. `image` and `layer` (its index, bottom
    first) are set for a lazy one, `usage` once it is known, `broken` says why it is quarantined."""

    id: int
    name: str
    kind: Kind
    parent_id: int | None
    parent: str
    labels: Mapping[str, str]
    created_ns: int
    updated_ns: int
    usage: Usage | None = None
    image: str | None = None
    layer: int | None = None
    broken: str | None = None

    @property
    def info(self) -> snapshots.Info:
        """What containerd is told of it."""
        return snapshots.Info(
            self.name, self.parent, self.kind, self.labels, self.created_ns, self.updated_ns
        )


def snapshot(row: Sequence[object]) -> SnapshotRow:
    """A row of the view `snapshot_rows`. CorruptStoreError."""
    number, name, kind, parent_id, parent, labels, created, updated, inodes, size, image, layer, broken = row
    try:
        decoded = json.loads(labels)  # type: ignore[arg-type]
    except (ValueError, TypeError) as exc:
        raise CorruptStoreError(f"snapshot {name!r}: its labels are not JSON: {exc}") from exc
    usage = Usage(inodes, size) if isinstance(inodes, int) and isinstance(size, int) else None
    return SnapshotRow(  # the columns' types are the schema's
        number,  # type: ignore[arg-type]
        name,  # type: ignore[arg-type]
        Kind(kind),  # type: ignore[arg-type]
        parent_id,  # type: ignore[arg-type]
        parent,  # type: ignore[arg-type]
        decoded,
        created,  # type: ignore[arg-type]
        updated,  # type: ignore[arg-type]
        usage,
        image,  # type: ignore[arg-type]
        layer,  # type: ignore[arg-type]
        broken,  # type: ignore[arg-type]
    )


def encoded(labels: Mapping[str, str]) -> str:
    """Labels as a row has them."""
    return json.dumps(dict(labels), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
