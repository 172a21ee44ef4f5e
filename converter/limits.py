"""Limits on what a source image may ask of us: every one is a flag of `glowplug convert`."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """Bounds per layer. Bytes unless named otherwise.

    `max_entries` bounds memory (about 1 KB an entry); `max_path_bytes` a path, as Linux's PATH_MAX;
    `max_header_bytes` a PAX or GNU long-name header, and the global PAX records in force;
    `max_attribute_bytes` what a tree keeps beside names (xattrs, link targets); `max_layer_bytes` the
    uncompressed tar; `max_image_bytes` the layer image, sparse files expanded; `max_ratio` uncompressed over
    compressed.
    """

    max_entries: int = 1_000_000
    max_path_bytes: int = 4096
    max_header_bytes: int = 1024 * 1024
    max_attribute_bytes: int = 128 * 1024 * 1024
    max_layer_bytes: int = 1 << 40
    max_image_bytes: int = 1 << 42
    max_ratio: int = 2000
