"""The agent's memory: snapshots, and the block images whose layers some of them are. SQLite, one file.

Called by snapshotter.py (snapshots) and images.py (images), from any thread. One connection writes, under a
lock, each change in a transaction of its own that is on the disk when the method returns (containerd has
written its half by then, too, and would miss ours). Readers have connections of their own and see the last
finished transaction (WAL), so that nobody waits for a disk to read.

Invariants, also kept by the schema: a name is unique; a parent is committed and exists as long as its
children; an id is never used twice, so that a folder named by it is never mistaken for another's. A lazy
snapshot names its block image and the layer's index in it. A layer's mount number belongs to its map digest,
whatever images it is part of, and is given back with the last of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from agent import errors as agent_errors
from agent import snapshots
from agent.snapshots import Kind, Usage
from imagefs import errors

SCHEMA_VERSION = 1

_SCHEMA = """
CREATE TABLE snapshots (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    name       TEXT    NOT NULL UNIQUE,
    kind       INTEGER NOT NULL CHECK (kind BETWEEN 1 AND 3),
    parent     INTEGER REFERENCES snapshots (id),
    labels     TEXT    NOT NULL,
    created_ns INTEGER NOT NULL,
    updated_ns INTEGER NOT NULL,
    inodes     INTEGER,
    size_bytes INTEGER,
    image      TEXT    REFERENCES images (block_digest),
    layer      INTEGER,
    broken     TEXT
);
CREATE INDEX snapshots_parent ON snapshots (parent);
CREATE INDEX snapshots_image ON snapshots (image) WHERE image IS NOT NULL;
CREATE TABLE images (
    block_digest  TEXT PRIMARY KEY,
    source_digest TEXT NOT NULL,
    reference     TEXT NOT NULL,
    origin_ref    TEXT NOT NULL,
    created_ns    INTEGER NOT NULL,
    pinned        INTEGER NOT NULL,
    prefetched    INTEGER NOT NULL
);
CREATE TABLE mount_numbers (
    map_digest TEXT PRIMARY KEY,
    number     INTEGER NOT NULL UNIQUE
);
CREATE TABLE layers (
    image       TEXT    NOT NULL REFERENCES images (block_digest) ON DELETE CASCADE,
    number      INTEGER NOT NULL,
    chain_id    TEXT    NOT NULL,
    diff_id     TEXT    NOT NULL,
    map_digest  TEXT    NOT NULL REFERENCES mount_numbers (map_digest),
    map_size    INTEGER NOT NULL,
    blob_digest TEXT    NOT NULL,
    blob_size   INTEGER NOT NULL,
    PRIMARY KEY (image, number)
);
CREATE INDEX layers_map ON layers (map_digest);
CREATE VIEW snapshot_rows AS
    SELECT s.id, s.name, s.kind, s.parent AS parent_id, coalesce(p.name, '') AS parent, s.labels,
           s.created_ns, s.updated_ns, s.inodes, s.size_bytes, s.image, s.layer, s.broken
    FROM snapshots s LEFT JOIN snapshots p ON p.id = s.parent;
"""

_CHAIN = """
WITH RECURSIVE line (id, depth) AS (
    SELECT id, 0 FROM snapshots WHERE name = ?
    UNION ALL
    SELECT a.parent, depth + 1 FROM line JOIN snapshots a USING (id) WHERE a.parent IS NOT NULL
)
SELECT snapshot_rows.* FROM snapshot_rows JOIN line USING (id) ORDER BY line.depth
"""


class CorruptStoreError(errors.IntegrityError):
    """The file is not a database of ours, or it is damaged. Whoever opened it moves it aside and rebuilds."""


@dataclasses.dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer of a block image. `mount_number`: its mount point below root/layers, the same for every
    image with the same map; given by `Store.put_image` (what is passed in there does not matter)."""

    chain_id: str
    diff_id: str
    map_digest: str
    map_size: int
    blob_digest: str
    blob_size: int
    mount_number: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class ImageRow:
    """A block image that is in use, wanted or prefetched. `block_digest` (of its manifest) is the key,
    `source_digest` the ordinary image's manifest, `reference` what was asked for, `origin_ref` the REF where
    the layer blobs lie; layers bottom first."""

    block_digest: str
    source_digest: str
    reference: str
    origin_ref: str
    layers: tuple[LayerRow, ...]
    created_ns: int
    pinned: bool = False
    prefetched: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class SnapshotRow:
    """A snapshot. `parent` is the name of `parent_id`, empty for none. `image` and `layer` (its index, bottom
    first) are set for a lazy one, `usage` once it is known, `broken` says why it is quarantined."""

    id: int
    name: str
    kind: Kind
    parent_id: int | None
    parent: str
    labels: Mapping[str, str]
    created_ns: int
    updated_ns: int
    usage: Usage | None = None
    image: str | None = None
    layer: int | None = None
    broken: str | None = None

    @property
    def info(self) -> snapshots.Info:
        """What containerd is told of it."""
        return snapshots.Info(
            self.name, self.parent, self.kind, self.labels, self.created_ns, self.updated_ns
        )


