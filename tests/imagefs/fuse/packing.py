"""Boot packs for the tests of the device server: made here, so that what is served does not depend on how
the converter makes them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import zstandard

from imagefs import bootpack
from imagefs.fuse import control
from tests.imagefs.fuse import stack


@dataclasses.dataclass(frozen=True, slots=True)
class Pack:
    """A table with its data blob."""

    table: bootpack.Table
    data: bytes

    @property
    def table_bytes(self) -> bytes:
        return bootpack.encode(self.table)

    @property
    def digest(self) -> str:
        return stack.digest(self.table_bytes)

    def spec(self, origin_ref: str, *, with_table: bool = True) -> control.PackSpec:
        return control.PackSpec(
            origin_ref=origin_ref,
            table_digest=self.digest,
            table_size=len(self.table_bytes),
            data_digest=self.table.data_digest,
            data_size=len(self.data),
            table_bytes=self.table_bytes if with_table else None,
        )


def make(
    layers: Sequence[stack.Layer], records: Sequence[tuple[int, int, int]], frame_bytes: int = 65536
) -> Pack:
    """A pack of (layer, first page, pages)."""
    made = [bootpack.Record(*record) for record in records]
    data = bytearray()
    frames = []
    page = 0
    for pieces in bootpack.plan_frames(made, frame_bytes):
        content = b"".join(_pages(layers[piece.layer], piece) for piece in pieces)
        frame = zstandard.ZstdCompressor(level=1).compress(content)
        digest = hashlib.sha256(content).digest()
        frames.append(bootpack.Frame(len(data), len(frame), len(content), digest, page))
        data += frame
        page += len(content) // bootpack.PAGE_BYTES
    digests = tuple(layer.map_digest for layer in layers)
    table = bootpack.Table(
        digests, tuple(made), tuple(frames), stack.digest(bytes(data)), len(data), page, 32
    )
    return Pack(bootpack.decode(bootpack.encode(table)), bytes(data))


def _pages(layer: stack.Layer, record: bootpack.Record) -> bytes:
    start = record.first_page * bootpack.PAGE_BYTES
    return layer.image[start : start + record.pages * bootpack.PAGE_BYTES]


def add(blobs: stack.BlobServer, pack: Pack) -> control.PackSpec:
    blobs.blobs[stack.digest(pack.data)] = pack.data
    blobs.blobs[pack.digest] = pack.table_bytes
    return pack.spec(blobs.ref())
