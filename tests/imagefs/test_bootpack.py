"""The boot pack's table: round trips, bytes that are no table, and the cutting of records into frames."""

from __future__ import annotations

import dataclasses
import struct

import hypothesis
import pytest
from hypothesis import strategies as st

from imagefs import blockmap, bootpack, errors, zstdframe
from imagefs.bootpack import PAGE_BYTES, Record

HEADER_BYTES = 72
RECORD_BYTES = 12
digests = st.binary(min_size=32, max_size=32)
runs = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 60)), min_size=1, max_size=12)


@st.composite
def record_lists(draw: st.DrawFn) -> list[Record]:
    """Records of up to three layers, without overlap, in any order."""
    out = []
    for layer in range(draw(st.integers(1, 3))):
        at = draw(st.sampled_from([0, 0, 2**32 - 2000]))
        for gap, pages in draw(runs):
            out.append(Record(layer, at + gap, pages))
            at += gap + pages
    return draw(st.permutations(out))


@st.composite
def tables(draw: st.DrawFn) -> bootpack.Table:
    records = draw(record_lists())
    frames = []
    offset = first_page = 0
    for pieces in bootpack.plan_frames(records, 64 * 1024):
        pages = sum(piece.pages for piece in pieces)
        compressed = draw(st.integers(1, zstdframe.compressed_bound(pages * PAGE_BYTES)))
        frames.append(bootpack.Frame(offset, compressed, pages * PAGE_BYTES, draw(digests), first_page))
        offset += compressed
        first_page += pages
    layers = max(record.layer for record in records) + 1
    return bootpack.Table(
        map_digests=tuple(
            f"sha256:{each.hex()}"
            for each in draw(st.lists(digests, min_size=layers, max_size=layers + 2, unique=True))
        ),
        records=tuple(records),
        frames=tuple(frames),
        data_digest=f"sha256:{draw(digests).hex()}",
        data_bytes=offset,
        pages=first_page,
        read_ahead_kib=draw(st.integers(1, 8192).map(lambda pages: 4 * pages)),
    )


def page_sequence(records: list[Record]) -> list[tuple[int, int]]:
    return [(r.layer, r.first_page + n) for r in records for n in range(r.pages)]


@hypothesis.given(tables())
def test_round_trip(table: bootpack.Table) -> None:
    assert bootpack.decode(bootpack.encode(table)) == table
    assert bootpack.decode_read_ahead(bootpack.encode(table)) == table.read_ahead_kib


@hypothesis.given(tables(), st.data())
def test_any_change_is_refused_or_means_something_else(table: bootpack.Table, data: st.DataObject) -> None:
    encoded = bytearray(bootpack.encode(table))
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] ^= data.draw(st.integers(1, 255))
    try:
        changed = bootpack.decode(bytes(encoded))
    except errors.InvalidInputError:
        return
    assert changed != table
    assert bootpack.encode(changed) == bytes(encoded)


@hypothesis.given(st.binary(max_size=300))
def test_arbitrary_bytes(data: bytes) -> None:
    for each in (data, bootpack.MAGIC + struct.pack("<HHHH", 1, 0, 1, 0) + data):
        with pytest.raises(errors.InvalidInputError):
            bootpack.decode(each)


@hypothesis.given(tables(), st.integers(1, 200))
def test_another_length(table: bootpack.Table, count: int) -> None:
    encoded = bootpack.encode(table)
    for each in (encoded[:-count], encoded + bytes(count)):
        with pytest.raises(errors.InvalidInputError):
            bootpack.decode(each)


@pytest.mark.parametrize(
    ("version", "kib"), [(1, 4), (1, 128), (2, 0), (2, 128), (2, 6), (2, 40_000), (3, 32)]
)
def test_one_form_for_each_read_ahead(version: int, kib: int) -> None:
    encoded = bytearray(bootpack.encode(ONE))
    struct.pack_into("<H", encoded, 8, version)
    struct.pack_into("<H", encoded, 14, kib)
    with pytest.raises(errors.InvalidInputError, match="version"):
        bootpack.decode(bytes(encoded))


def test_tables_of_the_first_version_are_for_128_kib() -> None:
    """And those for 128 KiB are of that version, so that packs made before keep their digests."""
    encoded = bootpack.encode(ONE)
    assert struct.unpack_from("<HHHH", encoded, 8) == (1, 0, 2, 0)
    smaller = bootpack.encode(dataclasses.replace(ONE, read_ahead_kib=32))
    assert struct.unpack_from("<HHHH", smaller, 8) == (2, 0, 2, 32)
    assert bootpack.decode(encoded).read_ahead_kib == 128


