"""What the database says, what lies on the disk, what is mounted, what the device server serves: made one.

Called by the daemon: `open_store` and `Reconciler.restore` before containerd may ask anything, `heal` and
`keep_copy` now and then afterwards. One bad snapshot never stands in the way of the others: it is quarantined
(the store's `broken`, an event), and comes back when what was wrong with it is right again.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from agent.images import Images
from agent.mounts import LayerMounts
from agent.observer import Observer
from agent.rows import SnapshotRow
from agent.snapshots import Kind
from agent.snapshotter import Snapshotter
from agent.store import CorruptStoreError, Store
from imagefs import errors
from imagefs.fuse.control import DeviceClient

DATABASE = "agent.db"
_COPY = "agent.db.copy"
_PARALLEL_MOUNTS = 8
_NO_FOLDER = "its folder is gone"


def open_store(root: Path, observer: Observer) -> tuple[Store, bool]:
    """Open root/agent.db. A damaged one is moved aside, and the last good copy (`keep_copy`) takes its place:
    what was changed since is lost to us, said aloud. Returns whether that was so, too. ConfigurationError
    when the file cannot be used for another reason."""
    path, copy = root / DATABASE, root / _COPY
    try:
        return Store.open(path), False
    except CorruptStoreError as exc:
        aside = root / f"{DATABASE}.corrupt-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
        _move_aside(path, aside)
        reason = str(exc)
    if copy.exists():
        try:
            os.link(copy, path)
            store = Store.open(path)
        except (OSError, CorruptStoreError):
            path.unlink(missing_ok=True)
        else:
            age = max(0, round(time.time() - copy.stat().st_mtime))
            copy.unlink()  # it is the database now; the next copy is made anew
            _say_rebuilt(observer, reason, aside, f"restored from the copy of {age} s ago", store)
            return store, True
    store = Store.open(path)
    _say_rebuilt(observer, reason, aside, "there is no copy of it: it starts empty", store)
    return store, True


def keep_copy(root: Path) -> None:
    """Copy the database, whole and consistent, beside it, if it was changed since the last time.
    UnavailableError if the disk does not take it."""
    new = root / f"{_COPY}.new"
    try:
        changed = max(_changed_ns(root / DATABASE), _changed_ns(root / f"{DATABASE}-wal"))
        if _changed_ns(root / _COPY) > changed:
            return
        new.unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(root / DATABASE, timeout=10)) as database:
            database.execute("VACUUM INTO ?", (os.fspath(new),))
        with open(new, "rb") as file:
            os.fsync(file.fileno())  # or a crash could leave half a copy in the place of a whole one
        os.replace(new, root / _COPY)
    except (OSError, sqlite3.Error) as exc:
        raise errors.UnavailableError(f"{root / _COPY}: cannot be written: {exc}") from exc


class Reconciler:
    """See the module. `wait_seconds` bounds how long `restore` waits for layers that active snapshots use:
    what is not mounted by then is quarantined, and healed when it is."""

    def __init__(
        self,
        store: Store,
        images: Images,
        mounts: LayerMounts,
        snapshotter: Snapshotter,
        devices: DeviceClient,
        observer: Observer,
        wait_seconds: float,
    ) -> None:
        self._store = store
        self._images = images
        self._mounts = mounts
        self._snapshotter = snapshotter
        self._devices = devices
        self._observer = observer
        self._wait_seconds = wait_seconds
        self._quarantined: set[int] = set()
        self._mounting: set[str] = set()
        self._lock = threading.Lock()  # of what is being mounted

    def restore(self, *, rebuilt: bool) -> None:
        """Everything, once, at start: `mounts` and `images` are open, the device server runs. With a
        database that was `rebuilt`, what looks like nobody's may be that of a container which runs: it is
        left for the next start."""
        orphans = self._images.reconcile(attached(self._devices))
        if not rebuilt:
            self._clean_devices(orphans)
            self._clean_mounts()
            self._images.tidy_maps()
            self._snapshotter.cleanup()
        self._images.sweep()
        rows = self._store.walk()
        self._quarantined = {row.id for row in rows if row.broken is not None}
        self._check_folders(rows)
        self._mount_used(rows, wait_seconds=self._wait_seconds)

    def heal(self) -> None:
        """Try again what is quarantined."""
        if self._quarantined:
            rows = self._store.walk()
            self._quarantined.intersection_update({row.id for row in rows})
            self._check_folders(rows)
            self._mount_used(rows, wait_seconds=0.0)

    def remount(self) -> None:
        """The device server was replaced, and every layer mount with it: forget what it had attached, and
        mount anew what active snapshots use, for the containers that are started again."""
        self._images.reconcile(attached(self._devices))
        self._mount_used(self._store.walk(), wait_seconds=0.0)

    # -- at start ----------------------------------------------------------------------------------

    def _clean_devices(self, owners: Iterable[str]) -> None:
        for owner in owners:
            if self._images.detach_orphan(owner):
                self._observer.event("orphan", f"detached {owner}: no image of that name is known")

    def _clean_mounts(self) -> None:
        expected = {
            layer.mount_number: row.device(layer) for row in self._images.rows() for layer in row.layers
        }
        for number, device in self._mounts.mounted().items():
            if expected.get(number) != device:
                self._mounts.unmount(number)
                self._observer.event("orphan", f"unmounted {self._mounts.path(number)}: it was nobody's")

    def _check_folders(self, rows: Iterable[SnapshotRow]) -> None:
        """Rows without their folder, and those whose folder is back."""
        for row in rows:
            if row.image is not None:
                continue
            there = (self._snapshotter.folder(row.id) / "fs").is_dir()
            if not there and row.broken is None:
                self._quarantine(row, _NO_FOLDER)
            elif there and row.broken == _NO_FOLDER:
                self._heal(row)

    # -- layers in use -----------------------------------------------------------------------------

    def _mount_used(self, rows: list[SnapshotRow], *, wait_seconds: float) -> None:
        """Mount the lazy layers below active snapshots and views, images in parallel. What is not there in
        time goes on by itself; an image that is still at it is not begun once more."""
        by_image: dict[str, list[SnapshotRow]] = {}
        for row in _used_layers(rows):
            by_image.setdefault(row.image or "", []).append(row)
        with self._lock:
            by_image = {image: group for image, group in by_image.items() if image not in self._mounting}
            self._mounting.update(by_image)
        if not by_image:
            return
        pool = concurrent.futures.ThreadPoolExecutor(_PARALLEL_MOUNTS, "mount")
        try:
            pending = {pool.submit(self._mount_image, group): group for group in by_image.values()}
        except RuntimeError as exc:
            with self._lock:
                self._mounting.difference_update(by_image)
            raise errors.UnavailableError(f"no thread to mount layers: {exc}") from exc
        done, late = concurrent.futures.wait(pending, wait_seconds)
        pool.shutdown(wait=False)
        for future in late if wait_seconds else ():
            for row in pending[future]:
                if row.broken is None and not self._is_mounted(row):
                    self._quarantine(row, f"its layer could not be mounted within {wait_seconds:g} s")
        for future in done:
            future.result()

    def _mount_image(self, rows: list[SnapshotRow]) -> None:
        try:
            self._mount_layers(rows)
        finally:
            with self._lock:
                self._mounting.discard(rows[0].image or "")

    def _mount_layers(self, rows: list[SnapshotRow]) -> None:
        for row in rows:
            assert row.image is not None
            assert row.layer is not None
            try:
                self._images.directory(row.image, row.layer)
            except errors.ImagefsError as exc:
                if row.broken is None:
                    self._quarantine(row, str(exc))
            else:
                with contextlib.suppress(errors.NotFoundError):
                    if self._store.by_id(row.id).broken is not None:
                        self._heal(row)

    def _is_mounted(self, row: SnapshotRow) -> bool:
        image = next((each for each in self._images.rows() if each.block_digest == row.image), None)
        if image is None or row.layer is None or not 0 <= row.layer < len(image.layers):
            return False
        layer = image.layers[row.layer]
        return self._mounts.find(layer.mount_number, image.device(layer)) is not None

    def _quarantine(self, row: SnapshotRow, why: str) -> None:
        self._store.set_broken(row.id, why)
        self._quarantined.add(row.id)
        self._observer.event("quarantined", f"snapshot {row.name}: {why}", level="error", snapshot=row.name)

    def _heal(self, row: SnapshotRow) -> None:
        self._store.set_broken(row.id, None)
        self._quarantined.discard(row.id)
        self._observer.event("healed", f"snapshot {row.name} works again", snapshot=row.name)


def attached(client: DeviceClient) -> dict[str, set[str]]:
    """What a device server has attached: owner -> names of devices."""
    found: dict[str, set[str]] = {}
    for device in client.status()["devices"]:
        for owner in device["owners"]:
            found.setdefault(owner, set()).add(device["name"])
    return found


def _used_layers(rows: list[SnapshotRow]) -> list[SnapshotRow]:
    """The lazy rows that active snapshots and views stand on."""
    by_id = {row.id: row for row in rows}
    seen: set[int] = set()
    for row in rows:
        number = row.parent_id if row.kind is not Kind.COMMITTED else None
        while number is not None and number not in seen and number in by_id:
            seen.add(number)
            number = by_id[number].parent_id
    return [by_id[number] for number in sorted(seen) if by_id[number].image is not None]


def _changed_ns(path: Path) -> int:
    """When a file was changed last; 0 for one that is not there."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime_ns
    return 0


def _move_aside(path: Path, aside: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{path}{suffix}", f"{aside}{suffix}")


def _say_rebuilt(observer: Observer, reason: str, aside: Path, how: str, store: Store) -> None:
    counts = f"{len(store.walk())} snapshots, {len(store.images())} images"
    observer.event(
        "database_rebuilt",
        f"{reason}; moved to {aside.name}; {how}: {counts}",
        level="error",
        aside=str(aside),
    )
