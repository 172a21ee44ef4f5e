"""The on-disk structures of EROFS that layer images use, and the superblock's codec.

Pure. The writer packs with these structures, the reader unpacks with them. Names of fields and what they mean
are the kernel's (fs/erofs/erofs_fs.h); which of them we use is in docs/format.md.
"""

from __future__ import annotations

import dataclasses
import stat
import struct
from typing import Final

from imagefs import errors

BLOCK_BITS: Final = 12
BLOCK_BYTES: Final = 1 << BLOCK_BITS
SLOT_BYTES: Final = 32
"""Inodes start at multiples of this; a nid counts slots from the start of the metadata region."""
INODE_BYTES: Final = 64
SUPERBLOCK_OFFSET: Final = 1024
MAX_NAME_BYTES: Final = 255
MAX_XATTR_VALUE_BYTES: Final = 65535
MAX_XATTR_BODY_BYTES: Final = 12 + 4 * 65534

MAGIC: Final = 0xE0F5E1E2
FEATURE_CHECKSUM: Final = 1 << 0
FEATURE_MTIME: Final = 1 << 1
COMPATIBLE_FEATURES: Final = FEATURE_CHECKSUM | FEATURE_MTIME

FORMAT_PLAIN: Final = 1 | 0 << 1
FORMAT_INLINE: Final = 1 | 2 << 1
"""i_format: bit 0 says 64-byte inode, the bits above it the data layout."""

SUPERBLOCK: Final = struct.Struct("<IIIBBHQQIIII16s16sI44s")
INODE: Final = struct.Struct("<HHHHQIIIIqII16x")
"""format, xattr units, mode, reserved, size, block or rdev, ino, uid, gid, mtime s, mtime ns, links."""
DIRENT: Final = struct.Struct("<QHBx")
XATTR_HEADER: Final = struct.Struct("<IB7s")
XATTR_ENTRY: Final = struct.Struct("<BBH")

FILE_TYPES: Final = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}
"""The file type of a directory entry by S_IFMT(mode)."""

# ACLs come before "system." could: their whole name is the prefix, nothing is left to store.
_XATTR_PREFIXES: Final = (
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
)
XATTR_PREFIX_OF_INDEX: Final = dict(_XATTR_PREFIXES)
MAX_TARGET_BYTES: Final = 4095
NANOSECONDS: Final = 1_000_000_000


@dataclasses.dataclass(frozen=True, slots=True)
class Superblock:
    """What a superblock of ours says. `metadata_block` is where nid 0 would be, in 4 KiB blocks."""

    root_nid: int
    inodes: int
    blocks: int
    metadata_block: int
    uuid: bytes


# -- superblock ----------------------------------------------------------------------------------------


def encode_superblock(value: Superblock) -> bytes:
    """The 3072 bytes from SUPERBLOCK_OFFSET to the end of the first 4 KiB, checksum included."""
    fields = (
        BLOCK_BITS,
        0,
        value.root_nid,
        value.inodes,
        0,
        0,
        value.blocks,
        value.metadata_block,
        0,
        value.uuid,
        bytes(16),
        0,
        bytes(44),
    )
    data = bytearray(BLOCK_BYTES - SUPERBLOCK_OFFSET)
    SUPERBLOCK.pack_into(data, 0, MAGIC, 0, COMPATIBLE_FEATURES, *fields)
    struct.pack_into("<I", data, 4, crc32c(data))
    return bytes(data)


def check_superblock(first_4k: bytes) -> Superblock:
    """Parse the superblock in the first 4 KiB of an image, and refuse any that our writer could not have
    made: the kernel will parse what this lets through. Raises InvalidInputError naming the field."""
    if len(first_4k) < BLOCK_BYTES:
        raise errors.InvalidInputError(f"EROFS superblock: {len(first_4k)} bytes instead of {BLOCK_BYTES}")
    data = bytearray(first_4k[SUPERBLOCK_OFFSET:BLOCK_BYTES])
    (
        magic,
        checksum,
        compatible,
        block_bits,
        extension_slots,
        root_nid,
        inodes,
        build_seconds,
        build_nanoseconds,
        blocks,
        metadata_block,
        xattr_block,
        uuid,
        volume_name,
        incompatible,
        rest,
    ) = SUPERBLOCK.unpack_from(data)
    if magic != MAGIC:
        raise errors.InvalidInputError(f"EROFS superblock: magic {magic:#x}, this is not an EROFS image")
    if incompatible:
        raise errors.InvalidInputError(f"EROFS superblock: incompatible features {incompatible:#x}")
    if compatible != COMPATIBLE_FEATURES:
        raise errors.InvalidInputError(
            f"EROFS superblock: features {compatible:#x}, layer images have {COMPATIBLE_FEATURES:#x}"
        )
    struct.pack_into("<I", data, 4, 0)
    if crc32c(data) != checksum:
        raise errors.InvalidInputError("EROFS superblock: wrong checksum")
    if block_bits != BLOCK_BITS:
        raise errors.InvalidInputError(f"EROFS superblock: blocks of 2^{block_bits} bytes, not {BLOCK_BYTES}")
    unused = (extension_slots, build_seconds, build_nanoseconds, xattr_block)
    if any(unused) or any(volume_name) or any(rest):
        raise errors.InvalidInputError("EROFS superblock: a field that layer images leave zero is set")
    if root_nid == 0 or metadata_block * BLOCK_BYTES + root_nid * SLOT_BYTES + INODE_BYTES > (
        blocks * BLOCK_BYTES
    ):
        raise errors.InvalidInputError(f"EROFS superblock: root inode {root_nid} lies outside the image")
    return Superblock(root_nid, inodes, blocks, metadata_block, uuid)


def check_superblock_of(first_4k: bytes, image_bytes: int) -> Superblock:
    """As `check_superblock`, of an image whose size is known from elsewhere."""
    superblock = check_superblock(first_4k)
    if superblock.blocks * BLOCK_BYTES != image_bytes:
        raise errors.InvalidInputError(
            f"EROFS superblock: of {superblock.blocks * BLOCK_BYTES} bytes in an image of {image_bytes}"
        )
    return superblock


def _crc32c_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_CRC32C: Final = _crc32c_table()


def crc32c(data: bytes | bytearray) -> int:
    """CRC-32C as EROFS uses it: starting from all ones, not inverted at the end."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC32C[(crc ^ byte) & 0xFF]
    return crc


# -- small codecs that writer and reader share ---------------------------------------------------------


def split_xattr_name(name: bytes) -> tuple[int, bytes] | None:
    """An attribute's full name as (prefix index, rest), or None when EROFS cannot store it."""
    for index, prefix in _XATTR_PREFIXES:
        if name.startswith(prefix):
            rest = name[len(prefix) :]
            if prefix.endswith(b".") == bool(rest) and len(rest) <= MAX_NAME_BYTES:
                return index, rest
    return None


def encode_rdev(major: int, minor: int) -> int:
    """A device number in the kernel's 32-bit form: 12 bits of major, 20 of minor."""
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


def decode_rdev(value: int) -> tuple[int, int]:
    """(major, minor) of `encode_rdev`'s result."""
    return value >> 8 & 0xFFF, value & 0xFF | value >> 12 & 0xFFF00


def xattr_units(body_bytes: int) -> int:
    """i_xattr_icount for an xattr body of `body_bytes` (0, or its header and entries)."""
    return (body_bytes - XATTR_HEADER.size) // 4 + 1 if body_bytes else 0
