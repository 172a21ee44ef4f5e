"""REFs: image references, their transports named as skopeo names them.

    docker://HOST[:PORT]/REPOSITORY[:TAG|@DIGEST]
    docker-daemon:NAME[:TAG]
    docker-archive:FILE[:NAME:TAG]
    oci:DIR[:TAG|@DIGEST]
    s3://BUCKET/PREFIX[:TAG|@DIGEST]

docker://...:TAG@DIGEST is accepted too; the digest decides and the tag is dropped.

Pure. `parse(str(ref)) == ref` for every value that parse returns.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from imagefs import errors

Transport = Literal["docker", "docker-daemon", "docker-archive", "oci", "s3"]

DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\Z")
REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*\Z")
_HOST = re.compile(r"(?:[A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?\Z")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]\Z")

FORMS = "docker://HOST/REPO[:TAG], docker-daemon:NAME, docker-archive:FILE, oci:DIR[:TAG], s3://BUCKET/PREFIX[:TAG]"


@dataclasses.dataclass(frozen=True, slots=True)
class Reference:
    """A parsed REF.

    `location` is HOST/REPOSITORY, NAME, FILE, DIR or BUCKET/PREFIX; at most one of `tag` and `digest` is
    set; neither means "latest" for docker:// and s3://, the only image for the others.
    """

    transport: Transport
    location: str
    tag: str | None = None
    digest: str | None = None

    def __str__(self) -> str:
        separator = "://" if self.transport in ("docker", "s3") else ":"
        suffix = f"@{self.digest}" if self.digest else f":{self.tag}" if self.tag else ""
        return f"{self.transport}{separator}{self.location}{suffix}"

    @property
    def host(self) -> str:
        """Registry host (docker://) or bucket (s3://)."""
        return self.location.partition("/")[0]

    @property
    def repository(self) -> str:
        """Repository (docker://) or prefix (s3://)."""
        return self.location.partition("/")[2]

    def with_digest(self, digest: str) -> Reference:
        """The same place, by digest."""
        return dataclasses.replace(self, tag=None, digest=digest)


def parse(text: str) -> Reference:
    """Parse a REF. Raises InvalidInputError with the accepted forms."""
    for prefix, transport in (
        ("docker://", "docker"),
        ("s3://", "s3"),
        ("docker-daemon:", "docker-daemon"),
        ("docker-archive:", "docker-archive"),
        ("oci:", "oci"),
    ):
        if text.startswith(prefix):
            return _parse_rest(transport, text[len(prefix) :], text)  # type: ignore[arg-type]
    raise errors.InvalidInputError(f"{text!r} names no transport; accepted: {FORMS}{_meant(text)}")


def _meant(name: str) -> str:
    """The remedy, if `name` is what the docker command calls an image."""
    first, slash, _ = name.partition("/")
    place = "" if slash and ("." in first or ":" in first or first == "localhost") else "docker.io/"
    text = f"docker://{place}{'' if slash else 'library/'}{name}"
    try:
        parse(text)
    except errors.InvalidInputError:
        return ""
    return f"; did you mean {text}?"


def _parse_rest(transport: Transport, rest: str, text: str) -> Reference:
    if not rest or "\0" in rest:
        raise errors.InvalidInputError(f"{text!r}: nothing after the transport; accepted: {FORMS}")
    # A folder above may have an @ in its name.
    parents, slash, last = rest.rpartition("/")
    name, at, digest = last.partition("@") if transport != "docker-archive" else (last, "", "")
    location, tag = f"{parents}{slash}{name}", ""
    if at and not DIGEST.match(digest):
        raise errors.InvalidInputError(f"{text!r}: {digest!r} is not a sha256 digest")
    if transport == "docker-archive":
        file, colon, name = rest.partition(":")
        location, tag = file, name if colon else ""
    elif not at:
        head, slash, last = location.rpartition("/")
        name, colon, tag = last.partition(":")
        if colon:
            location = f"{head}{slash}{name}"
            if not TAG.match(tag):
                raise errors.InvalidInputError(f"{text!r}: {tag!r} is not a tag")
    if not location:
        raise errors.InvalidInputError(f"{text!r}: the location is empty; accepted: {FORMS}")
    if transport == "docker":
        if at:  # REPO:TAG@DIGEST is what Kubernetes users write: the digest alone decides
            head, slash, last = location.rpartition("/")
            location = f"{head}{slash}{last.partition(':')[0]}"
        host, slash, repository = location.partition("/")
        if not slash or not _HOST.match(host) or not REPOSITORY.match(repository):
            raise errors.InvalidInputError(
                f"{text!r}: expected docker://HOST[:PORT]/REPOSITORY[:TAG|@DIGEST]"
                f"{'' if slash else _meant(rest)}"
            )
    if transport == "s3":
        bucket, slash, prefix = location.partition("/")
        if not slash or not _BUCKET.match(bucket) or not prefix or prefix != prefix.strip("/"):
            raise errors.InvalidInputError(f"{text!r}: expected s3://BUCKET/PREFIX[:TAG|@DIGEST]")
    return Reference(transport, location, tag or None, digest or None)
