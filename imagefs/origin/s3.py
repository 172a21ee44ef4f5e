"""s3://BUCKET/PREFIX: a bucket of an S3 server as an Origin.

Objects under PREFIX, each written whole and, but for tags, never changed:

    blobs/sha256/HEX                             blobs, and manifests with their media type as Content-Type
    tags/TAG                                     JSON descriptor of the manifest that the tag points at
    referrers/sha256/SUBJECTHEX/MANIFESTHEX      JSON descriptor of a manifest with that subject

The list of a subject's referrers is a listing of keys: nothing is read, changed and written back, so
concurrent writers have nothing to lose. boto3 writes, lists and signs, with its own retries off (retry.py
is the one policy); blobs are read through presigned URLs by ranges.py, as a registry's are. boto3 is loaded
with this module, so this module is loaded only for s3:// (connect.py). Thread-safe, as boto3's clients are.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import boto3
import botocore.config
import botocore.exceptions

from imagefs import artifact, errors, reference
from imagefs.artifact import Descriptor, Manifest
from imagefs.origin import (
    MAX_MANIFEST_BYTES,
    BlobSource,
    Origin,
    headers,
    ranges,
    referrers,
    retry,
    transport,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from imagefs.origin.connect import Options

T = TypeVar("T")

# At DEBUG, botocore logs requests with their signatures and session tokens.
logging.getLogger("botocore").setLevel(logging.INFO)

SINGLE_PUT_BYTES = 8 * 1024 * 1024
PART_BYTES = 8 * 1024 * 1024
_MAX_PARTS = 10_000
_MAX_REFERRERS = 10_000
_PRESIGNED_LIFE_SECONDS = 3600
_PRESIGNED_KEPT_SECONDS = 300.0
_MAX_PRESIGNED = 1024
_DENIED = frozenset(
    {
        "AccessDenied",
        "AllAccessDisabled",
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidToken",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
    }
)
_TRANSIENT = frozenset({"RequestTimeout", "RequestTimeTooSkewed", "SlowDown", "Throttling", "InternalError"})


def connect(bucket: str, prefix: str, options: Options) -> S3Origin:
    """The origin for s3://BUCKET/PREFIX, with the credentials and region that boto3 finds."""
    config = botocore.config.Config(
        retries={"total_max_attempts": 1},
        max_pool_connections=options.connections,
        connect_timeout=options.connect_timeout_seconds,
        read_timeout=options.read_timeout_seconds,
        signature_version="s3v4",
        # A server of one's own seldom has a DNS name per bucket.
        s3={"addressing_style": "path" if options.s3_endpoint_url else "auto"},
    )
    try:
        client = boto3.session.Session().client(
            "s3",
            endpoint_url=options.s3_endpoint_url,
            verify=str(options.ca_file) if options.ca_file else None,
            config=config,
        )
    except (botocore.exceptions.BotoCoreError, ValueError) as exc:
        raise errors.ConfigurationError(f"s3://{bucket}/{prefix}: {exc}") from exc
    http = transport.Transport(
        transport.Settings(
            plain_http=options.plain_http,
            loopback=True,
            ca_file=options.ca_file,
            connections=options.connections,
            connect_timeout_seconds=options.connect_timeout_seconds,
            read_timeout_seconds=options.read_timeout_seconds,
        )
    )
    if options.s3_endpoint_url:
        http.check_url(options.s3_endpoint_url, f"s3://{bucket}/{prefix}: endpoint")
    return S3Origin(bucket, prefix, client, http)


