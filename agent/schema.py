"""The tables of the agent's database, by version of the schema. Text only; store.py is who reads and writes
them, database.py who brings an older file up to the last version.
"""

from __future__ import annotations

_FIRST = """
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
_BOOT_PACKS = """
CREATE TABLE boot_packs (
    image        TEXT    PRIMARY KEY REFERENCES images (block_digest) ON DELETE CASCADE,
    table_digest TEXT    NOT NULL,
    table_size   INTEGER NOT NULL,
    data_digest  TEXT    NOT NULL,
    data_size    INTEGER NOT NULL
);
"""
_DEVICES = """
ALTER TABLE layers RENAME TO old_layers;
ALTER TABLE mount_numbers RENAME TO old_numbers;
DROP INDEX layers_map;
CREATE TABLE devices (
    number       INTEGER PRIMARY KEY,
    map_digest   TEXT NOT NULL,
    table_digest TEXT NOT NULL,
    UNIQUE (map_digest, table_digest)
);
CREATE TABLE layers (
    image       TEXT    NOT NULL REFERENCES images (block_digest) ON DELETE CASCADE,
    number      INTEGER NOT NULL,
    chain_id    TEXT    NOT NULL,
    diff_id     TEXT    NOT NULL,
    map_digest  TEXT    NOT NULL,
    map_size    INTEGER NOT NULL,
    blob_digest TEXT    NOT NULL,
    blob_size   INTEGER NOT NULL,
    device      INTEGER NOT NULL REFERENCES devices (number),
    PRIMARY KEY (image, number)
);
CREATE INDEX layers_device ON layers (device);
CREATE TEMP TABLE wanted AS
    SELECT DISTINCT map_digest, coalesce(table_digest, '') AS table_digest
    FROM old_layers LEFT JOIN boot_packs USING (image);
INSERT INTO devices (number, map_digest, table_digest)
    SELECT min(number), map_digest, min(table_digest) FROM wanted JOIN old_numbers USING (map_digest)
    GROUP BY map_digest;
INSERT INTO devices (map_digest, table_digest)
    SELECT * FROM wanted EXCEPT SELECT map_digest, table_digest FROM devices;
INSERT INTO layers
    SELECT image, old.number, chain_id, diff_id, map_digest, map_size, blob_digest, blob_size, devices.number
    FROM old_layers old LEFT JOIN boot_packs USING (image) JOIN devices USING (map_digest)
    WHERE devices.table_digest = coalesce(boot_packs.table_digest, '');
DROP TABLE wanted;
DROP TABLE old_layers;
DROP TABLE old_numbers;
"""
"""`table_digest` is empty for a device of blocks alone, which a layer's number was of before."""
SCHEMAS = (_FIRST, _BOOT_PACKS, _DEVICES)
"""What each version of the schema adds to the one before: a node keeps its database over an upgrade."""
