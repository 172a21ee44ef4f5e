"""Paths inside an image: cleaned and followed so that nothing ever leaves the image's root.

Pure; used by converter.tree (one layer), converter.flatten (all layers) and wherever a name from a tar meets
a directory tree. A path is a tuple of names, none empty, "." or ".."; the root is the empty tuple.
"""

from __future__ import annotations

from collections.abc import Callable

MAX_LINKS = 40
"""Symbolic links followed in one path, as Linux does."""

Path = tuple[bytes, ...]
_NOT_NAMES = frozenset((b"", b".", b".."))


class LoopError(ValueError):
    """A path goes through more than MAX_LINKS symbolic links."""


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


def follow(path: Path, readlink: Callable[[Path], bytes | None]) -> Path:
    """`path` with every symbolic link in it followed, the last name's included, scoped to the root.

    `readlink` gives the target of the link at a path whose parents are no links, None for all else, what does
    not exist included. Raises LoopError.
    """
    resolved: list[bytes] = []
    pending = list(reversed(path))
    links = 0
    while pending:
        name = pending.pop()
        if name == b"..":
            del resolved[-1:]
            continue
        if not is_name(name):
            continue
        resolved.append(name)
        target = readlink(tuple(resolved))
        if target is None:
            continue
        links += 1
        if links > MAX_LINKS:
            raise LoopError(f"more than {MAX_LINKS} symbolic links in the path {show(path)}")
        resolved.pop()
        if target.startswith(b"/"):
            resolved.clear()
        pending.extend(reversed(target.split(b"/")))
    return tuple(resolved)
