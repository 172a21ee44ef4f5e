"""The block map's codec: round trips, and bytes that are no block map."""

from __future__ import annotations

import dataclasses
import hashlib
import struct

import hypothesis
import pytest
from hypothesis import strategies as st

from imagefs import blockmap, errors

HEADER_BYTES = 200
BLOCK_ROW_BYTES = 48
ZEROS = hashlib.sha256(bytes(65536)).digest()
digests = st.binary(min_size=32, max_size=32)


@st.composite
def maps(draw: st.DrawFn) -> blockmap.BlockMap:
    block_bytes = 1 << draw(st.integers(16, 24))
    frame_bytes = max(4096, block_bytes >> draw(st.sampled_from([0, 0, 1, 3])))
    whole = draw(st.integers(0, 4))
    image_bytes = whole * block_bytes + 4096 * draw(st.integers(1, block_bytes // 4096))
    blocks = []
    offset = 0
    for index in range(blockmap.block_count(image_bytes, block_bytes)):
        length = min(block_bytes, image_bytes - index * block_bytes)
        frames: tuple[blockmap.Frame, ...] = ()
        if frame_bytes < block_bytes:
            count = blockmap.block_count(length, frame_bytes)
            frames = tuple(
                blockmap.Frame(draw(digests), draw(st.integers(1, frame_bytes))) for _ in range(count)
            )
        compressed = sum(f.compressed_bytes for f in frames) or draw(st.integers(1, block_bytes))
        zero = draw(st.booleans())
        digest = hashlib.sha256(bytes(length)).digest() if zero else draw(digests)
        blocks.append(blockmap.Block(digest, offset, compressed, zero, frames))
        offset += compressed
    metadata_offset = 4096 * draw(st.integers(0, image_bytes // 4096 - 1))
    return blockmap.BlockMap(
        block_bytes=block_bytes,
        frame_bytes=frame_bytes,
        image_bytes=image_bytes,
        blob_bytes=offset + draw(st.integers(0, 1000)),
        metadata_offset=metadata_offset,
        metadata_bytes=draw(st.integers(1, image_bytes - metadata_offset)),
        blob_digest=draw(digests),
        source_digest=draw(digests),
        diff_id=draw(digests),
        chain_id=draw(st.none() | digests.filter(any)),
        compression_level=draw(st.integers(-7, 22)),
        libzstd_version=draw(st.integers(0, 2**32 - 1)),
        root_implied=draw(st.booleans()),
        blocks=tuple(blocks),
    )


def sample(**changes: object) -> blockmap.BlockMap:
    value = blockmap.BlockMap(
        block_bytes=65536,
        frame_bytes=65536,
        image_bytes=65536 + 8192,
        blob_bytes=1000,
        metadata_offset=65536,
        metadata_bytes=8192,
        blob_digest=b"b" * 32,
        source_digest=b"s" * 32,
        diff_id=b"d" * 32,
        chain_id=None,
        compression_level=3,
        libzstd_version=10507,
        root_implied=False,
        blocks=(blockmap.Block(ZEROS, 0, 600, True), blockmap.Block(b"1" * 32, 600, 300)),
    )
    return dataclasses.replace(value, **changes)  # type: ignore[arg-type]


@hypothesis.given(value=maps())
def test_round_trip(value: blockmap.BlockMap) -> None:
    data = blockmap.encode(value)
    assert blockmap.decode(data) == value
    assert blockmap.encode(blockmap.decode(data)) == data


@hypothesis.settings(max_examples=500)
@hypothesis.given(
    value=maps(), place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), cut=st.integers(0, 3)
)
def test_changed_bytes_are_refused_or_encode_to_themselves(
    value: blockmap.BlockMap, place: float, byte: int, cut: int
) -> None:
    data = bytearray(blockmap.encode(value))
    # Half the changes go to the header: with many blocks it would hardly be hit.
    at = int(place * 2 * HEADER_BYTES) if place < 0.5 else int(place * len(data))
    data[at] = byte
    changed = bytes(data[: len(data) - cut])
    try:
        found = blockmap.decode(changed)
    except errors.InvalidInputError:
        return
    assert blockmap.encode(found) == changed


@hypothesis.given(data=st.binary(max_size=400))
def test_any_bytes(data: bytes) -> None:
    for start in (b"", blockmap.encode(sample())[:20]):
        with pytest.raises(errors.InvalidInputError):
            blockmap.decode(start + data)


@pytest.mark.parametrize(
    ("offset", "form", "value", "words"),
    [
        (0, "<8s", b"GPBLKMAQ", "magic"),
        (8, "<H", 2, "version 2"),
        (10, "<H", 208, "header of 208"),
        (12, "<I", 2, "unknown flags 0x2"),
        (16, "<I", 65537, "power of two"),
        (16, "<I", 32768, "power of two"),
        (16, "<I", 1 << 25, "power of two"),
        (20, "<I", 2048, "frame size 2048"),
        (20, "<I", 131072, "frame size 131072"),
        (20, "<I", 32768, "frames, expected"),
        (24, "<I", 3, "3 blocks"),
        (28, "<I", 1, "1 frames"),
        (40, "<Q", 0, "image size 0"),
        (40, "<Q", 4097, "image size 4097"),
        (40, "<Q", (1 << 44) + 4096, "image size"),
        (48, "<Q", 899, "block 1"),
        (56, "<Q", 100, "metadata region"),
        (56, "<Q", 1 << 63, "metadata region"),
        (64, "<Q", 0, "metadata region"),
        (64, "<Q", 8193, "metadata region"),
        (HEADER_BYTES + 32, "<Q", 1, "block 0"),
        (HEADER_BYTES + 40, "<I", 0, "block 0"),
        (HEADER_BYTES, "<I", 7, "block 0: flagged zero, with another digest"),
        (HEADER_BYTES + 44, "<I", 2, "block 0: unknown flags"),
        (HEADER_BYTES + BLOCK_ROW_BYTES + 32, "<Q", 599, "block 1"),
    ],
)
def test_each_field_is_checked(offset: int, form: str, value: object, words: str) -> None:
    data = bytearray(blockmap.encode(sample()))
    struct.pack_into(form, data, offset, value)
    with pytest.raises(errors.InvalidInputError, match=words):
        blockmap.decode(bytes(data))


def test_the_byte_table_of_docs_format() -> None:
    """Offsets as docs/format.md states them."""
    data = blockmap.encode(sample(chain_id=b"c" * 32, root_implied=True, compression_level=-3))
    assert len(data) == HEADER_BYTES + 2 * BLOCK_ROW_BYTES
    assert data[:8] == b"GPBLKMAP"
    assert struct.unpack_from("<HHIIIIIIi", data, 8) == (1, 200, 1, 65536, 65536, 2, 0, 10507, -3)
    assert struct.unpack_from("<QQQQ", data, 40) == (73728, 1000, 65536, 8192)
    assert data[72:200] == b"b" * 32 + b"s" * 32 + b"d" * 32 + b"c" * 32
    assert data[200:248] == ZEROS + struct.pack("<QII", 0, 600, 1)
    assert data[248:296] == b"1" * 32 + struct.pack("<QII", 600, 300, 0)


def test_metadata_blocks_and_lengths() -> None:
    value = sample()
    assert value.metadata_blocks() == [0, 1]
    assert [value.block_length(index) for index in (0, 1)] == [65536, 8192]
    assert sample(metadata_offset=4096, metadata_bytes=4096).metadata_blocks() == [0]
