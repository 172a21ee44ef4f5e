"""An image's layers in parallel, and the images of a multi-platform source one after another.

`convert` is the one entry. Workers take layers bottom first, so a layer that waits for those below it always
waits for layers that are being converted: no deadlock, whatever the number of workers. A finished layer goes
to an upload thread at once. The block image follows in the calling thread when every layer is stored; the
first error of any thread, or Ctrl-C, stops all of them, and the work directory with every spool file is
removed.

The spool files live until the image is done: a layer further up may turn out to depend on them.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from converter import blob, erofs_writer, layer, lower, memory, publish, report, reuse, stages, tasks, tree
from converter import source as sources
from converter.observer import Observer
from imagefs import artifact, errors, reference
from imagefs.lazylayer import LazyLayer
from imagefs.origin import Origin, connect

_PARALLEL_UPLOADS = 3
_COMPRESSION_NICENESS = 5
"""Added to the process' own. More is no faster, and costs more where other programs want the processors."""
_DESTINATIONS = ("docker", "oci", "s3")


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """What `convert` is asked for.

    `destination` None is the source's own repository. `jobs` bounds the layers converted at once, as memory
    does. `layer_cache` is an OCI layout folder of layers converted before.
    """

    source: reference.Reference
    destination: reference.Reference | None
    wanted: sources.Wanted
    parameters: layer.Parameters
    options: connect.Options
    jobs: int
    layer_cache: Path | None = None
    reuse: bool = True


def convert(request: Request, observer: Observer) -> report.Result:
    """Convert and publish. Raises converter.errors.ConverterError or imagefs.errors.ImagefsError."""
    started = time.monotonic()
    place = _destination(request)
    with tempfile.TemporaryDirectory(prefix="glowplug-convert-", ignore_cleanup_errors=True) as work:
        images = sources.open_images(
            request.source, request.options, request.wanted, Path(work), request.parameters.limits
        )
        opened: list[Origin] = [image.origin for image in images[:1] if image.origin is not None]
        try:
            origin = connect.connect(place, request.options)
            opened.append(origin)
            cache = None
            if request.layer_cache is not None:
                folder = reference.Reference("oci", os.fspath(request.layer_cache))
                cache = reuse.LayerIndex(connect.connect(folder, request.options))
                opened.append(cache.origin)
            return _convert_images(request, place, images, origin, cache, Path(work), observer, started)
        finally:
            for each in opened:
                each.close()


def _destination(request: Request) -> reference.Reference:
    """The place of the block images; its tag is what the result is tagged with."""
    if request.destination is None:
        if request.source.transport not in _DESTINATIONS:
            raise errors.InvalidInputError(
                f"{request.source}: nothing can be stored beside it; say where the block image goes with --to"
            )
        return dataclasses.replace(request.source, tag=None, digest=None)
    place = request.destination
    if place.transport not in _DESTINATIONS or place.digest:
        raise errors.InvalidInputError(
            f"{place}: not a destination; accepted: docker://HOST/REPO[:TAG], oci:DIR[:TAG], s3://BUCKET/PREFIX[:TAG]"
        )
    same_place = (place.transport, place.location) == (request.source.transport, request.source.location)
    if same_place and place.tag is not None and place.tag == (request.source.tag or "latest"):
        raise errors.InvalidInputError(
            f"{place}: this tag is the source image's own; leave it out (the block image is found from the "
            "source) or choose another"
        )
    return place


def _convert_images(
    request: Request,
    place: reference.Reference,
    images: Sequence[sources.SourceImage],
    origin: Origin,
    cache: reuse.LayerIndex | None,
    work: Path,
    observer: Observer,
    started: float,
) -> report.Result:
    reports = []
    published = []
    several = request.wanted == "all"
    for number, image in enumerate(images):
        directory = work / str(number)
        directory.mkdir()
        observer.image(image)
        conversion = _ImageConversion(request, image, origin, cache, directory, observer)
        layers = conversion.run()
        descriptor = conversion.destination.put_image(
            image, [each.layer for each in layers], None if several else place.tag
        )
        published.append((descriptor, image))
        ref = str(place.with_digest(descriptor.digest))
        reports.append(
            report.of_image(
                image, descriptor.digest, ref, [each.report for each in layers], conversion.meter.times()
            )
        )
    index = None
    if several and place.tag is not None:
        index = conversion.destination.put_index(published, place.tag).digest
    return report.Result(
        source=str(request.source),
        destination=str(place),
        index=index,
        images=tuple(reports),
        seconds=time.monotonic() - started,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Done:
    """A layer that is finished, how it is read back by layers above it, and its line in the report."""

    layer: publish.FinishedLayer
    readable: blob.FinishedBlob | LazyLayer
    report: report.LayerReport


def _yield_to_feeders() -> None:
    """In a thread that compresses: those which feed it go first. Where processors are few and all are treated
    alike, it finds nothing to do now and then, and a processor waits with it."""
    with contextlib.suppress(OSError):  # a sandbox may forbid it: slower, not wrong
        niceness = os.getpriority(os.PRIO_PROCESS, os.getpid()) + _COMPRESSION_NICENESS
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)


