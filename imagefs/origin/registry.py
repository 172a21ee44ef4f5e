"""docker://HOST/REPOSITORY: one repository of an OCI registry as an Origin.

OCI distribution spec 1.1. This module knows its end points; session.py has authorization and redirects,
transport.py HTTP, ranges.py reading, upload.py writing, fallback.py referrers without the API. Thread-safe:
all state shared by threads is the connection pool, the tokens, and the two caches below.

Blobs are often served by a redirect to storage with a presigned URL; the URL is kept for a short time, so
that further ranges of a blob cost no round trip to the registry, and dropped when storage refuses it.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from urllib.parse import quote

from imagefs import artifact, errors, reference
from imagefs.artifact import Descriptor, Manifest
from imagefs.origin import (
    MAX_MANIFEST_BYTES,
    BlobSource,
    Origin,
    auth,
    credentials,
    fallback,
    headers,
    ranges,
    referrers,
    retry,
    session,
    transport,
    upload,
)

LOCATION_LIFE_SECONDS = 60.0
_MAX_LOCATIONS = 1024
_MAX_REFERRER_PAGES = 64
_MAX_REFERRERS = 10_000
_ACCEPT = ", ".join((*artifact.MANIFEST_TYPES, *artifact.INDEX_TYPES))


class RegistryOrigin:
    """`imagefs.origin.Origin` on a registry."""

    def __init__(
        self,
        host: str,
        repository: str,
        settings: transport.Settings,
        docker_config: Path | None = None,
        policy: retry.Policy = retry.DEFAULT,
    ) -> None:
        self.host = host
        self.repository = repository
        self._policy = policy
        self._http = transport.Transport(dataclasses.replace(settings, loopback=transport.is_loopback(host)))
        store = credentials.Store(credentials.config_files(docker_config, os.environ), host, repository)
        self._session = session.Session(host, self._http, auth.Authenticator(store, self._http, policy))
        self._pull = frozenset({f"repository:{repository}:pull"})
        self._push = frozenset({f"repository:{repository}:pull,push"})
        self._ranges = ranges.RangeReader(self.name, self._open_blob, policy)
        self._lock = threading.Lock()
        self._locations: dict[str, tuple[str, float]] = {}
        self._has_referrers_api = True

    @property
    def name(self) -> str:
        return f"docker://{self.host}/{self.repository}"

    # -- reading -----------------------------------------------------------------------------------

    def read_manifest(self, reference: str) -> Manifest:
        if ":" in reference:
            _check_digest(reference)
        what = f"{self.name}: manifest {reference}"
        manifest = retry.call(self._policy, lambda: self._get_manifest(reference, what))
        if manifest is None:
            raise errors.NotFoundError(f"{what}: not found in this repository")
        return manifest

    def referrers(self, digest: str) -> list[Descriptor]:
        _check_digest(digest)
        if self._has_referrers_api:
            found = self._api_referrers(digest)
            if found is not None:
                return found
            self._has_referrers_api = False
        what = f"{self.name}: referrers of {digest}"
        tag = referrers.fallback_tag(digest)
        manifest = retry.call(self._policy, lambda: self._get_manifest(tag, what))
        return [] if manifest is None else referrers.listed(manifest.data, what)

    def read_blob(self, digest: str, max_bytes: int) -> bytes:
        return self._ranges.read(digest, max_bytes)

    def stream_range(
        self, digest: str, offset: int, length: int, deadline: float | None = None
    ) -> Generator[bytes, None, None]:
        return self._ranges.stream_range(digest, offset, length, deadline)

    def stream_blob(self, digest: str, size: int) -> Iterator[bytes]:
        return self._ranges.stream_blob(digest, size)

    # -- writing -----------------------------------------------------------------------------------

    def has_blob(self, digest: str) -> bool:
        return retry.call(self._policy, lambda: self._head_blob(digest))

    def put_blob(self, digest: str, size: int, source: BlobSource) -> None:
        if self.has_blob(digest):
            return
        what = f"{self.name}: upload of blob {digest}"
        blob = upload.Upload(
            self._session, self.repository, self._push, what, self._policy, lambda: self.has_blob(digest)
        )
        blob.run(digest, size, source)

    def mount_blob(self, digest: str, other: Origin) -> bool:
        if not isinstance(other, RegistryOrigin) or other.host != self.host:
            return False
        if self.has_blob(digest):
            return True
        if other.repository == self.repository:
            return False
        try:
            return retry.call(self._policy, lambda: self._mount(digest, other.repository))
        except (errors.DeniedError, errors.NotFoundError, errors.InvalidInputError):
            return False  # not permitted, or not supported: the caller sends the bytes

    def put_manifest(self, data: bytes, media_type: str, tag: str | None = None) -> str:
        if tag is not None and not reference.TAG.match(tag):
            raise errors.InvalidInputError(f"{self.name}: {tag!r} is not a tag")
        digest = artifact.digest_of(data)
        referrer = referrers.referrer(data, media_type)
        if referrer is None:
            self._put_manifest(tag or digest, data, media_type)
            return digest
        # The tag comes last: whoever sees it finds the referrer, too.
        if not self._put_manifest(digest, data, media_type):
            what = f"{self.name}: referrers of {referrer.subject}"
            fallback.add(_Tags(self), referrer.subject, referrer.descriptor, self._policy, what)
        if tag is not None:
            self._put_manifest(tag, data, media_type)
        return digest

    def close(self) -> None:
        self._http.close()

    # -- one attempt each --------------------------------------------------------------------------

    def _get_manifest(self, reference: str, what: str) -> Manifest | None:
        answer = self._session.follow(
            "GET", self._url("manifests", reference), what, self._pull, fields={"Accept": _ACCEPT}
        )
        if answer.status == 404:
            answer.discard()
            return None
        if answer.status != 200:
            raise transport.status_error(answer)
        data = answer.read(MAX_MANIFEST_BYTES)
        found = artifact.digest_of(data)
        wanted = reference if ":" in reference else answer.fields.get("Docker-Content-Digest", found)
        if wanted.startswith("sha256:") and wanted != found:
            raise errors.IntegrityError(f"{what}: the registry sent {found}, expected {wanted}")
        media_type = answer.fields.get("Content-Type", "").partition(";")[0].strip()
        if media_type not in (*artifact.MANIFEST_TYPES, *artifact.INDEX_TYPES):
            media_type = referrers.media_type_of(data)
        return Manifest(media_type, found, data)

    def _put_manifest(self, reference: str, data: bytes, media_type: str) -> bool:
        return retry.call(self._policy, lambda: self._put_manifest_once(reference, data, media_type))

    def _put_manifest_once(self, reference: str, data: bytes, media_type: str) -> bool:
        """Store a manifest; whether the registry itself lists it among its subject's referrers."""
        answer = self._session.open(
            "PUT",
            self._url("manifests", reference),
            f"{self.name}: manifest {reference}",
            self._push,
            fields={"Content-Type": media_type, "Content-Length": str(len(data))},
            body=lambda: data,
        )
        if answer.status not in (200, 201, 202, 204):
            error = transport.status_error(answer)
            if isinstance(error, errors.IntegrityError):
                # We sent what we hashed. docker-registry 2.8 says DIGEST_INVALID when it reads a blob's link
                # that another client's upload of the same blob has half written.
                raise errors.UnavailableError(str(error)) from error
            raise error
        stored = answer.fields.get("Docker-Content-Digest", "")
        answer.discard()
        if stored.startswith("sha256:") and stored != artifact.digest_of(data):
            raise errors.IntegrityError(
                f"{answer.what}: the registry stored {stored}, {artifact.digest_of(data)} was sent"
            )
        return "OCI-Subject" in answer.fields

    def _head_blob(self, digest: str) -> bool:
        what = f"{self.name}: blob {digest}"
        answer = self._session.follow("HEAD", self._url("blobs", _check_digest(digest)), what, self._pull)
        answer.discard()
        if answer.status == 404:
            return False
        if answer.status != 200:
            raise transport.status_error(answer)
        return True

    def _mount(self, digest: str, other_repository: str) -> bool:
        query = f"mount={_check_digest(digest)}&from={quote(other_repository)}"
        url = f"/v2/{self.repository}/blobs/uploads/?{query}"
        scopes = self._push | {f"repository:{other_repository}:pull"}
        what = f"{self.name}: mount of blob {digest} from {other_repository}"
        answer = self._session.open(
            "POST", url, what, scopes, fields={"Content-Length": "0"}, body=lambda: b""
        )
        if answer.status not in (201, 202):
            raise transport.status_error(answer)
        answer.discard()
        location = answer.fields.get("Location")
        if answer.status == 202 and location:
            # An upload was opened instead: it is not wanted.
            self._session.open("DELETE", transport.join(answer.url, location, what), what, scopes).discard()
        return answer.status == 201

    def _api_referrers(self, digest: str) -> list[Descriptor] | None:
        """The referrers by the API, None where there is no such API."""
        what = f"{self.name}: referrers of {digest}"
        out: list[Descriptor] = []
        url: str | None = self._url("referrers", digest)
        for _ in range(_MAX_REFERRER_PAGES):
            if url is None:
                return out
            page = retry.call(self._policy, lambda url=url: self._referrers_page(url, what))  # type: ignore[misc]
            if page is None:
                return None
            out += page[0]
            if len(out) > _MAX_REFERRERS:
                raise errors.InvalidInputError(f"{what}: more than {_MAX_REFERRERS} of them")
            url = page[1]
        raise errors.InvalidInputError(f"{what}: more than {_MAX_REFERRER_PAGES} pages")

    def _referrers_page(self, url: str, what: str) -> tuple[list[Descriptor], str | None] | None:
        answer = self._session.follow("GET", url, what, self._pull, fields={"Accept": artifact.OCI_INDEX})
        if answer.status in (400, 404, 405, 501):
            answer.discard()
            return None
        if answer.status != 200:
            raise transport.status_error(answer)
        content_type = answer.fields.get("Content-Type", "").partition(";")[0].strip()
        if content_type == "text/html":
            answer.discard()
            return None  # a web page for every unknown path
        found = referrers.listed(answer.read(MAX_MANIFEST_BYTES), what)
        link = headers.next_link(answer.fields.getlist("Link"))
        return found, transport.join(answer.url, link, what) if link else None

    def _open_blob(
        self, digest: str, offset: int, length: int | None, deadline: float | None
    ) -> transport.Answer:
        """As ranges.Opener."""
        what = f"{self.name}: blob {_check_digest(digest)} at byte {offset}"
        fields = {}
        if length is not None:
            fields["Range"] = f"bytes={offset}-{offset + length - 1}"
        elif offset:
            fields["Range"] = f"bytes={offset}-"
        location = self._location(digest)
        if location is not None:
            answer = self._http.open("GET", location, what, fields=fields, deadline=deadline)
            if answer.status not in (400, 401, 403, 404, 410):
                return answer
            answer.discard()
            self._forget_location(digest)
        url = self._session.base_url + self._url("blobs", digest)
        answer = self._session.follow("GET", url, what, self._pull, fields=fields, deadline=deadline)
        if answer.url != url and answer.status in (200, 206):
            self._keep_location(digest, answer.url)
        return answer

    def _location(self, digest: str) -> str | None:
        with self._lock:
            url, until = self._locations.get(digest, ("", 0.0))
        return url if time.monotonic() < until else None

    def _keep_location(self, digest: str, url: str) -> None:
        with self._lock:
            if len(self._locations) >= _MAX_LOCATIONS:
                self._locations.clear()
            self._locations[digest] = (url, time.monotonic() + LOCATION_LIFE_SECONDS)

    def _forget_location(self, digest: str) -> None:
        with self._lock:
            self._locations.pop(digest, None)

    def _url(self, kind: str, name: str) -> str:
        return f"/v2/{self.repository}/{kind}/{quote(name, safe=':')}"


@dataclasses.dataclass(frozen=True, slots=True)
class _Tags:
    """A registry's tags for the fallback protocol."""

    origin: RegistryOrigin

    def get(self, tag: str) -> bytes | None:
        what = f"{self.origin.name}: manifest {tag}"
        manifest = retry.call(self.origin._policy, lambda: self.origin._get_manifest(tag, what))
        return None if manifest is None else manifest.data

    def put(self, tag: str, data: bytes) -> None:
        self.origin._put_manifest_once(tag, data, artifact.OCI_INDEX)


def _check_digest(digest: str) -> str:
    if not reference.DIGEST.match(digest):
        raise errors.InvalidInputError(f"{digest!r} is not a sha256 digest")
    return digest
