"""The node's models: one directory that all engines of the machine share.

    DIR/NAME-IDENTITY/            a model that is whole: renamed into place once it was checked
    DIR/NAME-IDENTITY.part/       one that is being downloaded, or was: the next try goes on with it
    DIR/images/IDENTITY/          where a block image is mounted
    DIR/NAME-IDENTITY.lock        a flock: shared while an engine uses it, exclusive while it is brought,
                                  removed or mounted

The kernel lets go of the lock of an engine that was killed, so nothing is ever held by nobody. `acquire` may
be called by any number of processes: one brings the model, the others wait. For the quota the least recently
used models go first, none that is in use. A model whose bucket does not answer is served from what is here.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from serving import errors
from serving.models import bucket, image, listing, place

_MANIFEST = ".glowplug.json"
_PART, _LOCK = ".part", ".lock"
_TURN_SECONDS = 0.2


class Held:
    """A model that an engine may open, until `close`."""

    def __init__(self, path: Path, lock: _Lock, after: Callable[[], None] | None = None) -> None:
        self.path = path
        self._lock, self._after = lock, after

    def close(self) -> None:
        """It may go now. Who is the last takes the mount away."""
        if self._after is not None and self._lock.try_exclusive():
            self._after()
        self._lock.close()


class Store:
    """See the module. `say` is told what happens, in words."""

    def __init__(self, directory: Path, quota_bytes: int | None, say: Callable[[str], None]) -> None:
        self._directory, self._quota_bytes, self._say = directory, quota_bytes, say

    def acquire(self, wanted: place.Bucket | place.Image, stop: threading.Event) -> Held:
        """Have it on this node. Waits for whoever brings it; `stop` ends the waiting. Errors of `bucket` and
        `image`; ConfigurationError where the directory or the quota has no room."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise errors.ConfigurationError(
                f"model_cache.directory: {self._directory}: {exc.strerror or exc}"
            ) from exc
        if isinstance(wanted, place.Image):
            return self._mounted(wanted, stop)
        return self._downloaded(wanted, stop)

    # -- block images ----------------------------------------------------------------------------------

    def _mounted(self, wanted: place.Image, stop: threading.Event) -> Held:
        identity = hashlib.sha256(wanted.ref.encode()).hexdigest()[:16]
        at = self._directory / "images" / identity
        lock = _Lock(self._directory / f"image-{identity}{_LOCK}")
        lock.use(lambda: os.path.ismount(at), lambda: image.mount(wanted.ref, at, stop), stop)
        return Held(at / wanted.folder if wanted.folder else at, lock, lambda: image.umount(at))

    # -- buckets -----------------------------------------------------------------------------------------

    def _downloaded(self, wanted: place.Bucket, stop: threading.Event) -> Held:
        url = f"s3://{wanted.bucket}/{wanted.prefix}"
        source = bucket.Source(wanted)
        try:
            snapshot = source.look()
        except errors.UnavailableError as exc:
            if (known := self._newest(url)) is None:
                raise
            self._say(f"{exc}; served from what is on this node, {known.name}")
            return self._hold(known, stop)
        name = re.sub(r"[^A-Za-z0-9._-]", "_", wanted.prefix.rpartition("/")[2])[:60]
        path = self._directory / f"{name}-{snapshot.identity}"
        lock = _Lock(self._lock_of(path))
        lock.use(lambda: _whole(path, snapshot), lambda: self._bring(source, snapshot, path, url, stop), stop)
        with contextlib.suppress(OSError):
            os.utime(path / _MANIFEST)
        return Held(path, lock)

    def _hold(self, path: Path, stop: threading.Event) -> Held:
        def gone() -> None:
            raise errors.UnavailableError(f"model: {path.name} was removed just now; start again")

        lock = _Lock(self._lock_of(path))
        lock.use(path.is_dir, gone, stop)
        return Held(path, lock)

    def _bring(
        self,
        source: bucket.Source,
        snapshot: listing.Snapshot,
        path: Path,
        url: str,
        stop: threading.Event,
    ) -> None:
        part = path.with_name(f"{path.name}{_PART}")
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)  # it was damaged
        self._make_room(snapshot.size_bytes - _size_bytes(part), part)
        part.mkdir(mode=0o700, exist_ok=True)
        self._say(f"{url}: {len(snapshot.objects)} files, {snapshot.size_bytes} bytes, to {path}")
        source.fetch(snapshot, part, stop)
        manifest = {
            "url": url,
            "objects": [[each.name, each.size_bytes, each.etag] for each in snapshot.objects],
        }
        try:
            (part / _MANIFEST).write_text(json.dumps(manifest))
            part.rename(path)
        except OSError as exc:
            raise errors.ConfigurationError(f"model_cache: {path}: {exc.strerror or exc}") from exc

    def _newest(self, url: str) -> Path | None:
        """The model that was used last of those that came from there."""
        found = [
            (manifest.stat().st_mtime, manifest.parent)
            for manifest in self._directory.glob(f"*/{_MANIFEST}")
            if not manifest.parent.name.endswith(_PART) and _read_manifest(manifest).get("url") == url
        ]
        return max(found)[1] if found else None

    # -- room --------------------------------------------------------------------------------------------

    def _make_room(self, wanted_bytes: int, part: Path) -> None:
        """Remove what was not used for longest, until there is room."""
        for candidate in [None, *self._by_age(part)]:
            if candidate is not None:
                self._remove(candidate)
            lacking = self._lacking_bytes(wanted_bytes)
            if lacking <= 0:
                return
        raise errors.ConfigurationError(
            f"model_cache: {self._directory}: {lacking} bytes are lacking for a model of {wanted_bytes}, and "
            "what else is there is in use; raise model_cache.quota_bytes, or name a larger disk"
        )

    def _lacking_bytes(self, wanted_bytes: int) -> int:
        disk = shutil.disk_usage(self._directory)
        lacking = wanted_bytes - disk.free
        if self._quota_bytes is not None:
            used = sum(_size_bytes(each) for each in self._models())
            lacking = max(lacking, used + wanted_bytes - self._quota_bytes)
        return lacking

    def _models(self) -> list[Path]:
        return [
            each
            for each in self._directory.iterdir()
            if each.is_dir() and each.name != "images" and not each.is_symlink()
        ]

    def _by_age(self, besides: Path) -> list[Path]:
        def used_at(path: Path) -> float:
            with contextlib.suppress(OSError):
                return (path / _MANIFEST).stat().st_mtime
            return path.stat().st_mtime

        return sorted((each for each in self._models() if each != besides), key=used_at)

    def _remove(self, path: Path) -> None:
        """Unless somebody uses it."""
        lock = _Lock(self._lock_of(path))
        try:
            if lock.try_exclusive():
                self._say(f"{path.name} is removed, to make room")
                shutil.rmtree(path, ignore_errors=True)
        finally:
            lock.close()

    def _lock_of(self, path: Path) -> Path:
        return self._directory / f"{path.name.removesuffix(_PART)}{_LOCK}"


