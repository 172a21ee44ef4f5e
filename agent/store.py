"""The agent's memory: snapshots, and the block images whose layers some of them are. SQLite, one file
(schema.py has the tables, rows.py the values).

Called by snapshotter.py (snapshots) and images.py (images), from any thread. Each change is a transaction of
its own that is on the disk when the method returns: containerd has written its half by then, too, and would
miss ours. Readers see the last finished one (database.py).

Invariants, also kept by the schema: a name is unique; a parent is committed and exists as long as its
children; an id is never used twice, so that a folder named by it is never mistaken for another's (a database
that was restored from an older copy is told which are taken: `Store.start_above`). A lazy
snapshot names its block image and the layer's index in it. A layer's mount number belongs to its device (the
layer as one boot pack shows it: imagefs/fuse/devices.py), whatever images it is part of, and is given back
with the last of them.
"""

from __future__ import annotations

import dataclasses
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from agent import database, rows, schema
from agent import errors as agent_errors
from agent.database import CorruptStoreError as CorruptStoreError
from agent.rows import BootPackRow, ImageRow, LayerRow, SnapshotRow
from agent.snapshots import Kind, Usage
from imagefs import errors

_CHAIN = """
WITH RECURSIVE line (id, depth) AS (
    SELECT id, 0 FROM snapshots WHERE name = ?
    UNION ALL
    SELECT a.parent, depth + 1 FROM line JOIN snapshots a USING (id) WHERE a.parent IS NOT NULL
)
SELECT snapshot_rows.* FROM snapshot_rows JOIN line USING (id) ORDER BY line.depth
"""


