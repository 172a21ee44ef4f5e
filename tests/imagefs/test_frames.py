from __future__ import annotations

import contextlib
import dataclasses
import itertools
import struct
import tracemalloc
from collections.abc import Iterator

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from imagefs import blockmap, errors, frames, zstdframe
from tests.imagefs import scripted

DATA = scripted.image(3, seed=1)


def parts(frame_bytes: int | None = None) -> tuple[blockmap.BlockMap, bytes]:
    origin = scripted.ScriptedOrigin()
    layer = scripted.layer(DATA, origin, frame_bytes=frame_bytes)
    return layer.block_map, origin.blobs[layer.blob_digest]


def piece(block_map: blockmap.BlockMap, blob: bytes, index: int) -> bytes:
    block = block_map.blocks[index]
    return blob[block.offset : block.offset + block.compressed_bytes]


def decoded(block_map: blockmap.BlockMap, index: int, *pieces: bytes) -> bytes:
    """Block `index`; that nothing is written behind it is checked on the way."""
    length = block_map.block_length(index)
    buffer = bytearray(length) + b"behind"
    source = frames.Pieces(pieces)
    try:
        return bytes(frames.decode_block(block_map, index, source, "sha256:abc", memoryview(buffer)))
    finally:
        assert buffer[length:] == b"behind"


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % len(data) for cut in cuts)})
    return [data[start:end] for start, end in itertools.pairwise(places)]


@pytest.mark.parametrize("frame_bytes", [None, 16384, 4096])
def test_every_block_comes_back(frame_bytes: int | None) -> None:
    block_map, blob = parts(frame_bytes)
    frames.check_sizes(block_map, "layer")
    assert b"".join(decoded(block_map, index, piece(block_map, blob, index)) for index in range(3)) == DATA


@given(st.lists(st.integers(0), max_size=40), st.sampled_from([None, 16384]), st.booleans())
def test_neighbours_come_back_however_their_bytes_are_cut(
    cuts: list[int], frame_bytes: int | None, skip: bool
) -> None:
    block_map, blob = parts(frame_bytes)
    buffer = memoryview(bytearray(block_map.block_bytes))
    pieces = frames.Pieces(split(blob + b"behind", cuts))
    for index in (0, 2) if skip else range(3):
        block = block_map.blocks[index]
        pieces.skip_to(block.offset)
        data = frames.decode_block(block_map, index, pieces, "layer", buffer)
        assert data == DATA[index * 65536 :][:65536]
        assert pieces.position == block.offset + block.compressed_bytes
    assert pieces.take(100) == b"behind"
    assert not pieces.take(100)


@given(st.binary(max_size=300_000), st.integers(1, 22), st.booleans(), st.lists(st.integers(0), max_size=8))
def test_the_outline_ends_where_the_frame_ends(
    content: bytes, level: int, checksum: bool, cuts: list[int]
) -> None:
    content = content * (1 + 400_000 // (1 + len(content)) * (level % 2))
    frame = zstandard.ZstdCompressor(level=level, write_checksum=checksum).compress(content)
    outline = zstdframe.Outline()
    for part in split(frame, cuts):
        assert not outline.ended
        outline.follow(part)
    assert outline.ended
    assert outline.content_bytes == len(content) == zstandard.frame_content_size(frame)
    with pytest.raises(ValueError, match="unused data"):
        outline.follow(b"x")


@given(at=st.integers(0), flip=st.integers(1, 255), index=st.integers(0, 2), cuts=st.lists(st.integers(0)))
def test_no_changed_byte_gets_through(at: int, flip: int, index: int, cuts: list[int]) -> None:
    block_map, blob = parts(16384)
    spoiled = bytearray(piece(block_map, blob, index))
    spoiled[at % len(spoiled)] ^= flip
    with contextlib.suppress(errors.IntegrityError):
        # zstd leaves a few bits unused: then the bytes are the same.
        data = decoded(block_map, index, *split(bytes(spoiled), cuts))
        assert data == DATA[index * 65536 :][: block_map.block_length(index)]


def bomb(blocks: int) -> bytes:
    """A frame that declares 65536 bytes and holds `blocks` runs of 65536 equal ones, four bytes each."""
    frame = bytearray(b"\x28\xb5\x2f\xfd\x60" + struct.pack("<H", 65536 - 256))
    for number in range(blocks):
        frame += (65536 << 3 | 1 << 1 | (number == blocks - 1)).to_bytes(3, "little") + b"x"
    return bytes(frame)


def test_a_frame_that_holds_more_than_it_declares_gets_no_memory_for_it() -> None:
    one = bomb(1)
    assert zstandard.decompress(one) == b"x" * 65536
    tracemalloc.start()
    with pytest.raises(errors.IntegrityError):
        decoded(replaced(bomb(100_000)), 0, bomb(100_000))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The bomb itself, twice, and the block: not the 6.5 GB that its blocks say.
    assert peak_bytes < 4_000_000


def test_what_the_pieces_raise_comes_through() -> None:
    block_map, blob = parts()

    def broken() -> Iterator[bytes]:
        yield blob[:100]
        raise errors.UnavailableError("the link is cut")

    buffer = memoryview(bytearray(65536))
    with pytest.raises(errors.UnavailableError, match="the link is cut"):
        frames.decode_block(block_map, 0, frames.Pieces(broken()), "layer", buffer)


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
        (zstandard.compress(DATA[:65536]) + zstandard.compress(DATA[:65536]), "unused data"),
        (zstandard.compress(DATA[:65536]) + SKIPPABLE, "unused data"),
        (SKIPPABLE + zstandard.compress(DATA[:65536]), "not the start of a zstd frame"),
        (zstandard.compress(DATA[:32768]) + zstandard.compress(DATA[32768:65536]), "unused data"),
        (zstandard.compress(DATA[:32768]), "declares 32768 bytes"),
        (zstandard.compress(DATA[:65535]), "declares 65535 bytes"),
        (zstandard.ZstdCompressor(write_content_size=False).compress(DATA[:65536]), "declares -1 bytes"),
        (zstandard.compress(bytes(1 << 30)), "declares 1073741824 bytes"),
        (zstandard.compress(bytes(65536)), "differ from the block's digest"),
        (zstandard.compress(DATA[:65536])[:-1], "zstd"),
        (zstandard.ZstdCompressor(write_checksum=True).compress(DATA[:65536])[:-1], "cut short"),
        (zstandard.compress(DATA[:65536])[:3], "zstd"),
        (bomb(2), "zstd"),
        (b"not zstd", "zstd"),
    ],
)
def test_what_is_not_the_block_is_refused_by_name(compressed: bytes, message: str) -> None:
    with pytest.raises(errors.IntegrityError, match=message) as caught:
        decoded(replaced(compressed), 0, compressed)
    assert "sha256:abc" in str(caught.value)


