"""`glowplug convert`: options to a pipeline.Request, the result to stdout; --trace-run adds a boot pack."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from converter import limits
from glowplug import opening, settings
from glowplug.until import Until
from glowplug.verbs.trace import until_options
from imagefs import blockmap, errors

if TYPE_CHECKING:
    from converter.pack import Packed
    from converter.report import ImageReport, Result
    from imagefs.origin.connect import Options

_LIMITS = limits.Limits()
_MIN_SWITCH_SECONDS = 0.0005
"""Threads of a conversion hand the interpreter lock over at least this often. Python's default, 5 ms, is
longer than the work on one piece of data: the stages would wait for the parser, not run beside it."""


@click.command()
@click.argument("source", metavar="SOURCE")
@click.option(
    "--to", "destination", metavar="DEST", help="docker://, oci: or s3:// (default: beside the source)."
)
@click.option(
    "--platform", help="OS/ARCHITECTURE[/VARIANT] of a multi-platform image, or all (default: the host's)."
)
@click.option(
    "--block-size",
    type=settings.SIZE,
    default=blockmap.DEFAULT_BLOCK_BYTES,
    help="Unit of fetch (default 4MiB).",
)
@click.option(
    "--frame-size",
    type=settings.SIZE,
    help="Unit of compression, and of what a read waits for (default 4MiB, or the block size if smaller).",
)
@click.option("--level", type=click.IntRange(1, 19), help="zstd level (default 2).")
@click.option(
    "--layer-cache",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="GLOWPLUG_LAYER_CACHE",
    show_envvar=True,
    help="Folder of layers converted before, read and filled.",
)
@click.option("--no-reuse", is_flag=True, help="Convert every layer, whatever was converted before.")
@click.option(
    "--jobs", type=click.IntRange(1), help="Layers converted at once (default: one per processor, up to 8)."
)
@click.option(
    "--max-entries",
    type=click.IntRange(1),
    default=_LIMITS.max_entries,
    show_default=True,
    help="Limit per layer.",
)
@click.option(
    "--max-path-bytes",
    type=click.IntRange(1),
    default=_LIMITS.max_path_bytes,
    show_default=True,
    help="Limit of a path.",
)
@click.option(
    "--max-header-bytes",
    type=settings.SIZE,
    default=_LIMITS.max_header_bytes,
    help="Limit of a tar extension header (default 1M).",
)
@click.option(
    "--max-attribute-bytes",
    type=settings.SIZE,
    default=_LIMITS.max_attribute_bytes,
    help="Limit of a layer's xattrs and link targets, which are kept in memory (default 128M).",
)
@click.option(
    "--max-layer-bytes",
    type=settings.SIZE,
    default=_LIMITS.max_layer_bytes,
    help="Limit of an uncompressed tar (default 1T).",
)
@click.option(
    "--max-image-bytes",
    type=settings.SIZE,
    default=_LIMITS.max_image_bytes,
    help="Limit of a layer's files, holes included (default 4T).",
)
@click.option(
    "--max-ratio",
    type=click.IntRange(1),
    default=_LIMITS.max_ratio,
    show_default=True,
    help="Limit of uncompressed over compressed bytes.",
)
@click.option(
    "--trace-run",
    metavar="CMD",
    help="Then run CMD in the result, trace what it reads and add a boot pack of that: trace and pack in one "
    "step. Words as in a shell, but no shell runs them.",
)
@click.option(
    "--trace-runs",
    type=click.IntRange(1, 16),
    default=2,
    show_default=True,
    help="How often CMD is run: no two starts read quite the same, and the pack holds what any of them read.",
)
@until_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@settings.storage_options
@settings.origin_options
def command(
    *,
    source: str,
    destination: str | None,
    platform: str | None,
    block_size: int,
    frame_size: int | None,
    level: int | None,
    layer_cache: Path | None,
    no_reuse: bool,
    jobs: int | None,
    trace_run: str | None,
    trace_runs: int,
    until: Until,
    as_json: bool,
    storage: settings.Storage,
    origins: Options,
    **bounds: int,
) -> None:
    """Turn the OCI image SOURCE into a block image, stored beside it or in DEST.

    Temporary files go to $TMPDIR: about the compressed size of the image.
    """
    words = _words(trace_run)
    from converter import blob, layer, memory, pipeline
    from glowplug import progress
    from imagefs import platforms, reference

    frame_bytes = frame_size or min(blockmap.DEFAULT_FRAME_BYTES, block_size)
    blockmap.check_block_bytes(block_size)
    blockmap.check_frame_bytes(frame_bytes, block_size)
    request = pipeline.Request(
        source=reference.parse(source),
        destination=reference.parse(destination) if destination else None,
        wanted="all" if platform == "all" else platforms.parse(platform) if platform else None,
        parameters=layer.Parameters(
            block_bytes=block_size,
            frame_bytes=frame_bytes,
            compression_level=level or blob.DEFAULT_LEVEL,
            limits=limits.Limits(**bounds),
        ),
        options=origins,
        jobs=jobs or min(os.cpu_count() or 1, 8),
        layer_cache=layer_cache,
        reuse=not no_reuse,
    )
    sys.setswitchinterval(_MIN_SWITCH_SECONDS)
    memory.return_what_is_freed()
    with progress.conversion() as observer:
        result = pipeline.convert(request, observer)
    document, summary = result.document(), _summary(result)
    if words:
        packed = _trace_and_pack(result, destination, words, trace_runs, until, storage, origins)
        document["boot_pack"] = dataclasses.asdict(packed)
        summary += (
            f"\nboot pack: {packed.data_bytes / 1e6:.1f} MB of {packed.page_bytes / 1e6:.1f} MB read\n"
            f"  {_pinned(result, packed)}"
        )
    click.echo(json.dumps(document, indent=2) if as_json else summary)


def _words(trace_run: str | None) -> tuple[str, ...]:
    """The command of --trace-run; what is wrong with it is said before anything is converted."""
    if trace_run is None:
        return ()
    if os.geteuid() != 0:
        raise errors.ConfigurationError("--trace-run needs root, as run does")
    try:
        words = tuple(shlex.split(trace_run))
    except ValueError as exc:
        raise click.BadParameter(f"{trace_run!r}: {exc}", param_hint="--trace-run") from exc
    if not words:
        raise click.BadParameter("no command", param_hint="--trace-run")
    return words


def _trace_and_pack(
    result: Result,
    destination: str | None,
    words: tuple[str, ...],
    runs: int,
    until: Until,
    storage: settings.Storage,
    origins: Options,
) -> Packed:
    from converter import pack
    from glowplug import process, progress, tracing
    from imagefs import bootpack, kernelreadahead

    ref = destination or _of_this_machine(result).ref
    image = opening.open_image(ref, platform=None, block_repository=None, origins=origins)
    spec = process.from_config(image.config_document(), words)
    read_ahead_kib = kernelreadahead.TRACE_READ_AHEAD_KIB
    traces = []
    for _ in range(runs):
        traced = tracing.record(ref, image, spec, until, read_ahead_kib, storage, origins)
        if traced.failure:
            click.echo(f"glowplug: {traced.failure}: {image.manifest.digest} gets no boot pack", err=True)
            sys.exit(1)
        traces.append(traced.trace)
    jobs = min(os.cpu_count() or 1, 8)
    parameters = pack.Parameters(bootpack.DEFAULT_FRAME_BYTES, pack.DEFAULT_LEVEL, jobs)
    return pack.pack(image, traces, parameters, progress.total)


def _of_this_machine(result: Result) -> ImageReport:
    """The image that can run here."""
    from imagefs import platforms

    host = platforms.host()
    for image in result.images:
        if image.platform.split("/")[:2] == [host.system, host.architecture]:
            return image
    raise errors.InvalidInputError(f"--trace-run: no image of {host} was converted, and no other runs here")


def _pinned(result: Result, packed: Packed) -> str:
    """The REF by digest of the block image that has the pack."""
    traced = next(image for image in result.images if image.source_digest == packed.source_digest)
    return traced.ref.replace(traced.block_image, packed.block_image_digest)


def _summary(result: Result) -> str:
    lines = [line for image in result.images for line in _image_lines(image)]
    if result.index:
        lines.append(f"index {result.index} tagged {result.destination}")
    rate = (
        f", {result.mb_per_second:.0f} MB/s of tar" if any(i.totals.tar_bytes for i in result.images) else ""
    )
    lines.append(f"{result.seconds:.1f} s{rate}")
    return "\n".join(lines)


def _image_lines(image: ImageReport) -> list[str]:
    totals = image.totals
    stages = ", ".join(f"{each.stage.replace('_', ' ')} {each.mb_per_second:.0f}" for each in image.stages)
    return [
        f"{image.platform} {image.source_digest}",
        f"  {totals.layers} layers ({totals.reused} reused), {totals.blocks} blocks ({totals.holes} holes)",
        f"  {totals.compressed_bytes / 1e6:.1f} MB of source blobs -> {totals.blob_bytes / 1e6:.1f} MB",
        *([f"  MB per processor second: {stages}"] if stages else []),
        f"  {image.ref}",
    ]
