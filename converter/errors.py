"""The errors of the converter, split by who can act on them; errors of origins pass through as imagefs'."""

from __future__ import annotations


class ConverterError(Exception):
    """Root of the package's errors."""


class InvalidLayerError(ConverterError):
    """The source image is malformed; the message names image, layer, entry and byte offset. Not retried."""


class LimitError(ConverterError):
    """A limit was passed (bomb protection); the message names limit, value and flag."""


class LayerDigestError(ConverterError):
    """A source blob differs from its digest, diff_id or declared size."""
