"""`glowplug copy`: a source image and its block image from one place to another."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import click

from glowplug import settings

if TYPE_CHECKING:
    from imagefs.origin.connect import Options


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@click.option("--platform", help="Only this platform of a multi-platform image (default: all of it).")
@click.option(
    "--block-repository",
    metavar="REF",
    help="Keep the block image here instead of beside DST (for mirrors that drop referrers); if SRC has none "
    "beside it, it is looked for here, too. Readers of DST name the same --block-repository.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@settings.origin_options
def command(
    *,
    source: str,
    destination: str,
    platform: str | None,
    block_repository: str | None,
    as_json: bool,
    origins: Options,
) -> None:
    """Copy the image SRC with its block image to DST, digests unchanged (docker://, oci:, s3://)."""
    from converter import copying
    from imagefs import platforms, reference

    copied = copying.copy(
        reference.parse(source),
        reference.parse(destination),
        origins,
        platforms.parse(platform) if platform else None,
        reference.parse(block_repository) if block_repository else None,
    )
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(copied), indent=2))
        return
    click.echo(f"{copied.digest} {copied.destination}")
    for digest in copied.block_images:
        click.echo(f"  block image {digest}")
    click.echo(
        f"  {copied.blobs} blobs: {copied.blobs_mounted} mounted, {copied.blobs_present} there already, "
        f"{copied.bytes_copied / 1e6:.1f} MB copied"
    )
