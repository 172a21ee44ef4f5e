"""`glowplug inspect REF`: what a block image is made of, and what it shares with another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click

from glowplug import opening, settings, terminal
from imagefs import bootpack

if TYPE_CHECKING:
    from imagefs.blockmap import BlockMap
    from imagefs.image import LazyImage
    from imagefs.origin.connect import Options


@dataclasses.dataclass(frozen=True, slots=True)
class LayerFacts:
    """One layer, for the table and for --json. Sizes in bytes; `key` is "diff_id" or "chain_id"."""

    number: int
    diff_id: str
    source_digest: str
    map_digest: str
    map_bytes: int
    blob_digest: str
    compressed_bytes: int
    image_bytes: int
    blocks: int
    holes: int
    metadata_bytes: int
    block_bytes: int
    frame_bytes: int
    compression_level: int
    key: str
    root_implied: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Shared:
    """Blocks that occur elsewhere, too; bytes are uncompressed and compressed."""

    blocks: int
    image_bytes: int
    compressed_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class PackFacts:
    """The boot pack, for the table and for --json. Sizes in bytes; `usable` is False where reading the image
    goes on without it, and then nothing is known of its content."""

    table_digest: str
    table_bytes: int
    data_digest: str
    data_bytes: int
    generation: int
    usable: bool
    page_bytes: int | None
    records: int | None
    frames: int | None


def pack_facts(image: LazyImage) -> PackFacts | None:
    """The facts of the boot pack, None if there is none."""
    stored, table = image.block_image.boot_pack, image.boot_pack
    if stored is None:
        return None
    return PackFacts(
        table_digest=stored.table.digest,
        table_bytes=stored.table.size,
        data_digest=stored.data.digest,
        data_bytes=stored.data.size,
        generation=stored.generation,
        usable=table is not None,
        page_bytes=table.pages * bootpack.PAGE_BYTES if table else None,
        records=len(table.records) if table else None,
        frames=len(table.frames) if table else None,
    )


def layer_facts(image: LazyImage) -> list[LayerFacts]:
    """The facts of every layer, bottom first."""
    out = []
    for number, (lazy, stored) in enumerate(zip(image.layers, image.map_bytes, strict=True)):
        value = lazy.block_map
        out.append(
            LayerFacts(
                number=number,
                diff_id=f"sha256:{value.diff_id.hex()}",
                source_digest=f"sha256:{value.source_digest.hex()}",
                map_digest=lazy.map_digest,
                map_bytes=len(stored),
                blob_digest=lazy.blob_digest,
                compressed_bytes=value.blob_bytes,
                image_bytes=value.image_bytes,
                blocks=len(value.blocks),
                holes=sum(block.zero for block in value.blocks),
                metadata_bytes=value.metadata_bytes,
                block_bytes=value.block_bytes,
                frame_bytes=value.frame_bytes,
                compression_level=value.compression_level,
                key="chain_id" if value.chain_id else "diff_id",
                root_implied=value.root_implied,
            )
        )
    return out


def shared(maps: Iterable[BlockMap], others: Iterable[BlockMap]) -> Shared:
    """The distinct blocks of `maps` that are also among those of `others`; holes are nobody's."""
    known = {block.digest for value in others for block in value.blocks if not block.zero}
    return _sum((value, [i for i, b in enumerate(value.blocks) if b.digest in known]) for value in maps)


def repeated(maps: Iterable[BlockMap]) -> Shared:
    """The blocks that occurred before, in the same or a lower layer."""
    seen: set[bytes] = set()
    found = []
    for value in maps:
        again = []
        for index, block in enumerate(value.blocks):
            if block.digest in seen and not block.zero:
                again.append(index)
            seen.add(block.digest)
        found.append((value, again))
    return _sum(found, distinct=False)


def _sum(places: Iterable[tuple[BlockMap, list[int]]], *, distinct: bool = True) -> Shared:
    blocks = image_bytes = compressed = 0
    seen: set[bytes] = set()
    for value, indices in places:
        for index in indices:
            block = value.blocks[index]
            if block.zero or (distinct and block.digest in seen):
                continue
            seen.add(block.digest)
            blocks += 1
            image_bytes += value.block_length(index)
            compressed += block.compressed_bytes
    return Shared(blocks, image_bytes, compressed)