ONE = bootpack.Table(
    map_digests=("sha256:" + "ab" * 32, "sha256:" + "cd" * 32),
    records=(Record(1, 7, 16), Record(0, 0, 4)),
    frames=(
        bootpack.Frame(0, 100, 64 * 1024, bytes(32), 0),
        bootpack.Frame(100, 50, 16 * 1024, bytes(32), 16),
    ),
    data_digest="sha256:" + "00" * 32,
    data_bytes=150,
    pages=20,
    read_ahead_kib=128,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"records": (Record(1, 7, 16), Record(1, 22, 4))}, "page 22 of layer 1 occurs twice"),
        ({"records": (Record(2, 7, 16), Record(0, 0, 4))}, "record 0: layer 2 of 2"),
        ({"records": (Record(1, 7, 16),)}, "records of 16 pages, the header says 20"),
        ({"records": (*ONE.records, Record(0, 9, 0))}, "record 2: layer 0 of 2, 0 pages"),
        ({"frames": ONE.frames[:1]}, "frames of 16 pages"),
        ({"data_bytes": 151}, "frames of 150 bytes, the header says 151"),
        ({"pages": 0}, "0 pages"),
        ({"pages": bootpack.MAX_PAGES + 1}, "pages, expected 1 to"),
        ({"map_digests": (ONE.map_digests[0],) * 2}, "listed twice"),
        ({"map_digests": ()}, "0 layers"),
        (
            {"frames": (dataclasses.replace(ONE.frames[0], compressed_bytes=70_000), ONE.frames[1])},
            "frame 0: 70000 compressed bytes for 65536",
        ),
        (
            {"frames": (dataclasses.replace(ONE.frames[0], uncompressed_bytes=4097), ONE.frames[1])},
            "frame 0: 4097 uncompressed bytes",
        ),
    ],
)
def test_what_is_refused(change: dict[str, object], message: str) -> None:
    assert bootpack.decode(bootpack.encode(ONE)) == ONE
    with pytest.raises(errors.InvalidInputError, match=message):
        bootpack.decode(bootpack.encode(dataclasses.replace(ONE, **change)))  # type: ignore[arg-type]


def test_frames_of_several_sizes() -> None:
    sizes = (16, 3, 1)
    frames = tuple(bootpack.Frame(n, 1, size * PAGE_BYTES, bytes(32), 0) for n, size in enumerate(sizes))
    table = dataclasses.replace(ONE, frames=frames, data_bytes=3)
    with pytest.raises(errors.InvalidInputError, match="frame 1: 12288 uncompressed bytes, those before"):
        bootpack.decode(bootpack.encode(table))
    table = dataclasses.replace(ONE, frames=tuple(reversed(ONE.frames)))
    with pytest.raises(errors.InvalidInputError, match="frame 1: 65536 uncompressed bytes, expected"):
        bootpack.decode(bootpack.encode(table))


@pytest.mark.parametrize(("at", "message"), [(8, "version"), (10, "flags"), (14, "read-ahead"), (0, "magic")])
def test_header_fields(at: int, message: str) -> None:
    encoded = bytearray(bootpack.encode(ONE))
    encoded[at] ^= 8
    with pytest.raises(errors.InvalidInputError, match=message):
        bootpack.decode(bytes(encoded))


@hypothesis.given(record_lists(), st.integers(16, 64))
def test_frames_hold_the_page_sequence(records: list[Record], frame_pages: int) -> None:
    planned = bootpack.plan_frames(records, frame_pages * PAGE_BYTES)
    assert page_sequence([piece for pieces in planned for piece in pieces]) == page_sequence(records)
    sizes = [sum(piece.pages for piece in pieces) for pieces in planned]
    assert sizes[:-1] == [frame_pages] * (len(sizes) - 1)
    assert 0 < sizes[-1] <= frame_pages


@hypothesis.given(tables())
def test_pieces_of_each_frame(table: bootpack.Table) -> None:
    pieces = list(table.pieces())
    assert len(pieces) == len(table.frames)
    sequence = page_sequence(list(table.records))
    for frame, own in zip(table.frames, pieces, strict=True):
        pages = frame.uncompressed_bytes // PAGE_BYTES
        assert page_sequence(list(own)) == sequence[frame.first_page : frame.first_page + pages]


@pytest.mark.parametrize("frame_bytes", [0, 4096, 64 * 1024 + 1, 8 << 20])
def test_frame_sizes(frame_bytes: int) -> None:
    with pytest.raises(errors.InvalidInputError, match="frame size"):
        bootpack.plan_frames([Record(0, 0, 1)], frame_bytes)


def block_map(zeros: list[bool], last_pages: int = 16) -> blockmap.BlockMap:
    """A map of blocks of 16 pages, the last one shorter."""
    return blockmap.BlockMap(
        block_bytes=64 * 1024,
        frame_bytes=64 * 1024,
        image_bytes=(len(zeros) - 1) * 64 * 1024 + last_pages * PAGE_BYTES,
        blob_bytes=1000,
        metadata_offset=0,
        metadata_bytes=1,
        blob_digest=bytes(32),
        source_digest=bytes(32),
        diff_id=bytes(32),
        chain_id=None,
        compression_level=1,
        libzstd_version=1,
        root_implied=False,
        blocks=tuple(blockmap.Block(bytes(32), 0, 1, zero) for zero in zeros),
    )


def test_records_outside_a_layer_image() -> None:
    with pytest.raises(errors.InvalidInputError, match=r"pages 3\+18 of layer image 0 lie outside"):
        bootpack.check_record(Record(0, 3, 18), block_map([False, False], 4))
    maps = dict(zip(ONE.map_digests, [block_map([False]), block_map([False, False])], strict=True))
    bootpack.check_layers(ONE, maps)
    maps[ONE.map_digests[1]] = block_map([False, False], 6)
    with pytest.raises(errors.InvalidInputError, match=r"pages 7\+16 of layer image 1 lie outside"):
        bootpack.check_layers(ONE, maps)
    with pytest.raises(errors.IntegrityError, match="other layers"):
        bootpack.check_layers(ONE, {ONE.map_digests[0]: block_map([False])})