class Store:
    """Open it with `Store.open`. Every method raises UnavailableError when the disk is full, read-only or
    failing, and CorruptStoreError when the file turns out to be damaged."""

    def __init__(self, path: Path, now_ns: Callable[[], int]) -> None:
        self._path = path
        self._now_ns = now_ns
        self._lock = threading.Lock()
        self._readers: list[sqlite3.Connection] = []
        self._closed = False
        self._writer = self._connect()

    @classmethod
    def open(cls, path: Path, now_ns: Callable[[], int] = time.time_ns) -> Store:
        """Open or create. Raises CorruptStoreError, ConfigurationError when a newer version wrote it."""
        with _errors(path):
            store = cls(path, now_ns)
            try:
                store._prepare()
            except BaseException:
                store.close()
                raise
        return store

    def close(self) -> None:
        """Idempotent; nothing else may be under way."""
        with self._lock:
            self._closed = True
            for connection in (*self._readers, self._writer):
                connection.close()
            self._readers.clear()

    # --- snapshots ---------------------------------------------------------------------------------------

    def insert(
        self,
        name: str,
        kind: Kind,
        parent: str,
        labels: Mapping[str, str],
        *,
        image: str | None = None,
        layer: int | None = None,
        place: Callable[[int], None] | None = None,
    ) -> SnapshotRow:
        """A new snapshot. `place` is called with its id before the transaction ends: when it raises, there
        is no such snapshot. NotFoundError: no such parent; InvalidInputError: it is not committed;
        AlreadyExistsError: the name is taken; NotFoundError, too, when `image` was forgotten meanwhile."""
        now = self._now_ns()
        with self._writing() as database:
            parent_id = self._parent_id(database, parent)
            if _maybe(database, name) is not None:
                raise agent_errors.AlreadyExistsError(f"snapshot {name} exists already")
            if image is not None and not _images(database, image):
                raise errors.NotFoundError(f"no block image {image} is known here")
            cursor = database.execute(
                "INSERT INTO snapshots (name, kind, parent, labels, created_ns, updated_ns, image, layer)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (name, int(kind), parent_id, _encode(labels), now, now, image, layer),
            )
            assert cursor.lastrowid is not None
            if place is not None:
                place(cursor.lastrowid)
            return _by_name(database, name)

    def get(self, name: str) -> SnapshotRow:
        """By name. NotFoundError."""
        with self._reading() as database:
            return _by_name(database, name)

    def by_id(self, number: int) -> SnapshotRow:
        """By id. NotFoundError."""
        with self._reading() as database:
            for row in database.execute("SELECT * FROM snapshot_rows WHERE id = ?", (number,)):
                return _snapshot(row)
        raise errors.NotFoundError(f"no snapshot has the id {number}")

    def chain(self, name: str) -> list[SnapshotRow]:
        """The snapshot and its ancestors, in this order. NotFoundError."""
        with self._reading() as database:
            rows = database.execute(_CHAIN, (name,)).fetchall()
        if not rows:
            raise _absent(name)
        return [_snapshot(row) for row in rows]

    def children(self, name: str) -> list[SnapshotRow]:
        """What has the snapshot `name` as its parent; for the empty name, what has none. By id."""
        with self._reading() as database:
            rows = database.execute(
                "SELECT * FROM snapshot_rows WHERE parent_id IS (SELECT id FROM snapshots WHERE name = ?)"
                " AND (parent_id IS NULL) = (? = '') ORDER BY id",
                (name, name),
            ).fetchall()
        return [_snapshot(row) for row in rows]

    def walk(self) -> list[SnapshotRow]:
        """All, by id: parents come before their children, but for what was given a parent at its commit."""
        with self._reading() as database:
            return [
                _snapshot(row)
                for row in database.execute("SELECT * FROM snapshot_rows ORDER BY id").fetchall()
            ]

    def settled_ids(self) -> set[int]:
        """The ids in use once every change that is under way now has ended. For whoever has listed folders
        and wants to know which of them nobody owns: `insert` places a folder before its row is seen."""
        with self._writing() as database:
            return {number for (number,) in database.execute("SELECT id FROM snapshots")}

    def commit(
        self, key: str, name: str, labels: Mapping[str, str], usage: Usage, parent: str = ""
    ) -> SnapshotRow:
        """The active snapshot `key` becomes the committed `name`, with these labels only. `parent` may be
        given to one that had none. NotFoundError, AlreadyExistsError, InvalidInputError (another parent),
        FailedPreconditionError (not active)."""
        now = self._now_ns()
        with self._writing() as database:
            row = _by_name(database, key)
            if _maybe(database, name) is not None:
                raise agent_errors.AlreadyExistsError(f"snapshot {name} exists already")
            if row.kind is not Kind.ACTIVE:
                raise agent_errors.FailedPreconditionError(
                    f"snapshot {key} is {row.kind.name.lower()}; only an active one can be committed"
                )
            if parent and row.parent not in ("", parent):
                raise errors.InvalidInputError(
                    f"snapshot {key} has a parent already; commit cannot change it"
                )
            parent_id = self._parent_id(database, parent) if parent else row.parent_id
            database.execute(
                "UPDATE snapshots SET name = ?, kind = ?, parent = ?, labels = ?, created_ns = ?,"
                " updated_ns = ?, inodes = ?, size_bytes = ? WHERE id = ?",
                (
                    name,
                    int(Kind.COMMITTED),
                    parent_id,
                    _encode(labels),
                    now,
                    now,
                    usage.inodes,
                    usage.size_bytes,
                    row.id,
                ),
            )
            return _by_name(database, name)

    def update(self, name: str, change: Callable[[Mapping[str, str]], Mapping[str, str]]) -> SnapshotRow:
        """Replace labels by what `change` makes of them, undisturbed. NotFoundError."""
        now = self._now_ns()
        with self._writing() as database:
            row = _by_name(database, name)
            database.execute(
                "UPDATE snapshots SET labels = ?, updated_ns = ? WHERE id = ?",
                (_encode(change(row.labels)), now, row.id),
            )
            return _by_name(database, name)

    def remove(self, name: str) -> SnapshotRow:
        """Forget a snapshot; returns what it was. NotFoundError, FailedPreconditionError (has children)."""
        with self._writing() as database:
            row = _by_name(database, name)
            for (child,) in database.execute(
                "SELECT name FROM snapshots WHERE parent = ? LIMIT 1", (row.id,)
            ):
                raise agent_errors.FailedPreconditionError(
                    f"cannot remove snapshot {name}: it is the parent of {child}; remove that first"
                )
            database.execute("DELETE FROM snapshots WHERE id = ?", (row.id,))
            return row

    def set_usage(self, number: int, usage: Usage) -> None:
        """Keep what a snapshot takes; of one that is gone, nothing."""
        with self._writing() as database:
            database.execute(
                "UPDATE snapshots SET inodes = ?, size_bytes = ? WHERE id = ?",
                (usage.inodes, usage.size_bytes, number),
            )

    def set_broken(self, number: int, why: str | None) -> None:
        """Put a snapshot in quarantine, saying why, or take it out (None)."""
        with self._writing() as database:
            database.execute("UPDATE snapshots SET broken = ? WHERE id = ?", (why, number))

    # --- block images ------------------------------------------------------------------------------------

    def put_image(self, image: ImageRow) -> ImageRow:
        """Add or replace; each layer gets its mount number. Returns what is stored now."""
        with self._writing() as database:
            database.execute(
                "INSERT INTO images VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (block_digest) DO UPDATE SET"
                " source_digest = excluded.source_digest, reference = excluded.reference,"
                " origin_ref = excluded.origin_ref, created_ns = excluded.created_ns,"
                " pinned = excluded.pinned, prefetched = excluded.prefetched",
                (
                    image.block_digest,
                    image.source_digest,
                    image.reference,
                    image.origin_ref,
                    image.created_ns,
                    image.pinned,
                    image.prefetched,
                ),
            )
            database.execute("DELETE FROM layers WHERE image = ?", (image.block_digest,))
            _number_mounts(database, image.layers)
            database.executemany(
                "INSERT INTO layers VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        image.block_digest,
                        number,
                        layer.chain_id,
                        layer.diff_id,
                        layer.map_digest,
                        layer.map_size,
                        layer.blob_digest,
                        layer.blob_size,
                    )
                    for number, layer in enumerate(image.layers)
                ],
            )
            _drop_unused_numbers(database)
            return _images(database, image.block_digest)[0]

    def image(self, block_digest: str) -> ImageRow | None:
        """One image, or None."""
        with self._reading() as database:
            found = _images(database, block_digest)
        return found[0] if found else None

    def images(self) -> list[ImageRow]:
        """All, oldest first."""
        with self._reading() as database:
            return _images(database, None)

    def references(self, block_digest: str) -> int:
        """How many snapshots are layers of this image."""
        with self._reading() as database:
            count = database.execute(
                "SELECT count(*) FROM snapshots WHERE image = ?", (block_digest,)
            ).fetchone()[0]
        return int(count)

    def remove_image(self, block_digest: str) -> None:
        """Forget an image; of one that is not there, nothing. FailedPreconditionError: snapshots use it."""
        with self._writing() as database:
            for (name,) in database.execute(
                "SELECT name FROM snapshots WHERE image = ? LIMIT 1", (block_digest,)
            ):
                raise agent_errors.FailedPreconditionError(
                    f"block image {block_digest} is in use by snapshot {name}; remove that first"
                )
            database.execute("DELETE FROM images WHERE block_digest = ?", (block_digest,))
            _drop_unused_numbers(database)

    def set_pinned(self, block_digest: str, pinned: bool) -> None:
        """A pinned image is kept, snapshots or not. NotFoundError."""
        self._flag("UPDATE images SET pinned = ? WHERE block_digest = ?", block_digest, pinned)

    def set_prefetched(self, block_digest: str, prefetched: bool) -> None:
        """A prefetched image is kept until a snapshot of it has come and gone. NotFoundError."""
        self._flag("UPDATE images SET prefetched = ? WHERE block_digest = ?", block_digest, prefetched)

    # --- inside ------------------------------------------------------------------------------------------

    def _flag(self, statement: str, block_digest: str, value: bool) -> None:
        with self._writing() as database:
            if not database.execute(statement, (value, block_digest)).rowcount:
                raise errors.NotFoundError(f"no block image {block_digest} is known here")

    def _parent_id(self, database: sqlite3.Connection, parent: str) -> int | None:
        if not parent:
            return None
        row = _maybe(database, parent)
        if row is None:
            raise errors.NotFoundError(f"parent snapshot {parent} does not exist")
        if row.kind is not Kind.COMMITTED:
            raise errors.InvalidInputError(f"parent snapshot {parent} is not committed")
        return row.id

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=10, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA cache_size = -512")
        return connection

    def _prepare(self) -> None:
        for (verdict,) in self._writer.execute("PRAGMA quick_check(1)"):
            if verdict != "ok":
                raise CorruptStoreError(f"{self._path} is damaged: {verdict}")
        (version,) = self._writer.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise errors.ConfigurationError(
                f"{self._path} was written by a newer version of glowplug (schema {version}, this one knows "
                f"{SCHEMA_VERSION}); install that version again"
            )
        self._writer.execute("PRAGMA journal_mode = WAL")
        if version == 0:
            self._writer.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        elif not self._writer.execute("SELECT 1 FROM sqlite_schema WHERE name = 'snapshot_rows'").fetchone():
            raise CorruptStoreError(f"{self._path} is damaged: it has not the tables of its version")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock, _errors(self._path):
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with _errors(self._path):
            with self._lock:
                if self._closed:
                    raise errors.UnavailableError("the agent's database is closed: the agent is stopping")
                connection = self._readers.pop() if self._readers else self._connect()
            try:
                yield connection
            finally:
                with self._lock:
                    if self._closed:
                        connection.close()
                    else:
                        self._readers.append(connection)


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.OperationalError, sqlite3.ProgrammingError) as exc:
        raise errors.UnavailableError(f"{path}: {exc}; is its disk full, read-only or failing?") from exc
    except sqlite3.DatabaseError as exc:
        raise CorruptStoreError(f"{path} is damaged: {exc}") from exc


