"""Making a boot pack: the pages that traces name, out of a block image's own blocks, into table and data.

Called by `glowplug pack` (and by what converts and traces in one step), from one thread, which waits for the
pools that it starts. Two passes over a work directory that is removed whatever happens:

    blocks -> pages   each block that holds a wanted page is fetched once, verified against its block map, and
                      its pages are written to their places in the page sequence, a file
    pages -> frames   frame by frame, in order, compressed in parallel, written behind one another

Deterministic: the same block image, traces, frame size, level and libzstd give the same two blobs, hence the
same digests. Memory is bounded by the jobs: a block for each in the first pass, two frames in the second.

The pack goes where the block image is, as a new manifest for the same subject. A pack whose table is already
that of the block image changes nothing. What REF's tag names directly follows to the new manifest: the block
image itself, or its entry in an index of block images.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, TypeVar

from converter import blob, packchoice
from imagefs import artifact, bootpack, errors, frames, trace
from imagefs.artifact import Descriptor
from imagefs.bootpack import PAGE_BYTES, Record
from imagefs.image import LazyImage
from imagefs.lazylayer import LazyLayer
from imagefs.origin import BytesSource, FileSource, connect
from imagefs.trace import Trace

DEFAULT_LEVEL: Final = 9
"""Where more work stops to pay: docs/format.md has the figures."""
_BLOCK_PLACES = ("docker", "oci", "s3")
_RUN_BLOCKS = 8
"""Neighbouring blocks that one request brings at most, so that the threads share the work evenly."""
_AHEAD = 2
"""Results that may wait for their turn, for each job."""

_T = TypeVar("_T")
_R = TypeVar("_R")
Stage = Callable[[str, int], contextlib.AbstractContextManager[Callable[[int], None]]]
"""Opens the display of a stage, by its name and its bytes in all; what it yields is told how many more were
done, from any thread."""


@dataclasses.dataclass(frozen=True, slots=True)
class Parameters:
    """`jobs`: blocks fetched, and frames compressed, at once. `read_ahead_kib`: of the traces given, only
    those count that were made with it; None: all, and they must agree."""

    frame_bytes: int
    compression_level: int
    jobs: int
    read_ahead_kib: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Packed:
    """What a pack came to. `through_bytes` of what the traces read are not in it (packchoice.py). `changed`
    is False if the block image had this very pack."""

    source_digest: str
    block_image_digest: str
    table_digest: str
    table_bytes: int
    data_digest: str
    data_bytes: int
    page_bytes: int
    through_bytes: int
    records: int
    frames: int
    read_ahead_kib: int
    blocks_read: int
    generation: int
    changed: bool
    retagged: bool
    seconds: float


def silent(name: str, total_bytes: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
    """A Stage that nobody watches."""
    return contextlib.nullcontext(lambda done_bytes: None)


def read_trace(path: Path) -> Trace:
    """A trace file. InvalidInputError naming the file."""
    try:
        if path.stat().st_size > trace.MAX_TRACE_BYTES:
            raise errors.InvalidInputError(f"trace: more than {trace.MAX_TRACE_BYTES} bytes")
        return trace.decode(path.read_bytes())
    except errors.InvalidInputError as exc:
        raise errors.InvalidInputError(f"{path}: {exc}") from exc


def pack(image: LazyImage, traces: Sequence[Trace], parameters: Parameters, stage: Stage = silent) -> Packed:
    """Make the pack of these traces and publish it. InvalidInputError for traces of anything but this block
    image's layers, and for traces that read nothing that would be fetched."""
    started = time.monotonic()
    traces = _chosen(traces, parameters.read_ahead_kib)
    chosen = wanted(image, traces)
    with tempfile.TemporaryDirectory(prefix="glowplug-pack-", ignore_cleanup_errors=True) as work:
        try:
            read_ahead_kib = trace.read_ahead(traces)
            made = _Making(image, chosen.records, read_ahead_kib, parameters, Path(work), stage).run()
        except OSError as exc:
            raise errors.ConfigurationError(
                f"work directory {work}: {exc.strerror or exc}; free some space or choose another (TMPDIR)"
            ) from exc
        return _publish(image, made, chosen.through_bytes, started)


