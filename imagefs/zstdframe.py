"""The outline of one zstd frame: what it declares, where it ends, how long it can be. Pure.

libzstd decodes, but its streaming form says neither that a frame was cut short in its last bytes nor that
something lies behind it, and leaves the declared size unchecked until the end. This follows the frame from
header to header as its bytes come (RFC 8878, section 3.1.1), about 35 steps for a block of 4 MiB.
"""

from __future__ import annotations

_MAGIC = b"\x28\xb5\x2f\xfd"
_DESCRIPTOR_END = 5
_DICTIONARY_ID_BYTES = (0, 1, 2, 4)
_CONTENT_SIZE_BYTES = (0, 2, 4, 8)
_BLOCK_HEADER_BYTES = 3
_CHECKSUM_BYTES = 4
_RUN_LENGTH_BLOCK = 1


def compressed_bound(length: int) -> int:
    """The most bytes that a frame of `length` bytes takes: ZSTD_COMPRESSBOUND of zstd.h, and the 4 bytes of
    an optional checksum."""
    small = (128 * 1024 - length) >> 11 if length < 128 * 1024 else 0
    return length + (length >> 8) + small + 4


class Outline:
    """Give it the frame's bytes in order. Methods raise ValueError for what is not one whole frame."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._wanted = _DESCRIPTOR_END
        self._read_head = self._read_descriptor
        self._skip = 0
        self._checksum = 0
        self._last = False
        self._content_bytes: int | None = None

    def follow(self, piece: bytes) -> None:
        """Take the next bytes."""
        at = 0
        while at < len(piece):
            if self._skip:
                skipped = min(self._skip, len(piece) - at)
                self._skip -= skipped
                at += skipped
                continue
            if self._last:
                raise ValueError(f"{len(piece) - at} bytes of unused data follow the frame")
            taken = piece[at : at + self._wanted - len(self._head)]
            self._head += taken
            at += len(taken)
            if len(self._head) == self._wanted:
                self._read_head()

    @property
    def ended(self) -> bool:
        """Whether the frame is whole."""
        return self._last and not self._skip

    @property
    def content_bytes(self) -> int | None:
        """The uncompressed size that the frame declares: None before its header came, -1 if it has none."""
        return self._content_bytes

    def _read_descriptor(self) -> None:
        if self._head[:4] != _MAGIC:
            raise ValueError("this is not the start of a zstd frame")
        descriptor = self._head[4]
        self._checksum = _CHECKSUM_BYTES if descriptor & 4 else 0
        window = 0 if descriptor & 32 else 1
        self._wanted += window + _DICTIONARY_ID_BYTES[descriptor & 3] + self._size_bytes()
        self._read_head = self._read_header

    def _size_bytes(self) -> int:
        descriptor = self._head[4]
        # A single-segment frame has a size always: of one byte, where the flag says none.
        return _CONTENT_SIZE_BYTES[descriptor >> 6] or descriptor >> 5 & 1

    def _read_header(self) -> None:
        size_bytes = self._size_bytes()
        size = int.from_bytes(self._head[len(self._head) - size_bytes :], "little")
        self._content_bytes = size + (256 if size_bytes == 2 else 0) if size_bytes else -1
        self._read_head = self._read_block_header
        self._next_block()

    def _read_block_header(self) -> None:
        header = int.from_bytes(self._head, "little")
        self._last = bool(header & 1)
        self._skip = 1 if header >> 1 & 3 == _RUN_LENGTH_BLOCK else header >> 3
        if self._last:
            self._skip += self._checksum
        self._next_block()

    def _next_block(self) -> None:
        self._head.clear()
        self._wanted = _BLOCK_HEADER_BYTES