class S3Origin:
    """`imagefs.origin.Origin` on a bucket."""

    def __init__(
        self,
        bucket: str,
        prefix: str,
        client: S3Client,
        http: transport.Transport,
        policy: retry.Policy = retry.DEFAULT,
    ) -> None:
        self.bucket = bucket
        self.prefix = prefix
        self._client = client
        self._http = http
        self._policy = policy
        self._ranges = ranges.RangeReader(self.name, self._open_blob, policy)
        self._lock = threading.Lock()
        self._presigned: dict[str, tuple[str, float]] = {}

    @property
    def name(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"

    # -- reading -----------------------------------------------------------------------------------

    def read_manifest(self, reference: str) -> Manifest:
        what = f"{self.name}: manifest {reference}"
        digest = _check_digest(reference) if ":" in reference else self._tagged(reference, what)
        data, media_type = self._get(self._blob_key(digest), MAX_MANIFEST_BYTES, what)
        found = artifact.digest_of(data)
        if found != digest:
            raise errors.IntegrityError(f"{what}: the object's bytes have digest {found}, expected {digest}")
        if media_type not in (*artifact.MANIFEST_TYPES, *artifact.INDEX_TYPES):
            media_type = referrers.media_type_of(data)
        return Manifest(media_type, digest, data)

    def referrers(self, digest: str) -> list[Descriptor]:
        what = f"{self.name}: referrers of {digest}"
        prefix = self._referrer_key(_check_digest(digest), "")
        out = []
        for key in self._call(what, lambda: self._keys(prefix, what)):
            data, _ = self._get(key, MAX_MANIFEST_BYTES, what)
            out.append(artifact.decode_descriptor(artifact.parse_json_object(data, what), what))
        return out

    def read_blob(self, digest: str, max_bytes: int) -> bytes:
        return self._ranges.read(digest, max_bytes)

    def stream_range(
        self, digest: str, offset: int, length: int, deadline: float | None = None
    ) -> Generator[bytes, None, None]:
        return self._ranges.stream_range(digest, offset, length, deadline)

    def doubt(self, digest: str, why: errors.IntegrityError) -> None:
        """There is one copy."""

    def stream_blob(self, digest: str, size: int) -> Iterator[bytes]:
        return self._ranges.stream_blob(digest, size)

    # -- writing -----------------------------------------------------------------------------------

    def has_blob(self, digest: str) -> bool:
        key = self._blob_key(digest)
        try:
            self._call(
                f"{self.name}: blob {digest}",
                lambda: self._client.head_object(Bucket=self.bucket, Key=key),
            )
        except errors.NotFoundError:
            return False
        return True

    def put_blob(self, digest: str, size: int, source: BlobSource) -> None:
        if self.has_blob(digest):
            return
        what = f"{self.name}: upload of blob {digest}"
        if size > SINGLE_PUT_BYTES:
            self._put_parts(digest, size, source, what)
            return
        data = b"".join(source.open(0))
        _check_source(digest, size, artifact.digest_of(data), len(data), what)
        self._put(self._blob_key(digest), data, "application/octet-stream", what)

    def mount_blob(self, digest: str, other: Origin) -> bool:
        if self.has_blob(digest):
            return True
        if (
            not isinstance(other, S3Origin)
            or other._client.meta.endpoint_url != self._client.meta.endpoint_url
        ):
            return False
        what = f"{self.name}: copy of blob {digest} from {other.name}"
        source: Any = {"Bucket": other.bucket, "Key": other._blob_key(digest)}
        try:
            # boto3 copies what is too large for one request in parts, server side.
            self._call(what, lambda: self._client.copy(source, self.bucket, self._blob_key(digest)))
        except (errors.DeniedError, errors.NotFoundError, errors.InvalidInputError):
            return False
        return True

    def links(self, folder: Path) -> bool:
        return False

    def link_blob(self, digest: str, size: int, path: Path) -> bool:
        return False

    def put_manifest(self, data: bytes, media_type: str, tag: str | None = None) -> str:
        if tag is not None and not reference.TAG.match(tag):
            raise errors.InvalidInputError(f"{self.name}: {tag!r} is not a tag")
        digest = artifact.digest_of(data)
        what = f"{self.name}: manifest {digest}"
        referrer = referrers.referrer(data, media_type)
        self._put(self._blob_key(digest), data, media_type, what)
        if referrer is not None:
            key = self._referrer_key(referrer.subject, digest)
            self._put_json(key, artifact.encode_descriptor(referrer.descriptor), what)
        if tag is not None:
            descriptor = Descriptor(media_type=media_type, digest=digest, size=len(data))
            self._put_json(f"{self.prefix}/tags/{tag}", artifact.encode_descriptor(descriptor), what)
        return digest

    def close(self) -> None:
        self._client.close()
        self._http.close()

    # -- objects -----------------------------------------------------------------------------------

    def _tagged(self, tag: str, what: str) -> str:
        if not reference.TAG.match(tag):
            raise errors.InvalidInputError(f"{self.name}: {tag!r} is not a tag")
        data, _ = self._get(f"{self.prefix}/tags/{tag}", MAX_MANIFEST_BYTES, what)
        return artifact.decode_descriptor(artifact.parse_json_object(data, what), what).digest

    def _get(self, key: str, max_bytes: int, what: str) -> tuple[bytes, str]:
        """A small object and its Content-Type."""

        def once() -> tuple[bytes, str]:
            answer = self._client.get_object(Bucket=self.bucket, Key=key)
            with contextlib.closing(answer["Body"]) as body:
                if answer["ContentLength"] > max_bytes:
                    raise errors.InvalidInputError(f"{what}: the object is larger than {max_bytes} bytes")
                return body.read(), answer.get("ContentType", "")

        return self._call(what, once)

    def _put(self, key: str, data: bytes, media_type: str, what: str) -> None:
        self._call(
            what,
            lambda: self._client.put_object(Bucket=self.bucket, Key=key, Body=data, ContentType=media_type),
        )

    def _put_json(self, key: str, value: dict[str, Any], what: str) -> None:
        self._put(key, artifact.canonical_json(value), "application/json", what)

    def _keys(self, prefix: str, what: str) -> list[str]:
        out: list[str] = []
        for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix):
            out += [entry["Key"] for entry in page.get("Contents", [])]
            if len(out) > _MAX_REFERRERS:
                raise errors.InvalidInputError(f"{what}: more than {_MAX_REFERRERS} of them")
        return out

    def _put_parts(self, digest: str, size: int, source: BlobSource, what: str) -> None:
        key = self._blob_key(digest)
        begun = self._call(
            what,
            lambda: self._client.create_multipart_upload(
                Bucket=self.bucket, Key=key, ContentType="application/octet-stream"
            ),
        )
        upload_id = begun["UploadId"]
        try:
            parts: list[Any] = []
            hasher = hashlib.sha256()
            read_bytes = 0
            for number, part in enumerate(_parts(source, max(PART_BYTES, -(-size // _MAX_PARTS))), 1):
                hasher.update(part)
                read_bytes += len(part)
                done = self._call(
                    f"{what} at byte {read_bytes - len(part)}",
                    lambda number=number, part=part: self._client.upload_part(  # type: ignore[misc]
                        Bucket=self.bucket, Key=key, UploadId=upload_id, PartNumber=number, Body=part
                    ),
                )
                parts.append({"PartNumber": number, "ETag": done["ETag"]})
                del part  # while the next one is gathered
            _check_source(digest, size, "sha256:" + hasher.hexdigest(), read_bytes, what)
            self._call(
                what,
                lambda: self._client.complete_multipart_upload(
                    Bucket=self.bucket, Key=key, UploadId=upload_id, MultipartUpload={"Parts": parts}
                ),
            )
        except BaseException:
            with contextlib.suppress(errors.ImagefsError):
                self._call(
                    what,
                    lambda: self._client.abort_multipart_upload(
                        Bucket=self.bucket, Key=key, UploadId=upload_id
                    ),
                )
            raise

    def _call(self, what: str, function: Callable[[], T]) -> T:
        """One S3 operation, under the retry policy, its exceptions mapped."""

        def once() -> T:
            try:
                return function()
            except botocore.exceptions.ClientError as exc:
                raise _client_error(exc, what) from exc
            except (
                botocore.exceptions.NoCredentialsError,
                botocore.exceptions.PartialCredentialsError,
                botocore.exceptions.NoRegionError,
                botocore.exceptions.ParamValidationError,
            ) as exc:
                raise errors.ConfigurationError(f"{what}: {exc}") from exc
            except (
                botocore.exceptions.HTTPClientError,
                botocore.exceptions.BotoCoreError,
                OSError,
            ) as exc:
                raise errors.UnavailableError(f"{what}: {type(exc).__name__}") from exc

        return retry.call(self._policy, once)

    # -- reading blobs by presigned URLs -----------------------------------------------------------

    def _open_blob(
        self, digest: str, offset: int, length: int | None, deadline: float | None
    ) -> transport.Answer:
        """As ranges.Opener."""
        what = f"{self.name}: blob {digest} at byte {offset}"
        fields = {}
        if length is not None:
            fields["Range"] = f"bytes={offset}-{offset + length - 1}"
        elif offset:
            fields["Range"] = f"bytes={offset}-"
        url, kept = self._presign(digest, what)
        answer = self._http.open("GET", url, what, fields=fields, deadline=deadline)
        if kept and answer.status in (400, 401, 403):
            answer.discard()
            with self._lock:
                self._presigned.pop(digest, None)
            url, _ = self._presign(digest, what)
            answer = self._http.open("GET", url, what, fields=fields, deadline=deadline)
        return answer

    def _presign(self, digest: str, what: str) -> tuple[str, bool]:
        """A URL for a blob, and whether it is one made earlier."""
        now = time.monotonic()
        with self._lock:
            url, until = self._presigned.get(digest, ("", 0.0))
            if now < until:
                return url, True
        params = {"Bucket": self.bucket, "Key": self._blob_key(digest)}
        url = self._call(
            what,
            lambda: self._client.generate_presigned_url(
                "get_object", Params=params, ExpiresIn=_PRESIGNED_LIFE_SECONDS
            ),
        )
        with self._lock:
            if len(self._presigned) >= _MAX_PRESIGNED:
                self._presigned.clear()
            self._presigned[digest] = (url, now + _PRESIGNED_KEPT_SECONDS)
        return url, False

    def _blob_key(self, digest: str) -> str:
        return f"{self.prefix}/blobs/{_check_digest(digest).replace(':', '/')}"

    def _referrer_key(self, subject: str, digest: str) -> str:
        return f"{self.prefix}/referrers/{subject.replace(':', '/')}/{digest.removeprefix('sha256:')}"


def _parts(source: BlobSource, part_bytes: int) -> Iterator[bytes]:
    """The source in parts of exactly `part_bytes`, the last one shorter. Holds one part and a piece: uploads
    run in parallel, within the converter's memory."""
    pending: list[bytes] = []
    missing = part_bytes
    for piece in source.open(0):
        while len(piece) >= missing:
            pending.append(piece[:missing])
            piece, missing = piece[missing:], part_bytes
            part = b"".join(pending)
            pending.clear()
            yield part
            del part
        if piece:
            pending.append(piece)
            missing -= len(piece)
    if pending:
        yield b"".join(pending)


def _check_source(digest: str, size: int, found: str, found_bytes: int, what: str) -> None:
    if found != digest or found_bytes != size:
        raise errors.IntegrityError(
            f"{what}: the source has {found_bytes} bytes with digest {found}, "
            f"expected {size} bytes; nothing was stored"
        )


def _client_error(exc: botocore.exceptions.ClientError, what: str) -> errors.ImagefsError:
    response: Any = exc.response
    code = str(response.get("Error", {}).get("Code", ""))[:64]
    metadata = response.get("ResponseMetadata", {})
    status = metadata.get("HTTPStatusCode", 0)
    text = f"{what}: S3 answered {status} {code}"
    if status == 404 or code in ("NoSuchKey", "NoSuchBucket", "NoSuchUpload"):
        return errors.NotFoundError(f"{text}: not found")
    if code in _TRANSIENT or status in (408, 429) or status >= 500:
        wish = metadata.get("HTTPHeaders", {}).get("retry-after")
        return errors.UnavailableError(text, headers.retry_after_seconds(wish, time.time()))
    if code in _DENIED or status in (401, 403):
        return errors.DeniedError(f"{text}: access denied with the credentials that boto3 found")
    return errors.InvalidInputError(f"{text}: unexpected answer")


def _check_digest(digest: str) -> str:
    if not reference.DIGEST.match(digest):
        raise errors.InvalidInputError(f"{digest!r} is not a sha256 digest")
    return digest
