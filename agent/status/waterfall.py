"""A start's waterfall as SVG: its phases, and below them each block that did not come from the cache.

Pure: from the JSON of `starts.Starts.to_json` to text. A block's bar is pale while it waited for a
connection, full while it was fetched, and pale again once its readers had their part of it; its colour says
why it was wanted. Bars are packed into lanes, so that as many lanes are seen as blocks were under way at
once.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

_WIDTH = 1000
_LABELS = 96
_RIGHT = 14
_PHASE_HEIGHT = 16
_LANE_HEIGHT = 6
_AXIS_HEIGHT = 18
_GAP_PIXELS = 1.0
_MAX_LANES = 64
_Place = Callable[[float], float]
"""From seconds of the start's timeline to pixels."""
_PHASE_NAMES = {"first_read": "first read", "reads": "reads"}


def render(start: Mapping[str, Any]) -> str:
    """One start."""
    phases, bars = start["phases"], start["bars"]
    ends = [phase["end"] for phase in phases] + [bar["arrived"] for bar in bars]
    begin = min([0.0, *(bar["wanted"] for bar in bars)])
    step, axis_end = scale(max([*ends, start["total_seconds"], 0.01]) - begin)
    per_second = (_WIDTH - _LABELS - _RIGHT) / axis_end

    def x(seconds: float) -> float:
        return float(round(_LABELS + (seconds - begin) * per_second, 1))

    lanes = pack(bars, _GAP_PIXELS / per_second)
    count = min(max(lanes, default=-1) + 1, _MAX_LANES)
    bars_top = len(phases) * _PHASE_HEIGHT + 6
    axis_top = bars_top + count * _LANE_HEIGHT + 4
    parts = [
        f'<svg class="waterfall" viewBox="0 0 {_WIDTH} {axis_top + _AXIS_HEIGHT}" role="img" '
        f'aria-label="Waterfall of {html.escape(start["reference"])}">',
        *_axis(x, begin, axis_end, step, axis_top),
        *_phases(phases, x),
    ]
    if bars:
        parts.append(f'<text class="label" x="{_LABELS - 8}" y="{bars_top + 8}">blocks</text>')
    for bar, lane in zip(bars, lanes, strict=True):
        parts += _bar(bar, x, bars_top + lane % _MAX_LANES * _LANE_HEIGHT)
    return "\n".join([*parts, "</svg>"])


def scale(span_seconds: float) -> tuple[float, float]:
    """The distance of the axis's marks and its end: four to ten marks of 1, 2 or 5 times a power of ten."""
    rough = span_seconds / 8
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return step, math.ceil(span_seconds / step - 1e-9) * step


def pack(bars: Sequence[Mapping[str, Any]], gap_seconds: float) -> list[int]:
    """A lane for each bar, so that none overlaps another in its lane: the lowest that is free."""
    ends: list[float] = []
    lanes = [0] * len(bars)
    for number in sorted(range(len(bars)), key=lambda each: bars[each]["wanted"]):
        bar = bars[number]
        lane = next((each for each, end in enumerate(ends) if end <= bar["wanted"]), len(ends))
        if lane == len(ends):
            ends.append(0.0)
        ends[lane] = max(bar["arrived"], bar["wanted"]) + gap_seconds
        lanes[number] = lane
    return lanes


def _axis(x: _Place, begin: float, span: float, step: float, top: float) -> Iterator[str]:
    digits = max(0, -math.floor(math.log10(step)))
    for number in range(round(span / step) + 1):
        at = x(begin + number * step)
        yield f'<line class="grid" x1="{at}" y1="0" x2="{at}" y2="{top}"/>'
        text = f"{number * step:.{digits}f}" + (" s" if number == round(span / step) else "")
        anchor = ' text-anchor="end"' if text.endswith("s") else ""
        shift = _RIGHT if anchor else 0
        yield f'<text class="mark" x="{at + shift}" y="{top + 13}"{anchor}>{text}</text>'


def _phases(phases: Sequence[Mapping[str, Any]], x: _Place) -> Iterator[str]:
    for row, phase in enumerate(phases):
        top = row * _PHASE_HEIGHT
        name = html.escape(_PHASE_NAMES.get(phase["phase"], phase["phase"]))
        left, width = x(phase["begin"]), max(1.5, x(phase["end"]) - x(phase["begin"]))
        took = _seconds(phase["end"] - phase["begin"])
        times = f" ({phase['count']} times)" if phase["count"] > 1 else ""
        yield f'<text class="label" x="{_LABELS - 8}" y="{top + 11}">{name}</text>'
        yield (
            f'<rect class="phase" x="{left}" y="{top + 2}" width="{width:.1f}" height="{_PHASE_HEIGHT - 4}">'
            f"<title>{name}: {took}{times}</title></rect>"
        )
        inside = left + width + 60 > _WIDTH
        place = f'x="{left + width - 4:.1f}" text-anchor="end"' if inside else f'x="{left + width + 4:.1f}"'
        yield f'<text class="{"took inside" if inside else "took"}" {place} y="{top + 11}">{took}</text>'


def _bar(bar: Mapping[str, Any], x: _Place, top: float) -> Iterator[str]:
    wanted, started, served = x(bar["wanted"]), x(bar["started"]), x(bar["served"])
    kind = "".join(each for each in bar["reason"] if each.isalnum() or each == "_")
    title = html.escape(
        f"layer {bar['layer']}, block {bar['block']}: {bar['reason']}, from {bar['source']}, "
        f"{bar['compressed_bytes'] / 1024:.0f} KiB, waited {_seconds(bar['started'] - bar['wanted'])}, "
        f"had what was read in {_seconds(bar['served'] - bar['started'])}, "
        f"all of it in {_seconds(bar['arrived'] - bar['started'])}"
    )
    yield f'<g class="bar {kind}"><title>{title}</title>'
    height = _LANE_HEIGHT - 1
    if started > wanted:
        width = started - wanted
        yield f'<rect class="wait" x="{wanted}" y="{top}" width="{width:.1f}" height="{height}"/>'
    peer = ' class="peer"' if bar["source"] == "peer" else ""
    width = max(1.0, served - started)
    yield f'<rect{peer} x="{started}" y="{top}" width="{width:.1f}" height="{height}"/>'
    rest = x(bar["arrived"]) - started - width
    if rest > 0:
        left = started + width
        yield f'<rect class="wait" x="{left:.1f}" y="{top}" width="{rest:.1f}" height="{height}"/>'
    yield "</g>"


def _seconds(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 0.1 else f"{value:.2f} s"
