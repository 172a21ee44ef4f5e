"""`glowplug status`: what is mounted, whether it works, and what the device server holds and does."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glowplug import settings
from imagefs import errors

if TYPE_CHECKING:
    from glowplug.mountlist import Mounted


@click.command("status")
@settings.state_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(state_dir: Path, as_json: bool) -> None:
    """Show the mounts, block devices and processes of a state directory, its cache and what was fetched.

    A mount that does not work is said to be so, and what to do. Exits with 4 when there is neither a mount
    nor a device server.
    """
    from glowplug import mountlist
    from imagefs.fuse import control

    client = control.DeviceClient.connect(state_dir)
    status = client.status() if client is not None else None
    mounted = list(mountlist.listed(state_dir, status))
    if status is None and not mounted:
        raise errors.NotFoundError(f"nothing is mounted with state directory {state_dir}")
    if as_json:
        listing = [dataclasses.asdict(each) for each in mounted]
        click.echo(json.dumps({"mounts": listing, "server": status}, indent=1))
    else:
        for line in [*_mount_lines(mounted), *(_server_lines(status, mounted) if status else [])]:
            click.echo(line)


def _mount_lines(mounted: list[Mounted]) -> Iterator[str]:
    yield f"mounts     {len(mounted)}"
    for each in mounted:
        access = "writable" if each.writable else "read-only"
        yield f"  {each.directory or each.id}  {each.reference} ({each.mode or 'run'}, {access})"
        if each.wrong is not None:
            yield f"    {each.wrong}"


def _server_lines(status: dict[str, Any], mounted: list[Mounted]) -> Iterator[str]:
    processes, cache, fetch = status["processes"], status["cache"], status["fetch"]
    workers = ", ".join(map(str, processes["workers"]))
    survival = "survive" if processes["survives_kill"] else "do not survive (Linux 6.9)"
    yield (
        f"processes  server {processes['server']}, workers {workers}, "
        f"{processes['workers_replaced']} replaced; reads {survival} a killed server"
    )
    yield (
        f"cache      {cache['directory']}: {_size(cache['used_bytes'])} of {_size(cache['quota_bytes'])}, "
        f"{cache['blocks']} blocks, {cache['evicted_blocks']} evicted, {cache['disk_errors']} disk errors"
    )
    yield (
        f"fetched    {fetch['fetched_blocks']} blocks, {_size(fetch['fetched_bytes'])} in "
        f"{fetch['origin_requests']} requests, {fetch['expired_reads']} reads past their deadline; "
        f"{fetch['cache_hits']} from the cache"
    )
    yield f"devices    {len(status['devices'])}"
    places = {each.id: each.directory or each.id for each in mounted}
    for device in status["devices"]:
        image = "not served" if device["image_bytes"] is None else _size(device["image_bytes"])
        yield (
            f"  {device['map_digest'][:19]}  {image} ({_size(device['blob_bytes'])} compressed)  "
            f"{', '.join(device['origins'])}  for {', '.join(places.get(o, o) for o in device['owners'])}"
        )
        if (last := device["last_error"]) is not None:
            yield f"    last failed read {last['seconds_ago']:.0f} s ago: {last['message']}"


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
