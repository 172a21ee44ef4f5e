"""Downloads a listed prefix of S3, many pieces at a time, so that a download that was cut off goes on.

Called by `store`, with the store's lock of that model held, on the caller's thread and `_STREAMS` of its own.
Credentials, region and endpoint are botocore's business. Every request names the ETag that was listed
(If-Match), so that a file is never made of two versions of an object. Which pieces of a file have come stands
beside it (`NAME.pieces`, one byte a piece, written after the piece); whole files are checked against their
ETags, and what does not fit is fetched anew, once.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from serving import errors
from serving.models import listing, place

_STREAMS = 16
_TRIES = 4
_PAUSE_SECONDS = 0.5
_CHUNK_BYTES = 1 << 20
_CHANGED = ("412", "PreconditionFailed")
_MISSING = ("404", "NoSuchKey", "NoSuchBucket")


class Source:
    """One prefix. UnavailableError where S3 does not answer, NotFoundError where there is nothing."""

    def __init__(self, where: place.Bucket) -> None:
        try:
            import boto3
            import botocore.config
        except ImportError as exc:
            raise errors.ConfigurationError(
                "model: s3:// needs boto3, which is not installed; pip install 'glowplug[s3]'"
            ) from exc
        self._where = where
        self._url = f"s3://{where.bucket}/{where.prefix}"
        config = botocore.config.Config(
            connect_timeout=5,
            read_timeout=30,
            max_pool_connections=_STREAMS,
            retries={"mode": "standard", "max_attempts": 3},
        )
        with self._wrapped():
            self._s3: Any = boto3.client("s3", config=config)

    def look(self) -> listing.Snapshot:
        """What is there now."""
        found: list[tuple[str, int, str]] = []
        with self._wrapped():
            pages = self._s3.get_paginator("list_objects_v2").paginate(
                Bucket=self._where.bucket, Prefix=f"{self._where.prefix}/"
            )
            for page in pages:
                found += [(each["Key"], each["Size"], each["ETag"]) for each in page.get("Contents", ())]
        try:
            snapshot = listing.snapshot(self._where.prefix, found)
        except ValueError as exc:
            raise errors.ConfigurationError(f"model: {self._url}: {exc}") from exc
        if not snapshot.objects:
            raise errors.NotFoundError(f"model: {self._url}: there is nothing; upload the checkpoint there")
        return snapshot

    def fetch(self, snapshot: listing.Snapshot, directory: Path, stop: threading.Event) -> None:
        """Bring all of it into `directory`, whole and checked; what lies there of an earlier try is used."""
        with concurrent.futures.ThreadPoolExecutor(_STREAMS, "model") as pool:
            wanted: Sequence[listing.Object] = snapshot.objects
            for _ in range(2):
                self._all(
                    pool,
                    [(each, piece) for each in wanted for piece in _missing(directory, each)],
                    directory,
                    stop,
                )
                checked = pool.map(lambda each: (each, self._good(directory, each)), wanted)
                wanted = [each for each, good in checked if not good]
                if not wanted:
                    return
                for each in wanted:
                    _forget(directory / each.name)
        raise errors.UnavailableError(
            f"model: {self._url}: {wanted[0].name} is not what its ETag says, twice; what is wrong lies "
            "between the bucket and this disk"
        )

    # -- pieces --------------------------------------------------------------------------------------

    def _all(
        self,
        pool: concurrent.futures.Executor,
        wanted: list[tuple[listing.Object, listing.Piece]],
        directory: Path,
        stop: threading.Event,
    ) -> None:
        failed = threading.Event()

        def one(entry: tuple[listing.Object, listing.Piece]) -> None:
            if stop.is_set() or failed.is_set():
                return
            try:
                self._piece(*entry, directory, stop)
            except BaseException:
                failed.set()
                raise

        for _ in pool.map(one, wanted):
            pass
        if stop.is_set():
            raise errors.UnavailableError(f"model: {self._url}: the download was stopped; it can go on")

    def _piece(
        self, wanted: listing.Object, piece: listing.Piece, directory: Path, stop: threading.Event
    ) -> None:
        path = directory / wanted.name
        for left in reversed(range(_TRIES)):
            try:
                self._read(wanted, piece, path)
                return
            except errors.UnavailableError:
                if not left or stop.wait(_PAUSE_SECONDS * (_TRIES - left)):
                    raise

    def _read(self, wanted: listing.Object, piece: listing.Piece, path: Path) -> None:
        last = piece.offset + piece.size_bytes - 1
        with self._wrapped():
            answer = self._s3.get_object(
                Bucket=self._where.bucket,
                Key=f"{self._where.prefix}/{wanted.name}",
                Range=f"bytes={piece.offset}-{last}",
                IfMatch=f'"{wanted.etag}"',
            )
            data = answer["Body"].read(piece.size_bytes + 1)
        if len(data) != piece.size_bytes:
            raise errors.UnavailableError(f"model: {self._url}/{wanted.name}: the answer was cut off")
        with _disk(path):
            _write(path, piece.offset, data)
            _write(_record(path), piece.number, b"\1")

    def _good(self, directory: Path, wanted: listing.Object) -> bool:
        """Whether a whole file is what was listed."""
        path = directory / wanted.name
        with _disk(path):
            if not wanted.size_bytes:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            descriptor = os.open(path, os.O_RDWR)
            try:
                os.ftruncate(descriptor, wanted.size_bytes)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            parts = listing.kind(wanted.etag)
            if parts == 0:
                digests = _digests(path, max(1, wanted.size_bytes)) or [_md5().digest()]
                good = digests[0].hex() == wanted.etag
            elif parts is not None and (part_bytes := self._part_bytes(wanted)):
                good = listing.combined(_digests(path, part_bytes)) == wanted.etag
            else:
                good = True
        if good:
            _record(path).unlink(missing_ok=True)
        return good

    def _part_bytes(self, wanted: listing.Object) -> int | None:
        """How large the parts were that it was put in; None where the server does not say."""
        try:
            with self._wrapped():
                head = self._s3.head_object(
                    Bucket=self._where.bucket, Key=f"{self._where.prefix}/{wanted.name}", PartNumber=1
                )
        except errors.ServingError:
            return None
        size = int(head["ContentLength"])
        parts = listing.kind(wanted.etag)
        return size if parts and size and -(-wanted.size_bytes // size) == parts else None

    @contextlib.contextmanager
    def _wrapped(self) -> Iterator[None]:
        """botocore's errors, as ours."""
        import botocore.exceptions
        import urllib3.exceptions

        try:
            yield
        except botocore.exceptions.ClientError as exc:
            code = str(exc.response.get("Error", {}).get("Code", ""))
            if code in _MISSING:
                raise errors.NotFoundError(f"model: {self._url}: {code}; is the place right?") from exc
            if code in _CHANGED:
                raise errors.ConflictError(
                    f"model: {self._url}: an object changed while it was read; start again"
                ) from exc
            if "AccessDenied" in code or code in ("403", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
                raise errors.ConfigurationError(
                    f"model: {self._url}: {code}; give this machine credentials that may read it"
                ) from exc
            raise errors.UnavailableError(f"model: {self._url}: {code or exc}") from exc
        except botocore.exceptions.NoCredentialsError as exc:
            raise errors.ConfigurationError(
                f"model: {self._url}: {exc}; give this machine credentials that may read it"
            ) from exc
        except (botocore.exceptions.BotoCoreError, urllib3.exceptions.HTTPError, ValueError) as exc:
            raise errors.UnavailableError(f"model: {self._url}: {exc}") from exc


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.pieces")


def _missing(directory: Path, wanted: listing.Object) -> Iterator[listing.Piece]:
    """Pieces that have not come yet."""
    path = directory / wanted.name
    try:
        come = _record(path).read_bytes()
    except FileNotFoundError:
        # No record: either whole (and checked) or not begun.
        if path.exists() and path.stat().st_size == wanted.size_bytes:
            return
        come = b""
    for piece in listing.pieces(wanted.size_bytes):
        if come[piece.number : piece.number + 1] != b"\1":
            yield piece


def _forget(path: Path) -> None:
    path.unlink(missing_ok=True)
    _record(path).unlink(missing_ok=True)


def _write(path: Path, offset: int, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data)
        while view:
            written = os.pwrite(descriptor, view, offset)
            view, offset = view[written:], offset + written
    finally:
        os.close(descriptor)


def _md5() -> hashlib._Hash:
    """What ETags are made of; not what anybody is kept out by."""
    return hashlib.md5(usedforsecurity=False)


def _digests(path: Path, part_bytes: int) -> list[bytes]:
    """The MD5 of each part of a file."""
    found: list[bytes] = []
    with path.open("rb", buffering=0) as file:
        while True:
            digest, left = _md5(), part_bytes
            while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
                digest.update(chunk)
                left -= len(chunk)
            if left == part_bytes:
                return found
            found.append(digest.digest())


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise errors.ConfigurationError(
            f"model_cache: {path}: {exc.strerror or exc}; make room, or name another directory"
        ) from exc