class _ImageConversion:
    """One run over one image."""

    def __init__(
        self,
        request: Request,
        image: sources.SourceImage,
        origin: Origin,
        cache: reuse.LayerIndex | None,
        directory: Path,
        observer: Observer,
    ) -> None:
        self._request = request
        self._image = image
        self._directory = directory
        self._observer = observer
        self._group = tasks.Group()
        self.meter = stages.Meter()
        self.destination = publish.Destination(origin, cache, self._group.check)
        self._places: list[tuple[str, reuse.LayerIndex | reuse.ReferrerLayers]] = []
        if request.reuse:
            self._places.append(("destination", reuse.ReferrerLayers(origin, image.manifest.digest)))
            self._places.append(("destination", reuse.LayerIndex(origin)))
            if cache is not None:
                self._places.append(("cache", cache))
        self._todo = collections.deque(image.layers)
        self._done: list[tasks.Promise[_Done]] = [tasks.Promise(self._group) for _ in image.layers]
        self._uploads = tasks.Tokens(self._group, _PARALLEL_UPLOADS)
        wanted = request.parameters
        self._shares = memory.shares(
            wanted.block_bytes,
            wanted.frame_bytes,
            wanted.compression_level,
            min(request.jobs, max(1, len(image.layers))),
            os.cpu_count() or 1,
        )
        self._pool = memory.BufferPool(self._group, wanted.block_bytes, self._shares.buffers)
        self._executor = concurrent.futures.ThreadPoolExecutor(
            self._shares.threads, thread_name_prefix="compress", initializer=_yield_to_feeders
        )

    def run(self) -> list[_Done]:
        """Convert and store every layer."""
        try:
            for number in range(min(self._shares.layers, len(self._image.layers))):
                self._group.start(f"layer-worker-{number}", self._work)
            self._group.wait()
        finally:
            self._executor.shutdown(cancel_futures=True)
        return [promise.get() for promise in self._done]

    def _work(self) -> None:
        """Thread: layers, bottom first, until there are none."""
        while True:
            try:
                each = self._todo.popleft()
            except IndexError:
                return
            self._group.check()
            done = self._find(each) or self._convert(each)
            self._observer.converted(each.number, done.layer.found is not None)
            self._done[each.number].set(done)
            self._group.start(f"upload-{each.number}", lambda done=done: self._upload(done))  # type: ignore[misc]

    def _upload(self, done: _Done) -> None:
        """Thread: one finished layer to the destination."""
        with self._uploads, self.meter.laps() as laps:
            laps.enter(stages.Stage.UPLOAD)
            self.destination.put_layer(done.layer)
            laps.enter(None, 0 if done.layer.found else done.layer.blob.size)
        self._observer.published(done.report.number)

    def _key(self, each: sources.SourceLayer, chain_id: str | None) -> reuse.Key:
        parameters = self._request.parameters
        return reuse.Key(
            erofs_writer.LAYOUT_VERSION,
            each.diff_id,
            chain_id,
            parameters.block_bytes,
            parameters.frame_bytes,
            parameters.compression_level,
            blob.LIBZSTD_VERSION,
        )

    def _find(self, each: sources.SourceLayer) -> _Done | None:
        """The layer if it was converted before: on its own tar alone, or on all that lies below."""
        started = time.monotonic()
        for where, place in self._places:
            for chain_id in (None, each.chain_id):
                found = place.find(self._key(each, chain_id))
                if found is None:
                    continue
                finished = publish.FinishedLayer(
                    key=found.key,
                    map_bytes=found.map_for(each.descriptor.digest),
                    block_map=found.block_map,
                    blob=found.blob,
                    file=None,
                    found=found,
                )
                readable = reuse.lazy_layer(found)
                return _Done(
                    finished, readable, report.of_found(each, finished, where, time.monotonic() - started)
                )
        return None

    def _convert(self, each: sources.SourceLayer) -> _Done:
        def advance(compressed_bytes: int) -> None:
            self._observer.advanced(each.number, compressed_bytes)

        run = layer.LayerConversion(
            each,
            self._image.name,
            self._request.parameters,
            self._group,
            self._executor,
            self._pool,
            advance,
            self.meter,
            self.destination.links(self._directory),
        )
        new = run.run(self._directory / f"layer-{each.number}", lambda: self._below(each.number))
        made = new.finished
        finished = publish.FinishedLayer(
            key=self._key(each, new.chain_id),
            map_bytes=made.map_bytes,
            block_map=made.block_map,
            blob=artifact.Descriptor(artifact.BLOB_MEDIA_TYPE, made.digest, made.size),
            file=made.path,
            found=None,
        )
        return _Done(finished, made, report.of_new(each, finished, new))

    def _below(self, number: int) -> tree.Lower | None:
        """The layers below, merged, once they are all finished."""
        layers = [promise.get().readable for promise in self._done[:number]]
        return lower.Stack(layers) if layers else None
