"""Reading blobs over HTTP: ranges and whole blobs as streams, resumed where they broke.

Used by the registry and S3 origins, which differ only in how a request for a blob is made (`Opener`). Runs
in the caller's thread. A server may answer a range with less than was asked (the rest is asked for again),
or ignore Range and send everything: the bytes before the range are then read and dropped, up to a limit.
RFC 9110, section 14.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Generator, Iterator
from typing import Protocol

from imagefs import errors
from imagefs.origin import headers, retry, transport

_log = logging.getLogger(__name__)

MAX_SKIPPED_BYTES = 32 * 1024 * 1024
"""How much of a blob is read and dropped to reach a range that the server would not go to itself."""
_PROGRESS_BYTES = 64 * 1024
"""An attempt that brought this much starts the count of failures again."""


class Opener(Protocol):
    """Asks the origin for a blob, `length` None for everything from `offset` on (from 0: no Range field).
    Follows redirects and signs; returns whatever status comes."""

    def __call__(
        self, digest: str, offset: int, length: int | None, deadline: float | None
    ) -> transport.Answer: ...


class RangeReader:
    """The reading half of an origin that speaks HTTP. Thread-safe."""

    def __init__(self, name: str, opener: Opener, policy: retry.Policy) -> None:
        self._name = name
        self._open = opener
        self._policy = policy
        self._warned = False

    def stream_range(
        self, digest: str, offset: int, length: int, deadline: float | None
    ) -> Generator[bytes, None, None]:
        """As Origin.stream_range."""
        attempts = retry.Attempts(self._policy, deadline)
        done = 0
        while done < length:
            before = done
            try:
                for piece in self._from(digest, offset + done, length - done, deadline):
                    done += len(piece)
                    yield piece
            except errors.UnavailableError as exc:
                if done - before >= _PROGRESS_BYTES:
                    attempts.progressed()
                if deadline is not None and time.monotonic() >= deadline:
                    raise
                attempts.failed(exc)

    def read(self, digest: str, max_bytes: int) -> bytes:
        """As Origin.read_blob."""

        def check_total(total: int) -> None:
            if total > max_bytes:
                raise errors.InvalidInputError(
                    f"{self._name}: blob {digest} has {total} bytes, more than the {max_bytes} allowed"
                )

        out = bytearray()
        for piece in self._whole(digest, check_total):
            out += piece
            check_total(len(out))
        self._check_digest(digest, hashlib.sha256(out).hexdigest())
        return bytes(out)

    def stream_blob(self, digest: str, size: int) -> Iterator[bytes]:
        """As Origin.stream_blob."""

        def check_total(total: int) -> None:
            if total != size:
                raise errors.IntegrityError(f"{self._name}: blob {digest} has {total} bytes, expected {size}")

        hasher = hashlib.sha256()
        position = 0
        for piece in self._whole(digest, check_total):
            position += len(piece)
            if position > size:
                check_total(position)
            hasher.update(piece)
            yield piece
        check_total(position)
        self._check_digest(digest, hasher.hexdigest())

    def _whole(self, digest: str, check_total: Callable[[int], None]) -> Iterator[bytes]:
        """All bytes of a blob in order; `check_total` sees the size as soon as the server tells it."""
        attempts = retry.Attempts(self._policy)
        position = 0
        while True:
            before = position
            try:
                answer = self._answer(digest, position, None, None)
                try:
                    total = _total(answer)
                    if total is not None:
                        check_total(total)
                    self._skip(answer, digest, position, limit_bytes=None)
                    while piece := answer.read_piece(transport.READ_PIECE_BYTES):
                        position += len(piece)
                        yield piece
                finally:
                    answer.close()
                if total is None or position >= total:
                    return
                raise errors.UnavailableError(f"{answer.what}: the body ended at byte {position} of {total}")
            except errors.UnavailableError as exc:
                if position - before >= _PROGRESS_BYTES:
                    attempts.progressed()
                attempts.failed(exc)

    def _from(self, digest: str, offset: int, length: int, deadline: float | None) -> Iterator[bytes]:
        """At most `length` bytes from `offset`, by one request. UnavailableError if none or too few came."""
        answer = self._answer(digest, offset, length, deadline)
        try:
            total = _total(answer)
            if total is not None and total < offset + length:
                raise errors.IntegrityError(
                    f"{answer.what}: the blob has {total} bytes, it ends before byte {offset + length}"
                )
            self._skip(answer, digest, offset, MAX_SKIPPED_BYTES)
            left = length
            while left and (piece := answer.read_piece(min(left, transport.READ_PIECE_BYTES))):
                left -= len(piece)
                yield piece
            if left == length:
                raise errors.UnavailableError(f"{answer.what}: the body was empty")
        finally:
            answer.close()

    def _answer(
        self, digest: str, offset: int, length: int | None, deadline: float | None
    ) -> transport.Answer:
        answer = self._open(digest, offset, length, deadline)
        if answer.status not in (200, 206):
            raise transport.status_error(answer)
        return answer

    def _skip(self, answer: transport.Answer, digest: str, offset: int, limit_bytes: int | None) -> None:
        """Bring the body to `offset`, wherever the server began."""
        begins = 0
        if answer.status == 206:
            place = headers.content_range(answer.fields.get("Content-Range"))
            if place is None or place.first > offset:
                raise errors.UnavailableError(f"{answer.what}: the answer holds another range than asked for")
            begins = place.first
        skipped = offset - begins
        if skipped == 0:
            return
        if not self._warned:
            self._warned = True
            _log.warning(
                "%s ignores Range requests: lazy reading from it moves more than it needs", self._name
            )
        if limit_bytes is not None and skipped > limit_bytes:
            raise errors.InvalidInputError(
                f"{answer.what}: the server ignores Range requests, which lazy reading needs; "
                "copy the image to a registry that honours them"
            )
        while skipped and (piece := answer.read_piece(min(skipped, transport.READ_PIECE_BYTES))):
            skipped -= len(piece)

    def _check_digest(self, digest: str, found: str) -> None:
        if digest != f"sha256:{found}":
            raise errors.IntegrityError(f"{self._name}: blob {digest}: its bytes have digest sha256:{found}")


def _total(answer: transport.Answer) -> int | None:
    """The size of the whole blob, where the answer tells."""
    if answer.status == 206:
        place = headers.content_range(answer.fields.get("Content-Range"))
        return place.total if place else None
    return headers.content_length(answer.fields.get("Content-Length"))
