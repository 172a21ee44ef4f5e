"""Which block image may stand for a source image: the policy `images.trust`.

Called by whoever opens a block image, before anything of it is used, with its manifest as stored.
"repository" believes the list of a repository (of those that `images.repositories` names), "pinned" only the
digests that the settings name, "signed" only what one of the operator's cosign keys signed. `verify_payload`
and `verify_signature` are pure; signatures are read from the origin that the block image lies in, bounded in
number and size. DeniedError says why; the pull is then an ordinary one.

Signatures as `cosign sign --key` makes them, without a transparency log: a manifest under the tag
`sha256-HEX.sig`, or one that names the block image as its `subject`; each layer is a simple-signing payload
with the signature in an annotation. The payload must name exactly this block image's manifest digest.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

from agent import config
from imagefs import artifact, errors
from imagefs.artifact import Descriptor, Manifest
from imagefs.origin import Origin

PAYLOAD_TYPE = "application/vnd.dev.cosign.simplesigning.v1+json"
SIGNATURE_ARTIFACT_TYPE = "application/vnd.dev.cosign.artifact.sig.v1+json"
SIGNATURE_ANNOTATION = "dev.cosignproject.cosign/signature"
_PAYLOAD_KIND = "cosign container image signature"
_MAX_KEY_BYTES = 64 << 10
_MAX_PAYLOAD_BYTES = 64 << 10
_MAX_SIGNATURE_CHARS = 8 << 10
_MAX_SIGNATURES = 32
"""Layers of all signature manifests of one block image together."""
_MAX_REFERRERS = 16
_MIN_RSA_BITS = 2048

PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey


def pin_for(images: config.Images, source_digest: str) -> str | None:
    """The digest of the one block image that the settings accept for a source image."""
    return next((pin.block_image for pin in images.pins if pin.source == source_digest), None)


def check(images: config.Images, origin: Origin, source_digest: str, block_image: Manifest) -> None:
    """Refuse (DeniedError) a block image that the policy does not take. `block_image.digest` is that of its
    bytes, as origins return manifests. A pin counts under every policy. UnavailableError: the signatures
    could not be read now."""
    pin = pin_for(images, source_digest)
    if pin is not None:
        if pin != block_image.digest:
            raise errors.DeniedError(
                f"block image {block_image.digest} of {source_digest} in {origin.name} is refused: "
                f"{pin} is pinned"
            )
        return
    if images.trust == "pinned":
        raise errors.DeniedError(
            f"block image {block_image.digest} of {source_digest} in {origin.name} is refused: trust is "
            '"pinned" and images.pins has no entry for this source'
        )
    if images.trust == "repository" and not _is_believed(images.repositories, origin.name):
        raise errors.DeniedError(
            f"block image {block_image.digest} of {source_digest} in {origin.name} is refused: "
            "images.repositories does not name that place"
        )
    if images.trust == "signed":
        _check_signed(load_keys(images.signature_keys), origin, block_image.digest)


def still_holds(images: config.Images, origin_name: str, source_digest: str, digest: str) -> bool:
    """Whether a block image that was accepted once, under whatever policy, may be used without being looked
    at again. Not by a signature: the key may be gone from the settings."""
    pin = pin_for(images, source_digest)
    if pin is not None:
        return pin == digest
    return images.trust == "repository" and _is_believed(images.repositories, origin_name)


def _is_believed(places: Sequence[str], name: str) -> bool:
    return not places or any(
        name == each or (each.endswith("/") and name.startswith(each)) for each in places
    )


def load_keys(files: Sequence[Path]) -> list[PublicKey]:
    """The public keys of PEM files. ConfigurationError names the file. Read anew for each image, so that a
    rotated key counts without a restart."""
    if not files:
        raise errors.ConfigurationError('images.trust is "signed", but images.signature_keys names no key')
    return [_load_key(file) for file in files]


def verify_signature(key: PublicKey, signature: bytes, payload: bytes) -> bool:
    """Whether `key` made `signature` over `payload`, with the digests that cosign uses for its kind."""
    attempts: list[functools.partial[None]] = []
    if isinstance(key, ec.EllipticCurvePublicKey):
        # Older versions of cosign sign with SHA-256 whatever the curve.
        for digest in (hashes.SHA256(), hashes.SHA384()) if key.key_size > 256 else (hashes.SHA256(),):
            attempts.append(functools.partial(key.verify, signature, payload, ec.ECDSA(digest)))
    elif isinstance(key, rsa.RSAPublicKey):
        attempts.append(
            functools.partial(key.verify, signature, payload, padding.PKCS1v15(), hashes.SHA256())
        )
    else:
        attempts.append(functools.partial(key.verify, signature, payload))
    for attempt in attempts:
        try:
            attempt()
        except InvalidSignature:
            continue
        return True
    return False


def verify_payload(payload: bytes, digest: str) -> None:
    """Refuse (InvalidInputError) a payload that is not a statement about exactly this manifest."""
    document = artifact.parse_json_object(payload, "signature payload")
    critical = document.get("critical")
    image = critical.get("image") if isinstance(critical, dict) else None
    if not isinstance(critical, dict) or not isinstance(image, dict):
        raise errors.InvalidInputError("signature payload: critical.image is missing")
    if critical.get("type") != _PAYLOAD_KIND:
        raise errors.InvalidInputError("signature payload: critical.type is not that of an image's signature")
    if image.get("docker-manifest-digest") != digest:
        raise errors.InvalidInputError("signature payload: it names another manifest")


def _check_signed(keys: Sequence[PublicKey], origin: Origin, digest: str) -> None:
    seen, why = 0, "no signature was found"
    unread: errors.UnavailableError | None = None
    for number, layer in enumerate(_signature_layers(origin, digest)):
        if number >= _MAX_SIGNATURES:
            break
        seen += 1
        try:
            if _is_signed(keys, origin, layer, digest):
                return
        except errors.UnavailableError as exc:
            unread = exc
        except errors.ImagefsError as exc:
            why = str(exc)
        else:
            why = "no signature is by one of the keys in images.signature_keys"
    if unread is not None:
        raise unread
    raise errors.DeniedError(
        f'block image {digest} in {origin.name} is refused: trust is "signed", {seen} signatures read, '
        f"{why}; "
        f"sign it: cosign sign --key KEY --tlog-upload=false {origin.name.removeprefix('docker://')}@{digest}"
    )


def _is_signed(keys: Sequence[PublicKey], origin: Origin, layer: Descriptor, digest: str) -> bool:
    encoded = layer.annotations.get(SIGNATURE_ANNOTATION, "")
    if layer.size > _MAX_PAYLOAD_BYTES or not 0 < len(encoded) <= _MAX_SIGNATURE_CHARS:
        raise errors.InvalidInputError("a signature without a payload or annotation of a size that is read")
    try:
        signature = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise errors.InvalidInputError("a signature that is not base64") from None
    payload = origin.read_blob(layer.digest, _MAX_PAYLOAD_BYTES)
    # Before it is parsed: an unsigned payload is nothing to look into.
    if not any(verify_signature(key, signature, payload) for key in keys):
        return False
    verify_payload(payload, digest)
    return True


def _signature_layers(origin: Origin, digest: str) -> Iterator[Descriptor]:
    """The payloads of all signature manifests: of the tag, then of the referrers."""
    with contextlib.suppress(errors.NotFoundError, errors.InvalidInputError):  # the other place may have one
        yield from _payloads(origin.read_manifest(f"{digest.replace(':', '-', 1)}.sig"))
    found = [
        descriptor
        for descriptor in origin.referrers(digest)
        if descriptor.artifact_type in (SIGNATURE_ARTIFACT_TYPE, PAYLOAD_TYPE)
    ]
    for descriptor in sorted(found, key=lambda d: d.digest)[:_MAX_REFERRERS]:
        try:
            yield from _payloads(origin.read_manifest(descriptor.digest))
        except (errors.NotFoundError, errors.InvalidInputError):
            continue


def _payloads(manifest: Manifest) -> list[Descriptor]:
    document = artifact.parse_json_object(manifest.data, "signature manifest")
    layers = document.get("layers")
    if not isinstance(layers, list):
        raise errors.InvalidInputError("signature manifest: layers is not a list")
    decoded = [
        artifact.decode_descriptor(entry, f"signature manifest: layers[{number}]")
        for number, entry in enumerate(layers[:_MAX_SIGNATURES])
    ]
    return [descriptor for descriptor in decoded if descriptor.media_type == PAYLOAD_TYPE]


def _load_key(file: Path) -> PublicKey:
    try:
        with file.open("rb") as stream:
            data = stream.read(_MAX_KEY_BYTES)
        key = serialization.load_pem_public_key(data)
    except (OSError, ValueError, UnsupportedAlgorithm) as exc:
        raise errors.ConfigurationError(
            f"images.signature_keys: {file}: not a PEM public key: {exc}"
        ) from exc
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1):
        return key
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= _MIN_RSA_BITS:
        return key
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key
    raise errors.ConfigurationError(
        f"images.signature_keys: {file}: not ECDSA P-256 or P-384, RSA of {_MIN_RSA_BITS} bits, or Ed25519"
    )