def _absent(name: str) -> errors.NotFoundError:
    return errors.NotFoundError(f"snapshot {name} does not exist")


def _maybe(database: sqlite3.Connection, name: str) -> SnapshotRow | None:
    row = database.execute("SELECT * FROM snapshot_rows WHERE name = ?", (name,)).fetchone()
    return None if row is None else _snapshot(row)


def _by_name(database: sqlite3.Connection, name: str) -> SnapshotRow:
    row = _maybe(database, name)
    if row is None:
        raise _absent(name)
    return row


def _snapshot(row: Sequence[object]) -> SnapshotRow:
    number, name, kind, parent_id, parent, labels, created, updated, inodes, size, image, layer, broken = row
    assert isinstance(labels, str)
    usage = Usage(inodes, size) if isinstance(inodes, int) and isinstance(size, int) else None
    return SnapshotRow(  # the columns' types are the schema's
        number,  # type: ignore[arg-type]
        name,  # type: ignore[arg-type]
        Kind(kind),  # type: ignore[arg-type]
        parent_id,  # type: ignore[arg-type]
        parent,  # type: ignore[arg-type]
        json.loads(labels),
        created,  # type: ignore[arg-type]
        updated,  # type: ignore[arg-type]
        usage,
        image,  # type: ignore[arg-type]
        layer,  # type: ignore[arg-type]
        broken,  # type: ignore[arg-type]
    )


