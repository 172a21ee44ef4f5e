"""What one entry of a tar makes, and how messages name it.

Pure: made by converter.tarstream, used by all that read a layer. Numbers and texts of PAX records are
tarheader's to read; which of them an entry takes is said here.
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

from converter import tarheader


class Kind(enum.Enum):
    """What an entry makes."""

    FILE = "regular file"
    HARD_LINK = "hard link"
    SYMLINK = "symbolic link"
    CHARACTER = "character device"
    BLOCK = "block device"
    DIRECTORY = "directory"
    FIFO = "fifo"


class Entry(NamedTuple):
    """One entry of the tar, extension headers applied. (A tuple: made a million times a layer.)

    `mode` holds the permission bits only (07777). `size` is the apparent size, holes included, and 0 for all
    but regular files. `segments` is a sparse file's data, None for other files. `offset` is the byte offset
    of the entry's first header in the tar.
    """

    name: bytes
    kind: Kind
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    linkname: bytes
    rdev_major: int
    rdev_minor: int
    xattrs: dict[bytes, bytes] | None
    segments: tarheader.Segments | None
    offset: int


def overrides(records: dict[bytes, bytes], device: bool) -> dict[str, Any]:
    """The fields of Entry that PAX records set. An empty value sets none: the header's own counts."""
    changes: dict[str, Any] = {}
    get = records.get
    if value := get(b"path"):
        changes["name"] = value
    if value := get(b"linkpath"):
        changes["linkname"] = value
    if value := get(b"size"):
        changes["size"] = tarheader.decimal(value, "PAX size")
    if value := get(b"mtime"):
        changes["mtime_ns"] = tarheader.time_ns(value)
    if value := get(b"uid"):
        changes["uid"] = tarheader.decimal(value, "PAX uid")
    if value := get(b"gid"):
        changes["gid"] = tarheader.decimal(value, "PAX gid")
    if device and (value := get(b"SCHILY.devmajor")):
        changes["rdev_major"] = tarheader.decimal(value, "SCHILY.devmajor")
    if device and (value := get(b"SCHILY.devminor")):
        changes["rdev_minor"] = tarheader.decimal(value, "SCHILY.devminor")
    if xattrs := tarheader.xattrs(records):
        changes["xattrs"] = xattrs
    return changes


def describe(name: bytes, offset: int) -> str:
    """An entry, for messages."""
    return f"entry '{name[:200].decode('utf-8', 'backslashreplace')}' at byte {offset} of the tar"
