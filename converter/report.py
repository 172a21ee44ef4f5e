"""What a conversion did, as values: printed by the command, as JSON or as a summary. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from converter import layer, publish, source, stages


@dataclasses.dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer. `reused` is where it was found ("destination", "cache"), empty if it was converted; then
    `tar_bytes`, `entries` and `mb_per_second` (10^6 bytes of uncompressed tar) are known, else None.
    `holes` are blocks that are all zero."""

    number: int
    source_digest: str
    diff_id: str
    map_digest: str
    blob_digest: str
    reused: str
    compressed_bytes: int
    tar_bytes: int | None
    image_bytes: int
    blob_bytes: int
    map_bytes: int
    blocks: int
    holes: int
    entries: int | None
    depends_on_lower: bool
    seconds: float
    mb_per_second: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the layers; `tar_bytes` over the converted ones."""

    layers: int
    reused: int
    compressed_bytes: int
    tar_bytes: int
    image_bytes: int
    blob_bytes: int
    blocks: int
    holes: int


@dataclasses.dataclass(frozen=True, slots=True)
class ImageReport:
    """One image. `ref` is the block image by digest, in the destination; `stages` what converting took."""

    platform: str
    source_digest: str
    block_image: str
    ref: str
    layers: tuple[LayerReport, ...]
    totals: Totals
    stages: tuple[stages.Times, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """One run of `convert`. `index` is the digest of the tagged OCI index of block images, if any."""

    source: str
    destination: str
    index: str | None
    images: tuple[ImageReport, ...]
    seconds: float

    @property
    def mb_per_second(self) -> float:
        """10^6 bytes of uncompressed tar a second, over the whole run."""
        return sum(image.totals.tar_bytes for image in self.images) / 1e6 / max(self.seconds, 1e-9)

    def document(self) -> dict[str, object]:
        """As JSON."""
        return {**dataclasses.asdict(self), "mb_per_second": self.mb_per_second}


def of_new(each: source.SourceLayer, finished: publish.FinishedLayer, new: layer.NewLayer) -> LayerReport:
    """The line of a layer that was converted."""
    return dataclasses.replace(
        of_found(each, finished, "", new.seconds),
        tar_bytes=new.tar_bytes,
        entries=new.entries,
        mb_per_second=new.tar_bytes / 1e6 / max(new.seconds, 1e-9),
    )


def of_found(
    each: source.SourceLayer, finished: publish.FinishedLayer, where: str, seconds: float
) -> LayerReport:
    """The line of a layer that was found in `where`."""
    block_map = finished.block_map
    return LayerReport(
        number=each.number,
        source_digest=each.descriptor.digest,
        diff_id=each.diff_id,
        map_digest=finished.map_descriptor.digest,
        blob_digest=finished.blob.digest,
        reused=where,
        compressed_bytes=each.descriptor.size,
        tar_bytes=None,
        image_bytes=block_map.image_bytes,
        blob_bytes=block_map.blob_bytes,
        map_bytes=len(finished.map_bytes),
        blocks=len(block_map.blocks),
        holes=sum(block.zero for block in block_map.blocks),
        entries=None,
        depends_on_lower=finished.key.chain_id is not None,
        seconds=seconds,
        mb_per_second=None,
    )


def of_image(
    image: source.SourceImage,
    block_image: str,
    ref: str,
    layers: Sequence[LayerReport],
    times: tuple[stages.Times, ...],
) -> ImageReport:
    """The report of one image."""
    return ImageReport(
        platform=str(image.platform),
        source_digest=image.manifest.digest,
        block_image=block_image,
        ref=ref,
        layers=tuple(layers),
        totals=Totals(
            layers=len(layers),
            reused=sum(bool(each.reused) for each in layers),
            compressed_bytes=sum(each.compressed_bytes for each in layers),
            tar_bytes=sum(each.tar_bytes or 0 for each in layers),
            image_bytes=sum(each.image_bytes for each in layers),
            blob_bytes=sum(each.blob_bytes for each in layers),
            blocks=sum(each.blocks for each in layers),
            holes=sum(each.holes for each in layers),
        ),
        stages=times,
    )
