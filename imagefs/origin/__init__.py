"""Origins: where manifests and blobs live. One contract, three implementations, one conformance suite.

`registry.RegistryOrigin` (docker://), `s3.S3Origin` (s3://) and `folder.FolderOrigin` (oci:) implement
`Origin`, reading and writing; tests/imagefs/test_origin_conformance.py runs the same cases on each.

The contract:

* Every method may be called from any thread, concurrently.
* Reads never return bytes of the wrong length. Whole reads (`read_manifest`, `read_blob`) are verified
  against the digest they were asked by. Ranges are not: their caller holds the block digest.
* Writes are idempotent: putting what is already there succeeds and moves no data where the origin can tell.
  A blob or manifest is visible under its name whole or not at all.
* Each call retries transient faults itself (bounded, with jitter, honouring Retry-After), resuming a body
  where it broke; what it raises is final for this call: NotFoundError, DeniedError, IntegrityError,
  InvalidInputError, or UnavailableError once the attempts are spent.
* Messages name the origin, the blob and the offset; never a credential.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # whoever names an origin's options loads this, before it can start the device server
    from imagefs import errors
    from imagefs.artifact import Descriptor, Manifest

MAX_MANIFEST_BYTES = 4 * 1024 * 1024


class Origin(Protocol):
    """One repository (docker://HOST/REPOSITORY), prefix (s3://BUCKET/PREFIX) or layout folder (oci:DIR)."""

    @property
    def name(self) -> str:
        """The REF of this place without tag or digest, for messages; opening it again gives this origin."""

    # -- reading -----------------------------------------------------------------------------------

    def read_manifest(self, reference: str) -> Manifest:
        """The manifest or index by tag or `sha256:` digest, at most MAX_MANIFEST_BYTES."""

    def referrers(self, digest: str) -> list[Descriptor]:
        """Descriptors of the manifests whose `subject` is `digest`, in no particular order; empty if none."""

    def read_blob(self, digest: str, max_bytes: int) -> bytes:
        """A whole small blob, verified. InvalidInputError if it is larger than `max_bytes`."""

    def stream_range(
        self, digest: str, offset: int, length: int, deadline: float | None = None
    ) -> Generator[bytes, None, None]:
        """The `length` bytes from byte `offset` of the blob, unverified, in pieces of at most 1 MiB as they
        come, none empty: exactly `length` bytes, or an error after some of them. Resumes where a connection
        broke. Gives up (UnavailableError) once time.monotonic() passes `deadline`; without one, after the
        origin's own number of attempts. Who stops before the end closes the iterator."""

    def doubt(self, digest: str, why: errors.IntegrityError) -> None:
        """A range of this blob was not what its reader has a digest of. Where the origin has other copies
        (mirrors), the next read asks one of those; otherwise nothing changes."""

    def stream_blob(self, digest: str, size: int) -> Iterator[bytes]:
        """The blob's bytes in order, in pieces of at most 1 MiB; resumes where a connection broke.
        Raises IntegrityError at the end if length or digest differ from what was asked for."""

    # -- writing -----------------------------------------------------------------------------------

    def has_blob(self, digest: str) -> bool:
        """Whether the blob is there, whole."""

    def put_blob(self, digest: str, size: int, source: BlobSource) -> None:
        """Store a blob. IntegrityError if the source's bytes are not `digest`."""

    def mount_blob(self, digest: str, other: Origin) -> bool:
        """Make `other`'s blob appear here without moving its bytes through this machine; False if the
        origin cannot (different registry, not supported, not permitted)."""

    def links(self, folder: Path) -> bool:
        """Whether `link_blob` takes the files of a folder."""

    def link_blob(self, digest: str, size: int, path: Path) -> bool:
        """Make a local file appear here as a blob without moving its bytes; False if the origin cannot (it
        is elsewhere). Whoever calls has hashed what is in the file, and nobody writes to it any more: it may
        be the blob from now on, under both names."""

    def put_manifest(self, data: bytes, media_type: str, tag: str | None = None) -> str:
        """Store a manifest or index whose blobs are already there, and point `tag` at it. Returns its
        digest. A manifest with a `subject` is found by `referrers(subject)` afterwards: where the
        origin has no referrers API, the OCI fallback tag is updated without losing concurrent entries."""

    def close(self) -> None:
        """Release connections. The origin is not used afterwards."""


class BlobSource(Protocol):
    """Bytes to upload, readable more than once (an upload may restart)."""

    def open(self, offset: int) -> Iterator[bytes]:
        """The bytes from `offset` to the end, in pieces of at most 1 MiB."""


@dataclasses.dataclass(frozen=True, slots=True)
class FileSource:
    """A local file as a BlobSource: its first `size` bytes."""

    path: os.PathLike[str] | str
    size: int

    def open(self, offset: int) -> Iterator[bytes]:
        with open(self.path, "rb", buffering=0) as file:
            file.seek(offset)
            left = self.size - offset
            while left > 0:
                piece = file.read(min(left, 1 << 20))
                if not piece:
                    return
                left -= len(piece)
                yield piece


@dataclasses.dataclass(frozen=True, slots=True)
class BytesSource:
    """Bytes in memory as a BlobSource."""

    data: bytes

    def open(self, offset: int) -> Iterator[bytes]:
        for start in range(offset, len(self.data), 1 << 20):
            yield self.data[start : start + (1 << 20)]
