"""One SQLite file: connections, transactions, damage. What is in it is store.py's business.

One connection writes, under a lock; readers have connections of their own, which are kept for the next one,
and see the last finished transaction (WAL), so that nobody waits for a disk to read. `synchronous = FULL`: a
transaction that has ended is on the disk. Any thread may call anything.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from imagefs import errors


class CorruptStoreError(errors.IntegrityError):
    """The file is not a database of ours, or it is damaged. Whoever opened it moves it aside and rebuilds."""


class Database:
    """Open it with `Database.open`. Everything raises UnavailableError when the disk is full, read-only or
    failing, and CorruptStoreError when the file turns out to be damaged."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._write_lock = threading.Lock()
        self._lock = threading.Lock()  # of the two below; never held while a disk works
        self._readers: list[sqlite3.Connection] = []
        self._closed = False
        self._writer = self._connect()

    @classmethod
    def open(cls, path: Path, schemas: Sequence[str]) -> Database:
        """Open or create; the statements of each version that the file lacks are carried out. There are as
        many versions as `schemas`. CorruptStoreError; ConfigurationError when the file has a higher one."""
        with _errors(path):
            database = cls(path)
            try:
                database._check(schemas)
            except BaseException:
                database.close()
                raise
        return database

    def close(self) -> None:
        """Idempotent; nothing else may be under way."""
        with self._write_lock, self._lock:
            self._closed = True
            for connection in (*self._readers, self._writer):
                connection.close()
            self._readers.clear()

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction, alone. It is undone when the block raises."""
        with self._write_lock, _errors(self._path):
            self._refuse_closed()
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection for one query."""
        with _errors(self._path):
            with self._lock:
                self._refuse_closed()
                connection = self._readers.pop() if self._readers else None
            connection = connection or self._connect()
            try:
                yield connection
            finally:
                with self._lock:
                    if self._closed:
                        connection.close()
                    else:
                        self._readers.append(connection)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=10, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA cache_size = -512")
        return connection

    def _check(self, schemas: Sequence[str]) -> None:
        for (verdict,) in self._writer.execute("PRAGMA quick_check(1)"):
            if verdict != "ok":
                raise CorruptStoreError(f"{self._path} is damaged: {verdict}")
        (found,) = self._writer.execute("PRAGMA user_version").fetchone()
        if found > len(schemas):
            raise errors.ConfigurationError(
                f"{self._path} was written by a newer version of glowplug (schema {found}, this one knows "
                f"{len(schemas)}); install that version again"
            )
        self._writer.execute("PRAGMA journal_mode = WAL")
        if found and not self._writer.execute("SELECT 1 FROM sqlite_schema").fetchone():
            raise CorruptStoreError(f"{self._path} is damaged: it has a version and no tables")
        for version, schema in enumerate(schemas[found:], found + 1):
            self._writer.executescript(f"BEGIN; {schema} PRAGMA user_version = {version}; COMMIT;")

    def _refuse_closed(self) -> None:
        if self._closed:
            raise errors.UnavailableError("the agent's database is closed: the agent is stopping")


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.OperationalError, sqlite3.ProgrammingError) as exc:
        raise errors.UnavailableError(f"{path}: {exc}; is its disk full, read-only or failing?") from exc
    except sqlite3.DatabaseError as exc:
        raise CorruptStoreError(f"{path} is damaged: {exc}") from exc
