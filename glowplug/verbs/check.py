"""`glowplug check REF`: every digest of a block image, and with --against-source every file of it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glowplug import opening, settings

if TYPE_CHECKING:
    from converter import tarstream
    from converter.source import SourceImage
    from imagefs.bootpack import Table
    from imagefs.image import LazyImage
    from imagefs.origin.connect import Options
    from imagefs.verify import Verified


@click.command("check")
@click.argument("ref")
@click.option(
    "--against-source",
    is_flag=True,
    help="Mount it, and compare every file with the source image: needs the source's layers.",
)
@settings.storage_options
@settings.origin_options
@opening.image_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    ref: str,
    against_source: bool,
    storage: settings.Storage,
    origins: Options,
    open_image: Callable[[str], LazyImage],
    as_json: bool,
) -> None:
    """Verify the block image of REF: manifest, block maps, blobs, blocks, frames, seek tables, superblocks;
    and every page of the boot pack against the blocks.

    Reads every blob once from its origin, never from the cache. Exit code 0: all is right; 1: a file differs
    from the source, the first difference is printed; 6: a digest is wrong, the message says where.
    """
    from glowplug import progress

    image = open_image(ref)
    total = sum(layer.blob.size for layer in image.block_image.layers)
    boot_pack = _boot_pack(image)
    pack_bytes = boot_pack.data_bytes if boot_pack is not None else 0
    with progress.total("verify", total + pack_bytes) as advance:
        layers = _verify(image, boot_pack, advance)
    difference = _compare(ref, image, storage, origins) if against_source else None
    if as_json:
        document = _document(ref, image, layers, boot_pack, against_source, difference)
        click.echo(json.dumps(document, indent=2))
    else:
        blocks = sum(layer.blocks for layer in layers)
        click.echo(f"{ref}: {len(layers)} layers, {blocks} blocks, {total / 1e6:.1f} MB verified")
        if boot_pack is not None:
            click.echo(f"boot pack: {boot_pack.pages} pages, {pack_bytes / 1e6:.1f} MB verified")
        if difference is not None:
            click.echo(f"differs from its source at {difference}")
        elif against_source:
            click.echo("every file equals the source's")
    if difference is not None:
        sys.exit(1)


def _boot_pack(image: LazyImage) -> Table | None:
    """The table of the image's boot pack, wherever it is wrong an error: others do without such a pack."""
    from imagefs import bootpack
    from imagefs import image as images

    table = images.read_boot_pack(image.block_image, image.origin)
    if table is not None:
        bootpack.check_layers(table, {layer.map_digest: layer.block_map for layer in image.layers})
    return table


def _verify(image: LazyImage, boot_pack: Table | None, advance: Callable[[int], None]) -> list[Verified]:
    from imagefs import verify

    packed = None
    if boot_pack is not None:
        assert image.block_image.boot_pack is not None
        packed = verify.verify_boot_pack(
            boot_pack, image.block_image.boot_pack.table.digest, image.origin, advance
        )
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        running = [
            pool.submit(verify.verify_layer, lazy, layer.blob, advance, packed)
            for lazy, layer in zip(image.layers, image.block_image.layers, strict=True)
        ]
        try:
            return [each.result() for each in running]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _compare(ref: str, image: LazyImage, storage: settings.Storage, origins: Options) -> str | None:
    """The first difference between the mounted block image and its source, None if there is none."""
    from converter import compare, flatten, limits
    from glowplug import device_server, mounting, progress
    from imagefs import assembly

    with tempfile.TemporaryDirectory(prefix="glowplug-check-") as folder:
        source = _source_image(ref, image, origins, Path(folder))
        bounds = limits.Limits()
        with progress.total("read source", sum(layer.descriptor.size for layer in source.layers)) as advance:
            flattened = flatten.flatten(_tars(source, advance), bounds)
        directory = Path(folder) / "mounted"
        directory.mkdir()
        in_kernel = os.geteuid() == 0
        starting = device_server.starting(storage, origins) if in_kernel else contextlib.nullcontext()
        with starting as server:
            mounting.mount(ref, directory, assembly.Options(), storage, origins, lambda: image, server)
        try:
            return compare.first_difference(flattened, directory)
        finally:
            mounting.umount(directory, storage.state_dir, force=False)


def _source_image(ref: str, image: LazyImage, origins: Options, folder: Path) -> SourceImage:
    """The source that the block image names as its subject, from where REF is."""
    from converter import source
    from imagefs import errors, reference

    parsed = reference.parse(ref)
    if parsed.transport not in ("docker-archive", "docker-daemon"):
        parsed = parsed.with_digest(image.source_digest)
    found = source.open_images(parsed, origins, None, folder)[0]
    if found.manifest.digest != image.source_digest:
        raise errors.IntegrityError(
            f"{ref}: its manifest is {found.manifest.digest}, "
            f"the block image was made from {image.source_digest}"
        )
    return found


def _tars(source: SourceImage, advance: Callable[[int], None]) -> Iterator[tarstream.Source]:
    from converter import sourcetar

    for layer in source.layers:
        with sourcetar.open_tar(layer, source.name, advance) as tar:
            yield tar


def _document(
    ref: str,
    image: LazyImage,
    layers: list[Verified],
    boot_pack: Table | None,
    against_source: bool,
    difference: str | None,
) -> dict[str, Any]:
    return {
        "reference": ref,
        "block_image_digest": image.manifest.digest,
        "source_digest": image.source_digest,
        "layers": [dataclasses.asdict(layer) for layer in layers],
        "boot_pack_pages": boot_pack.pages if boot_pack is not None else None,
        "against_source": against_source,
        "difference": difference,
    }
