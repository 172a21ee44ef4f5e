"""`glowplug top`: what the agent of this node is doing, drawn again every second or two.

Asks the agent's socket and nothing else. `frame` turns two answers (now, and the one before, for rates) into
what rich draws; `command` is the loop around it. Ctrl-C ends it.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from glowplug import settings, terminal
from imagefs import errors

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from agent.client import AgentClient

_METER_CELLS = 14
_ONCE_COLUMNS = 110
_SHOWN_STARTS = 6
_SHOWN_IMAGES = 10
_SHOWN_EVENTS = 8
_PHASE_STYLES = {
    "lookup": "magenta",
    "metadata": "blue",
    "mount": "cyan",
    "first_read": "yellow",
    "reads": "red",
}
_LEVEL_STYLES = {"warning": "yellow", "error": "bold red"}


class Sample(NamedTuple):
    """One round of answers, and when (monotonic seconds, wall-clock seconds)."""

    status: Mapping[str, Any]
    starts: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    at_seconds: float
    wall_seconds: float


@click.command("top")
@settings.state_option
@click.option(
    "--interval",
    "interval_seconds",
    type=click.FloatRange(0.2, 3600),
    default=1.0,
    show_default=True,
    help="Seconds between two looks.",
)
@click.option("--once", is_flag=True, help="Print one frame and end.")
def command(state_dir: Path, interval_seconds: float, once: bool) -> None:
    """Watch the agent of this node: bytes by source, cache, queues, recent starts, images, events."""
    from rich import console, live

    from agent.client import AgentClient

    client = AgentClient(state_dir / "agent.sock")
    sample = _sample(client)
    terminal = sys.stdout.isatty()
    if once or not terminal:
        # What goes to a file has the width of a page, not that of nothing.
        screen = console.Console(width=None if terminal else _ONCE_COLUMNS)
        screen.print(frame(sample, None, screen.width, None))
        return
    screen = console.Console()
    with (
        contextlib.suppress(KeyboardInterrupt),
        live.Live(console=screen, screen=True, auto_refresh=False) as view,
    ):
        previous: Sample | None = None
        lost: str | None = None
        while True:
            shown = frame(sample, previous, screen.width, screen.height)
            # An agent that is being restarted will be back, and who watches wants to see when.
            view.update(console.Group(_plain(lost, "bold red"), shown) if lost else shown, refresh=True)
            time.sleep(interval_seconds)
            try:
                previous, sample, lost = sample, _sample(client), None
            except errors.UnavailableError as exc:
                lost = str(exc)


def _sample(client: AgentClient) -> Sample:
    return Sample(
        client.get("/api/v1/status"),
        client.get("/api/v1/starts")["starts"],
        client.get("/api/v1/events")["events"],
        time.monotonic(),
        time.time(),
    )


def frame(sample: Sample, previous: Sample | None, columns: int, rows: int | None) -> RenderableType:
    """One picture. `rows` None: as long as it gets."""
    from rich import box, console, panel

    parts: list[RenderableType] = [_head(sample)]
    parts += [panel.Panel(_numbers(sample, previous), box=box.ROUNDED, border_style="dim")]
    # What is shown of each list when the screen is short: starts first.
    room = None if rows is None else max(0, rows - 13)
    starts = sample.starts[: _fit(_SHOWN_STARTS, room, 2)]
    images = sample.status.get("images", ())[: _fit(_SHOWN_IMAGES, room, 3)]
    events = sample.events[-_fit(_SHOWN_EVENTS, room, 3) :]
    parts += [_starts(starts, sample.wall_seconds, columns), _images(images, sample), _events(events, sample)]
    return console.Group(*parts)


def _fit(wanted: int, room: int | None, share: int) -> int:
    return wanted if room is None else max(1, min(wanted, room // share - 2))


def _head(sample: Sample) -> Text:
    from rich.text import Text

    status = sample.status
    head = Text.assemble(
        ("glowplug", "bold red"),
        (f" on {terminal.printable(status['node'])}  ", "bold"),
        ("not ready", "bold red") if status["not_ready"] else ("ready", "bold green"),
        (f"  up {terminal.duration(status['up_seconds'])}, pid {status['pid']}, {status['version']}", "dim"),
    )
    for name, wrong in status["not_ready"].items():
        head.append(f"\n{name}: {terminal.printable(wrong)}", "red")
    for broken in status.get("quarantined", ())[:3]:
        head.append(
            f"\nquarantined {terminal.printable(broken['name'])}: {terminal.printable(broken['why'])}", "red"
        )
    return head


def _numbers(sample: Sample, previous: Sample | None) -> Table:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2), expand=True)
    for _ in range(2):
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    cells = list(_cells(sample, previous))
    for left, right in zip(cells[::2], [*cells[1::2], ("", "")], strict=False):
        grid.add_row(*left, *right)
    return grid


def _cells(sample: Sample, previous: Sample | None) -> Iterator[tuple[str, str | Text]]:
    status = sample.status
    server = status["server"]
    if server is not None:
        cache, fetch = server["cache"], server["fetch"]
        yield "cache", _meter(cache["used_bytes"], cache["quota_bytes"])
        queued = ", ".join(f"{count} {name}" for name, count in fetch["queued"].items() if count)
        yield "queued", f"{queued or 'nothing'}; {fetch['threads']} connections"
        yield "from origins", _rate(fetch["fetched_bytes"], "fetched_bytes", sample, previous)
        yield "from cache", _rate(fetch["cache_bytes"], "cache_bytes", sample, previous)
        if server["peers"]["address"]:
            yield "from peers", _rate(fetch["peer_bytes"], "peer_bytes", sample, previous)
        yield "read errors", f"{fetch['failed_reads']}, {fetch['expired_reads']} past their deadline"
        yield (
            "processes",
            f"server {server['processes']['server']}, {len(server['processes']['workers'])} workers",
        )
    misses, replaced = status["misses"], status["replaced"]
    yield "misses", f"{misses.get('running', 0)} of running containers, {misses.get('start', 0)} in starts"
    yield "replaced", ", ".join(f"{count} {name}" for name, count in replaced.items())
    kinds = status.get("snapshots", {})
    yield "snapshots", ", ".join(f"{count} {name}" for name, count in kinds.items())


def _meter(used_bytes: int, quota_bytes: int) -> Text:
    from rich.text import Text

    full = round(_METER_CELLS * min(1.0, used_bytes / max(1, quota_bytes)))
    return Text.assemble(
        ("━" * full, "red"),
        ("━" * (_METER_CELLS - full), "bright_black"),
        f" {terminal.size(used_bytes)} of {terminal.size(quota_bytes)}",
    )


def _rate(total: int, field: str, sample: Sample, previous: Sample | None) -> str:
    """The total, and what came in since the look before. A server that was replaced counts from 0."""
    if previous is None or previous.status["server"] is None:
        return terminal.size(total)
    before = previous.status["server"]["fetch"].get(field, 0)
    seconds = max(0.001, sample.at_seconds - previous.at_seconds)
    return f"{terminal.size(total)}  {terminal.size(int(max(0, total - before) / seconds))}/s"


def _table(*heads: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False, header_style="bold")
    for head in heads:
        name, _, kind = head.partition(":")
        if kind == "n":
            table.add_column(name, justify="right", no_wrap=True)
        else:
            table.add_column(name, ratio=int(kind) if kind else None, no_wrap=True, overflow="ellipsis")
    return table


def _starts(starts: Sequence[Mapping[str, Any]], now_seconds: float, columns: int) -> Table:
    cells = max(8, columns // 5)
    table = _table("starts:3", "state", "phases", "took:n", "misses:n", "fetched:n", "ago:n")
    for start in starts:
        lazy = start["lazy"] is not False
        table.add_row(
            _plain(start["reference"]),
            _plain(start["state"] if lazy else f"ordinary: {start['reason'] or '?'}"),
            _phases(start, cells),
            f"{start['total_seconds']:.2f} s" if lazy else "",
            str(start["misses"]),
            terminal.size(start["fetched_bytes"]),
            terminal.duration(now_seconds - start["at_seconds"]),
        )
    return table


def _phases(start: Mapping[str, Any], cells: int) -> Text:
    """The phases as one bar, each as wide as it took."""
    from rich.text import Text

    total = max(start["total_seconds"], 0.001)
    bar = Text()
    drawn = 0
    for phase in start["phases"]:
        begin = round(cells * max(0.0, min(1.0, phase["begin"] / total)))
        begin = min(max(begin, drawn), cells - 1)
        end = max(begin + 1, round(cells * max(0.0, min(1.0, phase["end"] / total))))
        bar.append(" " * max(0, begin - drawn))
        bar.append("█" * (end - max(begin, drawn)), _PHASE_STYLES.get(phase["phase"], "white"))
        drawn = max(drawn, end)
    return bar


def _images(images: Sequence[Mapping[str, Any]], sample: Sample) -> Table:
    table = _table("images:3", "layers:n", "served:n", "compressed:n", "snapshots:n", "")
    devices = (sample.status["server"] or {}).get("devices", ())
    served = {device["map_digest"] for device in devices}
    for image in images:
        count = sum(digest in served for digest in image["map_digests"])
        marks = ", ".join(name for name in ("pinned", "prefetched") if image[name])
        table.add_row(
            _plain(image["reference"]),
            str(image["layers"]),
            str(count) if count == image["layers"] else f"[red]{count}[/]",
            terminal.size(image["blob_bytes"]),
            str(image["snapshots"]),
            marks,
        )
    return table


def _events(events: Sequence[Mapping[str, Any]], sample: Sample) -> Table:
    table = _table("ago:n", "event", "message:1")
    for event in reversed(events):
        style = _LEVEL_STYLES.get(event["level"], "")
        table.add_row(
            terminal.duration(sample.wall_seconds - event["at_seconds"]),
            _plain(event["kind"], style),
            _plain(event["message"]),
        )
    return table


def _plain(text: str, style: str = "") -> Text:
    """A cell that means itself: in a string, rich would take square brackets for markup."""
    from rich.text import Text

    return Text(terminal.printable(text), style)
