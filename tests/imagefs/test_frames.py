from __future__ import annotations

import contextlib
import dataclasses
import struct

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from imagefs import blockmap, errors, frames
from tests.imagefs import scripted

DATA = scripted.image(3, seed=1)


def parts(frame_bytes: int | None = None) -> tuple[blockmap.BlockMap, bytes]:
    origin = scripted.ScriptedOrigin()
    layer = scripted.layer(DATA, origin, frame_bytes=frame_bytes)
    return layer.block_map, origin.blobs[layer.blob_digest]


def piece(block_map: blockmap.BlockMap, blob: bytes, index: int) -> bytes:
    block = block_map.blocks[index]
    return blob[block.offset : block.offset + block.compressed_bytes]


@pytest.mark.parametrize("frame_bytes", [None, 16384, 4096])
def test_every_block_comes_back(frame_bytes: int | None) -> None:
    block_map, blob = parts(frame_bytes)
    frames.check_sizes(block_map, "layer")
    decoded = [
        frames.decode_block(block_map, index, memoryview(piece(block_map, blob, index)), "layer")
        for index in range(3)
    ]
    assert b"".join(decoded) == DATA


@given(at=st.integers(0), flip=st.integers(1, 255), index=st.integers(0, 2))
def test_no_changed_byte_gets_through(at: int, flip: int, index: int) -> None:
    block_map, blob = parts(16384)
    spoiled = bytearray(piece(block_map, blob, index))
    spoiled[at % len(spoiled)] ^= flip
    with contextlib.suppress(errors.IntegrityError):
        # zstd leaves a few bits unused: then the bytes are the same.
        data = frames.decode_block(block_map, index, memoryview(spoiled), "layer")
        assert data == DATA[index * 65536 :][: block_map.block_length(index)]


def replaced(compressed: bytes) -> blockmap.BlockMap:
    """A map whose block 0 claims `compressed` as its bytes."""
    block_map, _ = parts()
    block = dataclasses.replace(block_map.blocks[0], compressed_bytes=len(compressed))
    return dataclasses.replace(block_map, blocks=(block, *block_map.blocks[1:]))


SKIPPABLE = struct.pack("<II", 0x184D2A50, 4) + b"skip"


@pytest.mark.parametrize(
    ("compressed", "message"),
    [
        (zstandard.compress(DATA[:65536]) + b"\0", "unused data"),
        (zstandard.compress(DATA[:65536]) + SKIPPABLE, "unused data"),
        (SKIPPABLE + zstandard.compress(DATA[:65536]), "declares 0 bytes"),
        (zstandard.compress(DATA[:32768]) + zstandard.compress(DATA[32768:65536]), "declares 32768 bytes"),
        (zstandard.compress(DATA[:65535]), "declares 65535 bytes"),
        (zstandard.ZstdCompressor(write_content_size=False).compress(DATA[:65536]), "declares -1 bytes"),
        (zstandard.compress(bytes(1 << 30)), "declares 1073741824 bytes"),
        (zstandard.compress(bytes(65536)), "differ from the block's digest"),
        (zstandard.compress(DATA[:65536])[:-1], "zstd"),
        (b"not zstd", "zstd"),
    ],
)
def test_what_is_not_the_block_is_refused_by_name(compressed: bytes, message: str) -> None:
    with pytest.raises(errors.IntegrityError, match=message) as caught:
        frames.decode_block(replaced(compressed), 0, memoryview(compressed), "sha256:abc")
    assert "sha256:abc" in str(caught.value)


def test_a_short_body_is_refused() -> None:
    block_map, blob = parts()
    with pytest.raises(errors.IntegrityError, match="bytes came"):
        frames.decode_block(block_map, 0, memoryview(piece(block_map, blob, 0)[:-1]), "layer")


def test_a_map_that_asks_for_a_huge_buffer_is_refused() -> None:
    block_map, _ = parts()
    last = dataclasses.replace(block_map.blocks[-1], compressed_bytes=1 << 31)
    greedy = dataclasses.replace(block_map, blocks=(*block_map.blocks[:-1], last), blob_bytes=1 << 33)
    with pytest.raises(errors.InvalidInputError, match="block 2"):
        frames.check_sizes(greedy, "layer")


@given(st.integers(1, 1 << 24))
def test_the_bound_is_not_below_what_zstd_makes_of_noise(length: int) -> None:
    block_map, _ = parts()
    whole = dataclasses.replace(
        block_map, block_bytes=1 << 24, frame_bytes=1 << 24, image_bytes=length, blocks=block_map.blocks[:1]
    )
    # ZSTD_compressBound as zstd.h defines it.
    bound = length + (length >> 8) + (((128 << 10) - length) >> 11 if length < (128 << 10) else 0)
    assert frames.compressed_bound(whole, 0) >= bound
