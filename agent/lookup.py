"""From what containerd says of an image to its block image, opened and verified: the way of one lookup.

Called by images.py, on threads of its own; nothing is kept here. containerd names an image by labels of a
Prepare: the reference and the digest of the platform's manifest, which is the source digest, so that neither
tag nor index nor manifest is asked for. A user's `glowplug pull` names it by a reference alone.

What may be used is the trust policy's to say (`Trust`), before anything that a block image names is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

from agent import config
from imagefs import artifact, errors, image, reference
from imagefs.image import LazyImage
from imagefs.origin import Origin, connect
from imagefs.reference import Reference

REFERENCE_LABEL = "containerd.io/snapshot/cri.image-ref"
MANIFEST_LABEL = "containerd.io/snapshot/cri.manifest-digest"

NO_BLOCK_IMAGE = "no block image"


class Trust(Protocol):
    """Which block images may be used; agent/trust.py."""

    def __call__(
        self, settings: config.Images, origin: Origin, source_digest: str, manifest: artifact.Manifest, /
    ) -> None:
        """Raises DeniedError for one that may not."""


class RefusedError(errors.DeniedError):
    """A block image is there and must not be used: the trust policy says so, or its digests do not agree."""


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """An image that was asked for. `reference` is docker://...; `source_digest` None: the tag decides."""

    reference: Reference
    source_digest: str | None = None

    @property
    def name(self) -> str:
        """As containerd's users write it, for messages and metrics."""
        return str(self.reference).removeprefix("docker://")


def from_labels(labels: Mapping[str, str]) -> Wanted | None:
    """What a Prepare of containerd's CRI (or transfer service) says of its image; None if it says nothing
    that can be understood: the labels are written by whoever may talk to containerd."""
    name, digest = labels.get(REFERENCE_LABEL), labels.get(MANIFEST_LABEL)
    if name is None:
        return None
    try:
        ref = reference.parse(f"docker://{name}")
    except errors.InvalidInputError:
        return None
    if digest is not None and reference.DIGEST.match(digest):
        return Wanted(ref, digest)
    return Wanted(ref, None)


def from_text(text: str) -> Wanted:
    """What a user asks for: a REF, or a name as containerd's users write it. Raises InvalidInputError."""
    ref = reference.parse(text if "://" in text else f"docker://{text}")
    if ref.transport != "docker":
        raise errors.InvalidInputError(
            f"{text}: containerd keeps images of registries only; block images in other places are found by "
            "images.block_repositories of the agent's settings"
        )
    return Wanted(ref)


def image_name(text: str) -> str:
    """A user's REF as containerd names the image: with its tag. Raises InvalidInputError."""
    ref = from_text(text).reference
    if ref.tag is None and ref.digest is None:
        ref = dataclasses.replace(ref, tag="latest")
    return str(ref).removeprefix("docker://")


def open_image(
    wanted: Wanted, settings: config.Images, options: connect.Options, trust: Trust | None
) -> LazyImage:
    """Open the block image. NotFoundError: there is none; RefusedError: there is, and it must not be used;
    otherwise what image.open_image raises."""

    def accept(origin: Origin, source_digest: str, manifest: artifact.Manifest) -> None:
        if trust is None:
            return
        try:
            trust(settings, origin, source_digest, manifest)
        except errors.DeniedError as exc:
            raise RefusedError(str(exc)) from exc

    place = block_repository(wanted.reference, settings.block_repositories)
    from agent import trust as policy  # with all of cryptography: only who opens images pays for it

    pin = policy.pin_for(settings, wanted.source_digest or "")
    try:
        if pin is not None:
            # No list is asked for: what is pinned needs no referrers, and no other can be meant.
            where = (place or wanted.reference).with_digest(pin)
            found = image.open_image(where, options=options, accept=accept)
            if found.source_digest != wanted.source_digest:
                raise errors.IntegrityError(
                    f"the pinned block image {pin} is not of {wanted.source_digest} but of "
                    f"{found.source_digest}"
                )
            return found
        return image.open_image(
            wanted.reference,
            source_digest=wanted.source_digest,
            block_repository=(place or wanted.reference) if wanted.source_digest else place,
            options=options,
            accept=accept,
        )
    except (errors.IntegrityError, errors.InvalidInputError) as exc:
        raise RefusedError(str(exc)) from exc


def reason(error: BaseException) -> str:
    """Why an image is pulled in the ordinary way: a short phrase of a small set, for metrics."""
    if isinstance(error, RefusedError):
        return "refused"
    if isinstance(error, errors.NotFoundError):
        return NO_BLOCK_IMAGE
    if isinstance(error, errors.DeniedError):
        return "denied"
    if isinstance(error, errors.UnavailableError):
        return "unavailable"
    if isinstance(error, errors.ConfigurationError):
        return "configuration"
    return "error"


def block_repository(ref: Reference, places: Mapping[str, str]) -> Reference | None:
    """Where the settings say that the block images of a repository lie: the longest entry that fits."""
    fitting = [
        key for key in places if ref.location == key or (key.endswith("/") and ref.location.startswith(key))
    ]
    return reference.parse(places[max(fitting, key=len)]) if fitting else None


def place(wanted: Wanted, places: Mapping[str, str]) -> str:
    """Where the block image of an image is looked for: the `name` of that origin."""
    found = block_repository(wanted.reference, places) or wanted.reference
    return str(dataclasses.replace(found, tag=None, digest=None))


def chain_ids(diff_ids: Sequence[str]) -> list[str]:
    """The chain id of each layer, bottom first (OCI image spec, config.md)."""
    out: list[str] = []
    for diff_id in diff_ids:
        out.append(artifact.digest_of(f"{out[-1]} {diff_id}".encode()) if out else diff_id)
    return out
