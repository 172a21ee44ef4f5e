"""A replica's record on disk, which is how replicas outlive the process that started them.

One folder a replica, `<endpoint>/replicas/<name>/`, with `record.json`, the engine's socket and its log. The
fleet writes a record before it starts what the record describes and after each change, whole and renamed into
place: whoever reads it, after a kill at any moment, finds one state or the next.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serving import wholefile

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """`handle` is the launcher's word for what it started ("" before it has). Times are Unix seconds; each is
    None until the thing has happened. `limit` and `request_log` are what the replica was told last."""

    name: str
    version: str
    address: tuple[str, int]
    created_at: float
    handle: str = ""
    ready_at: float | None = None
    draining_at: float | None = None
    told_at: float | None = None
    failed_at: float | None = None
    reason: str | None = None
    limit: int = 0
    phases: Mapping[str, float] = dataclasses.field(default_factory=dict)
    request_log: Mapping[str, Any] | None = None


class Shelf:
    """The folders of one endpoint's replicas. One thread."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def folder(self, name: str) -> Path:
        """Where a replica keeps its files."""
        return self._directory / name

    def read(self) -> dict[str, Record]:
        """All records. A folder without a readable one is a start that was killed before it began:
        removed."""
        found = {}
        for folder in sorted(self._directory.iterdir()):
            try:
                document: dict[str, Any] = json.loads((folder / "record.json").read_bytes())
                host, port = document.pop("address")
                found[folder.name] = Record(address=(str(host), int(port)), **document)
            except (OSError, ValueError, TypeError, KeyError, AttributeError) as exc:
                _log.warning("%s has no usable record (%s); removed", folder, exc)
                shutil.rmtree(folder, ignore_errors=True)
        return found

    def write(self, record: Record) -> None:
        """Make or replace a record."""
        folder = self.folder(record.name)
        folder.mkdir(mode=0o700, exist_ok=True)
        wholefile.write(folder / "record.json", json.dumps(dataclasses.asdict(record)))

    def remove(self, name: str) -> None:
        """A replica's folder, log and all."""
        shutil.rmtree(self.folder(name), ignore_errors=True)
