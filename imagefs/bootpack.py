"""The boot pack's table: which pages of which layer images a start reads, and where the pack has them.

Pure: bytes in, values out. Written by converter/pack.py, read by whatever serves a start. The byte table is
docs/format.md; `decode(encode(t)) == t` and `encode(decode(b)) == b` hold for every accepted input.

A pack is two blobs: this table, and the data, which is frames alone, one after another from byte 0 without
gaps. The *page sequence* is the pages of all records, in order; the frames hold it in order, too, so that a
record may straddle frames. A page is 4096 bytes of a layer image.

Invariants of a decoded table: all frames but the last have content of one size, the last of at most that; no
page occurs twice; no record, frame or layer image is empty or named twice; records, frames and `pages` count
the same pages; the frames' compressed bytes add up to `data_bytes`, and none claims more than zstd can make
of its content. What only the block maps know, `check_layers` checks.

A pack is good for mounts that read ahead as much as those that were traced: more would ask for pages that are
not in it. So the table says how much; one of version 1 is for 128 KiB, and what is for 128 KiB is version 1.
"""

from __future__ import annotations

import dataclasses
import itertools
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence

from imagefs import blockmap, errors, zstdframe

MAGIC = b"GLOWPACK"
VERSION = 2
_FIRST_VERSION = 1
FIRST_READ_AHEAD_KIB = 128
"""Of the traces and packs of version 1, which do not say it."""
MIN_READ_AHEAD_KIB = 4
MAX_READ_AHEAD_KIB = 32 * 1024
PAGE_BYTES = 4096
DEFAULT_FRAME_BYTES = 1024 * 1024
MIN_FRAME_BYTES = 64 * 1024
MAX_FRAME_BYTES = 4 * 1024 * 1024
"""A node holds a frame in memory, compressed and uncompressed, for each connection that brings one."""
MAX_LAYERS = 512
MAX_PAGES = 1 << 20
"""4 GiB: what is larger is no start, and a pack of it no gain over blocks."""
MAX_TABLE_BYTES = 16 * 1024 * 1024

_HEADER = struct.Struct("<8sHHHHIIQQ32s")
_RECORD = struct.Struct("<HHII")
_FRAME = struct.Struct("<II32s")
_DIGEST_BYTES = 32


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """`pages` pages of a layer image from `first_page`; `layer` counts in the table's `map_digests`."""

    layer: int
    first_page: int
    pages: int