class _Lock:
    """A flock on a file of its own."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def use(self, ready: Callable[[], bool], make: Callable[[], None], stop: threading.Event) -> None:
        """Hold it shared, with what it guards ready: made here, or by who else wants it. UnavailableError
        when told to stop; closed on any error."""
        try:
            while True:
                if self._try(fcntl.LOCK_SH):
                    if ready():
                        return
                    # Not atomic: the shared lock is let go of first, so all is looked at again.
                    if self.try_exclusive():
                        if not ready():
                            make()
                        continue
                if stop.wait(_TURN_SECONDS):
                    raise errors.UnavailableError("model: the waiting for it was stopped")
        except BaseException:
            self.close()
            raise

    def try_exclusive(self) -> bool:
        """Whether nobody else has it in any way. If not, it is not held at all any more."""
        return self._try(fcntl.LOCK_EX)

    def _try(self, how: int) -> bool:
        try:
            fcntl.flock(self._descriptor, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        os.close(self._descriptor)


def _read_manifest(path: Path) -> dict[str, object]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _whole(path: Path, snapshot: listing.Snapshot) -> bool:
    """Whether all files are there in their sizes: bytes were checked when they came."""
    if not (path / _MANIFEST).exists():
        return False
    with contextlib.suppress(OSError):
        return all((path / each.name).stat().st_size == each.size_bytes for each in snapshot.objects)
    return False


def _size_bytes(path: Path) -> int:
    """On the disk: a download under way has holes."""
    total = 0
    for each in path.rglob("*"):
        with contextlib.suppress(OSError):
            total += each.stat().st_blocks * 512
    return total