class Store:
    """Open it with `Store.open`. Every method raises UnavailableError when the disk is full, read-only or
    failing, and CorruptStoreError when the file turns out to be damaged."""

    def __init__(self, opened: database.Database, now_ns: Callable[[], int]) -> None:
        self._database = opened
        self._now_ns = now_ns

    @classmethod
    def open(cls, path: Path, now_ns: Callable[[], int] = time.time_ns) -> Store:
        """Open or create. Raises CorruptStoreError, ConfigurationError when a newer version wrote it."""
        store = cls(database.Database.open(path, schema.SCHEMAS), now_ns)
        try:
            store.walk()  # a row that cannot be read would else stop every walk, and every start, from now on
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Idempotent; nothing else may be under way."""
        self._database.close()

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
        with self._database.writing() as connection:
            parent_id = self._parent_id(connection, parent)
            if _maybe(connection, name) is not None:
                raise agent_errors.AlreadyExistsError(f"snapshot {name} exists already")
            if image is not None and not _has_image(connection, image):
                raise errors.NotFoundError(f"no block image {image} is known here")
            cursor = connection.execute(
                "INSERT INTO snapshots (name, kind, parent, labels, created_ns, updated_ns, image, layer)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (name, int(kind), parent_id, rows.encoded(labels), now, now, image, layer),
            )
            assert cursor.lastrowid is not None
            if place is not None:
                place(cursor.lastrowid)
            return _by_name(connection, name)

    def get(self, name: str) -> SnapshotRow:
        """By name. NotFoundError."""
        with self._database.reading() as connection:
            return _by_name(connection, name)

    def by_id(self, number: int) -> SnapshotRow:
        """By id. NotFoundError."""
        with self._database.reading() as connection:
            for row in connection.execute("SELECT * FROM snapshot_rows WHERE id = ?", (number,)):
                return rows.snapshot(row)
        raise errors.NotFoundError(f"no snapshot has the id {number}")

    def chain(self, name: str) -> list[SnapshotRow]:
        """The snapshot and its ancestors, in this order. NotFoundError."""
        with self._database.reading() as connection:
            found = connection.execute(_CHAIN, (name,)).fetchall()
        if not found:
            raise _absent(name)
        return [rows.snapshot(row) for row in found]

    def children(self, name: str) -> list[SnapshotRow]:
        """What has the snapshot `name` as its parent; for the empty name, what has none. By id."""
        with self._database.reading() as connection:
            found = connection.execute(
                "SELECT * FROM snapshot_rows WHERE parent_id IS (SELECT id FROM snapshots WHERE name = ?)"
                " AND (parent_id IS NULL) = (? = '') ORDER BY id",
                (name, name),
            ).fetchall()
        return [rows.snapshot(row) for row in found]

    def walk(self) -> list[SnapshotRow]:
        """All, by id: parents come before their children, but for what was given a parent at its commit."""
        with self._database.reading() as connection:
            return [
                rows.snapshot(row)
                for row in connection.execute("SELECT * FROM snapshot_rows ORDER BY id").fetchall()
            ]

    def start_above(self, number: int) -> None:
        """Give no new snapshot an id up to this one: folders named by them exist, whoever owns them."""
        with self._database.writing() as connection:
            given = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'snapshots'").fetchone()
            if given is None:
                connection.execute(
                    "INSERT INTO sqlite_sequence (name, seq) VALUES ('snapshots', ?)", (number,)
                )
            elif given[0] < number:
                connection.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = 'snapshots'", (number,))

    def settled_ids(self) -> set[int]:
        """The ids in use once every change that is under way now has ended. For whoever has listed folders
        and wants to know which of them nobody owns: `insert` places a folder before its row is seen."""
        with self._database.writing() as connection:
            return {number for (number,) in connection.execute("SELECT id FROM snapshots")}

    def commit(
        self, key: str, name: str, labels: Mapping[str, str], usage: Usage, parent: str = ""
    ) -> SnapshotRow:
        """The active snapshot `key` becomes the committed `name`, with these labels only. `parent` may be
        given to one that had none. NotFoundError, AlreadyExistsError, InvalidInputError (another parent),
        FailedPreconditionError (not active)."""
        now = self._now_ns()
        with self._database.writing() as connection:
            row = _by_name(connection, key)
            if _maybe(connection, name) is not None:
                raise agent_errors.AlreadyExistsError(f"snapshot {name} exists already")
            if row.kind is not Kind.ACTIVE:
                raise agent_errors.FailedPreconditionError(
                    f"snapshot {key} is {row.kind.name.lower()}; only an active one can be committed"
                )
            if parent and row.parent not in ("", parent):
                raise errors.InvalidInputError(
                    f"snapshot {key} has a parent already; commit cannot change it"
                )
            parent_id = self._parent_id(connection, parent) if parent else row.parent_id
            connection.execute(
                "UPDATE snapshots SET name = ?, kind = ?, parent = ?, labels = ?, created_ns = ?,"
                " updated_ns = ?, inodes = ?, size_bytes = ? WHERE id = ?",
                (
                    name,
                    int(Kind.COMMITTED),
                    parent_id,
                    rows.encoded(labels),
                    now,
                    now,
                    usage.inodes,
                    usage.size_bytes,
                    row.id,
                ),
            )
            return _by_name(connection, name)

    def update(self, name: str, change: Callable[[Mapping[str, str]], Mapping[str, str]]) -> SnapshotRow:
        """Replace labels by what `change` makes of them, undisturbed. NotFoundError."""
        now = self._now_ns()
        with self._database.writing() as connection:
            row = _by_name(connection, name)
            connection.execute(
                "UPDATE snapshots SET labels = ?, updated_ns = ? WHERE id = ?",
                (rows.encoded(change(row.labels)), now, row.id),
            )
            return _by_name(connection, name)

    def remove(self, name: str) -> SnapshotRow:
        """Forget a snapshot; returns what it was. NotFoundError, FailedPreconditionError (has children)."""
        with self._database.writing() as connection:
            row = _by_name(connection, name)
            for (child,) in connection.execute(
                "SELECT name FROM snapshots WHERE parent = ? LIMIT 1", (row.id,)
            ):
                raise agent_errors.FailedPreconditionError(
                    f"cannot remove snapshot {name}: it is the parent of {child}; remove that first"
                )
            connection.execute("DELETE FROM snapshots WHERE id = ?", (row.id,))
            return row

    def set_broken(self, number: int, why: str | None) -> None:
        """Put a snapshot in quarantine, saying why, or take it out (None)."""
        with self._database.writing() as connection:
            connection.execute("UPDATE snapshots SET broken = ? WHERE id = ?", (why, number))

    def relink(self, number: int, image: str, layer: int) -> None:
        """A lazy snapshot is this layer from now on, and not in quarantine. NotFoundError: no such image."""
        with self._database.writing() as connection:
            if not _has_image(connection, image):
                raise errors.NotFoundError(f"no block image {image} is known here")
            connection.execute(
                "UPDATE snapshots SET image = ?, layer = ?, broken = NULL WHERE id = ?",
                (image, layer, number),
            )

    # --- block images ------------------------------------------------------------------------------------

    def put_image(self, image: ImageRow) -> ImageRow:
        """Add or replace; each layer gets its mount number. Returns what is stored now."""
        with self._database.writing() as connection:
            connection.execute(
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
            connection.execute("DELETE FROM layers WHERE image = ?", (image.block_digest,))
            table_digest = image.boot_pack.table_digest if image.boot_pack is not None else ""
            numbers = _number_mounts(connection, image.layers, table_digest)
            connection.executemany(
                "INSERT INTO layers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
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
                        numbers[layer.map_digest],
                    )
                    for number, layer in enumerate(image.layers)
                ],
            )
            _drop_unused_numbers(connection)
            connection.execute("DELETE FROM boot_packs WHERE image = ?", (image.block_digest,))
            if image.boot_pack is not None:
                values = (image.block_digest, *dataclasses.astuple(image.boot_pack))
                connection.execute("INSERT INTO boot_packs VALUES (?, ?, ?, ?, ?)", values)
            return _images(connection, image.block_digest)[0]

    def image(self, block_digest: str) -> ImageRow | None:
        """One image, or None."""
        with self._database.reading() as connection:
            found = _images(connection, block_digest)
        return found[0] if found else None

    def images(self) -> list[ImageRow]:
        """All, oldest first."""
        with self._database.reading() as connection:
            return _images(connection, None)

    def references(self, block_digest: str) -> int:
        """How many snapshots are layers of this image."""
        with self._database.reading() as connection:
            count = connection.execute(
                "SELECT count(*) FROM snapshots WHERE image = ?", (block_digest,)
            ).fetchone()[0]
        return int(count)

    def remove_image(self, block_digest: str) -> None:
        """Forget an image; of one that is not there, nothing. FailedPreconditionError: snapshots use it."""
        with self._database.writing() as connection:
            for (name,) in connection.execute(
                "SELECT name FROM snapshots WHERE image = ? LIMIT 1", (block_digest,)
            ):
                raise agent_errors.FailedPreconditionError(
                    f"block image {block_digest} is in use by snapshot {name}; remove that first"
                )
            connection.execute("DELETE FROM images WHERE block_digest = ?", (block_digest,))
            _drop_unused_numbers(connection)

    def set_pinned(self, block_digest: str, pinned: bool) -> None:
        """A pinned image is kept, snapshots or not. NotFoundError."""
        self._flag("UPDATE images SET pinned = ? WHERE block_digest = ?", block_digest, pinned)

    def set_prefetched(self, block_digest: str, prefetched: bool) -> None:
        """A prefetched image is kept until a snapshot of it has come and gone. NotFoundError."""
        self._flag("UPDATE images SET prefetched = ? WHERE block_digest = ?", block_digest, prefetched)

    # --- inside ------------------------------------------------------------------------------------------

    def _flag(self, statement: str, block_digest: str, value: bool) -> None:
        with self._database.writing() as connection:
            if not connection.execute(statement, (value, block_digest)).rowcount:
                raise errors.NotFoundError(f"no block image {block_digest} is known here")

    def _parent_id(self, connection: sqlite3.Connection, parent: str) -> int | None:
        if not parent:
            return None
        row = _maybe(connection, parent)
        if row is None:
            raise errors.NotFoundError(f"parent snapshot {parent} does not exist")
        if row.kind is not Kind.COMMITTED:
            raise errors.InvalidInputError(f"parent snapshot {parent} is not committed")
        return row.id


def _absent(name: str) -> errors.NotFoundError:
    return errors.NotFoundError(f"snapshot {name} does not exist")


def _maybe(connection: sqlite3.Connection, name: str) -> SnapshotRow | None:
    row = connection.execute("SELECT * FROM snapshot_rows WHERE name = ?", (name,)).fetchone()
    return None if row is None else rows.snapshot(row)


def _by_name(connection: sqlite3.Connection, name: str) -> SnapshotRow:
    row = _maybe(connection, name)
    if row is None:
        raise _absent(name)
    return row


def _has_image(connection: sqlite3.Connection, block_digest: str) -> bool:
    found = connection.execute("SELECT 1 FROM images WHERE block_digest = ?", (block_digest,)).fetchone()
    return found is not None


def _images(connection: sqlite3.Connection, block_digest: str | None) -> list[ImageRow]:
    layers: dict[str, list[LayerRow]] = {}
    for image, *values in connection.execute(
        "SELECT image, chain_id, diff_id, map_digest, map_size, blob_digest, blob_size, device"
        " FROM layers WHERE ?1 IS NULL OR image = ?1 ORDER BY image, number",
        (block_digest,),
    ):
        layers.setdefault(image, []).append(LayerRow(*values))
    packs = {
        image: BootPackRow(*values)
        for image, *values in connection.execute(
            "SELECT * FROM boot_packs WHERE ?1 IS NULL OR image = ?1", (block_digest,)
        )
    }
    return [
        ImageRow(
            key,
            source,
            reference,
            origin,
            tuple(layers.get(key, ())),
            created,
            bool(pin),
            bool(early),
            packs.get(key),
        )
        for key, source, reference, origin, created, pin, early in connection.execute(
            "SELECT block_digest, source_digest, reference, origin_ref, created_ns, pinned, prefetched"
            " FROM images WHERE ?1 IS NULL OR block_digest = ?1 ORDER BY created_ns, block_digest",
            (block_digest,),
        )
    ]


def _number_mounts(
    connection: sqlite3.Connection, layers: Sequence[LayerRow], table_digest: str
) -> Mapping[str, int]:
    """By map digest. The smallest free numbers: 128 lower directories must fit into a mount's 4 KiB of
    options."""
    taken = {number for (number,) in connection.execute("SELECT number FROM devices")}
    query = "SELECT map_digest, number FROM devices WHERE table_digest = ?"
    numbers: dict[str, int] = dict(connection.execute(query, (table_digest,)).fetchall())
    number = 1
    for layer in layers:
        if layer.map_digest in numbers:
            continue
        while number in taken:
            number += 1
        connection.execute("INSERT INTO devices VALUES (?, ?, ?)", (number, layer.map_digest, table_digest))
        taken.add(number)
        numbers[layer.map_digest] = number
    return numbers


def _drop_unused_numbers(connection: sqlite3.Connection) -> None:
    connection.execute("DELETE FROM devices WHERE number NOT IN (SELECT device FROM layers)")
