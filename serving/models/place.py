"""What `model` in a document means: a directory, s3://BUCKET/PREFIX, or oci:REF#FOLDER. Pure.

Used by the document's check, by launchers and by the supervisor, so that all three read it alike.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]\Z")


@dataclass(frozen=True, slots=True)
class Directory:
    """On this machine."""

    path: str


@dataclass(frozen=True, slots=True)
class Bucket:
    """All objects below a prefix (without slashes at its ends)."""

    bucket: str
    prefix: str


@dataclass(frozen=True, slots=True)
class Image:
    """A folder ("" is the root) in a block image. `ref` is as the `glowplug` command takes it."""

    ref: str
    folder: str


Place = Directory | Bucket | Image


def parse(model: str) -> Place:
    """ValueError says what to write instead."""
    if model.startswith("s3://"):
        bucket, _, prefix = model.removeprefix("s3://").partition("/")
        if not _BUCKET.match(bucket) or not prefix.strip("/"):
            raise ValueError(f"{model!r} is no place in a bucket; write s3://BUCKET/PREFIX")
        return Bucket(bucket, prefix.strip("/"))
    if model.startswith("oci:"):
        ref, _, folder = model.partition("#")
        parts = [part for part in folder.split("/") if part]
        # A layout folder keeps the scheme that the command knows it by.
        ref = ref if ref.startswith("oci:/") else ref.removeprefix("oci:")
        if not ref or ".." in parts:
            raise ValueError(f"{model!r} is no image; write oci:REGISTRY/REPOSITORY@DIGEST#FOLDER")
        return Image(ref, "/".join(parts))
    if "://" in model:
        raise ValueError(f"{model!r} is of a kind that is not known; use a directory, s3:// or oci:")
    return Directory(model)
