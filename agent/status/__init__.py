"""The status page: one HTML document without scripts or anything to load, for whoever opens the agent's port.

Pure but for reading its own style sheet once: `render` turns what the API answers (status, starts, events)
into text. Whatever came from an image, a registry or containerd is escaped; the API's Content-Security-Policy
forbids scripts besides.
"""

from __future__ import annotations

import datetime
import functools
import html
import importlib.resources
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from agent.status import waterfall

_SHOWN_STARTS = 12
_LEGEND = (
    ("demand", "--demand", "a process waited for it"),
    ("boot", "--boot", "boot pack"),
    ("read ahead", "--ahead", "guessed"),
    ("fill", "--fill", "full copy"),
)

_LINKS = " &middot; ".join(
    f'<a href="{path}">{path}</a>'
    for path in ("/metrics", "/api/v1/status", "/api/v1/starts", "/api/v1/events")
)


def render(
    status: Mapping[str, Any],
    starts: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    now_seconds: float,
) -> str:
    """The page. Values as of `Outside.status`, `Starts.to_json` and `Event.to_json`; wall-clock `now`."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(status['node'])} - Glowplug</title><style>{_style()}</style></head><body>",
        *_head(status),
        "<main>",
        *_alerts(status),
        *_tiles(status),
        *_starts(starts, now_seconds),
        *_images(status),
        *_peers(status),
        *_events(events, now_seconds),
        *_mounts(status),
        "</main>",
        f"<footer>{_LINKS}</footer></body></html>",
    ]
    return "\n".join(parts)


@functools.cache
def _style() -> str:
    return importlib.resources.files(__name__).joinpath("page.css").read_text()


def _head(status: Mapping[str, Any]) -> Iterator[str]:
    ready = not status["not_ready"]
    badge = '<span class="badge good">ready</span>' if ready else '<span class="badge bad">not ready</span>'
    yield (
        f"<header><h1><b>Glowplug</b> on {_text(status['node'])}</h1>{badge}"
        f'<span class="soft push">version {_text(status["version"])}, up {duration(status["up_seconds"])}'
        "</span></header>"
    )


def _alerts(status: Mapping[str, Any]) -> Iterator[str]:
    for name, wrong in status["not_ready"].items():
        yield f'<p class="alert"><b class="bad">{_text(name)}</b>: {_text(wrong)}</p>'
    for broken in status.get("quarantined", ()):
        yield (
            f'<p class="alert"><b class="bad">quarantined</b> <code>{_text(broken["name"])}</code>: '
            f"{_text(broken['why'])}</p>"
        )


def _tiles(status: Mapping[str, Any]) -> Iterator[str]:
    yield '<section class="tiles">'
    kinds = status.get("snapshots", {})
    images = status.get("images", ())
    yield _tile(str(len(images)), f"block images, {sum(image['layers'] for image in images)} layers")
    yield _tile(
        str(sum(kinds.values())), "snapshots" + "".join(f", {count} {kind}" for kind, count in kinds.items())
    )
    server = status["server"]
    if server is not None:
        cache, fetch = server["cache"], server["fetch"]
        share = min(100.0, 100 * cache["used_bytes"] / max(1, cache["quota_bytes"]))
        yield (
            f'<div class="tile"><b>{size(cache["used_bytes"])}</b><div class="meter">'
            f'<i style="width:{share:.1f}%"></i></div><span>block cache, of {size(cache["quota_bytes"])}; '
            f"{cache['evicted_blocks']} blocks evicted</span></div>"
        )
        moved = f"from origins, {fetch['fetched_blocks']} blocks in {fetch['origin_requests']} requests"
        yield _tile(size(fetch["fetched_bytes"]), moved)
        if server["peers"]["address"]:
            given = f"from peers, {fetch['peer_blocks']} blocks; {size(fetch['served_bytes'])} given to them"
            yield _tile(size(fetch["peer_bytes"]), given)
        yield _tile(str(sum(fetch["queued"].values())), "blocks queued")
        failed = fetch["failed_reads"]
        yield _tile(
            str(failed), f"failed reads, {fetch['expired_reads']} past their deadline", bad=failed > 0
        )
    misses = status["misses"]
    yield _tile(
        str(misses.get("running", 0)), f"misses of running containers, {misses.get('start', 0)} in starts"
    )
    replaced = status["replaced"]
    named = ", ".join(f"{count} {kind}" for kind, count in replaced.items())
    yield _tile(str(sum(replaced.values())), f"processes replaced: {named}")
    yield "</section>"


def _tile(value: str, text: str, *, bad: bool = False) -> str:
    mark = ' class="bad"' if bad else ""
    return f'<div class="tile"><b{mark}>{_text(value)}</b><span>{_text(text)}</span></div>'


def _starts(starts: Sequence[Mapping[str, Any]], now_seconds: float) -> Iterator[str]:
    yield "<h2>Recent starts</h2>"
    if not starts:
        yield '<div class="card soft">No image was pulled since the agent started.</div>'
        return
    yield '<p class="legend">' + "".join(
        f'<span><i style="background:var({colour})"></i>{name}: {why}</span>' for name, colour, why in _LEGEND
    )
    yield "<span>pale: waited for a connection</span><span>outlined: from a peer</span></p>"
    for start in starts[:_SHOWN_STARTS]:
        yield '<div class="card"><div class="start-head">'
        yield f"<strong>{_text(start['reference'])}</strong>{_state(start)}"
        if start["lazy"] is not False:
            yield (
                f"<span>{start['total_seconds']:.2f} s, {start['misses']} misses, "
                f"{size(start['fetched_bytes'])} fetched</span>"
            )
        if start["waited_seconds"] > 1:
            yield f'<span class="soft">mounted {duration(start["waited_seconds"])} after its pull</span>'
        yield f'<span class="soft push">{duration(now_seconds - start["at_seconds"])} ago</span></div>'
        if start["phases"] or start["bars"]:
            yield waterfall.render(start)
        if start["bars_left_out"]:
            yield f'<span class="soft">and {start["bars_left_out"]} blocks more</span>'
        yield "</div>"


def _state(start: Mapping[str, Any]) -> str:
    if start["state"] == "ordinary":
        return f'<span class="warn">ordinary pull: {_text(start["reason"] or "reason unknown")}</span>'
    colour = {"settled": "good", "running": "warn"}.get(start["state"], "soft")
    return f'<span class="{colour}">{start["state"]}</span>'


def _images(status: Mapping[str, Any]) -> Iterator[str]:
    yield "<h2>Images</h2>"
    owned = {device["map_digest"] for device in (status["server"] or {}).get("devices", ())}
    rows = []
    for image in status.get("images", ()):
        served = sum(digest in owned for digest in image["map_digests"])
        # Fewer after a reboot: an image is attached again when it is used.
        whole = served >= image["layers"]
        marks = [name for name in ("pinned", "prefetched") if image[name]]
        rows.append(
            (
                f"{_text(image['reference'])}<br><code class='soft'>{_text(image['block_digest'])}</code>",
                str(image["layers"]),
                f"<span class='{'good' if whole else 'soft'}'>{served}</span>",
                size(image["blob_bytes"]),
                str(image["snapshots"]),
                f"<span class='mark'>{', '.join(marks)}</span>",
            )
        )
    heads = ("image", "layers", "served", "compressed", "snapshots", "")
    yield _table(heads, rows, "No image is in use.")


def _peers(status: Mapping[str, Any]) -> Iterator[str]:
    peers = (status["server"] or {}).get("peers")
    if not peers or not peers["address"]:
        return
    down = peers["down"]
    yield "<h2>Peers</h2>"
    yield (
        f'<div class="card">This node is <code>{_text(peers["address"])}</code>, one of '
        f"{peers['members']}. Blocks asked for now: {peers['waiting']}. Nodes left alone for a while: "
        f"{len(down)}.</div>"
    )
    if down:
        yield _table(("node", "why"), [(_text(node), _text(why)) for node, why in down.items()], "")


def _events(events: Sequence[Mapping[str, Any]], now_seconds: float) -> Iterator[str]:
    yield "<h2>Recent events</h2>"
    colours = {"warning": "warn", "error": "bad"}
    rows = [
        (
            f"<span class='soft mark' title='{_time(event['at_seconds'])}'>"
            f"{duration(now_seconds - event['at_seconds'])} ago</span>",
            f"<span class='mark {colours.get(event['level'], 'soft')}'>{_text(event['kind'])}</span>",
            _text(event["message"]),
        )
        for event in reversed(events)
    ]
    yield _table(("when", "what", ""), rows, "Nothing was reported yet.", numbers=False)


def _mounts(status: Mapping[str, Any]) -> Iterator[str]:
    mounts = status["mounts"]
    yield f"<h2>Mounts</h2><details><summary>{len(mounts)} mounted layers</summary>"
    rows = [(f"<code>{_text(mount['directory'])}</code>", _text(mount["filesystem"])) for mount in mounts]
    yield _table(("directory", "filesystem"), rows, "None.", numbers=False)
    yield "</details>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], empty: str, *, numbers: bool = True) -> str:
    """Cells are HTML; the columns between the first and the last are numbers."""
    if not rows:
        return f'<div class="card soft">{_text(empty)}</div>'
    middle = range(1, len(heads) - 1) if numbers else range(0)

    def row(tag: str, cells: Iterable[str]) -> str:
        made = (
            f'<{tag} class="{"n" if place in middle else "w"}">{cell}</{tag}>'
            for place, cell in enumerate(cells)
        )
        return f"<tr>{''.join(made)}</tr>"

    body = "\n".join(row("td", cells) for cells in rows)
    return f'<div class="card flush"><table>{row("th", map(_text, heads))}\n{body}</table></div>'


def _text(value: object) -> str:
    return html.escape(str(value))


def _time(at_seconds: float) -> str:
    return datetime.datetime.fromtimestamp(at_seconds, datetime.UTC).isoformat(timespec="seconds")


def duration(seconds: float) -> str:
    """Rounded, in the unit that fits: 12 s, 3 min, 5 h, 2 d."""
    for unit, length, until in (("s", 1, 90), ("min", 60, 90 * 60), ("h", 3600, 48 * 3600)):
        if seconds < until:
            return f"{max(0.0, seconds) / length:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def size(count: int) -> str:
    """Bytes, rounded, with a binary unit."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
