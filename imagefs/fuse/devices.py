"""The device table: which layer, as which boot pack shows it, is which node, and who holds it. A file in the
state directory.

Owned by the server, called from its control threads and, for look-ups, from its worker threads; one lock.
Every change is on disk (written beside, renamed) before it counts and before the caller goes on, so that a
successor of a killed server means the same by a node id as the kernel does. One exception: on a full disk a
detach counts all the same, because it is what gives the space back; the next change writes it down.

A device is a layer as one boot pack shows it: only the pack's author vouches for its pages (they are not
checked against the block map), so images share a device, hence the kernel's cache of it, if they have the
same pack, or none. What is checked by digest, blocks and maps, they share anyhow.

Invariants: a node id stands for one device name as long as the mount lives (`token` names the mount; a table
of another mount is discarded: its devices died with it), also after a detach, so that what the page cache
holds stays right. A device is there while it has owners; an owner is a name that the client chose, so that
attaching twice counts once, and an owner that crashed can be detached by whoever finds its name. A hold is an
owner without layers: the server does not end as idle while there is one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from imagefs import errors, reference

_log = logging.getLogger(__name__)

_VERSION = 1
_FIRST_NODE = 2
"""1 is the root of the mount (protocol.ROOT_NODE, not imported here: every client loads this module)."""
MAX_OWNER_BYTES = 255


@dataclasses.dataclass(frozen=True, slots=True)
class LayerSpec:
    """What it takes to serve a layer. `origin_ref` is a REF without tag; sizes in bytes. `map_bytes` is the
    encoded block map if the client has it already; it is not part of what is stored here."""

    origin_ref: str
    map_digest: str
    map_size: int
    blob_digest: str
    blob_size: int
    map_bytes: bytes | None = dataclasses.field(default=None, repr=False, compare=False)


@dataclasses.dataclass(frozen=True, slots=True)
class PackSpec:
    """What it takes to stream a boot pack: where its table and its data are. `table_bytes` is the encoded
    table if the client has it already; it is not part of what is stored here."""

    origin_ref: str
    table_digest: str
    table_size: int
    data_digest: str
    data_size: int
    table_bytes: bytes | None = dataclasses.field(default=None, repr=False, compare=False)


@dataclasses.dataclass(frozen=True, slots=True)
class OwnedPack:
    """The boot pack that an owner brought, and the JSON form of the origin options for it."""

    spec: PackSpec
    origins: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Where one owner's layers come from: a REF, and the JSON form of the origin options."""

    origin_ref: str
    origins: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One row. Each owner brought a source: a device that two images share has the origins of both.
    `table_digest` names the boot pack that it shows pages of."""

    node: int
    spec: LayerSpec
    owners: Mapping[str, Source]
    table_digest: str | None = None

    @property
    def name(self) -> str:
        """Its file name."""
        return device_name(self.spec.map_digest, self.table_digest)


def device_name(map_digest: str, table_digest: str | None) -> str:
    """The file name of a layer's device, as the boot pack with this table shows it: the digests with dashes,
    as colons are awkward in mount options."""
    digests = map_digest if table_digest is None else f"{map_digest}-{table_digest.removeprefix('sha256:')}"
    return digests.replace(":", "-")


def encode_spec(spec: LayerSpec) -> dict[str, Any]:
    """JSON form, without the map's bytes."""
    return {
        "origin_ref": spec.origin_ref,
        "map_digest": spec.map_digest,
        "map_size": spec.map_size,
        "blob_digest": spec.blob_digest,
        "blob_size": spec.blob_size,
    }


def decode_spec(value: object) -> LayerSpec:
    """Inverse of encode_spec. Raises InvalidInputError naming the field."""
    return LayerSpec(
        **_decode_fields(value, "layer", ("map_digest", "blob_digest"), ("map_size", "blob_size"))
    )


def encode_pack(spec: PackSpec) -> dict[str, Any]:
    """JSON form, without the table's bytes."""
    return {
        "origin_ref": spec.origin_ref,
        "table_digest": spec.table_digest,
        "table_size": spec.table_size,
        "data_digest": spec.data_digest,
        "data_size": spec.data_size,
    }


def decode_pack(value: object) -> PackSpec:
    """Inverse of encode_pack. Raises InvalidInputError naming the field."""
    digests, sizes = ("table_digest", "data_digest"), ("table_size", "data_size")
    return PackSpec(**_decode_fields(value, "boot pack", digests, sizes))


