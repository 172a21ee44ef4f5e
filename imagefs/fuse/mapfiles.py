"""Block maps, and tables of boot packs, as files of one folder, named by the hex of their digests.

The device server has one (STATE/maps: what is attached, given by clients or read from origins), the agent
another (root/maps: this node's images, so that a reboot needs no registry). Any thread. Not synced: what a
crash leaves damaged is noticed by its name and removed; the next who asks gets it from the origin.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from imagefs import errors
from imagefs.fuse.devices import write_atomically


class MapFiles:
    """See the module."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise errors.ConfigurationError(f"cannot make {directory}: {exc.strerror}") from exc

    def keep(self, map_digest: str, data: bytes) -> None:
        """Write a verified map. ConfigurationError if the disk does not take it."""
        path = self._path(map_digest)
        try:
            if not path.exists():
                write_atomically(path, data)
        except OSError as exc:
            raise errors.ConfigurationError(f"cannot write {path}: {exc.strerror}") from exc

    def read(self, map_digest: str) -> bytes | None:
        """The map; None where it is missing or damaged."""
        try:
            return self.read_or_refuse(map_digest)
        except (OSError, errors.IntegrityError):
            return None

    def read_or_refuse(self, map_digest: str) -> bytes | None:
        """The map; None where it is missing. IntegrityError for other bytes, which are removed; OSError."""
        path = self._path(map_digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        if hashlib.sha256(data).hexdigest() != path.name:
            self.remove(map_digest)
            raise errors.IntegrityError(f"{path}: its bytes are not {map_digest}")
        return data

    def remove(self, map_digest: str) -> None:
        """Of one that is not there: nothing."""
        try:
            self._path(map_digest).unlink(missing_ok=True)
        except OSError:
            return  # a disk that is read-only; `keep_only` sees it again

    def keep_only(self, map_digests: Iterable[str]) -> int:
        """Remove all others, and what a killed writer had not finished. How many."""
        wanted = {self._path(digest).name for digest in map_digests}
        extra = [path for path in self._directory.iterdir() if path.name not in wanted]
        for path in extra:
            path.unlink(missing_ok=True)
        return len(extra)

    def clear(self) -> None:
        """Remove all, but for what another process is writing."""
        for path in self._directory.iterdir():
            if not path.name.startswith("."):
                path.unlink(missing_ok=True)

    def _path(self, map_digest: str) -> Path:
        return self._directory / map_digest.partition(":")[2]
