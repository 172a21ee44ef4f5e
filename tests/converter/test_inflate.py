"""Decompression of layer blobs: members and frames one after another, damage, and bounded pieces."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from converter import errors, inflate
from converter.source.media import Encoding


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def run(data: bytes, encoding: Encoding, size: int = 1 << 20) -> bytes:
    return b"".join(inflate.inflate(pieces(data, size), encoding))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.binary(max_size=3000), min_size=1, max_size=5),
    st.integers(1, 4000),
    st.sampled_from([Encoding.GZIP, Encoding.ZSTD, Encoding.PLAIN]),
)
def test_members_and_frames_in_any_pieces(parts: list[bytes], size: int, encoding: Encoding) -> None:
    packed = {
        Encoding.GZIP: lambda part: gzip.compress(part, mtime=0),
        Encoding.ZSTD: zstandard.ZstdCompressor().compress,
        Encoding.PLAIN: bytes,
    }[encoding]
    assert run(b"".join(map(packed, parts)), encoding, size) == b"".join(parts)


def test_zero_padding_after_the_last_gzip_member_is_ignored() -> None:
    assert run(gzip.compress(b"x") + bytes(1000), Encoding.GZIP, 7) == b"x"


@pytest.mark.parametrize("encoding", [Encoding.GZIP, Encoding.ZSTD])
def test_a_bomb_comes_in_bounded_pieces(encoding: Encoding) -> None:
    data = bytes(50 << 20)
    packed = gzip.compress(data) if encoding is Encoding.GZIP else zstandard.compress(data)
    for piece in inflate.inflate(iter([packed]), encoding):
        assert len(piece) <= inflate.PIECE_BYTES


def test_a_frame_that_wants_gigabytes_of_memory_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=False)
    packed = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = packed.compress(os.urandom(1000)) + packed.flush()
    with pytest.raises(errors.InvalidLayerError, match="zstd: damaged near byte"):
        run(data, Encoding.ZSTD)


@pytest.mark.parametrize("encoding", [Encoding.GZIP, Encoding.ZSTD])
def test_damage_is_reported_with_its_place(encoding: Encoding) -> None:
    data = os.urandom(300_000)
    packed = (
        gzip.compress(data)
        if encoding is Encoding.GZIP
        else zstandard.ZstdCompressor(write_checksum=True).compress(data)
    )
    damaged = packed[:200_000] + b"\xff" * 300 + packed[200_300:]
    with pytest.raises(errors.InvalidLayerError, match=r"damaged near byte \d+"):
        run(damaged, encoding, 1000)


def test_a_gzip_blob_that_ends_early_or_goes_on_after_its_end() -> None:
    packed = gzip.compress(os.urandom(300_000))
    with pytest.raises(errors.InvalidLayerError, match=r"ends early"):
        run(packed[:200_000], Encoding.GZIP, 1000)
    with pytest.raises(errors.InvalidLayerError, match=r"damaged near byte|ends early"):
        run(packed + b"garbage", Encoding.GZIP)
    with pytest.raises(errors.InvalidLayerError, match="empty"):
        run(b"", Encoding.GZIP)
