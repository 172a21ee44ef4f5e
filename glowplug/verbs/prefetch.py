"""`glowplug prefetch REF`: an image on this node before anybody starts it. The agent does the work."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glowplug import settings
from imagefs import errors

if TYPE_CHECKING:
    from agent.client import AgentClient

_POLL_SECONDS = 0.5


@click.command("prefetch")
@click.argument("ref")
@settings.state_option
@click.option("--pin", is_flag=True, help="Keep its blocks from eviction, until `glowplug cache unpin`.")
@click.option("--wait", is_flag=True, help="Return when every block is here, not when that has begun.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(ref: str, state_dir: Path, pin: bool, wait: bool, as_json: bool) -> None:
    """Fetch the image REF (docker://HOST/REPO[:TAG], or as ctr writes it) to this node: its metadata now, its
    blocks in the background, behind everything that containers read.

    It is kept, also over a reboot, until `glowplug cache unpin REF`. With --wait, exit code 7: the registry
    fails, or the cache has no room for all of it; what is there stays, and the rest follows when it can.
    """
    from agent.client import AgentClient

    agent = AgentClient(state_dir / "agent.sock", timeout_seconds=None)
    warmth = agent.post("/api/v1/prefetch", {"image": ref})
    if pin:
        warmth = agent.post("/api/v1/pin", {"image": warmth["block_digest"]})
    if wait:
        warmth = _wait(agent, warmth)
    if as_json:
        click.echo(json.dumps(warmth, indent=1))
        return
    from glowplug import terminal

    click.echo(
        f"{terminal.printable(warmth['image'])}: {terminal.size(warmth['present_bytes'])} of "
        f"{terminal.size(warmth['total_bytes'])} here" + ("" if warmth["complete"] else ", the rest follows")
    )


def _wait(agent: AgentClient, warmth: dict[str, Any]) -> dict[str, Any]:
    from glowplug import progress

    with progress.total("prefetch", warmth["total_bytes"]) as advance:
        advance(warmth["present_bytes"])
        while not warmth["complete"] or warmth["copy"] in ("waiting", "filling"):
            if warmth["copy"] in ("no room", "origin fails"):
                reason = warmth["error"] or (
                    "no room in the cache: unpin or remove other images, or raise its quota"
                )
                raise errors.UnavailableError(f"{warmth['image']}: only in part on this node: {reason}")
            time.sleep(_POLL_SECONDS)
            before = warmth["present_bytes"]
            warmth = agent.get("/api/v1/warm", {"image": warmth["block_digest"]})
            advance(max(0, warmth["present_bytes"] - before))
    return warmth
