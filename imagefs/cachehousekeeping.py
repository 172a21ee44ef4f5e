"""What is done to a whole cache directory: bring it under its limits, and compare every block with its name.

Called by `cache.py` on its background thread, and by `glowplug cache` in a process of its own: the directory
is shared, so that neither needs the other. No state; every file may vanish meanwhile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping

from imagefs import cachedirectory, eviction

_log = logging.getLogger(__name__)

_LEAST_FREE_BYTES = 64 * 1024 * 1024


@dataclasses.dataclass(frozen=True, slots=True)
class Collected:
    """`kept` and `removed` blocks; `short_bytes` over the limits are pinned, or not the cache's."""

    kept: tuple[eviction.Entry, ...]
    removed: tuple[eviction.Entry, ...]
    short_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Verified:
    """`damaged` names the files (hex digests) whose bytes were wrong or could not be read; all are gone,
    except those in `stuck`."""

    blocks: int
    bytes_read: int
    damaged: tuple[str, ...]
    stuck: tuple[str, ...]


def space(files: cachedirectory.CacheDirectory, quota_bytes: int, free_floor_bytes: int) -> eviction.Space:
    """The limits, and the filesystem as it is. The floor is never less than 64 MiB or a fiftieth of it."""
    try:
        free_bytes, total_bytes = files.space()
    except OSError:
        return eviction.Space(quota_bytes, 0, 0)
    floor_bytes = max(free_floor_bytes, min(_LEAST_FREE_BYTES, total_bytes // 50))
    return eviction.Space(quota_bytes, free_bytes, floor_bytes)


def collect(
    files: cachedirectory.CacheDirectory,
    quota_bytes: int,
    free_floor_bytes: int,
    in_use: Callable[[], Collection[bytes]],
    used_at: Mapping[bytes, float],
) -> Collected:
    """Look at the directory as it is, whoever wrote it, and remove what must go. `used_at` are times of use
    that the files may not have yet."""
    entries = [
        dataclasses.replace(entry, used_at=max(entry.used_at, used_at.get(entry.digest, 0.0)))
        for entry in files.scan()
    ]
    choice = eviction.choose(
        entries,
        {digest for _, digests in files.pins() for digest in digests},
        in_use,
        space(files, quota_bytes, free_floor_bytes),
    )
    for victim in choice.victims:
        # Another process may have been first; what cannot be removed stays and is counted next time.
        with contextlib.suppress(OSError):
            os.unlink(files.block_path(victim.digest))
    gone = {victim.digest for victim in choice.victims}
    kept = tuple(entry for entry in entries if entry.digest not in gone)
    return Collected(kept, choice.victims, choice.short_bytes)


def verify(
    files: cachedirectory.CacheDirectory,
    blocks: Iterable[eviction.Entry],
    progress: Callable[[int], object] = lambda read_bytes: None,
) -> Verified:
    """Hash each block again and remove those that are wrong: they are fetched again when they are read.
    `progress` is told the bytes read of each file."""
    count = read_bytes = 0
    damaged, stuck = [], []
    for entry in blocks:
        path = files.block_path(entry.digest)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # evicted meanwhile
        except OSError as exc:
            _log.warning("block cache: cannot open %s: %s", path, exc)
            stuck.append(entry.digest.hex())
            continue
        try:
            # The disk's bytes, not what a reader left in memory; nor shall a whole cache fill the memory.
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            length = os.fstat(fd).st_size
            intact = cachedirectory.hash_file(fd) == entry.digest
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as exc:
            _log.warning("block cache: cannot read %s: %s", path, exc)
            intact, length = False, 0
        finally:
            os.close(fd)
        count += 1
        read_bytes += length
        progress(length)
        if not intact:
            damaged.append(entry.digest.hex())
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass
            except OSError as exc:
                _log.warning("block cache: cannot remove %s: %s", path, exc)
                stuck.append(entry.digest.hex())
    return Verified(count, read_bytes, tuple(damaged), tuple(stuck))
