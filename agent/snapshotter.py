"""The life of a snapshot: what containerd asks of a snapshotter, done with folders, rows and lazy layers.

Called by service.py, one call a thread, and by the daemon at start (`cleanup`). It owns root/snapshots:

    <id>/fs, <id>/work   an active snapshot's upper and work directory, a view's own, a layer's files
    new-*                a folder that is being made; its row is not written yet
    removed-*            a folder whose row is gone; `cleanup` deletes it

A committed lazy snapshot has a row and no folder: its files are the mount point of its layer, which
`LazyImages` mounts at first use.

Killed at any step, it leaves nothing but folders without a row, which `cleanup` finds: a folder gets its id
inside the transaction that writes the row, and loses its name only after the row is gone. Ids are never used
twice. A half-deleted folder never bears the name of a snapshot, so a database that is rebuilt from the
folders is not led astray. Deleting is left to `cleanup`, which containerd calls after its garbage
collection, outside its locks.

An upper directory has the attributes of the root that it covers, since overlayfs shows the topmost one's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from agent import errors as agent_errors
from agent import snapshots, store, treeremoval
from agent.mapped import MappedLowers
from agent.observer import Observer
from agent.rows import SnapshotRow
from agent.snapshots import Info, Kind, Mount, Usage
from imagefs import errors, holders, mount


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """A lazy layer: the block image's manifest digest, and the layer's index in it, bottom first."""

    block_digest: str
    layer: int


class LazyImages(Protocol):
    """What the snapshotter knows of lazy layers. Thread-safe."""

    def find_layer(self, chain_id: str, labels: Mapping[str, str]) -> Found | None:
        """The layer of a Prepare that carries this chain id, attached and its metadata at hand; its image's
        row is in the store. None: ordinary unpack, and the reason was told to the observer."""

    def may_serve(self, block_digest: str, labels: Mapping[str, str]) -> bool:
        """Whether a snapshot of this image's layer may stand for that of the image which `labels` name."""

    def directory(self, block_digest: str, layer: int) -> Path:
        """The layer's mount point, mounted now. UnavailableError and its siblings when it cannot be."""

    def root_attributes(self, block_digest: str, layer: int) -> mount.RootAttributes | None:
        """Of the layer's root directory; None when the layer itself does not say."""

    def usage(self, block_digest: str, layer: int) -> Usage:
        """What the layer takes in the block cache now, and its inodes."""

    def released(self, block_digest: str) -> None:
        """A snapshot of this image was removed: what nobody needs any more may go."""