@dataclasses.dataclass(frozen=True, slots=True)
class Frame:
    """One zstd frame of the data blob. `offset` is its place there, `first_page` that of its content in the
    page sequence, `digest` the sha256 of the content."""

    offset: int
    compressed_bytes: int
    uncompressed_bytes: int
    digest: bytes
    first_page: int


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """A decoded table. `map_digests` are the layer images of the block image, bottom first, each once;
    `data_digest` and `data_bytes` are those of the data blob; `pages` is the length of the page sequence;
    `read_ahead_kib` is the kernel's read-ahead that the pack is for."""

    map_digests: tuple[str, ...]
    records: tuple[Record, ...]
    frames: tuple[Frame, ...]
    data_digest: str
    data_bytes: int
    pages: int
    read_ahead_kib: int

    def pieces(self) -> Iterator[tuple[Record, ...]]:
        """For each frame, the pages that it holds: its content cut along them gives each its bytes."""
        return _cut(self.records, (frame.uncompressed_bytes // PAGE_BYTES for frame in self.frames))


def distinct(map_digests: Iterable[str]) -> tuple[str, ...]:
    """The layer images of an image, in order, each once: an image may have the same layer several times."""
    return tuple(dict.fromkeys(map_digests))


def check_frame_bytes(frame_bytes: int) -> None:
    """Raise InvalidInputError unless `frame_bytes` is whole pages, from 64 KiB to 4 MiB."""
    if frame_bytes % PAGE_BYTES or not MIN_FRAME_BYTES <= frame_bytes <= MAX_FRAME_BYTES:
        raise errors.InvalidInputError(
            f"frame size {frame_bytes} is not a multiple of {PAGE_BYTES} "
            f"from {MIN_FRAME_BYTES} to {MAX_FRAME_BYTES}"
        )


def is_read_ahead(kib: int) -> bool:
    """Whether traces and packs can be of this read-ahead: whole pages, from 4 KiB to 32 MiB."""
    return not kib % (PAGE_BYTES // 1024) and MIN_READ_AHEAD_KIB <= kib <= MAX_READ_AHEAD_KIB


def plan_frames(records: Sequence[Record], frame_bytes: int) -> list[tuple[Record, ...]]:
    """Cut records into frames of `frame_bytes`, the last one shorter: for each frame its pages, in order."""
    check_frame_bytes(frame_bytes)
    return list(_cut(records, itertools.repeat(frame_bytes // PAGE_BYTES)))


def _cut(records: Iterable[Record], frame_pages: Iterable[int]) -> Iterator[tuple[Record, ...]]:
    left = iter(records)
    record = next(left, None)
    for room in frame_pages:
        if record is None:
            return
        pieces = []
        while room and record is not None:
            taken = min(room, record.pages)
            pieces.append(dataclasses.replace(record, pages=taken))
            room -= taken
            record = (
                Record(record.layer, record.first_page + taken, record.pages - taken)
                if taken < record.pages
                else next(left, None)
            )
        yield tuple(pieces)


def check_layers(table: Table, block_maps: Mapping[str, blockmap.BlockMap]) -> None:
    """Raise IntegrityError unless the table is for the layer images of exactly these block maps (by map
    digest), InvalidInputError for a record outside its layer image."""
    if set(table.map_digests) != block_maps.keys():
        raise errors.IntegrityError(
            "boot pack: it was made for other layers than those of its block image; pack the image again"
        )
    maps = [block_maps[digest] for digest in table.map_digests]
    for record in table.records:
        check_record(record, maps[record.layer])


def check_record(record: Record, block_map: blockmap.BlockMap) -> None:
    """Raise InvalidInputError for a record outside its layer image."""
    if (record.first_page + record.pages) * PAGE_BYTES > block_map.image_bytes:
        raise errors.InvalidInputError(
            f"pages {record.first_page}+{record.pages} of layer image {record.layer} lie outside its "
            f"{block_map.image_bytes} bytes"
        )


def encode(table: Table) -> bytes:
    """The byte form of a table (docs/format.md)."""
    first = table.read_ahead_kib == FIRST_READ_AHEAD_KIB
    out = bytearray(
        _HEADER.pack(
            MAGIC,
            _FIRST_VERSION if first else VERSION,
            0,
            len(table.map_digests),
            0 if first else table.read_ahead_kib,
            len(table.records),
            len(table.frames),
            table.pages,
            table.data_bytes,
            bytes.fromhex(table.data_digest.removeprefix("sha256:")),
        )
    )
    for digest in table.map_digests:
        out += bytes.fromhex(digest.removeprefix("sha256:"))
    for record in table.records:
        out += _RECORD.pack(record.layer, 0, record.pages, record.first_page)
    for frame in table.frames:
        out += _FRAME.pack(frame.compressed_bytes, frame.uncompressed_bytes, frame.digest)
    return bytes(out)


def decode(data: bytes) -> Table:
    """Parse and validate a table. Raises InvalidInputError naming the field; nothing is allocated before
    the counts were checked against the length of `data`."""
    if not _HEADER.size <= len(data) <= MAX_TABLE_BYTES:
        raise errors.InvalidInputError(
            f"boot pack table: {len(data)} bytes, not {_HEADER.size} to {MAX_TABLE_BYTES}"
        )
    magic, version, flags, layers, read_ahead_kib, records, frames, pages, data_bytes, data_digest = (
        _HEADER.unpack_from(data)
    )
    if magic != MAGIC:
        raise errors.InvalidInputError("boot pack table: wrong magic, this is not a boot pack table")
    if flags:
        raise errors.InvalidInputError(f"boot pack table: unknown flags {flags:#x}")
    if not 0 < layers <= MAX_LAYERS:
        raise errors.InvalidInputError(f"boot pack table: {layers} layers, expected 1 to {MAX_LAYERS}")
    if not 0 < pages <= MAX_PAGES:
        raise errors.InvalidInputError(f"boot pack table: {pages} pages, expected 1 to {MAX_PAGES}")
    records_at = _HEADER.size + layers * _DIGEST_BYTES
    frames_at = records_at + records * _RECORD.size
    if len(data) != frames_at + frames * _FRAME.size:
        raise errors.InvalidInputError(f"boot pack table: {len(data)} bytes do not fit its counts")
    view = memoryview(data)
    digests = tuple(
        "sha256:" + view[at : at + _DIGEST_BYTES].hex()
        for at in range(_HEADER.size, records_at, _DIGEST_BYTES)
    )
    if len(set(digests)) != len(digests):
        raise errors.InvalidInputError("boot pack table: a layer image is listed twice")
    return Table(
        map_digests=digests,
        records=_decode_records(view[records_at:frames_at], layers, pages),
        frames=_decode_frames(view[frames_at:], pages, data_bytes),
        data_digest="sha256:" + data_digest.hex(),
        data_bytes=data_bytes,
        pages=pages,
        read_ahead_kib=_decode_read_ahead(version, read_ahead_kib),
    )


def decode_read_ahead(data: bytes) -> int:
    """What an encoded table says of its read-ahead, in KiB; the rest of it is not looked at. Raises
    InvalidInputError."""
    if len(data) < _HEADER.size or not data.startswith(MAGIC):
        raise errors.InvalidInputError("boot pack table: wrong magic, this is not a boot pack table")
    _, version, _, _, read_ahead_kib, *_ = _HEADER.unpack_from(data)
    return _decode_read_ahead(version, read_ahead_kib)


def _decode_read_ahead(version: int, field: int) -> int:
    """One form for each value, so that a table's bytes follow from what it says."""
    if version == _FIRST_VERSION:
        if field:
            raise errors.InvalidInputError(f"boot pack table: version 1 with a read-ahead of {field} KiB")
        return FIRST_READ_AHEAD_KIB
    if version != VERSION:
        raise errors.InvalidInputError(
            f"boot pack table: version {version}, this build reads versions {_FIRST_VERSION} and {VERSION}"
        )
    if not is_read_ahead(field) or field == FIRST_READ_AHEAD_KIB:
        raise errors.InvalidInputError(f"boot pack table: version {VERSION} with a read-ahead of {field} KiB")
    return field


def _decode_records(view: memoryview, layers: int, pages: int) -> tuple[Record, ...]:
    out = []
    counted = 0
    for number, (layer, reserved, count, first_page) in enumerate(_RECORD.iter_unpack(view)):
        if layer >= layers or reserved or count == 0:
            raise errors.InvalidInputError(
                f"boot pack table: record {number}: layer {layer} of {layers}, {count} pages, "
                f"reserved {reserved:#x}"
            )
        counted += count
        out.append(Record(layer, first_page, count))
    if counted != pages:
        raise errors.InvalidInputError(
            f"boot pack table: records of {counted} pages, the header says {pages}"
        )
    in_place = sorted(out, key=lambda record: (record.layer, record.first_page))
    for before, after in itertools.pairwise(in_place):
        if before.layer == after.layer and before.first_page + before.pages > after.first_page:
            raise errors.InvalidInputError(
                f"boot pack table: page {after.first_page} of layer {after.layer} occurs twice"
            )
    return tuple(out)


def _decode_frames(view: memoryview, pages: int, data_bytes: int) -> tuple[Frame, ...]:
    out: list[Frame] = []
    offset = counted = 0
    last = len(view) // _FRAME.size - 1
    for number, (compressed, uncompressed, digest) in enumerate(_FRAME.iter_unpack(view)):
        first = out[0].uncompressed_bytes if out else MAX_FRAME_BYTES
        if uncompressed == 0 or uncompressed % PAGE_BYTES or uncompressed > first:
            raise errors.InvalidInputError(
                f"boot pack table: frame {number}: {uncompressed} uncompressed bytes, expected whole pages "
                f"up to {first}"
            )
        if out and uncompressed != first and number != last:
            raise errors.InvalidInputError(
                f"boot pack table: frame {number}: {uncompressed} uncompressed bytes, those before it {first}"
            )
        if not 0 < compressed <= zstdframe.compressed_bound(uncompressed):
            raise errors.InvalidInputError(
                f"boot pack table: frame {number}: {compressed} compressed bytes for {uncompressed}"
            )
        out.append(Frame(offset, compressed, uncompressed, digest, counted))
        offset += compressed
        counted += uncompressed // PAGE_BYTES
    if counted != pages:
        raise errors.InvalidInputError(f"boot pack table: frames of {counted} pages, the header says {pages}")
    if offset != data_bytes:
        raise errors.InvalidInputError(
            f"boot pack table: frames of {offset} bytes, the header says {data_bytes}"
        )
    return tuple(out)
