"""oci:DIR: an OCI image layout on a local disk as an Origin.

Reads layouts that other tools made (skopeo, umoci); writes what they read. A blob is written to a temporary
name, synced and renamed; index.json is replaced the same way, under a lock (flock on DIR) and after reading
it again, so that any number of threads and processes may write at once. Temporary files are locked while
they are written: what a killed writer left is removed by the next one. Tools that ignore the lock can
still lose our entries in index.json, as each other's.

index.json lists every manifest once, tagged ones once per tag (`org.opencontainers.image.ref.name`), with
`artifactType` where the manifest has one. Referrers are found by reading the manifests that it lists.
OCI image spec 1.1, "Image Layout". Runs in the caller's thread and keeps no file open between calls.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import stat
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from imagefs import artifact, errors, readonce, reference
from imagefs.artifact import Descriptor, Manifest
from imagefs.origin import MAX_MANIFEST_BYTES, BlobSource, Origin, referrers
from imagefs.origin.referrers import Referrer

REF_NAME = "org.opencontainers.image.ref.name"
_LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'
_MAX_INDEX_BYTES = 64 * 1024 * 1024
_PIECE_BYTES = 1 << 20
_RANGE_PIECE_BYTES = 256 * 1024
_WRITING = ".writing-"
_YOUNG_SECONDS = 60.0


class FolderOrigin:
    """`imagefs.origin.Origin` on an OCI image layout. The folder is made by the first write."""

    def __init__(self, directory: Path) -> None:
        # Whole: processes with other working directories open this origin again by its name.
        self._directory = Path(os.path.abspath(directory))
        self._blobs = self._directory / "blobs" / "sha256"

    @property
    def name(self) -> str:
        return f"oci:{self._directory}"

    # -- reading -----------------------------------------------------------------------------------

    def read_manifest(self, reference: str) -> Manifest:
        """As Origin.read_manifest; an empty `reference` means the layout's only image or, without one, the
        block image of the only source that it has any of."""
        listed = self._entries(self._read_index())
        if ":" in reference:
            digest = _check_digest(reference)
            stated = next((e.media_type for e in listed if e.digest == digest), "")
        else:
            entry = self._tagged(listed, reference) if reference else self._only(listed)
            digest, stated = entry.digest, entry.media_type
        data = self._read_whole(digest, MAX_MANIFEST_BYTES)
        return Manifest(stated or referrers.media_type_of(data), digest, data)

    def referrers(self, digest: str) -> list[Descriptor]:
        _check_digest(digest)
        found = {}
        for entry in self._entries(self._read_index()):
            referrer = self._referrer(entry)
            if referrer is not None and referrer.subject == digest:
                found[entry.digest] = referrer.descriptor
        return list(found.values())

    def read_blob(self, digest: str, max_bytes: int) -> bytes:
        return self._read_whole(digest, max_bytes)

    def stream_range(
        self, digest: str, offset: int, length: int, deadline: float | None = None
    ) -> Generator[bytes, None, None]:
        with self._open(digest) as file:
            position, end = offset, offset + length
            while position < end:
                piece = self._read_piece(
                    file.fileno(), digest, position, min(_RANGE_PIECE_BYTES, end - position)
                )
                if not piece:
                    raise errors.IntegrityError(
                        f"{self.name}: blob {digest} ends at byte {position}, "
                        f"{length} bytes from byte {offset} were expected"
                    )
                position += len(piece)
                yield piece

    def doubt(self, digest: str, why: errors.IntegrityError) -> None:
        """There is one copy."""

    def stream_blob(self, digest: str, size: int) -> Iterator[bytes]:
        hasher = hashlib.sha256()
        position = 0
        with self._open(digest) as file:
            while piece := self._read_piece(file.fileno(), digest, position):
                position += len(piece)
                hasher.update(piece)
                yield piece
        if position != size or hasher.hexdigest() != digest.removeprefix("sha256:"):
            raise errors.IntegrityError(
                f"{self.name}: blob {digest} has {position} bytes with digest "
                f"sha256:{hasher.hexdigest()}, expected {size} bytes"
            )

    # -- writing -----------------------------------------------------------------------------------

    def has_blob(self, digest: str) -> bool:
        return self._path(digest).is_file()

    def put_blob(self, digest: str, size: int, source: BlobSource) -> None:
        if self.has_blob(digest):
            return
        self._make_layout()
        hasher = hashlib.sha256()
        written = 0
        with self._replacing(self._path(digest)) as fd:
            for piece in source.open(0):
                hasher.update(piece)
                written += len(piece)
                _write_all(fd, piece)
            if written != size or hasher.hexdigest() != digest.removeprefix("sha256:"):
                raise errors.IntegrityError(
                    f"{self.name}: blob {digest}: the source has {written} bytes with digest "
                    f"sha256:{hasher.hexdigest()}, expected {size} bytes; nothing was stored"
                )

    def mount_blob(self, digest: str, other: Origin) -> bool:
        if self.has_blob(digest):
            return True
        if not isinstance(other, FolderOrigin) or not other.has_blob(digest):
            return False
        self._make_layout()
        try:
            os.link(other._path(digest), self._path(digest))
        except FileExistsError:
            return True
        except OSError:
            return False  # another filesystem, or one without hard links
        return True

    def links(self, folder: Path) -> bool:
        try:
            # The layout, or the folder that it will be made in.
            ours = next(place for place in (self._blobs, *self._blobs.parents) if place.exists())
            return os.stat(folder).st_dev == os.stat(ours).st_dev
        except OSError:
            return False  # what is wrong, storing says

    def link_blob(self, digest: str, size: int, path: Path) -> bool:
        if self.has_blob(digest):
            return True
        self._make_layout()
        target = self._path(digest)
        try:
            with _open_file(path) as file:
                status = os.fstat(file.fileno())
                if status.st_size != size:
                    raise errors.IntegrityError(
                        f"{self.name}: blob {digest}: {path} has {status.st_size} bytes, expected {size}"
                    )
                if not self.links(path.parent):
                    return False
                os.fchmod(file.fileno(), 0o644)
                os.fsync(file.fileno())
                os.link(path, target)
            _sync_directory(target.parent)
        except FileExistsError:
            return True
        except OSError:
            return False  # a filesystem without hard links; what else is wrong, copying says
        return True

    def put_manifest(self, data: bytes, media_type: str, tag: str | None = None) -> str:
        if tag is not None and not reference.TAG.match(tag):
            raise errors.InvalidInputError(f"{self.name}: {tag!r} is not a tag")
        digest = artifact.digest_of(data)
        document = artifact.parse_json_object(data, f"{self.name}: manifest {digest}")
        if not self.has_blob(digest):
            self._make_layout()
            with self._replacing(self._path(digest)) as fd:
                _write_all(fd, data)
        entry: dict[str, Any] = {"mediaType": media_type, "digest": digest, "size": len(data)}
        if isinstance(document.get("artifactType"), str):
            entry["artifactType"] = document["artifactType"]
        self._list(entry, tag)
        return digest

    def close(self) -> None:
        """Nothing is held."""

    # -- index.json --------------------------------------------------------------------------------

    def _list(self, entry: dict[str, Any], tag: str | None) -> None:
        self._make_layout()
        lock = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            index = self._read_index()
            entries = index["manifests"]
            if tag is None:
                if any(isinstance(e, dict) and e.get("digest") == entry["digest"] for e in entries):
                    return
            else:
                entries = [e for e in entries if _digest(e) != entry["digest"] or _ref_name(e)]
                entries = self._untagged(entries, tag, entry["digest"])
                entry = {**entry, "annotations": {REF_NAME: tag}}
            document = {**index, "manifests": [*entries, entry]}
            with self._replacing(self._directory / "index.json") as fd:
                _write_all(fd, json.dumps(document, separators=(",", ":")).encode())
        finally:
            os.close(lock)

    def _untagged(self, entries: list[Any], tag: str, new: str) -> list[Any]:
        """`entries` after `tag` moved away. What loses its last entry that way is no longer listed, unless
        it is a referrer: those are found by being listed."""
        moved = [e for e in entries if _ref_name(e) == tag]
        kept = [e for e in entries if _ref_name(e) != tag]
        listed = {_digest(e) for e in kept} | {new}
        for entry in moved:
            descriptor = artifact.decode_descriptor(entry, f"{self.name}: index.json")
            if descriptor.digest not in listed and self._referrer(descriptor) is not None:
                annotations = {k: v for k, v in entry["annotations"].items() if k != REF_NAME}
                kept.append({**entry, "annotations": annotations})
        return kept

    def _read_index(self) -> dict[str, Any]:
        path = self._directory / "index.json"
        try:
            with _open_file(path) as file:
                data = file.read(_MAX_INDEX_BYTES + 1)
        except FileNotFoundError:
            data = b'{"schemaVersion":2,"mediaType":"' + artifact.OCI_INDEX.encode() + b'","manifests":[]}'
        except NotADirectoryError as exc:
            raise errors.InvalidInputError(f"{self.name}: not a folder") from exc
        except PermissionError as exc:
            raise errors.DeniedError(f"{self.name}: cannot read index.json: {exc.strerror}") from exc
        except OSError as exc:
            raise errors.UnavailableError(f"{self.name}: cannot read index.json: {exc}") from exc
        if len(data) > _MAX_INDEX_BYTES:
            raise errors.InvalidInputError(f"{path} is larger than {_MAX_INDEX_BYTES} bytes")
        index = artifact.parse_json_object(data, str(path))
        if not isinstance(index.get("manifests"), list):
            raise errors.InvalidInputError(
                f"{path}: manifests is not a list, this is not an OCI image layout"
            )
        return index

    def _entries(self, index: dict[str, Any]) -> list[Descriptor]:
        return [
            artifact.decode_descriptor(entry, f"{self.name}: index.json: manifests[{number}]")
            for number, entry in enumerate(index["manifests"])
        ]

    def _tagged(self, listed: list[Descriptor], tag: str) -> Descriptor:
        for entry in listed:
            if entry.annotations.get(REF_NAME) == tag:
                return entry
        have = sorted({e.annotations[REF_NAME] for e in listed if REF_NAME in e.annotations})
        raise errors.NotFoundError(
            f"{self.name}: no tag {tag} in index.json; it has: {', '.join(have[:20]) or 'no tags'}"
        )

    def _only(self, listed: list[Descriptor]) -> Descriptor:
        images = {e.digest: e for e in listed if not e.artifact_type and self._referrer(e) is None}
        if not images:
            # A folder that was the destination of conversions, and of nothing else: one image of each source.
            own = [r for e in listed if (r := self._referrer(e)) is not None]
            for subject in {r.subject for r in own}:
                chosen = artifact.choose(r.descriptor for r in own if r.subject == subject)
                if chosen is not None:
                    images[chosen.digest] = chosen
        if len(images) == 1:
            return next(iter(images.values()))
        if not images:
            raise errors.NotFoundError(f"{self.name}: there is no image in this folder")
        raise errors.InvalidInputError(
            f"{self.name}: {len(images)} images in this folder; say which one: oci:DIR:TAG or oci:DIR@DIGEST"
        )

    def _referrer(self, entry: Descriptor) -> Referrer | None:
        if entry.media_type not in (*artifact.MANIFEST_TYPES, *artifact.INDEX_TYPES):
            return None
        try:
            data = self._read_whole(entry.digest, MAX_MANIFEST_BYTES)
        except errors.NotFoundError:
            return None  # a layout may list what it does not hold
        return referrers.referrer(data, entry.media_type)

    # -- files -------------------------------------------------------------------------------------

    def _path(self, digest: str) -> Path:
        return self._blobs / _check_digest(digest).removeprefix("sha256:")

    @contextlib.contextmanager
    def _open(self, digest: str) -> Iterator[Any]:
        try:
            file = _open_file(self._path(digest))
        except (FileNotFoundError, NotADirectoryError) as exc:
            raise errors.NotFoundError(f"{self.name}: blob {digest}: not found in this folder") from exc
        except PermissionError as exc:
            raise errors.DeniedError(f"{self.name}: blob {digest}: {exc.strerror}") from exc
        except OSError as exc:
            raise errors.UnavailableError(f"{self.name}: blob {digest}: {exc}") from exc
        with file:
            yield file

    def _read_whole(self, digest: str, max_bytes: int) -> bytes:
        with self._open(digest) as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise errors.InvalidInputError(
                    f"{self.name}: blob {digest} has {size} bytes, more than the {max_bytes} allowed"
                )
            pieces = []
            position = 0
            while piece := self._read_piece(file.fileno(), digest, position):
                position += len(piece)
                pieces.append(piece)
        data = b"".join(pieces)
        found = artifact.digest_of(data)
        if found != digest:
            raise errors.IntegrityError(f"{self.name}: blob {digest}: its bytes have digest {found}")
        return data

    def _read_piece(self, fd: int, digest: str, position: int, limit_bytes: int = _PIECE_BYTES) -> bytes:
        try:
            return readonce.pread(fd, limit_bytes, position)
        except OSError as exc:
            raise errors.UnavailableError(f"{self.name}: blob {digest} at byte {position}: {exc}") from exc

    def _make_layout(self) -> None:
        try:
            self._blobs.mkdir(parents=True, exist_ok=True)
            if not (self._directory / "oci-layout").exists():
                with self._replacing(self._directory / "oci-layout") as fd:
                    _write_all(fd, _LAYOUT)
        except OSError as exc:
            raise errors.ConfigurationError(f"{self.name}: cannot write there: {exc}") from exc

    def _remove_abandoned(self) -> None:
        """Temporary files that nobody writes any more. One that is younger than a moment may not be locked
        yet: it stays."""
        youngest = time.time() - _YOUNG_SECONDS
        for path in self._directory.glob(f"{_WRITING}*"):
            # Held by its writer, gone meanwhile, or not ours to touch: no reason not to write.
            with contextlib.suppress(OSError), _open_file(path) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(file.fileno()).st_mtime <= youngest:
                    path.unlink()

    @contextlib.contextmanager
    def _replacing(self, path: Path) -> Iterator[int]:
        """A temporary file that becomes `path`, whole and synced, when the block ends without an error."""
        try:
            self._remove_abandoned()
            fd, temporary = tempfile.mkstemp(prefix=_WRITING, dir=self._directory)
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as exc:
            raise errors.ConfigurationError(f"{self.name}: cannot write there: {exc}") from exc
        try:
            try:
                yield fd
                os.fchmod(fd, 0o644)
                os.fsync(fd)
                os.rename(temporary, path)  # while the lock is held
            finally:
                os.close(fd)
        except OSError as exc:
            raise errors.ConfigurationError(f"{self.name}: cannot write {path}: {exc}") from exc
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        _sync_directory(path.parent)


def _open_file(path: Path) -> io.BufferedReader:
    """Open a regular file. Of a FIFO, which others may have put there, the opening alone would wait for ever.
    Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return os.fdopen(fd, "rb")


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _check_digest(digest: str) -> str:
    if not reference.DIGEST.match(digest):
        raise errors.InvalidInputError(f"{digest!r} is not a sha256 digest")
    return digest


def _ref_name(entry: object) -> str | None:
    annotations = entry.get("annotations") if isinstance(entry, dict) else None
    name = annotations.get(REF_NAME) if isinstance(annotations, dict) else None
    return name if isinstance(name, str) else None


def _digest(entry: object) -> object:
    return entry.get("digest") if isinstance(entry, dict) else None
