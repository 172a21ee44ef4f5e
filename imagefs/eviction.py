"""Which cached blocks to give up. Pure: a listing of the cache in, the victims out; `cache.py` calls it.

Order: blocks of removed images, then least recently used. Pinned blocks never go.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable

FORGOTTEN = 0.0
"""`used_at` of a block whose images were removed: before every real time of use."""
_SLACK_BYTES = 256 * 1024 * 1024


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One block in the cache: allocated bytes, and when it was last used (Unix seconds)."""

    digest: bytes
    allocated_bytes: int
    used_at: float


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """`victims` in the order to remove; `short_bytes` is what is still missing when all of them are gone
    (everything left is pinned, or is not the cache's)."""

    victims: tuple[Entry, ...]
    short_bytes: int


def choose(
    entries: Iterable[Entry],
    pinned: Collection[bytes],
    *,
    quota_bytes: int,
    free_bytes: int,
    free_floor_bytes: int,
) -> Choice:
    """The victims that bring the cache under its quota and the filesystem above its floor.

    Over the quota, a fiftieth of it more goes (at most 256 MiB), so that not every put finds it full again.
    """
    listing = list(entries)
    over_quota = sum(entry.allocated_bytes for entry in listing) - quota_bytes
    needed = max(over_quota, free_floor_bytes - free_bytes)
    if needed <= 0:
        return Choice((), 0)
    wanted = needed + min(quota_bytes // 50, _SLACK_BYTES)
    victims = []
    for entry in sorted(listing, key=lambda entry: entry.used_at):
        if wanted <= 0:
            break
        if entry.digest not in pinned:
            victims.append(entry)
            wanted -= entry.allocated_bytes
    freed = sum(entry.allocated_bytes for entry in victims)
    return Choice(tuple(victims), max(0, needed - freed))
