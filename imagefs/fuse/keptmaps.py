"""The block maps and tables of what is attached: from the device server's folder, or from their origins.

A client that has one puts it into STATE/maps before it attaches; what it does not bring is read from the
origin. Kept for a successor while the layer is attached. Used by Layers, from its control
threads.
"""

from __future__ import annotations

from pathlib import Path

from imagefs import blockmap, bootpack, bootstream, errors, frames
from imagefs.fuse.devices import LayerSpec, PackSpec
from imagefs.fuse.mapfiles import MapFiles
from imagefs.origin import Origin


class KeptMaps:
    """See the module. Digests are `sha256:` strings; whatever is read is verified against them."""

    def __init__(self, state_dir: Path) -> None:
        self.files = MapFiles(state_dir / "maps")

    def read(self, spec: LayerSpec, origin: Origin) -> tuple[blockmap.BlockMap, bytes]:
        """A layer's map, and its bytes. IntegrityError; what the origin raises."""
        data = self._bytes(spec.map_digest, min(spec.map_size, blockmap.MAX_MAP_BYTES), origin)
        # A peer that starts an image with a boot pack names its table: to us the frames are blocks.
        is_table = data.startswith(bootpack.MAGIC)
        block_map = bootstream.block_map(bootpack.decode(data)) if is_table else blockmap.decode(data)
        frames.check_sizes(block_map, spec.map_digest)
        check_blob(spec, block_map)
        return block_map, data

    def read_table(self, spec: PackSpec, origin: Origin) -> bootpack.Table:
        """As `read`, of a boot pack's table, which is then kept."""
        data = self._bytes(spec.table_digest, min(spec.table_size, bootpack.MAX_TABLE_BYTES), origin)
        self.files.keep(spec.table_digest, data)
        table = bootpack.decode(data)
        if table.data_digest != spec.data_digest:
            raise errors.IntegrityError(
                f"boot pack table {spec.table_digest} is of data {table.data_digest}, not {spec.data_digest}"
            )
        return table

    def _bytes(self, digest: str, most_bytes: int, origin: Origin) -> bytes:
        data = self.files.read_or_refuse(digest)
        return origin.read_blob(digest, most_bytes) if data is None else data


def check_blob(spec: LayerSpec, block_map: blockmap.BlockMap) -> None:
    """Raise IntegrityError unless the map is of the blob that the client named."""
    if "sha256:" + block_map.blob_digest.hex() != spec.blob_digest:
        raise errors.IntegrityError(
            f"block map {spec.map_digest} is of blob sha256:{block_map.blob_digest.hex()}, "
            f"not of {spec.blob_digest}"
        )
