"""One source layer becomes one layer blob in a spool file, in one pass.

    blob -> sha256, size, inflate | diff_id | tar -> tree -> layer image -> blocks | sha256, zstd (a pool)

Each bar is a change of thread, over a pipe of a few pieces of 1 MiB, so that memory does not grow with the
layer. The heavy work (hashes, inflate, zstd) releases the GIL. Called by the pipeline's workers; the threads
made here belong to its group.

A digest that differs explains whatever damage was found in the bytes. So before damage is reported, the rest
of the blob is read and its digest compared. Messages start with image, layer number and layer digest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from pathlib import Path

from converter import blob, erofs_writer, errors, inflate, memory, tarstream, tasks, tree
from converter.limits import Limits
from converter.source import SourceLayer, media
from imagefs import errors as imagefs_errors

_PIPE_PIECES = 2
_RATIO_FLOOR_BYTES = 64 << 20
"""Up to here the ratio says nothing: small layers are mostly padding."""


@dataclasses.dataclass(frozen=True, slots=True)
class Parameters:
    """What decides the bytes of a layer blob, and the limits on its source. Sizes in bytes."""

    block_bytes: int
    frame_bytes: int
    compression_level: int
    limits: Limits


@dataclasses.dataclass(frozen=True, slots=True)
class NewLayer:
    """A layer that was converted: its blob in the spool file, and figures for the report. `chain_id` is set
    if it depends on the layers below."""

    finished: blob.FinishedBlob
    chain_id: str | None
    entries: int
    compressed_bytes: int
    tar_bytes: int
    seconds: float


class LayerConversion:
    """One run over one layer. `advance` is told the compressed bytes as they are read."""

    def __init__(
        self,
        layer: SourceLayer,
        image_name: str,
        parameters: Parameters,
        group: tasks.Group,
        executor: Executor,
        pool: memory.BufferPool,
        advance: Callable[[int], None],
    ) -> None:
        self._layer = layer
        self._where = f"{image_name}: layer {layer.number} ({layer.descriptor.digest})"
        self._parameters = parameters
        self._group = group
        self._executor = executor
        self._pool = pool
        self._advance = advance
        self._tar: tasks.Pipe[bytes] = tasks.Pipe(group, _PIPE_PIECES)
        self._hashed: tasks.Pipe[bytes] = tasks.Pipe(group, _PIPE_PIECES)
        self._verified: tasks.Promise[None] = tasks.Promise(group)
        self._compressed_bytes = 0
        self._tar_bytes = 0

    def run(self, spool: Path, lower: Callable[[], tree.Lower | None]) -> NewLayer:
        """Convert. `lower` waits for the layers below and gives their merged view, None if there are none;
        it is called only if this layer depends on them."""
        started = time.monotonic()
        self._group.start(f"read-{self._layer.number}", self._read)
        self._group.start(f"diff-id-{self._layer.number}", self._check_diff_id)
        source = _PipeSource(self._tar)
        with located(self._where):
            try:
                finished, layer_tree, chain_id = self._write(spool, source, lower)
            except errors.InvalidLayerError:
                source.drain()
                self._verified.get()
                raise
        return NewLayer(
            finished=finished,
            chain_id=chain_id,
            entries=layer_tree.entries,
            compressed_bytes=self._compressed_bytes,
            tar_bytes=self._tar_bytes,
            seconds=time.monotonic() - started,
        )

    def _write(
        self, spool: Path, source: tarstream.Source, lower: Callable[[], tree.Lower | None]
    ) -> tuple[blob.FinishedBlob, tree.LayerTree, str | None]:
        parameters, layer = self._parameters, self._layer
        sink = blob.LayerBlobWriter(
            spool,
            parameters.block_bytes,
            parameters.frame_bytes,
            parameters.compression_level,
            self._executor,
            self._pool,
        )
        try:
            layer_tree = tree.LayerTree(parameters.limits)
            layout, depends = self._write_image(sink, source, layer_tree, lower)
            self._verified.get()
            chain_id = layer.chain_id if depends else None
            finished = sink.finish(
                layout, layer.descriptor.digest, layer.diff_id, chain_id, layer_tree.root_implied
            )
        except BaseException:
            sink.abort()
            raise
        return finished, layer_tree, chain_id

    def _write_image(
        self,
        sink: erofs_writer.BlockSink,
        source: tarstream.Source,
        layer_tree: tree.LayerTree,
        lower: Callable[[], tree.Lower | None],
    ) -> tuple[erofs_writer.Layout, bool]:
        limits = self._parameters.limits
        writer = erofs_writer.ErofsWriter(sink, self._parameters.block_bytes)
        reader = tarstream.TarReader(source, limits)
        for entry in reader:
            node = layer_tree.add(entry)
            if node is not None:
                writer.add_file(node, entry.size, reader)
        depends = layer_tree.depends_on_lower()
        copied_bytes = 0
        for copy in layer_tree.resolve(lower() if depends else None):
            copied_bytes += copy.entry.size
            if copied_bytes > limits.max_image_bytes:
                raise errors.LimitError(
                    f"hard links to files of lower layers copy {copied_bytes} bytes, "
                    f"the limit is {limits.max_image_bytes} (--max-image-bytes)"
                )
            writer.add_file(copy.node, copy.entry.size, _LowerData(copy.entry))
        return writer.finish(layer_tree.root), depends

    def _read(self) -> None:
        """Thread: the source blob, to the tar's bytes."""
        descriptor = self._layer.descriptor
        encoding = media.encoding(descriptor)
        with located(self._where), self._layer.open() as pieces:
            blob_bytes = VerifiedBlob(pieces, descriptor.digest, descriptor.size, self._advance)
            try:
                for piece in inflate.inflate(iter(blob_bytes), encoding):
                    self._tar_bytes += len(piece)
                    self._check_limits(blob_bytes.count)
                    self._hashed.put(piece)
                    self._tar.put(piece)
            except errors.InvalidLayerError:
                blob_bytes.drain()
                raise
            blob_bytes.drain()
            self._compressed_bytes = blob_bytes.count
        self._hashed.close()

    def _check_limits(self, compressed_bytes: int) -> None:
        limits = self._parameters.limits
        if self._tar_bytes > limits.max_layer_bytes:
            raise errors.LimitError(
                f"more than {limits.max_layer_bytes} bytes uncompressed (--max-layer-bytes)"
            )
        if self._tar_bytes > max(_RATIO_FLOOR_BYTES, compressed_bytes * limits.max_ratio):
            raise errors.LimitError(
                f"{compressed_bytes} compressed bytes gave {self._tar_bytes}, "
                f"a ratio above {limits.max_ratio} (--max-ratio)"
            )

    def _check_diff_id(self) -> None:
        """Thread: the digest of the uncompressed tar. The parser gets the end of the tar from here, once
        the digest was found right: what it then complains of is what the image's author wrote."""
        hasher = hashlib.sha256()
        for piece in self._hashed:
            hasher.update(piece)
        found = f"sha256:{hasher.hexdigest()}"
        with located(self._where):
            if found != self._layer.diff_id:
                raise errors.LayerDigestError(
                    f"the uncompressed tar ({self._tar_bytes} bytes) has digest {found}, "
                    f"the image config's diff_id is {self._layer.diff_id}"
                )
        self._verified.set(None)
        self._tar.close()


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


class _PipeSource:
    """The tar's bytes as the parser reads them."""

    def __init__(self, pipe: tasks.Pipe[bytes]) -> None:
        self._pieces = iter(pipe)
        self._left = memoryview(b"")

    def readinto(self, buffer: memoryview, /) -> int:
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._left = memoryview(piece)
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def drain(self) -> None:
        """Read what is left."""
        for _ in self._pieces:
            pass


class _LowerData:
    """A lower layer's file as FileData."""

    def __init__(self, file: tree.LowerEntry) -> None:
        self._file = file
        self._position = 0

    def readinto(self, view: memoryview) -> int:
        data = self._file.read(self._position, min(len(view), inflate.PIECE_BYTES))
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def hole_ahead(self) -> int:
        return 0

    def skip_hole(self) -> None:
        return