def _chosen(traces: Sequence[Trace], read_ahead_kib: int | None) -> Sequence[Trace]:
    if read_ahead_kib is None:
        return traces
    chosen = [each for each in traces if each.read_ahead_kib == read_ahead_kib]
    if not chosen:
        raise errors.InvalidInputError(
            f"none of the {len(traces)} traces was made with a read-ahead of {read_ahead_kib} KiB"
        )
    return chosen


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """What a pack of some traces holds, in order; and how much that they read from end to end is left to
    blocks."""

    records: tuple[Record, ...]
    through_bytes: int


def wanted(image: LazyImage, traces: Sequence[Trace]) -> Wanted:
    """See Wanted. Raises as `pack`."""
    layers = bootpack.distinct(layer.map_digest for layer in image.layers)
    for found in traces:
        if bootpack.distinct(found.map_digests) != layers:
            raise errors.InvalidInputError(
                f"the trace was recorded on block image {found.block_image_digest} of "
                f"{found.source_digest}; {image.reference} is now {image.manifest.digest} of "
                f"{image.source_digest}, with other layers: trace it again"
            )
    maps = {layer.map_digest: layer.block_map for layer in image.layers}
    ordered = [maps[digest] for digest in layers]
    read = packchoice.without_zero_blocks(trace.merge(traces), ordered)
    records = packchoice.without_read_through(read, ordered, packchoice.MIN_THROUGH_BYTES)
    if not records:
        raise errors.InvalidInputError(
            "the traces read nothing but zero blocks and what is read from end to end, which blocks bring as "
            "fast: there is nothing to pack"
        )
    pages = _pages(records)
    if pages > bootpack.MAX_PAGES:
        raise errors.InvalidInputError(
            f"the traces read {pages * PAGE_BYTES} bytes, here and there, a boot pack holds at most "
            f"{bootpack.MAX_PAGES * PAGE_BYTES}: trace less of the start"
        )
    return Wanted(records, (_pages(read) - pages) * PAGE_BYTES)


def _pages(records: Iterable[Record]) -> int:
    return sum(record.pages for record in records)


