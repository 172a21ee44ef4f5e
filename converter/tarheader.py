"""The encodings inside a tar header: numbers, PAX records, times, xattrs and sparse maps.

Pure functions over bytes, called by converter.tarstream for every entry; they hold no position in the
archive. What they refuse they refuse with BadFieldError, to which the reader adds entry and byte offset.

Follows POSIX.1-2024 pax (ustar and extended headers), the GNU tar manual's "Basic Tar Format" and "Storing
Sparse Files", and where those leave a choice what Go's archive/tar does, because that is what decides how an
image looks on every other node.
"""

from __future__ import annotations

import binascii
import struct
import urllib.parse
import zlib

BLOCK_BYTES = 512
ZERO_BLOCK = bytes(BLOCK_BYTES)

HEADER = struct.Struct("100s24s12s12s8sc100s8s64x8s8s155s12x")
"""name, owner (see `owner`), size, mtime, checksum, type, linkname, magic and version, devmajor, devminor,
prefix."""

USTAR_MAGIC = b"ustar\0"
STAR_TRAILER = b"tar\0"
MAX_XATTR_NAME_BYTES = 255
MAX_XATTR_VALUE_BYTES = 65535

_CHECKSUM_AT = slice(148, 156)
_STAR_TRAILER_AT = slice(508, 512)
_STAR_PREFIX_BYTES = 131
_SPARSE_ENTRY_BYTES = 24
_SPARSE_AT = 386
_SPARSE_ENTRIES = 4
_SPARSE_EXTENDED_AT = 482
_SPARSE_REAL_SIZE_AT = slice(483, 495)
_EXTENSION_ENTRIES = 21
_EXTENSION_EXTENDED_AT = 504
_MAX_DIGITS = 20
_XATTR = b"SCHILY.xattr."
_LIBARCHIVE_XATTR = b"LIBARCHIVE.xattr."
_SPARSE_PAIR = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")
_SPARSE_MAP = b"GNU.sparse.map"

Segments = list[tuple[int, int]]
"""The data of a sparse file: (offset, length) in the file, ascending, none empty."""


class BadFieldError(ValueError):
    """A header field cannot be read; the message names it and its value."""


def byte_sum(header: memoryview) -> int:
    """The sum of a header block's bytes.

    Adler-32's lower half is 1 + the sum modulo 65521, which half a block (at most 256 * 255) never reaches:
    exact, and ten times faster than adding in Python.
    """
    return (zlib.adler32(header[:256]) & 0xFFFF) + (zlib.adler32(header[256:]) & 0xFFFF) - 2


def checksum_ok(header: memoryview, field: bytes) -> bool:
    """Whether the checksum field fits the header: the sum of its bytes, the field itself taken as spaces."""
    stored = number(field, "checksum")
    # As in `byte_sum`: 1 + the sum of the field's bytes.
    if stored == byte_sum(header) - (zlib.adler32(field) & 0xFFFF) + 1 + 8 * 0x20:
        return True
    # Some old tars added signed characters.
    return stored == sum(header.cast("b")) - sum(memoryview(field).cast("b")) + 8 * 0x20


def number(field: bytes, what: str) -> int:
    """An octal field, or a base-256 one (first bit set, two's complement in the rest). Empty means 0."""
    text = field.strip(b" \0")
    if text.isdigit():
        try:
            return int(text, 8)
        except ValueError:
            raise BadFieldError(f"{what} {field!r} is not an octal number") from None
    if not text:
        return 0
    if field[0] & 0x80:
        bits = 8 * len(field) - 1
        value = int.from_bytes(field, "big") - (1 << bits)
        return value - (1 << bits) if field[0] & 0x40 else value
    text = text.partition(b"\0")[0].rstrip(b" ")
    if not text.isdigit():
        raise BadFieldError(f"{what} {field!r} is not an octal number")
    return number(text, what)


def owner(field: bytes) -> tuple[int, int, int]:
    """The permission bits (07777), uid and gid: three fields of 8 bytes."""
    return number(field[:8], "mode") & 0o7777, number(field[8:16], "uid"), number(field[16:], "gid")


def decimal(text: bytes, what: str) -> int:
    """A non-negative decimal number of a PAX record."""
    if not text.isdigit() or len(text) > _MAX_DIGITS:
        raise BadFieldError(f"{what} {text[:40]!r} is not a decimal number")
    return int(text)


def time_ns(text: bytes) -> int:
    """A PAX time (seconds, any number of decimals, perhaps a minus) in nanoseconds; cut, not rounded."""
    seconds, _, fraction = text.partition(b".")
    negative = seconds.startswith(b"-")
    digits = seconds[1:] if negative else seconds
    if not digits.isdigit() or len(digits) > _MAX_DIGITS or (fraction and not fraction.isdigit()):
        raise BadFieldError(f"PAX mtime {text[:40]!r} is not a decimal number")
    value = int(digits) * 1_000_000_000 + int(fraction[:9].ljust(9, b"0"))
    return -value if negative else value


def prefix(header: memoryview, field: bytes) -> bytes:
    """The path prefix of a ustar header; the star variant keeps times in the field's last 24 bytes."""
    if header[_STAR_TRAILER_AT] == STAR_TRAILER:
        field = field[:_STAR_PREFIX_BYTES]
    return field.partition(b"\0")[0]


