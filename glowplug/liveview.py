"""The live view of an endpoint in the terminal: replicas, traffic, what happened. Drawn on stderr.

Called by `glowplug serve` (on a thread of its own) and `glowplug endpoint status --watch`. `render` is pure.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from serving import errors

_REFRESH_SECONDS = 0.5
_SHOWN_EVENTS = 8
_STYLES = {"ready": "green", "starting": "yellow", "draining": "cyan", "failed": "red"}


def watch(status: Callable[[], Mapping[str, Any]]) -> None:
    """Until there is nobody left to ask."""
    console = Console(stderr=True)
    with Live(console=console, auto_refresh=False) as live, contextlib.suppress(errors.UnavailableError):
        while True:
            live.update(render(status()), refresh=True)
            time.sleep(_REFRESH_SECONDS)


def render(status: Mapping[str, Any]) -> RenderableType:
    """One picture. What came from elsewhere is never read as markup."""
    head = Text.assemble(
        (status["name"], "bold"),
        f"  {status['url']}  revision {status['revision']}  ",
        (status["phase"], "green" if status["phase"] == "steady" else "yellow"),
        "".join(f"  {version} {weight} %" for version, weight in status["weights"].items()),
    )
    last = status["traffic"][-1] if status["traffic"] else None
    rates = "no load reports yet"
    if last is not None:
        rates = f"{last['per_second']:.1f} req/s, {last['in_flight']} in flight"
        rates += f", {last['errors_per_second']:.1f} failures/s"
    rates += "".join(f", {name} {value * 1000:.0f} ms" for name, value in status.get("latency", {}).items())
    autoscaling = status["autoscaling"]
    decided = f"autoscaling {autoscaling['mode']}"
    if "words" in autoscaling:
        decided += (
            f": {autoscaling['replicas']} replicas, limit {autoscaling['limit']}: {autoscaling['words']}"
        )
    table = Table(box=None, pad_edge=False)
    for name in ("replica", "state", "version", "start", "in flight", "req/s", "failed", ""):
        table.add_column(
            name, justify="right" if name in ("start", "in flight", "req/s", "failed") else "left"
        )
    for each in status["replicas"]:
        took = (each["ready_at"] or status["now"]) - each["created_at"]
        table.add_row(
            Text(each["name"]),
            Text(each["state"], style=_STYLES.get(each["state"], "")),
            Text(each["version"]),
            f"{took:.1f} s",
            str(each["in_flight"]),
            f"{each['per_second']:.1f}",
            str(each["errors"]),
            Text((each["reason"] or "").partition("\n")[0]),
        )
    events = [
        Text(f"{time.strftime('%H:%M:%S', time.localtime(each['at']))}  {each['text']}", style="dim")
        for each in status["events"][-_SHOWN_EVENTS:]
    ]
    return Group(head, Text(rates), Text(decided), table, *events)