@dataclasses.dataclass(frozen=True, slots=True)
class _Made:
    table: bootpack.Table
    data_path: Path
    blocks_read: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """Bytes of a block, and where they go in the page sequence."""

    start: int
    length: int
    position: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring blocks of one layer, from block `first`: the places of each."""

    layer: LazyLayer
    first: int
    places: tuple[tuple[_Place, ...], ...]

    @property
    def compressed_bytes(self) -> int:
        blocks = self.layer.block_map.blocks[self.first : self.first + len(self.places)]
        return sum(block.compressed_bytes for block in blocks)


class _Making:
    """One pack in the making."""

    def __init__(
        self,
        image: LazyImage,
        records: tuple[Record, ...],
        read_ahead_kib: int,
        parameters: Parameters,
        work: Path,
        stage: Stage,
    ) -> None:
        self._records = records
        self._read_ahead_kib = read_ahead_kib
        self._parameters = parameters
        self._stage = stage
        self._pages_path = work / "pages"
        self._data_path = work / "data"
        by_digest = {layer.map_digest: layer for layer in image.layers}
        self._digests = tuple(by_digest)
        self._layers = tuple(by_digest.values())

    def run(self) -> _Made:
        runs = list(_runs(self._layers, self._records))
        for layer in self._layers:
            frames.check_sizes(layer.block_map, layer.map_digest)
        with open(self._pages_path, "xb+", buffering=0) as pages:
            self._read_blocks(runs, pages.fileno())
            table = self._write_frames(pages.fileno())
        return _Made(table, self._data_path, sum(len(run.places) for run in runs))

    def _read_blocks(self, runs: list[_Run], pages: int) -> None:
        total = sum(run.compressed_bytes for run in runs)
        with self._stage("read blocks", total) as advance, self._pool() as pool:
            for _ in _in_order(
                pool, lambda run: _read_run(run, pages, advance), runs, _AHEAD * self._parameters.jobs
            ):
                pass

    def _write_frames(self, pages: int) -> bootpack.Table:
        planned = bootpack.plan_frames(self._records, self._parameters.frame_bytes)
        lengths = [sum(piece.pages for piece in pieces) * PAGE_BYTES for pieces in planned]
        starts = [number * self._parameters.frame_bytes for number in range(len(lengths))]
        compress = functools.partial(_frame, pages, self._parameters.compression_level)
        found: list[bootpack.Frame] = []
        offset = 0
        hasher = hashlib.sha256()
        with (
            self._stage("compress", sum(lengths)) as advance,
            open(self._data_path, "xb") as out,
            self._pool() as pool,
        ):
            places = zip(starts, lengths, strict=True)
            made = _in_order(pool, compress, places, _AHEAD * self._parameters.jobs)
            for (digest, data), start, length in zip(made, starts, lengths, strict=True):
                found.append(bootpack.Frame(offset, len(data), length, digest, start // PAGE_BYTES))
                offset += len(data)
                hasher.update(data)
                out.write(data)
                advance(length)
        return bootpack.Table(
            map_digests=self._digests,
            records=self._records,
            frames=tuple(found),
            data_digest=f"sha256:{hasher.hexdigest()}",
            data_bytes=offset,
            pages=sum(lengths) // PAGE_BYTES,
            read_ahead_kib=self._read_ahead_kib,
        )

    @contextlib.contextmanager
    def _pool(self) -> Iterator[concurrent.futures.Executor]:
        pool = concurrent.futures.ThreadPoolExecutor(self._parameters.jobs, thread_name_prefix="pack")
        try:
            yield pool
        finally:
            # After an error the files are about to go: nobody may be writing to them.
            pool.shutdown(cancel_futures=True)


def _runs(layers: Sequence[LazyLayer], records: Iterable[Record]) -> Iterator[_Run]:
    """The blocks that hold the records, each once, neighbours together."""
    blocks: dict[tuple[int, int], list[_Place]] = {}
    position = 0
    for record in records:
        block_bytes = layers[record.layer].block_map.block_bytes
        at, end = record.first_page * PAGE_BYTES, (record.first_page + record.pages) * PAGE_BYTES
        while at < end:
            index = at // block_bytes
            length = min(end, (index + 1) * block_bytes) - at
            place = _Place(at - index * block_bytes, length, position)
            blocks.setdefault((record.layer, index), []).append(place)
            at += length
            position += length
    wanted_blocks = sorted(blocks)
    at = 0
    while at < len(wanted_blocks):
        layer, first = wanted_blocks[at]
        count = 1
        while count < _RUN_BLOCKS and wanted_blocks[at + count : at + count + 1] == [(layer, first + count)]:
            count += 1
        own = wanted_blocks[at : at + count]
        yield _Run(layers[layer], first, tuple(tuple(blocks[each]) for each in own))
        at += count


def _read_run(run: _Run, pages: int, advance: Callable[[int], None]) -> None:
    """Pool: fetch and verify a run's blocks, and write the wanted bytes to their places."""
    block_map = run.layer.block_map
    buffer = memoryview(bytearray(block_map.block_bytes))
    offset = block_map.blocks[run.first].offset
    stream = run.layer.origin.stream_range(run.layer.blob_digest, offset, run.compressed_bytes)
    with contextlib.closing(stream):
        pieces = frames.Pieces(stream, offset)
        for index, places in enumerate(run.places, start=run.first):
            data = frames.decode_block(block_map, index, pieces, run.layer.map_digest, buffer)
            for place in places:
                _write_at(pages, place.position, data[place.start : place.start + place.length])
            advance(block_map.blocks[index].compressed_bytes)