def _encode(labels: Mapping[str, str]) -> str:
    return json.dumps(dict(labels), ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _images(database: sqlite3.Connection, block_digest: str | None) -> list[ImageRow]:
    layers: dict[str, list[LayerRow]] = {}
    for image, *values in database.execute(
        "SELECT image, chain_id, diff_id, map_digest, map_size, blob_digest, blob_size, mount_numbers.number"
        " FROM layers JOIN mount_numbers USING (map_digest) WHERE ?1 IS NULL OR image = ?1"
        " ORDER BY image, layers.number",
        (block_digest,),
    ):
        layers.setdefault(image, []).append(LayerRow(*values))
    return [
        ImageRow(key, source, reference, origin, tuple(layers.get(key, ())), created, bool(pin), bool(early))
        for key, source, reference, origin, created, pin, early in database.execute(
            "SELECT block_digest, source_digest, reference, origin_ref, created_ns, pinned, prefetched"
            " FROM images WHERE ?1 IS NULL OR block_digest = ?1 ORDER BY created_ns, block_digest",
            (block_digest,),
        )
    ]


def _number_mounts(database: sqlite3.Connection, layers: Sequence[LayerRow]) -> None:
    """The smallest free numbers: 128 lower directories must fit into a mount's 4 KiB of options."""
    taken = {number for (number,) in database.execute("SELECT number FROM mount_numbers")}
    known = {digest for (digest,) in database.execute("SELECT map_digest FROM mount_numbers")}
    number = 1
    for layer in layers:
        if layer.map_digest in known:
            continue
        while number in taken:
            number += 1
        database.execute("INSERT INTO mount_numbers VALUES (?, ?)", (layer.map_digest, number))
        taken.add(number)
        known.add(layer.map_digest)


def _drop_unused_numbers(database: sqlite3.Connection) -> None:
    database.execute("DELETE FROM mount_numbers WHERE map_digest NOT IN (SELECT map_digest FROM layers)")
