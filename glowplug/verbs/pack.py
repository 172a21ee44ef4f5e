"""`glowplug pack REF --trace FILE`: a boot pack for a block image, from recorded starts."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glowplug import opening, settings
from glowplug.verbs.trace import read_ahead_kib
from imagefs import bootpack, errors

if TYPE_CHECKING:
    from converter.pack import Packed
    from imagefs.image import LazyImage
    from imagefs.origin.connect import Options


@click.command("pack")
@click.argument("ref")
@click.option(
    "--trace",
    "traces",
    metavar="FILE",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A trace of a start, as `glowplug trace` writes it; several are merged.",
)
@click.option(
    "--trace-from-registry", "published", is_flag=True, help="Use the traces that agents have published, too."
)
@click.option(
    "--frame-size",
    type=settings.SIZE,
    default=bootpack.DEFAULT_FRAME_BYTES,
    help="Unit that arrives and is verified (default 1MiB).",
)
@click.option(
    "--read-ahead",
    type=settings.SIZE,
    help="Use only the traces that were made with this read-ahead (default: all, which must agree).",
)
@click.option("--level", type=click.IntRange(1, 19), help="zstd level (default 9).")
@click.option("--jobs", type=click.IntRange(1), help="Threads (default: one per processor, up to 8).")
@settings.origin_options
@opening.image_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    *,
    ref: str,
    traces: tuple[Path, ...],
    published: bool,
    frame_size: int,
    read_ahead: int | None,
    level: int | None,
    jobs: int | None,
    origins: Options,
    open_image: Callable[[str], LazyImage],
    as_json: bool,
) -> None:
    """Give the block image of REF a boot pack: what the traced starts read, in the order they read it.

    The pack is stored beside the block image, with a new manifest for the same source image, which counts
    from then on. Traces of other layers than REF has now are refused.
    """
    if not traces and not published:
        raise click.UsageError("nothing to pack: give --trace FILE or --trace-from-registry")
    from converter import pack
    from glowplug import progress
    from imagefs import tracestore

    bootpack.check_frame_bytes(frame_size)
    parameters = pack.Parameters(
        frame_bytes=frame_size,
        compression_level=level or pack.DEFAULT_LEVEL,
        jobs=jobs or min(os.cpu_count() or 1, 8),
        read_ahead_kib=None if read_ahead is None else read_ahead_kib(read_ahead),
    )
    recorded = [pack.read_trace(path) for path in traces]
    image = open_image(ref)
    if published:
        recorded += tracestore.read_all(image)
        if not recorded:
            raise errors.NotFoundError(
                f"{ref}: no trace of {image.manifest.digest} is in {image.origin.name}"
            )
    packed = pack.pack(image, recorded, parameters, progress.total)
    if as_json:
        click.echo(json.dumps({"reference": ref, **dataclasses.asdict(packed)}, indent=2))
    else:
        click.echo(_summary(ref, packed))


def _summary(ref: str, packed: Packed) -> str:
    ratio = packed.data_bytes / packed.page_bytes
    lines = [
        f"{ref}",
        f"  {packed.page_bytes / 1e6:.1f} MB of pages in {packed.records} records, "
        f"from {packed.blocks_read} blocks",
        f"  {packed.data_bytes / 1e6:.1f} MB packed ({ratio:.3f}) in {packed.frames} frames, "
        f"{packed.seconds:.1f} s, for a read-ahead of {packed.read_ahead_kib} KiB",
        f"  block image {packed.block_image_digest}",
    ]
    if packed.through_bytes:
        through = f"{packed.through_bytes / 1e6:.1f} MB that were read from end to end"
        lines.append(f"  {through} come by blocks, with read-ahead, as fast as in a pack")
    if not packed.changed:
        lines.append("  it had this boot pack already")
    return "\n".join(lines)