def _frame(pages: int, level: int, place: tuple[int, int]) -> tuple[bytes, bytes]:
    """Pool: the digest of a frame's content, and the frame."""
    start, length = place
    data = os.pread(pages, length, start)
    if len(data) != length:
        raise OSError(None, f"{len(data)} bytes of {length} at {start} could be read back")
    return hashlib.sha256(data).digest(), blob.compressor(level).compress(data)


def _write_at(fd: int, position: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], position + done)


def _in_order(
    pool: concurrent.futures.Executor,
    function: Callable[[_T], _R],
    arguments: Iterable[_T],
    ahead: int,
) -> Iterator[_R]:
    """The results of `function` in the order of its arguments, about `ahead` of them under way or waiting."""
    waiting: collections.deque[concurrent.futures.Future[_R]] = collections.deque()
    for argument in arguments:
        waiting.append(pool.submit(function, argument))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _publish(image: LazyImage, made: _Made, through_bytes: int, started: float) -> Packed:
    origin = image.origin
    encoded = bootpack.encode(made.table)
    if len(encoded) > bootpack.MAX_TABLE_BYTES:
        raise errors.InvalidInputError(
            f"the boot pack's table has {len(encoded)} bytes, readers take {bootpack.MAX_TABLE_BYTES}: "
            "the traces are too scattered; give fewer of them"
        )
    table = Descriptor(artifact.PACK_TABLE_MEDIA_TYPE, artifact.digest_of(encoded), len(encoded))
    data = Descriptor(artifact.PACK_DATA_MEDIA_TYPE, made.table.data_digest, made.table.data_bytes)
    before = image.block_image.boot_pack
    changed = before is None or (before.table, before.data) != (table, data)
    generation = before.generation if before is not None else 1
    if changed:
        generation = artifact.next_generation(origin.referrers(image.source_digest))
    origin.put_blob(data.digest, data.size, FileSource(made.data_path, data.size))
    origin.put_blob(table.digest, table.size, BytesSource(encoded))
    boot_pack = artifact.BootPack(table, data, generation)
    manifest = artifact.encode(dataclasses.replace(image.block_image, boot_pack=boot_pack))
    digest = origin.put_manifest(manifest, artifact.OCI_MANIFEST)
    retagged = changed and _retag(image, Descriptor(artifact.OCI_MANIFEST, digest, len(manifest)), manifest)
    return Packed(
        source_digest=image.source_digest,
        block_image_digest=digest,
        table_digest=table.digest,
        table_bytes=table.size,
        data_digest=data.digest,
        data_bytes=data.size,
        page_bytes=made.table.pages * PAGE_BYTES,
        through_bytes=through_bytes,
        records=len(made.table.records),
        frames=len(made.table.frames),
        read_ahead_kib=made.table.read_ahead_kib,
        blocks_read=made.blocks_read,
        generation=generation,
        changed=changed,
        retagged=retagged,
        seconds=time.monotonic() - started,
    )


def _retag(image: LazyImage, new: Descriptor, manifest: bytes) -> bool:
    """Let a tag that names the block image, or an index that lists it, follow to the new manifest. False if
    REF's tag names something else (its source), or REF is pinned to a digest."""
    ref = image.reference
    tag = connect.selector(ref)
    if image.sources or ref.digest is not None or ref.transport not in _BLOCK_PLACES or not tag:
        return False
    origin = image.origin
    top = origin.read_manifest(tag)
    if top.digest == image.manifest.digest:
        origin.put_manifest(manifest, new.media_type, tag)
        return True
    if top.media_type not in artifact.INDEX_TYPES:
        return False
    document = artifact.parse_json_object(top.data, f"index {top.digest}")
    entries = document.get("manifests")
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and entry.get("digest") == image.manifest.digest:
            entry["digest"], entry["size"] = new.digest, new.size
            origin.put_manifest(artifact.canonical_json(document), top.media_type, tag)
            return True
    return False