@click.command("inspect")
@click.argument("ref")
@click.option("--shared-with", metavar="REF", help="Count the blocks that are also in this image.")
@settings.origin_options
@opening.image_options
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(
    ref: str,
    shared_with: str | None,
    origins: Options,
    open_image: Callable[[str], LazyImage],
    as_json: bool,
) -> None:
    """Show the block image of REF: its layers, their sizes, blocks and holes, and what is shared."""
    image = open_image(ref)
    layers = layer_facts(image)
    maps = [layer.block_map for layer in image.layers]
    own = repeated(maps)
    other = None
    if shared_with is not None:
        other = shared(maps, [layer.block_map for layer in open_image(shared_with).layers])
    if as_json:
        import json

        click.echo(json.dumps(_document(ref, image, layers, own, shared_with, other), indent=2))
    else:
        click.echo(_table(ref, image, layers, own, shared_with, other))


def _totals(layers: list[LayerFacts]) -> dict[str, int]:
    names = ("compressed_bytes", "image_bytes", "blocks", "holes", "metadata_bytes", "map_bytes")
    return {name: sum(getattr(layer, name) for layer in layers) for name in names}


def _document(
    ref: str,
    image: LazyImage,
    layers: list[LayerFacts],
    own: Shared,
    shared_with: str | None,
    other: Shared | None,
) -> dict[str, Any]:
    out: dict[str, Any] = {
        "reference": ref,
        "source_digest": image.source_digest,
        "block_image_digest": image.manifest.digest,
        "config_digest": image.block_image.config.digest,
        "layers": [dataclasses.asdict(layer) for layer in layers],
        "totals": _totals(layers),
        "repeated": dataclasses.asdict(own),
        "boot_pack": dataclasses.asdict(pack) if (pack := pack_facts(image)) else None,
    }
    if other is not None:
        out["shared"] = {"with": shared_with, **dataclasses.asdict(other)}
    return out


def _table(
    ref: str,
    image: LazyImage,
    layers: list[LayerFacts],
    own: Shared,
    shared_with: str | None,
    other: Shared | None,
) -> str:
    head = (
        "layer",
        "diff_id",
        "blob",
        "compressed",
        "image",
        "blocks",
        "holes",
        "metadata",
        "block",
        "level",
        "key",
    )
    rows = [head]
    for layer in layers:
        block = terminal.size(layer.block_bytes)
        if layer.frame_bytes != layer.block_bytes:
            block += f"/{terminal.size(layer.frame_bytes)}"
        rows.append(
            (
                str(layer.number),
                _short(layer.diff_id),
                _short(layer.blob_digest),
                terminal.size(layer.compressed_bytes),
                terminal.size(layer.image_bytes),
                str(layer.blocks),
                str(layer.holes),
                terminal.size(layer.metadata_bytes),
                block,
                str(layer.compression_level),
                layer.key,
            )
        )
    totals = _totals(layers)
    rows.append(
        (
            "total",
            "",
            "",
            terminal.size(totals["compressed_bytes"]),
            terminal.size(totals["image_bytes"]),
            str(totals["blocks"]),
            str(totals["holes"]),
            terminal.size(totals["metadata_bytes"]),
            "",
            "",
            "",
        )
    )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        f"{ref}",
        f"source image  {image.source_digest}",
        f"block image   {image.manifest.digest}",
        "",
        *(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ),
        "",
        f"repeated inside the image: {_blocks(own)}",
        f"boot pack: {_boot_pack(pack_facts(image))}",
    ]
    if other is not None:
        lines.append(f"shared with {shared_with}: {_blocks(other)}")
    return "\n".join(lines)


def _boot_pack(pack: PackFacts | None) -> str:
    if pack is None:
        return "none"
    if pack.page_bytes is None:
        return f"cannot be used, `glowplug check` says why ({pack.table_digest})"
    return (
        f"{terminal.size(pack.page_bytes)} in {pack.records} records "
        f"({terminal.size(pack.data_bytes)} compressed, {pack.frames} frames), generation {pack.generation}"
    )


def _blocks(value: Shared) -> str:
    return (
        f"{value.blocks} blocks, {terminal.size(value.image_bytes)} "
        f"({terminal.size(value.compressed_bytes)} compressed)"
    )


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]
