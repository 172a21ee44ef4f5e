"""The endpoint's web page: replicas and their state, requests, latency, and how each replica's start went.

Pure: from the status document to one self-contained HTML text, without a script: it asks to be loaded again
every two seconds. Every text that came from elsewhere is escaped.
"""

from __future__ import annotations

import datetime
import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_REFRESH_SECONDS = 2
_SHOWN_EVENTS = 30
_WIDTH, _ROW, _LABELS = 1000, 20, 110
_HUES = ("#d9480f", "#7048e8", "#1c7ed6", "#2b8a3e", "#c2255c", "#5f6b73")
_STATE_CLASSES = {"ready": "good", "failed": "bad", "starting": "warn", "draining": "soft"}

_STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf8; --card: #fff; --ink: #1d2125; --soft: #667079;
  --line: #e3e1dc; --good: #1a7f4b; --bad: #b3261e; --warn: #a15c00; --glow: #d9480f; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --card: #1c2024; --ink: #e6e8ea;
  --soft: #97a1aa; --line: #2e343a; --good: #57c98a; --bad: #ff8a80; --warn: #f2b45c; --glow: #ff8f4d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 0 24px 40px; background: var(--paper); color: var(--ink);
  font: 14px/1.5 system-ui, "DejaVu Sans", sans-serif; }