def pax_records(body: bytes) -> dict[bytes, bytes]:
    """The records of a PAX extended header; of several with one key the last wins.

    The repeated offset and length records of GNU sparse format 0.0 come as the map of format 0.1.
    """
    records: dict[bytes, bytes] = {}
    sparse: list[bytes] = []
    position, end = 0, len(body)
    while position < end:
        space = body.find(b" ", position, position + _MAX_DIGITS)
        digits = body[position:space] if space > 0 else b""
        stop = position + int(digits) if digits.isdigit() else 0
        equals = body.find(b"=", space + 1, stop)
        if equals <= space + 1 or stop > end or body[stop - 1] != 0x0A:
            raise BadFieldError(f"malformed PAX record at byte {position} of its header")
        key = body[space + 1 : equals]
        value = body[equals + 1 : stop - 1]
        if key in _SPARSE_PAIR:
            if key != _SPARSE_PAIR[len(sparse) % 2]:
                raise BadFieldError("PAX sparse offsets and lengths do not alternate")
            sparse.append(value)
        else:
            records[key] = value
        position = stop
    if sparse:
        records[_SPARSE_MAP] = b",".join(sparse)
    return records


def xattrs(records: dict[bytes, bytes]) -> dict[bytes, bytes] | None:
    """The extended attributes among PAX records, None if there are none. SCHILY's win over LIBARCHIVE's."""
    found: dict[bytes, bytes] = {}
    for key, value in records.items():
        if key.startswith(_XATTR):
            found[key[len(_XATTR) :]] = value
        elif key.startswith(_LIBARCHIVE_XATTR):
            name = urllib.parse.unquote_to_bytes(key[len(_LIBARCHIVE_XATTR) :])
            if _XATTR + name not in records:
                found[name] = _base64(name, value)
    for name, value in found.items():
        if not 0 < len(name) <= MAX_XATTR_NAME_BYTES or b"\0" in name:
            raise BadFieldError(f"xattr name {name[:80]!r} does not have 1 to {MAX_XATTR_NAME_BYTES} bytes")
        if len(value) > MAX_XATTR_VALUE_BYTES:
            raise BadFieldError(
                f"xattr {name!r} has {len(value)} bytes, Linux allows {MAX_XATTR_VALUE_BYTES}"
            )
    return found or None


def _base64(name: bytes, value: bytes) -> bytes:
    # libarchive leaves the padding out.
    unpadded = value.rstrip(b"=")
    try:
        return binascii.a2b_base64(unpadded + b"=" * (-len(unpadded) % 4), strict_mode=True)
    except binascii.Error as exc:
        raise BadFieldError(f"LIBARCHIVE xattr {name!r} is not base64: {exc}") from None


def pax_sparse_map(text: bytes) -> list[int]:
    """The numbers of GNU sparse format 0.1: offset,length,offset,length..."""
    if not text:
        return []
    return [decimal(item, "PAX sparse map number") for item in text.split(b",")]


def gnu_sparse_header(header: bytes) -> tuple[list[int], int, bool]:
    """Of an old GNU sparse header: offsets and lengths, the file's size, whether an extension follows."""
    real_size = number(header[_SPARSE_REAL_SIZE_AT], "sparse real size")
    numbers = _sparse_numbers(header, _SPARSE_AT, _SPARSE_ENTRIES)
    return numbers, real_size, header[_SPARSE_EXTENDED_AT] != 0


def gnu_sparse_extension(block: bytes) -> tuple[list[int], bool]:
    """Of an old GNU sparse extension block: offsets and lengths, whether another follows."""
    return _sparse_numbers(block, 0, _EXTENSION_ENTRIES), block[_EXTENSION_EXTENDED_AT] != 0


def _sparse_numbers(block: bytes, start: int, count: int) -> list[int]:
    numbers: list[int] = []
    for at in range(start, start + count * _SPARSE_ENTRY_BYTES, _SPARSE_ENTRY_BYTES):
        if block[at] == 0:
            break
        numbers.append(number(block[at : at + 12], "sparse offset"))
        numbers.append(number(block[at + 12 : at + 24], "sparse length"))
    return numbers


def segments(numbers: list[int], size: int, stored_bytes: int) -> Segments:
    """The checked sparse map: ascending, without overlap, inside `size`, adding up to `stored_bytes`."""
    if len(numbers) % 2:
        raise BadFieldError("sparse map has an offset without a length")
    if size < 0:
        raise BadFieldError(f"sparse file of the negative size {size}")
    out: Segments = []
    position = total = 0
    for offset, length in zip(numbers[::2], numbers[1::2], strict=True):
        if length < 0 or offset < position or offset + length > size:
            raise BadFieldError(
                f"sparse map: data at {offset}+{length} overlaps or leaves the file of {size} bytes"
            )
        position = offset + length
        total += length
        if length:
            out.append((offset, length))
    if total != stored_bytes:
        raise BadFieldError(f"sparse map names {total} bytes of data, the entry stores {stored_bytes}")
    return out
