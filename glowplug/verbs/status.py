"""`glowplug status`: what the device server of this machine holds and does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from glowplug import settings
from imagefs import errors


@click.command("status")
@settings.state_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(state_dir: Path, as_json: bool) -> None:
    """Show the block devices, the block cache, what was fetched, and the processes of a state directory.

    Exits with 4 when no device server runs there.
    """
    from imagefs.fuse import control

    client = control.DeviceClient.connect(state_dir)
    if client is None:
        raise errors.NotFoundError(f"no device server runs in {state_dir}: nothing is mounted through it")
    status = client.status()
    if as_json:
        click.echo(json.dumps(status, indent=1))
    else:
        for line in _lines(status):
            click.echo(line)


def _lines(status: dict[str, Any]) -> list[str]:
    processes, cache, fetch = status["processes"], status["cache"], status["fetch"]
    workers = ", ".join(map(str, processes["workers"]))
    survival = "survive" if processes["survives_kill"] else "do not survive (Linux 6.9)"
    out = [
        f"processes  server {processes['server']}, workers {workers}, "
        f"{processes['workers_replaced']} replaced; reads {survival} a killed server",
        f"cache      {cache['directory']}: {_size(cache['used_bytes'])} of {_size(cache['quota_bytes'])}, "
        f"{cache['blocks']} blocks, {cache['evicted_blocks']} evicted, {cache['disk_errors']} disk errors",
        f"fetched    {fetch['fetched_blocks']} blocks, {_size(fetch['fetched_bytes'])} in "
        f"{fetch['origin_requests']} requests, {fetch['expired_reads']} reads past their deadline; "
        f"{fetch['cache_hits']} from the cache",
        f"devices    {len(status['devices'])}",
    ]
    for device in status["devices"]:
        image = "not served" if device["image_bytes"] is None else _size(device["image_bytes"])
        out.append(
            f"  {device['map_digest'][:19]}  {image} ({_size(device['blob_bytes'])} compressed)  "
            f"{', '.join(device['origins'])}  for {', '.join(device['owners'])}"
        )
    return out


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
