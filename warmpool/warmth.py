"""What makes a node warm: which images it should have, and what is to be done until it has them. Pure.

A node is warm when its agent says of every required image that all of it is cached (`complete`: a start needs
no block, hence no boot pack and no metadata, from anywhere) and pinned, so that it stays. Who is no longer
wanted is let go of, but only what this pool asked for: pins of others are theirs.

Called by the controller at each look; `nodeagents` carries out the tasks and brings the readings.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Collection, Iterable, Mapping, Sequence

from warmpool import errors


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """An image for one node class. `chance` is how likely a node's next work needs it; a node without a
    `required` one is not warm."""

    image: str
    chance: float
    required: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Cached:
    """What an agent says of an image. `error`: why its copy does not get on, "" while it does."""

    present_bytes: int
    total_bytes: int
    complete: bool
    pinned: bool
    prefetched: bool
    error: str = ""


class Verb(enum.Enum):
    """What an agent is asked to do with an image."""

    PREFETCH = "prefetch"
    PIN = "pin"
    UNPIN = "unpin"


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    verb: Verb
    image: str


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """What one node's agent said at one look. `images`: None for what it does not know. `error`: why it could
    not be asked, "" if it could."""

    images: Mapping[str, Cached | None] = dataclasses.field(default_factory=dict)
    error: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """`missing` says in words what a node lacks; it is warm when that is nothing."""

    missing: tuple[str, ...]
    tasks: tuple[Task, ...]

    @property
    def warm(self) -> bool:
        return not self.missing


def parse(document: object, where: str) -> Cached:
    """An agent's answer about one image. InvalidInputError."""
    if not isinstance(document, Mapping):
        raise errors.InvalidInputError(f"{where}: not a JSON object")
    present, total = document.get("present_bytes"), document.get("total_bytes")
    flags = [document.get(name) for name in ("complete", "pinned", "prefetched")]
    if type(present) is not int or type(total) is not int or present < 0 or total < present:
        raise errors.InvalidInputError(f"{where}: present_bytes and total_bytes are {present!r} of {total!r}")
    if not all(isinstance(each, bool) for each in flags):
        raise errors.InvalidInputError(f"{where}: complete, pinned and prefetched must be true or false")
    error = document.get("error")
    complete, pinned, prefetched = (each is True for each in flags)
    return Cached(present, total, complete, pinned, prefetched, str(error)[:300] if error else "")


def choose(wanted: Iterable[Wanted], sizes: Mapping[str, int], disk_bytes: int) -> tuple[Wanted, ...]:
    """What fits on a node, best first: the required images, then the others by chance of use per byte. A size
    that is not known yet counts as nothing: the node that fetches it will tell. An image that is wanted
    several times counts once, as what asks most of it."""
    merged: dict[str, Wanted] = {}
    for each in wanted:
        old = merged.get(each.image)
        if old is not None:
            absent = (1 - min(1.0, old.chance)) * (1 - min(1.0, each.chance))
            each = Wanted(each.image, 1 - absent, old.required or each.required)
        merged[each.image] = each

    def order(each: Wanted) -> tuple[bool, float, str]:
        return not each.required, -each.chance / max(1, sizes.get(each.image, 1)), each.image

    chosen: list[Wanted] = []
    left_bytes = disk_bytes
    for each in sorted(merged.values(), key=order):
        size_bytes = sizes.get(each.image, 0)
        if each.required or size_bytes <= left_bytes:
            chosen.append(each)
            left_bytes -= size_bytes
    return tuple(chosen)


def judge(chosen: Sequence[Wanted], reading: Reading, unwanted: Collection[str] = ()) -> Verdict:
    """What a node that could be asked lacks, and what to ask of it next. `unwanted` is what this pool asked
    for once and wants no longer."""
    missing: list[str] = []
    tasks: list[Task] = []
    for each in chosen:
        cached = reading.images.get(each.image)
        if cached is None or not cached.prefetched:
            tasks.append(Task(Verb.PREFETCH, each.image))
        if cached is None or not cached.pinned:
            tasks.append(Task(Verb.PIN, each.image))
        lack = _lack(each.image, cached)
        if lack and each.required:
            missing.append(lack)
    for image in unwanted:
        kept = reading.images.get(image)
        if kept is not None and (kept.pinned or kept.prefetched):
            tasks.append(Task(Verb.UNPIN, image))
    # Room first: an agent refuses pins beyond its quota.
    tasks.sort(key=lambda task: task.verb is not Verb.UNPIN)
    return Verdict(tuple(missing), tuple(tasks))


def _lack(image: str, cached: Cached | None) -> str:
    if cached is None:
        return f"{image}: not there"
    if not cached.complete:
        said = f": {cached.error}" if cached.error else ""
        return f"{image}: {cached.present_bytes} of {cached.total_bytes} bytes{said}"
    return "" if cached.pinned else f"{image}: not pinned"
