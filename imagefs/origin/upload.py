"""Uploading one blob to a registry: in one piece when small, else in chunks that resume.

Called by RegistryOrigin.put_blob, in its thread, once it is known that the blob is missing. The digest of
what was read from the source is compared before the upload is closed, so that a registry never has the
chance to store wrong bytes; an upload that fails is cancelled, so that none is left open. OCI distribution
spec 1.1, "Pushing a blob in chunks".
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator

from imagefs import errors, frames
from imagefs.origin import BlobSource, headers, retry, session, transport

MONOLITHIC_BYTES = 1024 * 1024
CHUNK_BYTES = 16 * 1024 * 1024
_OCTETS = {"Content-Type": "application/octet-stream"}


class _UploadLostError(errors.UnavailableError):
    """The registry no longer knows the upload: it starts again, from the first byte."""


class Upload:
    """One blob on its way. Used by one thread, once."""

    def __init__(
        self,
        registry: session.Session,
        uploads_url: str,
        scopes: frozenset[str],
        what: str,
        policy: retry.Policy,
        is_there: Callable[[], bool],
    ) -> None:
        self._session = registry
        self._uploads_url = uploads_url
        self._scopes = scopes
        self._what = what
        self._policy = policy
        self._is_there = is_there
        self._chunk_bytes = CHUNK_BYTES
        self._location: str | None = None
        self._sent = 0
        self._hasher = hashlib.sha256()
        self._hashed = 0
        self._reader: frames.Pieces | None = None
        """Stands where the last chunk ended: a source is opened again only where one is sent again."""

    def run(self, digest: str, size: int, source: BlobSource) -> None:
        """Send the blob. IntegrityError if the source is not `size` bytes with `digest`."""
        attempts = retry.Attempts(self._policy)
        while True:
            before = self._sent
            try:
                if self._location is None:
                    self._begin()
                elif size > MONOLITHIC_BYTES:
                    self._ask_offset()
                if size <= MONOLITHIC_BYTES:
                    self._finish(digest, self._small(digest, size, source))
                else:
                    self._send_chunks(size, source)
                    self._check(digest, size)
                    self._finish(digest, b"")
                return
            except errors.UnavailableError as exc:
                self._reader = None  # the error may have been the source's
                if isinstance(exc, _UploadLostError):
                    self._location = None
                    if self._is_there():
                        return  # lost was only the answer that said so
                if self._sent > before:
                    attempts.progressed()
                self._retry(attempts, exc)
            except BaseException:
                self._cancel()
                raise

    def _retry(self, attempts: retry.Attempts, exc: errors.UnavailableError) -> None:
        try:
            attempts.failed(exc)
        except BaseException:
            self._cancel()
            raise

    def _begin(self) -> None:
        self._sent = 0
        answer = self._request("POST", self._uploads_url, {"Content-Length": "0"}, b"")
        if answer.status != 202:
            raise transport.status_error(answer)
        self._moved_to(answer)
        smallest = headers.content_length(answer.fields.get("OCI-Chunk-Min-Length"))
        self._chunk_bytes = max(self._chunk_bytes, smallest or 0)

    def _send_chunks(self, size: int, source: BlobSource) -> None:
        while self._sent < size:
            start, end = self._sent, min(self._sent + self._chunk_bytes, size)
            fields = {
                **_OCTETS,
                "Content-Length": str(end - start),
                "Content-Range": f"{start}-{end - 1}",
            }
            answer = self._session.open(
                "PATCH",
                self._where(),
                f"{self._what} at byte {start}",
                self._scopes,
                fields=fields,
                body=lambda start=start, end=end: self._pieces(source, start, end, size),  # type: ignore[misc]
            )
            if answer.status not in (202, 204):
                raise self._failure(answer)
            self._moved_to(answer)
            stored = headers.upload_offset(answer.fields.get("Range"))
            self._sent = end if stored is None else self._checked(stored, end)

    def _pieces(self, source: BlobSource, start: int, end: int, size: int) -> Iterator[bytes]:
        """Bytes `start` to `end` of the source; each is hashed once, however often it is sent."""
        reader = self._reader
        if reader is None or reader.position != start:
            reader = self._reader = frames.Pieces(source.open(start), start)
        while reader.position < end:
            position = reader.position
            piece = reader.take(end - position)
            if not piece:
                raise errors.IntegrityError(
                    f"{self._what}: the source ended at byte {position}, {end} bytes were expected"
                )
            if reader.position > self._hashed:
                self._hasher.update(piece[max(0, self._hashed - position) :])
                self._hashed = reader.position
            yield piece
        if end == size and reader.take(1):
            raise errors.IntegrityError(f"{self._what}: the source has more than {size} bytes")

    def _small(self, digest: str, size: int, source: BlobSource) -> bytes:
        data = b"".join(source.open(0))
        self._hasher, self._hashed = hashlib.sha256(data), len(data)
        self._check(digest, size)
        return data

    def _check(self, digest: str, size: int) -> None:
        found = "sha256:" + self._hasher.hexdigest()
        if self._hashed != size or found != digest:
            raise errors.IntegrityError(
                f"{self._what}: the source has {self._hashed} bytes with digest {found}, "
                f"expected {size} bytes; nothing was stored"
            )

    def _finish(self, digest: str, data: bytes) -> None:
        location = self._where()
        url = f"{location}{'&' if '?' in location else '?'}digest={digest}"
        answer = self._request("PUT", url, {**_OCTETS, "Content-Length": str(len(data))}, data)
        if answer.status not in (201, 202, 204):
            raise self._failure(answer)
        answer.discard()

    def _ask_offset(self) -> None:
        """Where a broken upload stands."""
        answer = self._request("GET", self._where(), {}, None)
        if answer.status not in (202, 204):
            raise self._failure(answer)
        stored = headers.upload_offset(answer.fields.get("Range"))
        self._moved_to(answer)
        self._sent = self._checked(stored or 0, self._hashed)

    def _checked(self, stored: int, limit: int) -> int:
        if stored > limit:
            raise _UploadLostError(f"{self._what}: the registry claims {stored} bytes of {limit} sent")
        return stored

    def _failure(self, answer: transport.Answer) -> errors.ImagefsError:
        error = transport.status_error(answer)
        # 404: the upload expired or its registry restarted; 416: we disagree about where it stands.
        if answer.status in (404, 416):
            return _UploadLostError(str(error))
        return error

    def _cancel(self) -> None:
        if self._location is None:
            return
        # Where it fails, the registry's own clean-up of old uploads takes it.
        with contextlib.suppress(errors.ImagefsError):
            self._request("DELETE", self._location, {}, None).discard()
        self._location = None

    def _request(self, method: str, url: str, fields: dict[str, str], body: bytes | None) -> transport.Answer:
        return self._session.open(
            method,
            url,
            self._what,
            self._scopes,
            fields=fields,
            body=None if body is None else lambda: body,
        )

    def _where(self) -> str:
        if self._location is None:
            raise _UploadLostError(f"{self._what}: the registry named no place to upload to")
        return self._location

    def _moved_to(self, answer: transport.Answer) -> None:
        target = answer.fields.get("Location")
        answer.discard()
        if target:
            self._location = transport.join(answer.url, target, self._what)
        self._where()
