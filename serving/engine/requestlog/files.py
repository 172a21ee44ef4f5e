"""Parquet files: begun, filled, closed by size or age, and only then called by their names.

Used by `writer`, on its one thread. A file is written as `.NAME.part`, held by a flock for as long as its
writer lives, synced, and renamed: whoever lists the directory sees whole files only. Parts that nobody holds
are what a killed writer left, and are removed at the start.

When the disk is full (or gone) the file under way is given up, its records are counted as dropped, and for
`_PAUSE_SECONDS` all others are, too; then it is tried again. Nothing is retried: a log that queues without
bound is worse than a gap in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from serving.engine.requestlog import columns
from serving.engine.requestlog.record import Record

_GROUP_BYTES = 8 << 20
_GROUP_RECORDS = 2_000
"""A row group is written when so much waits in memory."""
_PAUSE_SECONDS = 10.0
_PART = ".part"


@dataclasses.dataclass(slots=True)
class Totals:
    """Since the process began. `trouble`: why records are dropped now."""

    written: int = 0
    dropped: int = 0
    files: int = 0
    written_bytes: int = 0
    trouble: str | None = None


def add(one: Totals, other: Totals) -> Totals:
    """Both together; the trouble of either."""
    return Totals(
        one.written + other.written,
        one.dropped + other.dropped,
        one.files + other.files,
        one.written_bytes + other.written_bytes,
        one.trouble or other.trouble,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """`directory` is where files go, `service` and `instance` whose they are."""

    directory: Path
    service: str
    instance: str
    file_bytes: int
    file_seconds: float


class _File:
    """One file under way."""

    def __init__(self, path: Path, now: float) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path, self.began = path, now
        self.records = 0
        self._part = path.with_name(f".{path.name}{_PART}")
        descriptor = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._handle = os.fdopen(descriptor, "wb")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            self._parquet: Any = pq.ParquetWriter(self._handle, columns.SCHEMA, compression="zstd")
        except BaseException:
            self.give_up()
            raise

    @property
    def size_bytes(self) -> int:
        return self._handle.tell()

    def write(self, records: list[Record], instance: str) -> None:
        self._parquet.write_batch(columns.batch(records, instance))
        self.records += len(records)

    def close(self) -> int:
        """Its size, once it has its name."""
        self._parquet.close()
        self._handle.flush()
        os.fsync(self._handle.fileno())
        size = self._handle.tell()
        self._part.rename(self.path)
        self._handle.close()
        return size

    def give_up(self) -> None:
        with contextlib.suppress(OSError):
            self._part.unlink()
        with contextlib.suppress(OSError):  # what is buffered has no room still
            self._handle.close()


class Files:
    """`settled` is called with each whole file and the number of its records."""

    def __init__(
        self, settings: Settings, totals: Totals, settled: Callable[[Path, int], None] | None = None
    ) -> None:
        self._settings, self._totals, self._settled = settings, totals, settled
        self._file: _File | None = None
        self._waiting: list[Record] = []
        self._waiting_bytes = 0
        self._not_before = 0.0
        self._count = 0
        _remove_parts(settings.directory)

    def add(self, record: Record) -> None:
        """Keep it, or drop it."""
        now = time.monotonic()
        if now < self._not_before:
            self._totals.dropped += 1
            return
        try:
            if self._file is None:
                self._file = _File(self._name(time.time()), now)
            self._waiting.append(record)
            self._waiting_bytes += len(record.request_body) + len(record.response_body)
            if self._waiting_bytes >= _GROUP_BYTES or len(self._waiting) >= _GROUP_RECORDS:
                self._flush(self._file)
        except OSError as exc:
            self._failed(exc)
        self.turn()

    def turn(self) -> None:
        """Close a file that is due. To be called now and then."""
        file = self._file
        if file is None:
            return
        old = time.monotonic() - file.began >= self._settings.file_seconds
        if old or file.size_bytes + self._waiting_bytes >= self._settings.file_bytes:
            self.close()

    def close(self) -> None:
        """Close what is under way."""
        file = self._file
        if file is None:
            return
        try:
            self._flush(file)
            size = file.close()
        except OSError as exc:
            self._failed(exc)
            return
        self._file = None
        self._totals.trouble = None
        if self._settled is not None:
            self._settled(file.path, file.records)
        else:
            self._totals.written += file.records
            self._totals.files += 1
            self._totals.written_bytes += size

    def _flush(self, file: _File) -> None:
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        if waiting:
            try:
                file.write(waiting, self._settings.instance)
            except OSError:
                self._totals.dropped += len(waiting)
                raise

    def _failed(self, exc: OSError) -> None:
        file, self._file = self._file, None
        lost = len(self._waiting) + (file.records if file is not None else 0)
        self._waiting, self._waiting_bytes = [], 0
        if file is not None:
            file.give_up()
        # Without a file, it is the record that wanted one.
        self._totals.dropped += lost if file is not None else 1
        self._totals.trouble = f"{self._settings.directory}: {exc.strerror or exc}"
        self._not_before = time.monotonic() + _PAUSE_SECONDS

    def _name(self, now: float) -> Path:
        """Directories as readers of Parquet know partitions."""
        moment = time.gmtime(now)
        self._count += 1
        writer = f"{self._settings.instance}-{os.getpid()}-{self._count}"
        return (
            self._settings.directory
            / f"endpoint={self._settings.service}"
            / time.strftime("date=%Y-%m-%d", moment)
            / f"{time.strftime('%H%M%S', moment)}-{writer}.parquet"
        )


def whole(directory: Path) -> list[tuple[Path, int]]:
    """The files that have their names, oldest first, and how many records each has. One that cannot be read
    is removed: it would be in the way of every writer."""
    found = []
    for path in sorted(directory.glob("endpoint=*/date=*/*.parquet")):
        try:
            found.append((path, int(pq.read_metadata(path).num_rows)))
        except (OSError, pa.ArrowInvalid):
            path.unlink(missing_ok=True)
    return found


def _remove_parts(directory: Path) -> None:
    """Those whose writer is no more."""
    for part in directory.glob(f"endpoint=*/date=*/.*{_PART}"):
        with contextlib.suppress(OSError), part.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()
