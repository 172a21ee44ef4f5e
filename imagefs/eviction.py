"""Which cached blocks to give up, and how much a full copy may take. Pure: a listing of the cache in, the
victims out; `cachehousekeeping.py` and `cache.py` call it.

Order: what no image in use has, and in it the least recently used; then, the same way, what images in use
have: it is fetched again when it is read again. Pinned blocks never go.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable

_SLACK_BYTES = 256 * 1024 * 1024
COPIES_PERCENT = 90


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One block in the cache: allocated bytes, and when it was last used (Unix seconds)."""

    digest: bytes
    allocated_bytes: int
    used_at: float


@dataclasses.dataclass(frozen=True, slots=True)
class Space:
    """The cache's limits and its filesystem: `quota_bytes` bounds the cache, `free_bytes` are free now,
    `free_floor_bytes` must stay free."""

    quota_bytes: int
    free_bytes: int
    free_floor_bytes: int

    def excess_bytes(self, used_bytes: int) -> int:
        """What must go from a cache of `used_bytes`; 0 or less for nothing."""
        return used_bytes - self.most_bytes(used_bytes)

    def most_bytes(self, used_bytes: int) -> int:
        """What a cache of `used_bytes` could hold at most. Negative where others use even the floor."""
        return min(self.quota_bytes, used_bytes + self.free_bytes - self.free_floor_bytes)


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """`victims` in the order to remove; `short_bytes` is what is still missing when all of them are gone
    (everything left is pinned, or is not the cache's)."""

    victims: tuple[Entry, ...]
    short_bytes: int


def choose(
    entries: Iterable[Entry],
    pinned: Collection[bytes],
    in_use: Callable[[], Collection[bytes]],
    space: Space,
) -> Choice:
    """The victims that bring the cache under its quota and the filesystem above its floor. `in_use` gives the
    digests that images in use have; it is asked only when something must go.

    A fiftieth of what the cache can hold goes as well (at most 256 MiB), so that not every put finds it full.
    """
    listing = list(entries)
    used_bytes = sum(entry.allocated_bytes for entry in listing)
    needed = space.excess_bytes(used_bytes)
    if needed <= 0:
        return Choice((), 0)
    wanted = needed + min(max(0, space.most_bytes(used_bytes)) // 50, _SLACK_BYTES)
    used = in_use()
    victims = []
    for entry in sorted(listing, key=lambda entry: (entry.digest in used, entry.used_at)):
        if wanted <= 0:
            break
        if entry.digest not in pinned:
            victims.append(entry)
            wanted -= entry.allocated_bytes
    freed = sum(entry.allocated_bytes for entry in victims)
    return Choice(tuple(victims), max(0, needed - freed))


def copy_room_bytes(kept_bytes: int, used_bytes: int, space: Space, percent: int = COPIES_PERCENT) -> int:
    """How many bytes full copies may still add to a cache of `used_bytes`, of which `kept_bytes` belong to
    images in use or are pinned. 0 or less for none.

    Copies may push out what nobody uses, and nothing else. A tenth of what the cache can hold stays for reads
    of other images, more than eviction takes at once: a copy never fetches again what its own bytes pushed
    out, and copies that are complete, and pinned, leave room for blocks that somebody waits for. `percent` is
    less for what is worth less than a copy.
    """
    return space.most_bytes(used_bytes) * percent // 100 - kept_bytes


def most_copied_bytes(most_bytes: int) -> int:
    """What full copies and pins may take of a cache that can hold `most_bytes`."""
    return most_bytes * COPIES_PERCENT // 100
