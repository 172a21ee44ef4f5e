"""`glowplug status`: what is mounted, whether it works, what the device server holds and does; and what the
agent says of itself, where one runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glowplug import settings, terminal
from imagefs import errors

if TYPE_CHECKING:
    from agent.client import AgentClient
    from glowplug.mountlist import Mounted


@click.command("status")
@settings.state_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(state_dir: Path, as_json: bool) -> None:
    """Show the mounts, block devices and processes of a state directory, its cache and what was fetched.

    A mount that does not work is said to be so, and what to do. Where an agent runs, its images and snapshots
    are shown, too. Exits with 4 when there is neither a mount nor a device server nor an agent.
    """
    from agent.client import AgentClient
    from glowplug import mountlist
    from imagefs.fuse import control

    client = control.DeviceClient.connect(state_dir)
    status = client.status() if client is not None else None
    mounted = list(mountlist.listed(state_dir, status))
    agent = _agent(AgentClient.found(state_dir / "agent.sock"))
    if status is None and not mounted and agent is None:
        raise errors.NotFoundError(f"nothing is mounted with state directory {state_dir}")
    if as_json:
        listing = [dataclasses.asdict(each) for each in mounted]
        document = {"mounts": listing, "server": status, "agent": agent}
        click.echo(json.dumps(document, indent=1))
    else:
        lines = [*_mount_lines(mounted), *(_server_lines(status, mounted) if status else [])]
        for line in [*lines, *(_agent_lines(agent) if agent else [])]:
            click.echo(line)


def _agent(client: AgentClient | None) -> dict[str, Any] | None:
    """The agent's status, without the device server's; what is wrong with it if it does not answer."""
    if client is None:
        return None
    try:
        document = client.get("/api/v1/status")
    except errors.ImagefsError as exc:
        return {"error": str(exc)}
    del document["server"]
    return document


def _agent_lines(agent: dict[str, Any]) -> Iterator[str]:
    if "error" in agent:
        yield f"agent      {terminal.printable(agent['error'])}"
        return
    ready = "not ready" if agent["not_ready"] else "ready"
    replaced = ", ".join(f"{count} {name}" for name, count in agent["replaced"].items())
    yield f"agent      pid {agent['pid']}, version {agent['version']}, {ready}; replaced: {replaced}"
    for name, wrong in agent["not_ready"].items():
        yield f"  {name}: {terminal.printable(wrong)}"
    kinds = ", ".join(f"{count} {name}" for name, count in agent.get("snapshots", {}).items())
    yield f"snapshots  {kinds}; {len(agent['mounts'])} layers mounted"
    for broken in agent.get("quarantined", ()):
        yield f"  quarantined {terminal.printable(broken['name'])}: {terminal.printable(broken['why'])}"
    images = agent.get("images", ())
    yield f"images     {len(images)}"
    for image in images:
        marks = "".join(f", {name}" for name in ("pinned", "prefetched") if image[name])
        yield (
            f"  {terminal.printable(image['reference'])}  {image['layers']} layers, "
            f"{terminal.size(image['blob_bytes'])} compressed, {image['snapshots']} snapshots{marks}"
        )


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
        f"cache      {cache['directory']}: {terminal.size(cache['used_bytes'])} of "
        f"{terminal.size(cache['quota_bytes'])}, {cache['blocks']} blocks, "
        f"{cache['evicted_blocks']} evicted, {cache['disk_errors']} disk errors"
    )
    if cache["memory_blocks"]:
        yield (
            f"  {cache['memory_blocks']} blocks, {terminal.size(cache['memory_bytes'])}, were served from "
            "memory: the disk is full, or less of it is free than --free-floor says; make room on it"
        )
    yield (
        f"fetched    {fetch['fetched_blocks']} blocks, {terminal.size(fetch['fetched_bytes'])} in "
        f"{fetch['origin_requests']} requests, {fetch['expired_reads']} reads past their deadline; "
        f"{fetch['cache_hits']} from the cache"
    )
    yield f"devices    {len(status['devices'])}"
    places = {each.id: each.directory or each.id for each in mounted}
    for device in status["devices"]:
        image = "not served" if device["image_bytes"] is None else terminal.size(device["image_bytes"])
        table_digest = device.get("table_digest")  # servers of before there were packs do not say
        pack = f" with boot pack {table_digest[:19]}" if table_digest else ""
        whole = ", whole in a file" if device.get("has_file") else ""
        yield (
            f"  {device['map_digest'][:19]}{pack}  "
            f"{image} ({terminal.size(device['blob_bytes'])} compressed{whole})  "
            f"{', '.join(device['origins'])}  for {', '.join(places.get(o, o) for o in device['owners'])}"
        )
        if (last := device["last_error"]) is not None:
            yield f"    last failed read {last['seconds_ago']:.0f} s ago: {last['message']}"
