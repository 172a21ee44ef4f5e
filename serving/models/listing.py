"""What lies below a prefix, what it is called on the node, and whether what came is what was listed. Pure.

Called by `bucket`. Names of objects become paths of files, and come from whoever writes to the bucket: one
that would leave its directory is refused.

ETags: of an object put in one piece it is the MD5 of its bytes; of one put in N parts, the MD5 of the parts'
MD5s, with "-N". Objects encrypted with a key of KMS have ETags that say nothing: those are checked by size
alone (`kind` says which).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

PIECE_BYTES = 16 << 20
"""What one request asks for."""
_ETAG = re.compile(r"[0-9a-f]{32}(-[0-9]{1,5})?\Z")


@dataclass(frozen=True, slots=True)
class Object:
    """`name` is relative to the prefix; `etag` has no quotes."""

    name: str
    size_bytes: int
    etag: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The objects of one moment. `identity` differs where any of them does."""

    objects: tuple[Object, ...]
    identity: str

    @property
    def size_bytes(self) -> int:
        return sum(each.size_bytes for each in self.objects)


@dataclass(frozen=True, slots=True)
class Piece:
    """`number` within its object."""

    number: int
    offset: int
    size_bytes: int


def snapshot(prefix: str, found: Sequence[tuple[str, int, str]]) -> Snapshot:
    """From keys, sizes and ETags as listed. ValueError names a key that cannot be a file's path."""
    objects = []
    for key, size, etag in found:
        name = key.removeprefix(prefix).removeprefix("/") if prefix else key
        if not name or name.endswith("/"):
            continue  # what consoles make for a folder
        parts = name.split("/")
        if any(part in ("", ".", "..") or "\0" in part or len(part.encode()) > 255 for part in parts):
            raise ValueError(f"{key!r} cannot be a file's path; rename or remove the object")
        objects.append(Object(name, size, etag.strip('"')))
    objects.sort(key=lambda each: each.name)
    names = {each.name for each in objects}
    for name in names:
        parents = name.split("/")[:-1]
        if any("/".join(parents[:end]) in names for end in range(1, len(parents) + 1)):
            raise ValueError(f"{name!r} lies in what is an object itself; rename one of them")
    text = json.dumps([[each.name, each.size_bytes, each.etag] for each in objects])
    return Snapshot(tuple(objects), hashlib.sha256(text.encode()).hexdigest()[:16])


def pieces(size_bytes: int) -> Iterator[Piece]:
    """Of an object, in order; none of an empty one."""
    for number, offset in enumerate(range(0, size_bytes, PIECE_BYTES)):
        yield Piece(number, offset, min(PIECE_BYTES, size_bytes - offset))


def kind(etag: str) -> int | None:
    """How many parts an ETag is made of, 0 for one put whole; None where it says nothing."""
    if not _ETAG.match(etag):
        return None
    return int(etag.partition("-")[2] or 0)


def combined(part_digests: Sequence[bytes]) -> str:
    """The ETag of an object put in parts with these MD5 digests."""
    whole = hashlib.md5(b"".join(part_digests), usedforsecurity=False).hexdigest()
    return f"{whole}-{len(part_digests)}"