def _decode_fields(value: object, what: str, digests: Sequence[str], sizes: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise errors.InvalidInputError(f"{what}: not an object")
    for field in digests:
        if not isinstance(value.get(field), str) or not reference.DIGEST.match(value[field]):
            raise errors.InvalidInputError(f"{what}: {field} {value.get(field)!r} is not a sha256 digest")
    for field in sizes:
        if type(value.get(field)) is not int or value[field] <= 0:
            raise errors.InvalidInputError(f"{what}: {field} {value.get(field)!r} is not a byte count")
    if not isinstance(value.get("origin_ref"), str):
        raise errors.InvalidInputError(f"{what}: origin_ref missing")
    return {field: value[field] for field in ("origin_ref", *digests, *sizes)}


class DeviceTable:
    """See the module. `path` is the file; `token` names the mount."""

    def __init__(self, path: Path, token: str) -> None:
        self._path = path
        self.token = token
        self._lock = threading.Lock()
        self._records: dict[str, Record] = {}
        self._nodes: dict[str, int] = {}
        self._packs: dict[str, OwnedPack] = {}
        self._holds: frozenset[str] = frozenset()
        self._load()

    def records(self) -> list[Record]:
        """The devices that are there, by node id."""
        with self._lock:
            return sorted(self._records.values(), key=lambda record: record.node)

    def holds(self) -> frozenset[str]:
        """Who wants the server to be there, whatever is attached."""
        with self._lock:
            return self._holds

    def hold(self, owner: str) -> None:
        """Add a hold; `detach` ends it. ConfigurationError if it cannot be written."""
        _check_owner(owner)
        with self._lock:
            if owner not in self._holds:
                self._save(self._records, self._nodes, self._holds | {owner}, self._packs)

    def packs(self) -> dict[str, OwnedPack]:
        """Owner -> its boot pack, of those who brought one."""
        with self._lock:
            return dict(self._packs)

    def attach(
        self,
        specs: Iterable[LayerSpec],
        origins: Mapping[str, Any],
        owner: str,
        pack: PackSpec | None = None,
    ) -> list[Record]:
        """Add `owner` to each layer's device, making those that are missing, and note its boot pack. Returns
        the rows that changed: an owner that has a device, or a pack, already keeps its source.
        ConfigurationError if it cannot be written."""
        _check_owner(owner)
        changed = []
        table_digest = pack.table_digest if pack is not None else None
        with self._lock:
            records, nodes = dict(self._records), dict(self._nodes)
            for spec in specs:
                source = Source(spec.origin_ref, origins)
                name = device_name(spec.map_digest, table_digest)
                old = records.get(name)
                if old is None:
                    node = nodes.setdefault(name, _FIRST_NODE + len(nodes))
                    kept = dataclasses.replace(spec, map_bytes=None)
                    record = Record(node, kept, {owner: source}, table_digest)
                elif owner not in old.owners:
                    record = dataclasses.replace(old, owners={**old.owners, owner: source})
                else:
                    continue
                records[name] = record
                changed.append(record)
            packs = dict(self._packs)
            if pack is not None:
                packs.setdefault(owner, OwnedPack(dataclasses.replace(pack, table_bytes=None), origins))
            self._save(records, nodes, self._holds, packs)
        return changed

    def detach(self, owner: str) -> list[Record]:
        """Remove `owner` everywhere. Returns the rows that changed; those without owners are gone."""
        changed = []
        with self._lock:
            records, holds = dict(self._records), self._holds - {owner}
            packs = {name: pack for name, pack in self._packs.items() if name != owner}
            for name, record in self._records.items():
                if owner in record.owners:
                    left = {other: source for other, source in record.owners.items() if other != owner}
                    record = dataclasses.replace(record, owners=left)
                    if left:
                        records[name] = record
                    else:
                        del records[name]
                    changed.append(record)
            try:
                self._save(records, self._nodes, holds, packs)
            except errors.ConfigurationError as exc:
                _log.warning("%s; the devices of %s are gone all the same", exc, owner)
                self._records, self._holds, self._packs = records, holds, packs
        return changed

    def _load(self) -> None:
        try:
            document = json.loads(self._path.read_bytes())
            if document["version"] != _VERSION or document["token"] != self.token:
                return
            # An earlier version wrote map digests here, for what are devices without a pack today.
            self._nodes = {
                device_name(str(name), None): int(node) for name, node in document["nodes"].items()
            }
            for row in document["devices"]:
                spec, table_digest = decode_spec(row["spec"]), row.get("table_digest")
                name = device_name(spec.map_digest, table_digest)
                owners = {
                    str(owner): Source(str(source["origin_ref"]), dict(source["origins"]))
                    for owner, source in row["owners"].items()
                }
                self._records[name] = Record(self._nodes[name], spec, owners, table_digest)
            for owner, pack in document.get("packs", {}).items():
                self._packs[str(owner)] = OwnedPack(decode_pack(pack["spec"]), dict(pack["origins"]))
            self._holds = frozenset(str(owner) for owner in document.get("holds", ()))
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError, AttributeError, errors.InvalidInputError) as exc:
            # Going on with an empty table could give a node id a second meaning.
            raise errors.InvalidInputError(
                f"{self._path}: not a device table ({exc!r}); unmount what uses {self._path.parent} and "
                "stop the device server to start anew"
            ) from exc

    def _save(
        self,
        records: dict[str, Record],
        nodes: dict[str, int],
        holds: frozenset[str],
        packs: dict[str, OwnedPack],
    ) -> None:
        document = {
            "version": _VERSION,
            "token": self.token,
            "nodes": nodes,
            "devices": [
                {
                    "spec": encode_spec(record.spec),
                    "table_digest": record.table_digest,
                    "owners": {
                        owner: {"origin_ref": source.origin_ref, "origins": dict(source.origins)}
                        for owner, source in record.owners.items()
                    },
                }
                for record in records.values()
            ],
            "packs": {
                owner: {"spec": encode_pack(pack.spec), "origins": dict(pack.origins)}
                for owner, pack in packs.items()
            },
            "holds": sorted(holds),
        }
        try:
            write_atomically(self._path, json.dumps(document).encode())
        except OSError as exc:
            raise errors.ConfigurationError(
                f"cannot write {self._path}: {exc.strerror}; the state directory needs space"
            ) from exc
        self._records, self._nodes, self._holds, self._packs = records, nodes, holds, packs


def _check_owner(owner: str) -> None:
    if not owner or len(owner.encode()) > MAX_OWNER_BYTES:
        raise errors.InvalidInputError(f"owner {owner!r} is not a name of 1 to {MAX_OWNER_BYTES} bytes")


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file by `data`: a reader, or a successor after a kill, sees the old or the new one, whole.
    Not synced: the state directory means nothing after a reboot."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as f:
            f.write(data)
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
