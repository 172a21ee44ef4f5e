"""Referrers: which manifests say, by `subject`, that they belong to another.

Pure: bytes in, values out; used by all origins. OCI image spec 1.1 (`subject`, `artifactType`), OCI
distribution spec 1.1 (the index that the referrers API answers and the fallback tag holds).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from imagefs import artifact, errors

_EMPTY_INDEX: dict[str, Any] = {"schemaVersion": 2, "mediaType": artifact.OCI_INDEX, "manifests": []}


@dataclasses.dataclass(frozen=True, slots=True)
class Referrer:
    """A manifest that names a subject: the subject's digest, and the descriptor it is listed by."""

    subject: str
    descriptor: artifact.Descriptor


def referrer(data: bytes, media_type: str) -> Referrer | None:
    """What the manifest `data` says of its subject; None without one. InvalidInputError if malformed."""
    document = artifact.parse_json_object(data, "manifest")
    if document.get("subject") is None:
        return None
    subject = artifact.decode_descriptor(document["subject"], "manifest: subject")
    artifact_type = document.get("artifactType")
    if not artifact_type and isinstance(document.get("config"), dict):
        artifact_type = document["config"].get("mediaType")
    annotations = document.get("annotations")
    if not isinstance(annotations, dict) or not all(isinstance(v, str) for v in annotations.values()):
        annotations = {}
    descriptor = artifact.Descriptor(
        media_type=media_type,
        digest=artifact.digest_of(data),
        size=len(data),
        artifact_type=artifact_type if isinstance(artifact_type, str) else None,
        annotations=annotations,
    )
    return Referrer(subject.digest, descriptor)


def media_type_of(data: bytes) -> str:
    """The media type that a manifest states or, as OCI manifests may leave it out, shows by its fields."""
    document = artifact.parse_json_object(data, "manifest")
    stated = document.get("mediaType")
    if isinstance(stated, str):
        return stated
    return artifact.OCI_INDEX if "manifests" in document else artifact.OCI_MANIFEST


def listed(data: bytes, what: str) -> list[artifact.Descriptor]:
    """The descriptors of an index of referrers. InvalidInputError naming `what` and the field."""
    return [
        artifact.decode_descriptor(entry, f"{what}: manifests[{number}]")
        for number, entry in enumerate(_entries(artifact.parse_json_object(data, what), what))
    ]


def fallback_tag(subject: str) -> str:
    """The tag under which registries without the referrers API keep the referrers of `subject`."""
    return subject.replace(":", "-", 1)


@dataclasses.dataclass(frozen=True, slots=True)
class FallbackIndex:
    """The index behind a fallback tag, kept as JSON, so that whatever others wrote into it survives."""

    document: Mapping[str, Any]

    def digests(self) -> frozenset[str]:
        return frozenset(str(entry["digest"]) for entry in self.entries())

    def entries(self) -> list[Mapping[str, Any]]:
        return list(self.document.get("manifests") or [])

    def with_entries(self, wanted: Iterable[Mapping[str, Any]]) -> FallbackIndex:
        """This index and those of `wanted` whose digest it lacks, at its end."""
        have = set(self.digests())
        entries = self.entries()
        for entry in wanted:
            if entry["digest"] not in have:
                have.add(str(entry["digest"]))
                entries.append(entry)
        return FallbackIndex({**self.document, "manifests": entries})

    def encode(self) -> bytes:
        # ASCII: a foreign annotation may hold a lone surrogate, which UTF-8 cannot.
        return json.dumps(self.document, separators=(",", ":"), ensure_ascii=True).encode()


EMPTY_FALLBACK = FallbackIndex(_EMPTY_INDEX)


def decode_fallback(data: bytes, what: str) -> FallbackIndex:
    """Parse what lies behind a fallback tag. InvalidInputError if it is not an index: it is never
    overwritten then."""
    document = artifact.parse_json_object(data, what)
    for number, entry in enumerate(_entries(document, what)):
        if not isinstance(entry, dict) or not isinstance(entry.get("digest"), str):
            raise errors.InvalidInputError(f"{what}: manifests[{number}]: descriptor without a digest")
    return FallbackIndex(document)


def _entries(document: Mapping[str, Any], what: str) -> list[Any]:
    entries = document.get("manifests")
    if entries is None and document.get("mediaType") in artifact.INDEX_TYPES:
        return []
    if not isinstance(entries, list):
        raise errors.InvalidInputError(f"{what}: manifests is not a list, this is not an index")
    return entries
