"""Block maps of attached layers and tables of attached boot packs: STATE/maps/, one file by digest.

A client that has one puts it there before it attaches; what it does not bring is read from the origin. Kept
for a successor while the layer is attached. Whatever is read is verified each time. Used by Layers, from its
control threads.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from imagefs import blockmap, bootpack, bootstream, errors, frames
from imagefs.fuse.devices import LayerSpec, PackSpec, write_atomically
from imagefs.origin import Origin


class KeptMaps:
    """See the module. Digests are `sha256:` strings."""

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir / "maps"

    def read(self, spec: LayerSpec, origin: Origin) -> tuple[blockmap.BlockMap, bytes]:
        """A layer's map, and its bytes, from here or from the origin. IntegrityError; what the origin
        raises."""
        path = self._path(spec.map_digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            data = origin.read_blob(spec.map_digest, min(spec.map_size, blockmap.MAX_MAP_BYTES))
        if "sha256:" + hashlib.sha256(data).hexdigest() != spec.map_digest:
            path.unlink(missing_ok=True)
            raise errors.IntegrityError(f"{path}: the block map's bytes are not {spec.map_digest}")
        # A peer that starts an image with a boot pack names its table: to us the frames are blocks.
        is_table = data.startswith(bootpack.MAGIC)
        block_map = bootstream.block_map(bootpack.decode(data)) if is_table else blockmap.decode(data)
        frames.check_sizes(block_map, spec.map_digest)
        check_blob(spec, block_map)
        return block_map, data

    def read_table(self, spec: PackSpec, origin: Origin) -> bootpack.Table:
        """As `read`, of a boot pack's table, which is then kept."""
        path = self._path(spec.table_digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            data = origin.read_blob(spec.table_digest, min(spec.table_size, bootpack.MAX_TABLE_BYTES))
            write_atomically(path, data)
        if "sha256:" + hashlib.sha256(data).hexdigest() != spec.table_digest:
            path.unlink(missing_ok=True)
            raise errors.IntegrityError(f"{path}: the table's bytes are not {spec.table_digest}")
        table = bootpack.decode(data)
        if table.data_digest != spec.data_digest:
            raise errors.IntegrityError(
                f"boot pack table {spec.table_digest} is of data {table.data_digest}, not {spec.data_digest}"
            )
        return table

    def keep(self, map_digest: str, data: bytes) -> None:
        """Have a map's bytes here, which were verified. ConfigurationError where the disk refuses."""
        path = self._path(map_digest)
        try:
            if not path.exists():
                write_atomically(path, data)
        except OSError as exc:
            raise errors.ConfigurationError(f"cannot write {path}: {exc.strerror}") from exc

    def remove(self, digest: str) -> None:
        """Forget one, if it is here."""
        self._path(digest).unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget all, but for what a client is writing for an attach to come."""
        for path in self._folder.iterdir():
            if not path.name.startswith("."):
                path.unlink(missing_ok=True)

    def _path(self, digest: str) -> Path:
        return self._folder / digest.partition(":")[2]


def check_blob(spec: LayerSpec, block_map: blockmap.BlockMap) -> None:
    """Raise IntegrityError unless the map is of the blob that the client named."""
    if "sha256:" + block_map.blob_digest.hex() != spec.blob_digest:
        raise errors.IntegrityError(
            f"block map {spec.map_digest} is of blob sha256:{block_map.blob_digest.hex()}, "
            f"not of {spec.blob_digest}"
        )
