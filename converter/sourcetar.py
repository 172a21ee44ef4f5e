"""A source layer's uncompressed tar, verified while it is read.

`VerifiedBlob` and `TarSource` are the two ends of it: compressed bytes against the manifest's digest, the tar
against the image config's. The pipeline (converter.layer) has a thread for each; `open_tar` is both in the
caller's, for `glowplug check --against-source`. Memory does not grow with the layer.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator

from converter import errors, inflate, stages
from converter.source import SourceLayer, media
from converter.stages import Stage
from imagefs import errors as imagefs_errors


@contextlib.contextmanager
def open_tar(layer: SourceLayer, image_name: str, advance: Callable[[int], None]) -> Iterator[TarSource]:
    """The tar of a layer as a tarstream.Source. Leaving the context without an error reads what is left, and
    raises LayerDigestError unless digest, size and diff_id are what the image says. `advance` is told the
    compressed bytes as they are read."""
    with located(f"{image_name}: layer {layer.number} ({layer.descriptor.digest})"), layer.open() as pieces:
        blob = VerifiedBlob(pieces, layer.descriptor.digest, layer.descriptor.size, advance)
        tar = inflate.inflate(iter(blob), media.encoding(layer.descriptor))
        source = TarSource(tar, layer, stages.Meter().laps())
        yield source
        source.drain()
        blob.drain()


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Put `where` before the message of our errors."""
    try:
        yield
    except (errors.ConverterError, imagefs_errors.ImagefsError) as exc:
        exc.args = (f"{where}: {exc}", *exc.args[1:])
        raise


class VerifiedBlob:
    """The pieces of a source blob; once they were all read, size and digest are what was declared."""

    def __init__(
        self, pieces: Iterator[bytes], digest: str, size: int, advance: Callable[[int], None]
    ) -> None:
        self._pieces = pieces
        self._digest = digest
        self._size = size
        self._advance = advance
        self._hasher = hashlib.sha256()
        self.count = 0

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            self._hasher.update(piece)
            self.count += len(piece)
            if self.count > self._size:
                raise errors.LayerDigestError(f"the blob has more than its declared {self._size} bytes")
            self._advance(len(piece))
            yield piece
        if self.count != self._size:
            raise errors.LayerDigestError(
                f"the blob ends after {self.count} of its declared {self._size} bytes"
            )
        found = f"sha256:{self._hasher.hexdigest()}"
        if found != self._digest:
            raise errors.LayerDigestError(f"the blob's {self.count} bytes have digest {found}")

    def drain(self) -> None:
        """Read and verify what is left."""
        for _ in self:
            pass


class TarSource:
    """Pieces of a layer's tar as a tarstream.Source. The end is told once the tar's digest is what the image
    config says, else it is a LayerDigestError. For one thread, whose `laps` it switches."""

    def __init__(self, pieces: Iterator[bytes], layer: SourceLayer, laps: stages.Laps) -> None:
        self._pieces = pieces
        self._diff_id = layer.diff_id
        self._laps = laps
        self._left = memoryview(b"")
        self._count = 0
        self._hasher = hashlib.sha256()

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill `buffer` as far as one piece goes; 0 at the end."""
        if not self._left and not self._next():
            return 0
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def drain(self) -> None:
        """Read to the end, for the digest."""
        while self._next():
            pass

    def _next(self) -> bool:
        around = self._laps.enter(None)
        piece = next(self._pieces, b"")
        self._laps.enter(Stage.TAR_DIGEST)
        self._hasher.update(piece)
        self._laps.enter(around, len(piece))
        self._left = memoryview(piece)
        self._count += len(piece)
        found = f"sha256:{self._hasher.hexdigest()}"
        if not piece and found != self._diff_id:
            raise errors.LayerDigestError(
                f"the uncompressed tar ({self._count} bytes) has digest {found}, "
                f"the image config's diff_id is {self._diff_id}"
            )
        return bool(piece)
