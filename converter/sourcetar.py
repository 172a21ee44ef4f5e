"""A source layer's uncompressed tar, verified while it is read, without converting it.

Called by `glowplug check --against-source`. One thread; memory does not grow with the layer. The pipeline
has its own way (converter.layer), with a thread for each stage.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator

from converter import errors, inflate
from converter.layer import VerifiedBlob, located
from converter.source import SourceLayer, media


@contextlib.contextmanager
def open_tar(layer: SourceLayer, image_name: str, advance: Callable[[int], None]) -> Iterator[TarSource]:
    """The tar of a layer as a tarstream.Source. Leaving the context without an error reads what is left, and
    raises LayerDigestError unless digest, size and diff_id are what the image says. `advance` is told the
    compressed bytes as they are read."""
    with located(f"{image_name}: layer {layer.number} ({layer.descriptor.digest})"):
        with layer.open() as pieces:
            blob = VerifiedBlob(pieces, layer.descriptor.digest, layer.descriptor.size, advance)
            source = TarSource(inflate.inflate(iter(blob), media.encoding(layer.descriptor)))
            yield source
            source.drain()
            blob.drain()
        if source.digest() != layer.diff_id:
            raise errors.LayerDigestError(
                f"the uncompressed tar has digest {source.digest()}, "
                f"the image config's diff_id is {layer.diff_id}"
            )


class TarSource:
    """Pieces of bytes as a tarstream.Source, hashed as they pass."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._left = memoryview(b"")
        self._hasher = hashlib.sha256()

    def readinto(self, buffer: memoryview) -> int:
        """Fill `buffer` as far as one piece goes; 0 at the end."""
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._hasher.update(piece)
            self._left = memoryview(piece)
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def drain(self) -> None:
        """Read to the end, for the digest."""
        self._left = memoryview(b"")
        for piece in self._pieces:
            self._hasher.update(piece)

    def digest(self) -> str:
        """`sha256:` digest of all that was read."""
        return f"sha256:{self._hasher.hexdigest()}"