def test_a_short_body_is_refused() -> None:
    block_map, blob = parts()
    with pytest.raises(errors.IntegrityError, match="bytes too few came"):
        decoded(block_map, 0, piece(block_map, blob, 0)[:-1])


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


@given(
    order=st.permutations(range(4)),
    wanted=st.lists(st.integers(1, 15), max_size=6),
    cuts=st.lists(st.integers(0), max_size=8),
)
def test_frames_in_any_order_are_verified_one_by_one(
    order: list[int], wanted: list[int], cuts: list[int]
) -> None:
    block_map, blob = parts(16384)
    buffer = memoryview(bytearray(65536))
    seen = bytearray(65536)

    def appeared(piece: memoryview, at: int) -> None:
        seen[at : at + len(piece)] = piece

    assembly = frames.Assembly(block_map, 1, "layer", buffer, appeared)
    asked = iter(wanted)
    for number in order:
        frame = blob[assembly.place(number) : assembly.place(number + 1)]
        assembly.decode(number, frames.Pieces([*split(frame, cuts), b"behind"]))
        assert assembly.decoded >> number & 1
        ask = next(asked, 0) & assembly.decoded
        verified = assembly.verify(ask)
        assert verified & ask == ask
        assert not verified & ~assembly.decoded
        assert seen[number * 16384 :][:16384] == DATA[65536 + number * 16384 :][:16384]
    assert assembly.finish() == DATA[65536 : 2 * 65536] == seen


@given(order=st.permutations(range(4)), at=st.integers(0), flip=st.integers(1, 255), wrong=st.integers(0, 3))
def test_a_changed_frame_is_never_verified_and_spares_the_others(
    order: list[int], at: int, flip: int, wrong: int
) -> None:
    block_map, blob = parts(16384)
    buffer = memoryview(bytearray(65536))
    assembly = frames.Assembly(block_map, 0, "layer", buffer)
    for number in order:
        frame = bytearray(blob[assembly.place(number) : assembly.place(number + 1)])
        if number == wrong:
            frame[at % len(frame)] ^= flip
        try:
            assembly.decode(number, frames.Pieces([bytes(frame)]))
            assembly.verify(1 << number)
        except errors.IntegrityError:
            assert number == wrong
            return
        # zstd leaves a few bits unused: then the bytes are the same.
        assert buffer[number * 16384 :][:16384] == DATA[number * 16384 :][:16384]
    assert assembly.finish() == DATA[:65536]


def test_a_block_is_its_own_digest_whatever_its_frames_say() -> None:
    block_map, blob = parts(16384)
    first = dataclasses.replace(block_map.blocks[0], digest=bytes(32))
    forged = dataclasses.replace(block_map, blocks=(first, *block_map.blocks[1:]))
    assembly = frames.Assembly(forged, 0, "layer", memoryview(bytearray(65536)))
    for number in (2, 3, 0, 1):
        assembly.decode(number, frames.Pieces([blob[assembly.place(number) : assembly.place(number + 1)]]))
    assert assembly.verify(0b1111) == 0b1111
    with pytest.raises(errors.IntegrityError, match="the block's digest"):
        assembly.finish()
