"""`glowplug cache`: what the block cache of this machine holds, what is kept in it, and its upkeep.

The cache is a directory that processes share: `ls`, `verify` and, without a device server, `gc` work on its
files. Where a device server runs (its --state), the directory is the one it has, and `gc` is its work, since
it knows what is in use. An image's pin is named image:DIGEST after its block image, by the agent and here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glowplug import opening, settings, subcommands
from imagefs import errors

if TYPE_CHECKING:
    from agent.client import AgentClient
    from imagefs.cachedirectory import CacheDirectory
    from imagefs.fuse.control import DeviceClient
    from imagefs.image import LazyImage
    from imagefs.origin.connect import Options


@click.group("cache", cls=subcommands.Verbs)
def command() -> None:
    """The block cache: what it holds, what is pinned, and its upkeep."""


_cache_option = click.option(
    "--cache",
    "cache_dir",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="GLOWPLUG_CACHE",
    show_envvar=True,
    help="Block cache (default: that of the device server that runs, else as for mount).",
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """A cache directory, and the device server that keeps it, if one runs."""

    files: CacheDirectory
    server: DeviceClient | None
    status: dict[str, Any] | None

    @classmethod
    def find(cls, state_dir: Path, cache_dir: Path | None) -> _Place:
        from imagefs import cachedirectory
        from imagefs.fuse import control

        server = control.DeviceClient.connect(state_dir)
        status = server.status() if server is not None else None
        if status is not None:
            served = Path(status["cache"]["directory"])
            if cache_dir is not None and not _same(served, cache_dir):
                server = status = None
            else:
                cache_dir = served
        directory = Path(os.path.abspath(cache_dir or settings.default_cache_dir()))
        if not directory.is_dir():
            raise errors.NotFoundError(f"there is no block cache at {directory}; name it with --cache")
        return cls(cachedirectory.CacheDirectory(directory), server, status)


def _same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _agent(state_dir: Path) -> AgentClient | None:
    from agent.client import AgentClient

    return AgentClient.found(state_dir / "agent.sock")


# -- ls ------------------------------------------------------------------------------------------------


@command.command("ls")
@settings.state_option
@_cache_option
@_json_option
def ls(state_dir: Path, cache_dir: Path | None, as_json: bool) -> None:
    """Show how full the cache is, the pins, and, where an agent runs, how much of each image is here."""
    place = _Place.find(state_dir, cache_dir)
    document = _listing(place)
    document["images"] = _images(state_dir) if place.server is not None else []
    if as_json:
        click.echo(json.dumps(document, indent=1))
        return
    from glowplug import terminal

    quota = document["quota_bytes"]
    of = f" of {terminal.size(quota)}" if quota is not None else ""
    click.echo(
        f"{document['directory']}: {terminal.size(document['used_bytes'])}{of} in {document['blocks']} "
        f"blocks, {terminal.size(document['free_bytes'])} free on its disk"
    )
    if files := document["layer_files"]:
        click.echo(
            f"  of it   {terminal.size(document['layer_files_bytes'])} in {files} whole layers, "
            "as files beside their blocks"
        )
    for pin in document["pins"]:
        click.echo(
            f"  pinned  {terminal.printable(pin['name'])}  {pin['present_blocks']} of {pin['blocks']} blocks "
            f"here, {terminal.size(pin['present_bytes'])}"
        )
    for image in document["images"]:
        marks = [name for name in ("pinned", "prefetched") if image[name]]
        if image["copy"] is not None:
            marks.append(f"copy: {image['copy']}")
        click.echo(
            f"  image   {terminal.printable(image['image'])}  {100 * image['fraction']:.0f} %, "
            f"{terminal.size(image['present_bytes'])} of {terminal.size(image['total_bytes'])}"
            + (f"  ({', '.join(marks)})" if marks else "")
        )


def _images(state_dir: Path) -> list[dict[str, Any]]:
    agent = _agent(state_dir)
    if agent is None:
        return []
    try:
        images: list[dict[str, Any]] = agent.get("/api/v1/warm")["images"]
    except errors.UnavailableError as exc:
        click.echo(f"glowplug: without the agent's images: {exc}", err=True)
        return []
    return images


def _listing(place: _Place) -> dict[str, Any]:
    sizes = {entry.digest: entry.allocated_bytes for entry in place.files.scan()}
    free_bytes, _ = place.files.space()
    files = place.files.layer_files()
    return {
        "directory": str(place.files.path),
        "blocks": len(sizes.keys() - set(files)),
        "used_bytes": sum(sizes.values()),
        "layer_files": len(files),
        "layer_files_bytes": sum(sizes.get(digest, 0) for digest in files),
        "quota_bytes": place.status["cache"]["quota_bytes"] if place.status is not None else None,
        "free_bytes": free_bytes,
        "pins": [
            {
                "name": name,
                "blocks": len(digests),
                "present_blocks": sum(digest in sizes for digest in digests),
                "present_bytes": sum(sizes.get(digest, 0) for digest in digests),
            }
            for name, digests in sorted(place.files.pins())
        ],
    }


# -- pins ----------------------------------------------------------------------------------------------


@command.command("pin")
@click.argument("ref")
@settings.state_option
@_cache_option
@settings.origin_options
@opening.image_options
@_json_option
def pin(
    ref: str,
    state_dir: Path,
    cache_dir: Path | None,
    origins: Options,
    open_image: Callable[[str], LazyImage],
    as_json: bool,
) -> None:
    """Keep the blocks of the image REF from eviction: those that are here, and those that will be.

    Holds until `unpin`, also over a reboot. Nothing is fetched: `glowplug prefetch` does that. Where an agent
    runs, it keeps the image itself as well, without any container of it.
    """
    agent = _agent(state_dir)
    if agent is not None and ref.startswith("docker://"):
        warmth = agent.post("/api/v1/pin", {"image": ref})
        name, blocks = f"image:{warmth['block_digest']}", None
    else:
        place = _Place.find(state_dir, cache_dir)
        image = open_image(ref)
        digests = {
            block.digest for layer in image.layers for block in layer.block_map.blocks if not block.zero
        }
        name, blocks = f"image:{image.manifest.digest}", len(digests)
        place.files.pin(name, sorted(digests))
    click.echo(json.dumps({"name": name, "blocks": blocks}, indent=1) if as_json else name)


@command.command("unpin")
@click.argument("name")
@settings.state_option
@_cache_option
def unpin(name: str, state_dir: Path, cache_dir: Path | None) -> None:
    """Drop a pin, by its name as `ls` shows it, or by the image's REF where an agent runs.

    Where an agent runs, the image is not kept as a prefetched one either: it goes with its last container.
    """
    agent = _agent(state_dir)
    if agent is not None and not name.startswith("copy:"):
        try:
            agent.post("/api/v1/unpin", {"image": name.removeprefix("image:")})
            return
        except errors.NotFoundError:
            if not name.startswith("image:"):
                raise  # else a pin of an image that the agent does not know
    place = _Place.find(state_dir, cache_dir)
    if name not in {known for known, _ in place.files.pins()}:
        raise errors.NotFoundError(f"no pin is named {name}; `glowplug cache ls` shows them")
    place.files.unpin(name)


# -- upkeep --------------------------------------------------------------------------------------------


@command.command("gc")
@settings.state_option
@_cache_option
@click.option(
    "--cache-quota",
    "quota_bytes",
    type=settings.SIZE,
    envvar="GLOWPLUG_CACHE_QUOTA",
    show_envvar=True,
    default=settings.CACHE_QUOTA_BYTES,
    help="Bytes of blocks to keep, where no device server runs that has its own (default 20G).",
)
@click.option(
    "--free-floor",
    "free_floor_percent",
    type=click.IntRange(0, 100),
    envvar="GLOWPLUG_FREE_FLOOR",
    show_envvar=True,
    default=settings.FREE_FLOOR_PERCENT,
    show_default=True,
    help="Percent of the filesystem to leave free, likewise.",
)
@_json_option
def gc(
    state_dir: Path, cache_dir: Path | None, quota_bytes: int, free_floor_percent: int, as_json: bool
) -> None:
    """Bring the cache under its quota and its disk above its floor now: least recently used blocks go, those
    of images that are not in use first, pinned ones never.

    Exit code 1: what is left is pinned, or is not the cache's, and the limits are not met.
    """
    place = _Place.find(state_dir, cache_dir)
    if place.server is not None:
        found = place.server.collect()
    else:
        from imagefs import cachehousekeeping
        from imagefs.fuse import control

        floor_bytes = control.free_floor_bytes(place.files.path, free_floor_percent)
        collected = cachehousekeeping.collect(place.files, quota_bytes, floor_bytes, frozenset, {})
        found = {
            "removed_blocks": len(collected.removed),
            "removed_bytes": sum(entry.allocated_bytes for entry in collected.removed),
            "short_bytes": collected.short_bytes,
        }
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        from glowplug import terminal

        click.echo(f"removed {found['removed_blocks']} blocks, {terminal.size(found['removed_bytes'])}")
        if found["short_bytes"]:
            click.echo(
                f"still {terminal.size(found['short_bytes'])} over the limits: pins (`glowplug cache ls`), "
                "or files that are not the cache's",
                err=True,
            )
    if found["short_bytes"]:
        sys.exit(1)


@command.command("verify")
@settings.state_option
@_cache_option
@_json_option
def verify(state_dir: Path, cache_dir: Path | None, as_json: bool) -> None:
    """Read and hash every block in the cache again, and remove those that are wrong: they are fetched again
    when they are read. Nothing needs to be stopped for it.

    Exit code 1: some were wrong. 8: some were, and could not be removed.
    """
    from glowplug import progress
    from imagefs import cachehousekeeping

    place = _Place.find(state_dir, cache_dir)
    entries = list(place.files.scan())
    with progress.total("verify", sum(entry.allocated_bytes for entry in entries)) as advance:
        found = cachehousekeeping.verify(place.files, entries, advance)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found), indent=1))
    else:
        from glowplug import terminal

        click.echo(
            f"{found.blocks} blocks, {terminal.size(found.bytes_read)}: "
            + (f"{len(found.damaged)} wrong, removed" if found.damaged else "all right")
        )
        for name in found.damaged:
            click.echo(f"  {name}")
    if found.stuck:
        raise errors.ConfigurationError(
            f"{len(found.stuck)} blocks in {place.files.path} could be neither read nor removed: "
            "see to its disk"
        )
    if found.damaged:
        sys.exit(1)
