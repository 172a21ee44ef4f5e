"""When which image is copied in full. Pure: what is known of the images in, whom to start and stop out.

`fill.py` carries it out. "settled" means that the container has started and reads no longer miss: then the
copy is in nobody's way, and what it will read later is on the way before it asks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable

from agent import config
from agent.rows import SnapshotRow
from agent.snapshots import Kind


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """One image: its block digest; whether it was prefetched; whether a container has been made of it; how
    long its reads have not missed the cache, None if that was not asked."""

    block_digest: str
    prefetched: bool
    started: bool
    quiet_seconds: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """Block digests whose copies are to begin, and to end."""

    begin: tuple[str, ...]
    end: tuple[str, ...]


def decide(settings: config.Fill, candidates: Iterable[Candidate], copying: Collection[str]) -> Decision:
    """A copy that has begun goes on for as long as the image is there: new reads go first all the same, and
    only switching copies off ends it. Prefetched images are copied whatever the settings say."""
    begin, end = [], []
    for each in candidates:
        under_way = each.block_digest in copying
        if each.prefetched:
            wanted = True
        elif settings.start == "off":
            wanted = False
        elif settings.start == "immediately":
            wanted = True
        else:
            quiet = each.quiet_seconds is not None and each.quiet_seconds >= settings.settle_seconds
            wanted = under_way or (each.started and quiet)
        if wanted and not under_way:
            begin.append(each.block_digest)
        elif under_way and not wanted:
            end.append(each.block_digest)
    return Decision(tuple(begin), tuple(end))


def started_images(rows: Iterable[SnapshotRow]) -> set[str]:
    """The images that a container was made of: the nearest lazy layer below an active snapshot."""
    by_id = {row.id: row for row in rows}
    found = set()
    for row in by_id.values():
        if row.kind is not Kind.ACTIVE:
            continue
        below = by_id.get(row.parent_id) if row.parent_id is not None else None
        while below is not None:
            if below.image is not None:
                found.add(below.image)
                break
            below = by_id.get(below.parent_id) if below.parent_id is not None else None
    return found
