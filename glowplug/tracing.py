"""Recording what the start of an image reads: run the command, note the kernel's reads, stop when it is up.

Called by the verbs `trace` and `convert --trace-run`, on their main thread. What is recorded must be what the
command touches, so each trace has a device server of its own below STATE/traces/<pid>-<start>/: nothing else
is served by it, no page is cached in its mounts yet, and they read ahead what those of a start with the boot
pack will: the trace says how much. The block cache is the usual one. What a trace that was killed
left there, the next one takes away.

    this process       attaches, records, watches, ends the command
      child            `mounting.run`: namespaces, mounts, the command

What is in a trace beyond what was touched: the metadata of all layers, which every mount reads whole, and of
a read(2) all that was asked for, and what the kernel reads ahead of either.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

from glowplug import mounting, readiness, settings
from glowplug.until import Until
from imagefs import assembly, errors, mounts, privatedirectory, trace
from imagefs.fuse import control

if TYPE_CHECKING:
    from pathlib import Path

    from glowplug.process import Process
    from imagefs.image import LazyImage
    from imagefs.origin.connect import Options

_OWNER = "trace"


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """A trace. `left_out` counts reads that there was no room for; `failure` says why the start that was
    traced was none, and is empty otherwise."""

    trace: trace.Trace
    left_out: int
    failure: str

    @property
    def read_bytes(self) -> int:
        """Bytes of layer images that were read, each read counted."""
        return sum(read.length for read in self.trace.reads)


def record(
    ref: str,
    image: LazyImage,
    spec: Process,
    until: Until,
    read_ahead_kib: int,
    storage: settings.Storage,
    origins: Options,
) -> Result:
    """Run `spec` in an image until it is ready, then end it. Returns what was read until then. BusyError
    when the address that is waited for answers before."""
    if until.address is not None and readiness.answers_now(until.address):
        raise errors.BusyError(f"{until.address} answers already, without {spec.argv[0]}: end what does")
    if not image.layers:
        raise errors.InvalidInputError(f"{ref} has no layers: its start reads nothing")
    options = assembly.Options(writable=True, traced_read_ahead_kib=read_ahead_kib)
    with _own_server(storage, origins) as (own, client):
        # The same devices as the run: with its boot pack.
        client.attach(_OWNER, assembly.layer_specs(image), origins, assembly.pack_spec(image))
        client.start_recording(_OWNER)

        def run() -> int:
            return mounting.run(ref, image, spec, options, own, origins, client)

        with readiness.child(run, until) as child:
            ready = child.wait()
            recorded = client.stop_recording(_OWNER)
            failure = ""
            if ready:
                child.end()
            else:
                child.raise_failure()
                failure = _failure(spec, until, child.exit_code)
    return Result(_trace(image, spec, read_ahead_kib, recorded), recorded.left_out, failure)


def _failure(spec: Process, until: Until, exit_code: int | None) -> str:
    waits = until.log is not None or until.address is not None
    return f"{spec.argv[0]} ended with code {exit_code} before {until}" if waits or exit_code else ""


def _trace(image: LazyImage, spec: Process, read_ahead_kib: int, recorded: control.Recorded) -> trace.Trace:
    digests = tuple(layer.map_digest for layer in image.layers)
    sizes = {layer.map_digest: layer.block_map.image_bytes for layer in image.layers}
    reads = []
    for number, offset, length, microseconds in recorded.reads:
        digest = recorded.map_digests[number]
        length = min(length, sizes[digest] - offset)
        if length > 0:
            reads.append(trace.Read(digests.index(digest), offset, length, microseconds))
    return trace.Trace(
        image.source_digest, image.manifest.digest, digests, spec.argv, tuple(reads), read_ahead_kib
    )


@contextlib.contextmanager
def _own_server(
    storage: settings.Storage, origins: Options
) -> Iterator[tuple[settings.Storage, control.DeviceClient]]:
    """A device server of this process alone, on the same block cache; gone when the block is left."""
    folder = storage.state_dir / "traces"
    privatedirectory.make(storage.state_dir)
    privatedirectory.make(folder)
    _collect(folder)
    pid = os.getpid()
    own = dataclasses.replace(storage, state_dir=folder / f"{pid}-{mounts.process_start(pid)}")
    try:
        yield own, control.DeviceClient.ensure(settings.server_settings(own, origins))
    finally:
        _remove(own.state_dir)


def _collect(folder: Path) -> None:
    """Take away what traces left whose process is gone."""
    for path in folder.iterdir():
        pid, _, start = path.name.partition("-")
        if not pid.isdigit() or str(mounts.process_start(int(pid))) != start:
            _remove(path)


def _remove(state_dir: Path) -> None:
    with contextlib.suppress(errors.ImagefsError, OSError):  # the next trace tries again
        client = control.DeviceClient.connect(state_dir)
        if client is not None:
            client.stop()
        shutil.rmtree(state_dir)
