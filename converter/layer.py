"""One source layer becomes one layer blob in a spool file, in one pass.

    blob -> sha256, size, inflate | diff_id, tar -> tree -> layer image -> blocks | sha256, zstd (a pool)

Each bar is a change of thread, over a pipe of a few pieces of 1 MiB, so that memory does not grow with the
layer. The heavy work (hashes, inflate, zstd) releases the GIL. Called by the pipeline's workers; the thread
made here belongs to its group. A thread for diff_id alone was no faster, and every change of thread costs.

A digest that differs explains whatever damage was found in the bytes. So before damage is reported, the rest
of the blob is read and its digest compared. Messages start with image, layer number and layer digest.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path

from converter import blob, erofs_writer, errors, inflate, memory, sourcetar, stages, tarstream, tasks, tree
from converter.limits import Limits
from converter.source import SourceLayer, media
from converter.stages import Stage

_PIPE_PIECES = 4
_PIPE_BATCH = 2
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
    """One run over one layer. `advance` is told the compressed bytes as they are read, `meter` what the
    stages cost. `kept`: the spool file is to become the stored blob."""

    def __init__(
        self,
        layer: SourceLayer,
        image_name: str,
        parameters: Parameters,
        group: tasks.Group,
        executor: Executor,
        pool: memory.BufferPool,
        advance: Callable[[int], None],
        meter: stages.Meter,
        kept: bool,
    ) -> None:
        self._layer = layer
        self._where = f"{image_name}: layer {layer.number} ({layer.descriptor.digest})"
        self._parameters = parameters
        self._group = group
        self._executor = executor
        self._pool = pool
        self._advance = advance
        self._meter = meter
        self._kept = kept
        self._tar: tasks.Pipe[bytes] = tasks.Pipe(group, _PIPE_PIECES, _PIPE_BATCH)
        self._compressed_bytes = 0
        self._tar_bytes = 0

    def run(self, spool: Path, lower: Callable[[], tree.Lower | None]) -> NewLayer:
        """Convert. `lower` waits for the layers below and gives their merged view, None if there are none;
        it is called only if this layer depends on them."""
        started = time.monotonic()
        self._group.start(f"read-{self._layer.number}", self._read)
        with sourcetar.located(self._where), self._meter.laps() as laps:
            # The parser gets the tar's end once the digest was found right: what it then complains of is
            # what the image's author wrote.
            source = sourcetar.TarSource(iter(self._tar), self._layer, laps)
            try:
                finished, layer_tree, chain_id = self._write(spool, source, laps, lower)
            except errors.InvalidLayerError:
                source.drain()
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
        self,
        spool: Path,
        source: tarstream.Source,
        laps: stages.Laps,
        lower: Callable[[], tree.Lower | None],
    ) -> tuple[blob.FinishedBlob, tree.LayerTree, str | None]:
        parameters, layer = self._parameters, self._layer
        sink = blob.LayerBlobWriter(
            spool,
            parameters.block_bytes,
            parameters.frame_bytes,
            parameters.compression_level,
            self._executor,
            self._pool,
            laps,
            self._kept,
        )
        try:
            layer_tree = tree.LayerTree(parameters.limits)
            laps.enter(Stage.TREE)
            layout, depends = self._write_image(sink, source, layer_tree, lower)
            laps.enter(None, layout.image_bytes)
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
        with (
            sourcetar.located(self._where),
            self._meter.laps() as laps,
            self._layer.open() as pieces,
        ):
            blob_bytes = sourcetar.VerifiedBlob(
                laps.through(Stage.READ, pieces), descriptor.digest, descriptor.size, self._advance
            )
            verified = laps.through(Stage.SOURCE_DIGEST, iter(blob_bytes))
            inflated = inflate.inflate(verified, encoding)
            if encoding is not media.Encoding.PLAIN:
                inflated = laps.through(Stage.INFLATE, inflated)
            try:
                for piece in inflated:
                    self._tar_bytes += len(piece)
                    self._check_limits(blob_bytes.count)
                    self._tar.put(piece)
            except errors.InvalidLayerError:
                blob_bytes.drain()
                raise
            blob_bytes.drain()
            self._compressed_bytes = blob_bytes.count
        self._tar.close()

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
        return self._file.hole_ahead(self._position)

    def skip_hole(self) -> None:
        self._position += self.hole_ahead()
