"""Paths inside an image: cleaned and followed so that nothing ever leaves the image's root.

Pure; used by converter.tree (one layer), converter.flatten (all layers) and wherever a name from a tar meets
a directory tree. A path is a tuple of names, none empty, "." or ".."; the root is the empty tuple.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

MAX_LINKS = 40
"""Symbolic links followed in one path, as Linux does."""

MAX_STEPS = 8192
"""Names walked over in one path, those of its links' targets included."""

Path = tuple[bytes, ...]
Place = TypeVar("Place")
_NOT_NAMES = frozenset((b"", b".", b".."))


class LoopError(ValueError):
    """A path goes through more than MAX_LINKS symbolic links, or MAX_STEPS names."""


def is_name(name: bytes) -> bool:
    """Whether `name` can name something in a directory."""
    return name not in _NOT_NAMES


def clean(name: bytes) -> Path:
    """The names of a path from the root; "." and ".." resolved by text alone, ".." stops at the root."""
    names: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            del names[-1:]
        elif is_name(part):
            names.append(part)
    return tuple(names)


def show(path: Path) -> str:
    """A path for messages."""
    return "/" + b"/".join(path).decode("utf-8", "backslashreplace")


def follow(path: Path, root: Place, enter: Callable[[Place, bytes], tuple[Place, bytes | None]]) -> Path:
    """`path` with every symbolic link in it followed, the last name's included, scoped to the root.

    `enter(place, name)` gives the place of a name in a directory (any value that `enter` understands, also
    for what does not exist) and, if it is a symbolic link, its target. Raises LoopError.
    """
    resolved: list[bytes] = []
    places = [root]
    pending = list(reversed(path))
    links = steps = 0
    while pending:
        name = pending.pop()
        steps += 1
        if name == b"..":
            del resolved[-1:]
            del places[max(1, len(places) - 1) :]
            continue
        if not is_name(name):
            continue
        place, target = enter(places[-1], name)
        if target is None:
            resolved.append(name)
            places.append(place)
            continue
        links += 1
        if links > MAX_LINKS or steps > MAX_STEPS:
            raise LoopError(f"too many symbolic links in the path {show(path)[:200]}")
        if target.startswith(b"/"):
            resolved.clear()
            del places[1:]
        pending.extend(reversed(target.split(b"/")))
    return tuple(resolved)
