"""docker://HOST/REPOSITORY: one repository of an OCI registry as an Origin.

OCI distribution spec 1.1. This module knows its end points; mirrors.py has the hosts that are read from,
session.py authorization and redirects, transport.py HTTP, ranges.py reading, upload.py writing, fallback.py
referrers without the API. Writing, and reading what is about to be written, goes to the registry itself.
Thread-safe: all state shared by threads is the connection pools, the tokens, which mirrors are down, and the
cache below.

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
    agentcredentials,
    credentials,
    fallback,
    headers,
    mirrors,
    ranges,
    referrers,
    retry,
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
        *,
        credentials_socket: Path | None = None,
        hosts_directory: Path | None = None,
    ) -> None:
        self.host = host
        self.repository = repository
        self._policy = policy
        files = credentials.config_files(docker_config, os.environ)

        def source(at_host: str, at_repository: str) -> credentials.Source:
            store = credentials.Store(files, at_host, at_repository)
            if credentials_socket is None:
                return store
            return agentcredentials.AgentSource(credentials_socket, at_host, at_repository, store)

        sources = mirrors.Sources(source, policy)
        self._configured = mirrors.Configured(hosts_directory, host, repository, settings, sources)
        self._ranges = ranges.RangeReader(self.name, self._open_blob, policy)
        self._lock = threading.Lock()
        self._locations: dict[str, tuple[mirrors.Place, str, float]] = {}

    @property
    def _places(self) -> mirrors.Places:
        return self._configured.current()

    @property
    def _server(self) -> mirrors.Place:
        return self._places.server

    @property
    def name(self) -> str:
        return f"docker://{self.host}/{self.repository}"

    # -- reading -----------------------------------------------------------------------------------

    def read_manifest(self, reference: str) -> Manifest:
        if ":" in reference:
            _check_digest(reference)
        what = f"{self.name}: manifest {reference}"
        return retry.call(
            self._policy,
            lambda: self._places.first(
                "pull" if ":" in reference else "resolve",
                what,
                lambda place, deadline: self._get_manifest(place, reference, what, deadline),
            ),
        )

    def referrers(self, digest: str) -> list[Descriptor]:
        _check_digest(digest)
        what = f"{self.name}: referrers of {digest}"

        def listed(place: mirrors.Place, deadline: float | None) -> list[Descriptor]:
            found = self._referrers_at(place, digest, what, deadline)
            if not found and not place.is_server:
                # Few pull-through caches know referrers, and none of them says so.
                raise errors.NotFoundError(f"{what}: mirror {place.host} lists none")
            return found

        try:
            return retry.call(self._policy, lambda: self._places.first("resolve", what, listed))
        except errors.NotFoundError:
            return []

    def read_blob(self, digest: str, max_bytes: int) -> bytes:
        try:
            return self._ranges.read(digest, max_bytes)
        except errors.IntegrityError as exc:
            self._forget_location(digest)
            if not self._places.doubt(exc):
                raise
        return self._ranges.read(digest, max_bytes)

    def stream_range(
        self, digest: str, offset: int, length: int, deadline: float | None = None
    ) -> Generator[bytes, None, None]:
        return self._ranges.stream_range(digest, offset, length, deadline)

    def doubt(self, digest: str, why: errors.IntegrityError) -> None:
        self._forget_location(digest)
        self._places.doubt(why)

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
            self._server.session,
            self._server.write_url("blobs/uploads/"),
            self._server.push,
            what,
            self._policy,
            lambda: self.has_blob(digest),
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

    def links(self, folder: Path) -> bool:
        return False

    def link_blob(self, digest: str, size: int, path: Path) -> bool:
        return False

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
        self._places.close()

    # -- one attempt each --------------------------------------------------------------------------

    def _get_manifest(
        self, place: mirrors.Place, reference: str, what: str, deadline: float | None = None
    ) -> Manifest:
        answer = place.session.follow(
            "GET",
            place.url("manifests", reference),
            what,
            place.pull,
            fields={"Accept": _ACCEPT},
            deadline=deadline,
        )
        if answer.status == 404:
            answer.discard()
            raise errors.NotFoundError(f"{what}: not found in this repository")
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
        answer = self._server.session.open(
            "PUT",
            self._server.write_url(f"manifests/{quote(reference, safe=':')}"),
            f"{self.name}: manifest {reference}",
            self._server.push,
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
        url = self._server.write_url(f"blobs/{_check_digest(digest)}")
        answer = self._server.session.follow("HEAD", url, what, self._server.pull)
        answer.discard()
        if answer.status == 404:
            return False
        if answer.status != 200:
            raise transport.status_error(answer)
        return True

    def _mount(self, digest: str, other_repository: str) -> bool:
        query = f"mount={_check_digest(digest)}&from={quote(other_repository)}"
        url = self._server.write_url(f"blobs/uploads/?{query}")
        scopes = self._server.push | {f"repository:{other_repository}:pull"}
        what = f"{self.name}: mount of blob {digest} from {other_repository}"
        answer = self._server.session.open(
            "POST", url, what, scopes, fields={"Content-Length": "0"}, body=lambda: b""
        )
        if answer.status not in (201, 202):
            raise transport.status_error(answer)
        answer.discard()
        location = answer.fields.get("Location")
        if answer.status == 202 and location:
            # An upload was opened instead: it is not wanted.
            url = transport.join(answer.url, location, what)
            self._server.session.open("DELETE", url, what, scopes).discard()
        return answer.status == 201

    def _referrers_at(
        self, place: mirrors.Place, digest: str, what: str, deadline: float | None
    ) -> list[Descriptor]:
        if place.has_referrers_api:
            found = self._api_referrers(place, digest, what, deadline)
            if found is not None:
                return found
            place.has_referrers_api = False
        try:
            manifest = self._get_manifest(place, referrers.fallback_tag(digest), what, deadline)
        except errors.NotFoundError:
            return []
        return referrers.listed(manifest.data, what)

    def _api_referrers(
        self, place: mirrors.Place, digest: str, what: str, deadline: float | None
    ) -> list[Descriptor] | None:
        """The referrers by the API, None where there is no such API."""
        out: list[Descriptor] = []
        url: str | None = place.url("referrers", digest)
        for _ in range(_MAX_REFERRER_PAGES):
            if url is None:
                return out
            page = self._referrers_page(place, url, what, deadline)
            if page is None:
                return None
            out += page[0]
            if len(out) > _MAX_REFERRERS:
                raise errors.InvalidInputError(f"{what}: more than {_MAX_REFERRERS} of them")
            url = page[1]
        raise errors.InvalidInputError(f"{what}: more than {_MAX_REFERRER_PAGES} pages")

    def _referrers_page(
        self, place: mirrors.Place, url: str, what: str, deadline: float | None
    ) -> tuple[list[Descriptor], str | None] | None:
        answer = place.session.follow(
            "GET", url, what, place.pull, fields={"Accept": artifact.OCI_INDEX}, deadline=deadline
        )
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
        """As ranges.Opener; raises what the status stands for."""
        what = f"{self.name}: blob {_check_digest(digest)} at byte {offset}"
        fields = {}
        if length is not None:
            fields["Range"] = f"bytes={offset}-{offset + length - 1}"
        elif offset:
            fields["Range"] = f"bytes={offset}-"
        kept = self._location(digest)
        if kept is not None:
            place, location = kept
            try:
                answer = place.http.open("GET", location, what, fields=fields, deadline=deadline)
            except errors.UnavailableError as exc:
                self._forget_location(digest)
                place.failed(exc)
                raise
            if answer.status not in (400, 401, 403, 404, 410):
                answer.on_fault = place.failed
                return answer
            answer.discard()
            self._forget_location(digest)

        def opened(place: mirrors.Place, deadline: float | None) -> transport.Answer:
            url = place.url("blobs", digest)
            answer = place.session.follow("GET", url, what, place.pull, fields=fields, deadline=deadline)
            if answer.status not in (200, 206):
                raise transport.status_error(answer)
            if answer.url != url:
                self._keep_location(digest, place, answer.url)
            answer.on_fault = place.failed
            return answer

        return self._places.first("pull", what, opened, deadline)

    def _location(self, digest: str) -> tuple[mirrors.Place, str] | None:
        with self._lock:
            found = self._locations.get(digest)
        return found[:2] if found is not None and time.monotonic() < found[2] else None

    def _keep_location(self, digest: str, place: mirrors.Place, url: str) -> None:
        with self._lock:
            if len(self._locations) >= _MAX_LOCATIONS:
                self._locations.clear()
            self._locations[digest] = (place, url, time.monotonic() + LOCATION_LIFE_SECONDS)

    def _forget_location(self, digest: str) -> None:
        with self._lock:
            self._locations.pop(digest, None)


@dataclasses.dataclass(frozen=True, slots=True)
class _Tags:
    """A registry's tags for the fallback protocol."""

    origin: RegistryOrigin

    def get(self, tag: str) -> bytes | None:
        origin, what = self.origin, f"{self.origin.name}: manifest {tag}"
        try:
            return retry.call(origin._policy, lambda: origin._get_manifest(origin._server, tag, what)).data
        except errors.NotFoundError:
            return None

    def put(self, tag: str, data: bytes) -> None:
        self.origin._put_manifest_once(tag, data, artifact.OCI_INDEX)


def _check_digest(digest: str) -> str:
    if not reference.DIGEST.match(digest):
        raise errors.InvalidInputError(f"{digest!r} is not a sha256 digest")
    return digest
