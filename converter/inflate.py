"""Decompression of layer blobs: gzip (isal's igzip) and zstd, any number of members or frames.

Owns no thread: the stage that calls `inflate` pays for it, with the GIL released in the C code. Output comes
in pieces of at most PIECE_BYTES whatever the input says, so that a bomb is met by limits, not by the
allocator. Messages give the byte offset in the compressed blob; the caller adds image and layer. A zstd frame
that ends early is not seen here (zstandard's reader does not tell): the caller's digests are what catches it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, cast

import zstandard
from isal import igzip_lib, isal_zlib

from converter import errors
from converter.source.media import Encoding

PIECE_BYTES = 1 << 20
MAX_ZSTD_WINDOW_BYTES = 1 << 27
"""What `zstd -d` itself accepts unasked; a frame may claim 2 GiB."""


def inflate(pieces: Iterator[bytes], encoding: Encoding) -> Iterator[bytes]:
    """The uncompressed bytes of a blob. Raises InvalidLayerError with the offset."""
    if encoding is Encoding.PLAIN:
        return pieces
    return _gunzip(pieces) if encoding is Encoding.GZIP else _unzstd(pieces)


def _gunzip(pieces: Iterator[bytes]) -> Iterator[bytes]:
    taken = 0
    left = b""
    while True:
        left = left or next(pieces, b"")
        if not left:
            if taken == 0:
                raise errors.InvalidLayerError("gzip: the blob is empty")
            return
        if taken and not left.strip(b"\0"):
            # Zero padding after the last member, as tape tools leave it.
            taken += len(left)
            left = b""
            continue
        decompressor = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
        taken += len(left)
        data = left
        while True:
            try:
                out = decompressor.decompress(data, PIECE_BYTES)
            except isal_zlib.error as exc:  # type: ignore[misc]  # its stub says instance
                raise errors.InvalidLayerError(
                    f"gzip: damaged near byte {taken} of the compressed blob: {exc}"
                ) from exc
            if out:
                yield out
            if decompressor.eof:
                left = decompressor.unused_data
                taken -= len(left)
                break
            data = b""
            if decompressor.needs_input:
                data = next(pieces, b"")
                if not data:
                    raise errors.InvalidLayerError(f"gzip: the blob ends early, at byte {taken}")
                taken += len(data)


def _unzstd(pieces: Iterator[bytes]) -> Iterator[bytes]:
    source = _Readable(pieces)
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW_BYTES)
    file = cast(IO[bytes], source)  # it asks for read() alone
    with decompressor.stream_reader(file, read_size=PIECE_BYTES, read_across_frames=True) as reader:
        while True:
            try:
                out = reader.read(PIECE_BYTES)
            except zstandard.ZstdError as exc:
                raise errors.InvalidLayerError(
                    f"zstd: damaged near byte {source.taken} of the compressed blob: {exc}"
                ) from exc
            if not out:
                return
            yield out


class _Readable:
    """Pieces as the file that zstandard reads from; it takes whatever length a read returns up to `size`."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._left = b""
        self.taken = 0

    def read(self, size: int) -> bytes:
        piece = self._left or next(self._pieces, b"")
        self._left = piece[size:]
        self.taken += min(size, len(piece))
        return piece[:size]