header { display: flex; align-items: baseline; gap: 14px; flex-wrap: wrap; padding-top: 24px; }
h1 { font-size: 20px; margin: 0; } h1 b { color: var(--glow); } h2 { font-size: 15px; margin: 30px 0 10px; }
.soft { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); }
.warn { color: var(--warn); }
.badge { border: 1px solid currentColor; border-radius: 99px; padding: 1px 10px; font-size: 12px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin-top: 20px; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 12px 14px; }
.tile b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 12px; }
.card { margin-bottom: 12px; overflow-x: auto; } .card.flush { padding: 0; }
table { border-collapse: collapse; width: 100%; } tr:last-child td { border-bottom: 0; }
th, td { text-align: left; padding: 6px 14px; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; font-size: 12px; }
.n { text-align: right; font-variant-numeric: tabular-nums; }
td.w { overflow-wrap: anywhere; white-space: pre-line; }
svg { display: block; width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--soft); }
svg .label { fill: var(--ink); text-anchor: end; }
.wanted { stroke: var(--good); } .demand { stroke: var(--soft); }
.line { fill: none; stroke: var(--glow); stroke-width: 2; } .errors { stroke: var(--bad); }
"""


def render(status: Mapping[str, Any]) -> str:
    """The page."""
    name = _text(status["name"])
    replicas = status["replicas"]
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="refresh" content="{_REFRESH_SECONDS}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{name} - Glowplug</title><style>{_STYLE}</style></head><body>",
        *_header(status, name),
        *_tiles(status),
        "<h2>Requests</h2>",
        *_traffic(status["traffic"]),
        "<h2>Autoscaling</h2>",
        *_autoscaling(status["autoscaling"]),
        "<h2>Replicas</h2>",
        *_table(replicas),
        "<h2>Cold starts</h2>",
        *_starts(replicas, status["now"]),
        "<h2>Events</h2>",
        *_events(status["events"]),
        "</body></html>",
    ]
    return "\n".join(parts)


def _header(status: Mapping[str, Any], name: str) -> Iterator[str]:
    phase = status["phase"]
    badge = "good" if phase == "steady" else "warn"
    shares = ", ".join(f"{_text(version)} {weight} %" for version, weight in status["weights"].items())
    yield f"<header><h1><b>Glowplug</b> {name}</h1>"
    yield f'<span class="badge {badge}" id="phase">{_text(phase)}</span>'
    place = f"{_text(status['url'])} &middot; revision {status['revision']} &middot; {shares}"
    yield f'<span class="soft">{place}</span></header>'
    if status["note"]:
        yield f'<p class="warn" id="note">{_text(status["note"])}</p>'
    for envoy in status["envoys"]:
        for kind, why in envoy["refused"].items():
            yield f'<p class="bad">Envoy {_text(envoy["node"])} refused {_text(kind)}: {_text(why)}</p>'


def _tiles(status: Mapping[str, Any]) -> Iterator[str]:
    ready = sum(each["state"] == "ready" for each in status["replicas"])
    last = status["traffic"][-1] if status["traffic"] else None
    latency = status.get("latency", {})
    tiles = [
        (f"{ready} / {status['wanted_replicas']}", "replicas ready"),
        ("-" if last is None else f"{last['per_second']:.1f}", "requests a second"),
        ("-" if last is None else str(last["in_flight"]), "in flight"),
        (str(status["held"]), "waiting for a replica"),
        ("-" if last is None else f"{last['errors_per_second']:.1f}", "failures a second"),
        *(
            (_seconds(latency[each]) if each in latency else "-", each + _promise(status, f"{each}_seconds"))
            for each in ("p50", "p95", "p99")
        ),
    ]
    yield '<div class="tiles">'
    for value, label in tiles:
        yield f'<div class="tile"><b>{_text(value)}</b><span>{_text(label)}</span></div>'
    yield "</div>"


def _promise(status: Mapping[str, Any], objective: str) -> str:
    promised = status["objectives"].get(objective)
    return "" if promised is None else f", promised {_seconds(promised)}"


def _traffic(samples: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if len(samples) < 2:
        yield '<div class="card soft">No load reports yet.</div>'
        return
    most = max(1.0, *(each["per_second"] for each in samples))
    begin, end = samples[0]["at"], samples[-1]["at"]
    span = max(1.0, end - begin)

    def points(field: str) -> str:
        return " ".join(
            f"{(each['at'] - begin) / span * (_WIDTH - 60) + 50:.1f},{90 - each[field] / most * 80:.1f}"
            for each in samples
        )

    yield f'<div class="card"><svg viewBox="0 0 {_WIDTH} 110" role="img" aria-label="Requests a second">'
    yield f'<text class="label" x="44" y="16">{most:.0f}/s</text><text class="label" x="44" y="92">0</text>'
    yield f'<polyline class="line" points="{points("per_second")}"/>'
    yield f'<polyline class="line errors" points="{points("errors_per_second")}"/>'
    yield f'<text x="50" y="106">{span:.0f} s ago</text></svg></div>'


def _autoscaling(said: Mapping[str, Any]) -> Iterator[str]:
    """The decision that is in force, and the last hour: replicas ready and wanted, demand as a part of its
    own height."""
    yield '<div class="card" id="autoscaling">'
    yield f'<span class="badge soft">{_text(said["mode"])}</span> '
    if "words" not in said:
        yield '<span class="soft">Nothing is decided.</span></div>'
        return
    yield f"{said['replicas']} replicas, limit {said['limit']}, target {said['target']:.4g}"
    yield f'<p class="soft">{_text(said["words"])}</p>'
    series = said["series"]
    if len(series) > 1:
        begin, span = series[0]["at"], max(1.0, series[-1]["at"] - series[0]["at"])
        most = max(1, *(max(each["ready"], each["replicas"]) for each in series))
        peak = max(1.0, *(each["demand"] or 0.0 for each in series))

        def points(field: str, height: float) -> str:
            return " ".join(
                f"{(each['at'] - begin) / span * (_WIDTH - 60) + 50:.1f},{90 - each[field] / height * 80:.1f}"
                for each in series
                if each[field] is not None
            )

        yield f'<svg viewBox="0 0 {_WIDTH} 110" role="img" aria-label="Replicas and demand">'
        yield f'<text class="label" x="44" y="16">{most}</text><text class="label" x="44" y="92">0</text>'
        for field, height, style in (
            ("demand", peak, "demand"),
            ("replicas", most, "wanted"),
            ("ready", most, ""),
        ):
            yield f'<polyline class="line {style}" points="{points(field, height)}"/>'
        yield f'<text x="50" y="106">{span:.0f} s ago</text></svg>'
        yield f'<p class="soft">ready, <span class="good">wanted</span>, demand (peak {peak:.4g})</p>'
    yield "</div>"


def _table(replicas: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    heads = ("replica", "state", "version", "address", "in flight", "req/s", "requests", "failed", "")
    yield '<div class="card flush"><table id="replicas"><tr>'
    yield "".join(f"<th{' class=n' if 4 <= at < 8 else ''}>{each}</th>" for at, each in enumerate(heads))
    yield "</tr>"
    for each in replicas:
        style = _STATE_CLASSES.get(each["state"], "soft")
        numbers = (each["in_flight"], f"{each['per_second']:.1f}", each["issued"], each["errors"])
        yield (
            f'<tr><td>{_text(each["name"])}</td><td class="{style}">{_text(each["state"])}</td>'
            f"<td>{_text(each['version'])}</td><td>{_text(each['address'] or '')}</td>"
            + "".join(f'<td class="n">{_text(value)}</td>' for value in numbers)
            + f'<td class="w">{_text(each["reason"] or "")}</td></tr>'
        )
    yield "</table></div>"


def _starts(replicas: Sequence[Mapping[str, Any]], now: float) -> Iterator[str]:
    """One bar a replica on one scale, its phases one after another as the engine reported them."""
    starts = [(each, (each["ready_at"] or now) - each["created_at"]) for each in replicas]
    starts = [(each, took) for each, took in starts if each["state"] != "failed" or each["ready_at"]]
    if not starts:
        yield '<div class="card soft">No replica has started yet.</div>'
        return
    names = list(dict.fromkeys(phase for each, took in starts for phase, _ in _phases(each["phases"], took)))
    longest = max(0.1, *(took for _, took in starts))
    per_second = (_WIDTH - _LABELS - 90) / longest
    yield f'<div class="card"><svg id="starts" viewBox="0 0 {_WIDTH} {len(starts) * _ROW + 4}" role="img" '
    yield 'aria-label="Cold starts">'
    for row, (each, took) in enumerate(starts):
        top = row * _ROW + 3
        yield f'<text class="label" x="{_LABELS - 8}" y="{top + 11}">{_text(each["name"])}</text>'
        at = 0.0
        for phase, seconds in _phases(each["phases"], took):
            width = max(1.0, seconds * per_second)
            hue = _HUES[names.index(phase) % len(_HUES)]
            box = f'x="{_LABELS + at * per_second:.1f}" y="{top}" width="{width:.1f}" height="{_ROW - 6}"'
            title = f"<title>{_text(phase)}: {_seconds(seconds)}</title>"
            yield f'<rect {box} fill="{hue}">{title}</rect>'
            at += seconds
        end = _LABELS + max(took, at) * per_second + 6
        done = "" if each["ready_at"] else " so far"
        yield f'<text x="{end:.1f}" y="{top + 11}">{_seconds(took)}{done}</text>'
    yield '</svg><p class="soft">'
    for number, phase in enumerate(names):
        yield f'<span style="color: {_HUES[number % len(_HUES)]}">&#9632;</span> {_text(phase)} &nbsp;'
    yield "</p></div>"


def _phases(phases: Mapping[str, float], took: float) -> list[tuple[str, float]]:
    """The phases that the engine reports, after what came before them: process or container, supervisor."""
    named = [(name, seconds) for name, seconds in phases.items() if seconds > 0]
    rest = took - sum(seconds for _, seconds in named)
    return [("launch", rest), *named] if rest > 0.001 else named


def _events(events: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield '<div class="card flush"><table id="events">'
    for each in reversed(events[-_SHOWN_EVENTS:]):
        at = datetime.datetime.fromtimestamp(each["at"], datetime.UTC).strftime("%H:%M:%S")
        yield f'<tr><td class="soft">{at} UTC</td><td class="w">{_text(each["text"])}</td></tr>'
    yield "</table></div>"


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def _text(value: object) -> str:
    return html.escape(str(value))
