"""What a tree of inodes may take in memory: its entries, and the attributes that it keeps beside their names.

Pure; one for each layer's tar, in converter.tree and converter.flatten. A compressed layer of a few megabytes
can hold a thousand times as many bytes of xattrs and link targets, and all of them stay until the layer is
done.
"""

from __future__ import annotations

from collections.abc import Mapping

from converter import errors, tarentry
from converter.limits import Limits
from converter.rootedpath import Path
from converter.tarentry import Entry

_NAME_BYTES = 48
"""What a name of its own takes beside its bytes."""


class Budget:
    """Counts up; LimitError, naming the entry and the flag, when a limit is passed."""

    def __init__(self, limits: Limits) -> None:
        self.entries = 0
        self._attribute_bytes = 0
        self._limits = limits

    def count_entry(self, entry: Entry) -> None:
        """One more inode."""
        self.entries += 1
        if self.entries > self._limits.max_entries:
            raise errors.LimitError(
                f"{tarentry.describe(entry.name, entry.offset)}: {self.entries} entries, implied directories"
                f" included, the limit is {self._limits.max_entries} (--max-entries)"
            )

    def count_attributes(self, target: bytes, xattrs: Mapping[bytes, bytes] | None, entry: Entry) -> None:
        """A link's target and extended attributes that are kept."""
        if target or xattrs:
            held = sum(len(name) + len(value) + 2 * _NAME_BYTES for name, value in (xattrs or {}).items())
            self._add(len(target) + held, entry)

    def count_path(self, path: Path, entry: Entry) -> None:
        """A path that is kept, name by name."""
        self._add(sum(len(name) + _NAME_BYTES for name in path), entry)

    def _add(self, count: int, entry: Entry) -> None:
        self._attribute_bytes += count
        allowed = self._limits.max_attribute_bytes
        if self._attribute_bytes > allowed:
            raise errors.LimitError(
                f"{tarentry.describe(entry.name, entry.offset)}: {self._attribute_bytes} bytes of xattrs "
                f"and link targets, the limit is {allowed} (--max-attribute-bytes)"
            )