class Snapshotter:
    """The ten verbs. They raise what agent.errors and imagefs.errors have; the message says what to do."""

    def __init__(self, root: Path, rows: store.Store, images: LazyImages, observer: Observer) -> None:
        self._folder = root / "snapshots"
        self._rows = rows
        self._images = images
        self._mapped = MappedLowers(root / "mapped")
        self._observer = observer
        self._lock = threading.Lock()
        self._making: set[str] = set()
        with _disk(self._folder):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            taken = [int(name) for name in os.listdir(self._folder) if _is_id(name)]
        self._rows.start_above(max(taken, default=0))

    # --- questions ---------------------------------------------------------------------------------------

    def stat(self, key: str) -> Info:
        """NotFoundError."""
        return self._rows.get(_named(key, "key")).info

    def walk(self, filters: Sequence[str] = ()) -> Iterator[Info]:
        """Those that match one of the filters, by id. InvalidInputError before the first."""
        matches = snapshots.parse_filters(filters)
        return (row.info for row in self._rows.walk() if matches(row.info))

    def usage(self, key: str) -> Usage:
        """What the snapshot itself takes: of an active one as it is now, of a lazy one what is cached."""
        row = self._rows.get(_named(key, "key"))
        if row.image is not None and row.layer is not None:
            return self._images.usage(row.image, row.layer)
        if row.kind is Kind.ACTIVE:
            return disk_usage(self.folder(row.id) / "fs")
        return row.usage or Usage(0, 0)

    def mounts(self, key: str) -> list[Mount]:
        """How to mount an active snapshot or a view; lazy layers below it are mounted now."""
        chain = self._rows.chain(_named(key, "key"))
        if chain[0].kind is Kind.COMMITTED:
            raise agent_errors.FailedPreconditionError(
                f"snapshot {key} is committed; only an active one or a view has mounts"
            )
        _refuse_broken(chain)
        return [self._mount(chain[0].kind, chain[0].id, chain[1:], chain[0].labels)]

    # --- changes -----------------------------------------------------------------------------------------

    def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """An active snapshot. AlreadyExistsError when `labels` name a layer (snapshots.REF_LABEL) that is
        there now, lazily: containerd then finds the committed snapshot by that label and its parent."""
        labels = snapshots.checked_labels(labels)
        reference = labels.get(snapshots.REF_LABEL)
        if reference and self._commit_lazily(reference, parent, labels):
            raise agent_errors.AlreadyExistsError(f"layer {reference} is here; its snapshot is committed")
        return self._create(Kind.ACTIVE, key, parent, labels)

    def view(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """A snapshot that can only be read."""
        return self._create(Kind.VIEW, key, parent, snapshots.checked_labels(labels))

    def commit(self, name: str, key: str, labels: Mapping[str, str], parent: str = "") -> None:
        """The active snapshot `key` becomes the committed `name`; labels are replaced."""
        _named(name, "name")
        row = self._rows.get(_named(key, "key"))
        taken = disk_usage(self.folder(row.id) / "fs") if row.kind is Kind.ACTIVE else Usage(0, 0)
        self._rows.commit(key, name, snapshots.checked_labels(labels), taken, parent)

    def update(self, name: str, labels: Mapping[str, str], field_paths: Sequence[str]) -> Info:
        """Change labels by a field mask; returns the result. Nothing else of a snapshot can be changed."""
        return self._rows.update(
            _named(name, "name"), lambda old: snapshots.updated_labels(old, labels, field_paths)
        ).info

    def remove(self, key: str) -> None:
        """Forget a snapshot. FailedPreconditionError when it has children. Its files go with `cleanup`."""
        row = self._rows.remove(_named(key, "key"))
        self._mapped.remove(row.id)
        folder = self.folder(row.id)
        try:
            folder.rename(self._folder / f"removed-{row.id}")
        except FileNotFoundError:
            pass  # a lazy one
        except OSError as exc:
            self._observer.event(
                "leftover", f"{folder}: {exc.strerror}; the next cleanup tries again", level="warning"
            )
        if row.image is not None:
            self._images.released(row.image)

    def cleanup(self) -> None:
        """Delete folders that no snapshot owns: removed ones, and what a killed agent had begun. Not those of
        a running container whose row was lost with a damaged database."""
        with _disk(self._folder):
            names = os.listdir(self._folder)
            mapped = self._mapped.numbers()
        with self._lock:
            making = set(self._making)
        owned = {str(number) for number in self._rows.settled_ids()}
        unowned = [name for name in names if name not in owned and name not in making]
        for name in mapped - owned:
            self._mapped.remove(int(name))
        in_use = self._below_overlays() if any(map(_is_id, unowned)) else frozenset()
        for name in unowned:
            if name in in_use:
                continue
            try:
                treeremoval.remove_tree(self._folder / name)
            except FileNotFoundError:
                pass  # it has got its name, or another cleanup was faster
            except OSError as exc:
                self._observer.event(
                    "leftover",
                    f"cannot delete {self._folder / name}: {exc}; is something mounted in it?",
                    level="warning",
                )

    def folder(self, number: int) -> Path:
        """Where the snapshot with this id has its files, unless it is lazy."""
        return self._folder / str(number)

    # --- inside ------------------------------------------------------------------------------------------

    def _below_overlays(self) -> frozenset[str]:
        """The folders that active snapshots which are mounted now are made of. containerd shortens long
        options by naming lower directories relative to some folder: that is enough to tell ours."""
        found = set()
        with _disk(self._folder):
            overlays = [point for point in holders.mount_points() if point.filesystem == "overlay"]
        for point in overlays:
            options = dict(option.partition("=")[::2] for option in point.options.split(","))
            upper = Path(options.get("upperdir", ""))
            if upper.parent.parent == self._folder:
                paths = [upper, *map(Path, options.get("lowerdir", "").split(":"))]
                found |= {path.parent.name for path in paths if path.name == "fs"}
        return frozenset(found)

    def _commit_lazily(self, reference: str, parent: str, labels: Mapping[str, str]) -> bool:
        there = self._lazy_row(reference, parent)
        if there is not None and there.broken is None and self._may_serve(there, labels):
            return True
        for _ in range(2):
            found = self._images.find_layer(reference, labels)
            if found is None:
                break
            if there is not None and not self._may_serve(there, labels):
                # Nor a second one beside it: containerd takes the first that has the label and the parent.
                text = f"layer {reference} is here from another repository's block image: ordinary unpack"
                self._observer.event("layer_not_shared", text, level="warning", snapshot=there.name)
                break
            try:
                if there is None:
                    return self._insert_lazy(reference, parent, labels, found)
                if there.broken is not None:
                    self._relink(there, found)
                return True
            except errors.NotFoundError:  # released just now, with the image's last snapshot: find it again
                if parent:
                    self._rows.get(parent)
        return False

    def _may_serve(self, row: SnapshotRow, labels: Mapping[str, str]) -> bool:
        return row.image is not None and self._images.may_serve(row.image, labels)

    def _insert_lazy(self, reference: str, parent: str, labels: Mapping[str, str], found: Found) -> bool:
        """The name is the layer's, unless one on another parent has it. False if somebody else's image was
        faster, and must not stand for this one."""
        for number in itertools.count(1):
            name = reference if number == 1 else f"{reference}/{number}"
            try:
                self._rows.insert(
                    name, Kind.COMMITTED, parent, labels, image=found.block_digest, layer=found.layer
                )
                return True
            except agent_errors.AlreadyExistsError:
                there = self._lazy_row(reference, parent)
                if there is not None:
                    return self._may_serve(there, labels)
        raise AssertionError("unreachable")

    def _relink(self, row: SnapshotRow, found: Found) -> None:
        """A quarantined layer that was found again. There must be one snapshot of it: containerd takes the
        first that has the label and the parent."""
        self._rows.relink(row.id, found.block_digest, found.layer)
        self._observer.event("healed", f"layer {row.name} was found again", snapshot=row.name)
        if row.image is not None and row.image != found.block_digest:
            self._images.released(row.image)

    def _lazy_row(self, reference: str, parent: str) -> SnapshotRow | None:
        for row in self._rows.children(parent):
            if row.image is not None and row.labels.get(snapshots.REF_LABEL) == reference:
                return row
        return None

    def _create(self, kind: Kind, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        _named(key, "key")
        mapping = snapshots.id_mapping(labels)
        chain = self._rows.chain(parent) if parent else []
        _refuse_broken(chain)
        root = self._root_attributes(chain)
        lazy = any(row.image is not None for row in chain)
        if mapping is not None and chain and (kind is Kind.ACTIVE or lazy):
            # What is below is mapped by its mount; so is a bind mount. A directory of ours above it is not.
            uid, gid = mapping.host_ids(root.uid, root.gid)
            root = dataclasses.replace(root, uid=uid, gid=gid)
        new = self._folder / f"new-{secrets.token_hex(8)}"
        with self._lock:
            self._making.add(new.name)
        placed: list[Path] = []

        def place(number: int) -> None:
            new.rename(self.folder(number))
            placed.append(self.folder(number))

        try:
            with _disk(new):
                new.mkdir(mode=0o700)
                mount.carry_attributes(new / "fs", root)
                if kind is Kind.ACTIVE:
                    (new / "work").mkdir(mode=0o711)
                row = self._rows.insert(key, kind, parent, labels, place=place)
        except BaseException:
            for folder in (new, *placed):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            with self._lock:
                self._making.discard(new.name)
        try:
            return [self._mount(kind, row.id, chain, labels)]
        except BaseException:
            # containerd knows nothing of a snapshot whose Prepare failed: it would never remove it.
            with contextlib.suppress(errors.ImagefsError):
                self.remove(key)
            raise

    def _mount(
        self, kind: Kind, number: int, parents: Sequence[SnapshotRow], labels: Mapping[str, str]
    ) -> Mount:
        lower = [self._directory(row) for row in parents]
        lazy = any(row.image is not None for row in parents)
        mapping = snapshots.id_mapping(labels)
        if lazy and mapping is not None:
            lower = self._mapped.place(number, lower, mapping)
            labels = {}
        return snapshots.chain_mount(kind, self.folder(number), lower, lazy, labels)

    def _directory(self, row: SnapshotRow) -> Path:
        if row.image is not None and row.layer is not None:
            return self._images.directory(row.image, row.layer)
        return self.folder(row.id) / "fs"

    def _root_attributes(self, chain: Sequence[SnapshotRow]) -> mount.RootAttributes:
        for row in chain:
            if row.image is not None and row.layer is not None:
                said = self._images.root_attributes(row.image, row.layer)
                if said is not None:
                    return said
            else:
                return _attributes(self.folder(row.id) / "fs")
        return mount.RootAttributes()


def _is_id(name: str) -> bool:
    return name.isascii() and name.isdigit()


def disk_usage(directory: Path) -> Usage:
    """Inodes, and bytes on the disk, of a tree; a file with several names counts once. Folders so deep that
    their path is too long for the kernel are left out. UnavailableError."""
    seen: set[tuple[int, int]] = set()
    size_bytes = 0

    def count(status: os.stat_result) -> None:
        nonlocal size_bytes
        if (status.st_dev, status.st_ino) not in seen:
            seen.add((status.st_dev, status.st_ino))
            size_bytes += status.st_blocks * 512

    with _disk(directory):
        count(directory.lstat())
        pending = [str(directory)]
        while pending:
            with _uncounted(), os.scandir(pending.pop()) as entries:
                for entry in entries:
                    with _uncounted():
                        count(entry.stat(follow_symlinks=False))
                        if entry.is_dir(follow_symlinks=False):
                            pending.append(entry.path)
    return Usage(len(seen), size_bytes)


@contextlib.contextmanager
def _uncounted() -> Iterator[None]:
    """An active snapshot changes while it is counted: what is gone counts nothing."""
    try:
        yield
    except FileNotFoundError:
        pass
    except OSError as exc:
        if exc.errno != errno.ENAMETOOLONG:
            raise


def _attributes(directory: Path) -> mount.RootAttributes:
    with _disk(directory):
        status = directory.lstat()
        names = [name for name in os.listxattr(directory) if not name.startswith("trusted.overlay.")]
        xattrs = {os.fsencode(name): os.getxattr(directory, name) for name in names}
    mode = stat.S_IFDIR | stat.S_IMODE(status.st_mode)
    return mount.RootAttributes(mode, status.st_uid, status.st_gid, status.st_mtime_ns, xattrs)


def _named(name: str, field: str) -> str:
    if not name:
        raise errors.InvalidInputError(f"the request has no {field}")
    return name


def _refuse_broken(chain: Sequence[SnapshotRow]) -> None:
    for row in chain:
        if row.broken is not None:
            raise errors.UnavailableError(f"snapshot {row.name} is quarantined: {row.broken}")


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise errors.UnavailableError(f"{path}: {exc.strerror or exc}") from exc
