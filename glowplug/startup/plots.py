"""The plots of a measurement but for the waterfall: bars to ready, and bytes over time. Pure: SVG texts."""

from __future__ import annotations

import html

from glowplug.startup import table
from glowplug.startup.axis import Axis, round_step
from glowplug.startup.result import COLD, MARKS, Measurement, Series

_BAR = 24
_GAP = 16
_LEFT = 290
_RIGHT = 90
_FLOW_LEFT = 64
_FLOW_RIGHT = 24
_FLOW_HEIGHT = 260


def bars(measured: Measurement, width: int) -> str:
    """Each kind of start as a bar of its medians up to ready, with the spread, and the physical limit."""
    longest = max(series.spread[1] for series in measured.series)
    axis = Axis(_LEFT, width - _RIGHT, longest)
    height = len(measured.series) * (_BAR + _GAP) + 34
    parts = [axis.grid(0, height - 26, height - 8)]
    for number, series in enumerate(measured.series):
        parts.append(_bar(measured, series, axis, 8 + number * (_BAR + _GAP)))
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Time to ready">{"".join(parts)}</svg>'


def _bar(measured: Measurement, series: Series, axis: Axis, top: int) -> str:
    middle = top + _BAR / 2
    parts = [f'<text x="{_LEFT - 12}" y="{middle + 5}" class="name end">{html.escape(series.label)}</text>']
    begin = 0.0
    for mark, style in zip(MARKS, ("mount", "output", "ready"), strict=True):
        end = series.median(mark)
        if end is None:
            continue
        title = f"{series.label}: {mark} after {table.seconds(end)}"
        parts.append(
            f'<rect x="{axis.x(begin):.1f}" y="{top}" width="{max(axis.x(end) - axis.x(begin), 0.5):.1f}" '
            f'height="{_BAR}" class="{style}"><title>{html.escape(title)}</title></rect>'
        )
        begin = end
    low, high = (axis.x(moment) for moment in series.spread)
    parts.append(
        f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 5}v10M{high:.1f} {middle - 5}v10"'
        ' class="spread"/>'
    )
    limit = measured.limit_seconds(series)
    if limit is not None:
        title = f"{series.label}: its bytes over the link, then a warm start: {table.seconds(limit)}"
        parts.append(
            f'<path d="M{axis.x(limit):.1f} {top - 5}v{_BAR + 10}" class="limit">'
            f"<title>{html.escape(title)}</title></path>"
        )
    # Right of what is drawn there already.
    free = high if limit is None or not 0 < axis.x(limit) - high < _RIGHT else axis.x(limit)
    ready = table.seconds(series.ready_seconds)
    parts.append(f'<text x="{free + 8:.1f}" y="{middle + 5}" class="value">{ready}</text>')
    return "".join(parts)


def flow(measured: Measurement, width: int) -> str:
    """Bytes that came over the link, by time, of the typical start of each kind that moves any."""
    moving = [series for series in measured.series if series.mode in COLD]
    if not moving:
        return ""
    longest = max(series.typical.ready_seconds for series in moving)
    most = max(1, *(series.typical.moved_bytes for series in moving))
    axis = Axis(_FLOW_LEFT, width - _FLOW_RIGHT, longest)
    bottom = _FLOW_HEIGHT - 26.0

    def y(moved_bytes: float) -> float:
        return bottom - (bottom - 14) * moved_bytes / most

    parts = [axis.grid(8, bottom, _FLOW_HEIGHT - 8)]
    step = round_step(most, 5)
    for number in range(1, int(most / step) + 1):
        at = y(number * step)
        parts.append(
            f'<path d="M{_FLOW_LEFT} {at:.1f}H{width - _FLOW_RIGHT}" class="grid"/>'
            f'<text x="{_FLOW_LEFT - 8}" y="{at + 4:.1f}" class="end">{table.megabytes(number * step)}</text>'
        )
    full = min(longest, measured.speed.seconds(most))
    reached = full * most / measured.speed.seconds(most)
    parts.append(
        f'<path d="M{axis.x(0):.1f} {y(0):.1f}L{axis.x(full):.1f} {y(reached):.1f}" class="limit">'
        f"<title>what the link can carry: {html.escape(str(measured.speed))}</title></path>"
    )
    for series in moving:
        points = " ".join(f"{axis.x(at):.1f},{y(moved):.1f}" for at, moved in series.typical.flow)
        title = f"{series.label}: {table.megabytes(series.typical.moved_bytes)}"
        parts.append(
            f'<polyline points="{points}" class="flow {series.mode}">'
            f"<title>{html.escape(title)}</title></polyline>"
        )
    return (
        f'<svg viewBox="0 0 {width} {_FLOW_HEIGHT}" role="img" aria-label="Bytes over time">'
        f"{''.join(parts)}</svg>"
    )


def flow_legend(measured: Measurement) -> str:
    """What each line is."""
    return "".join(
        f'<li class="{series.mode}">{html.escape(series.label)}</li>'
        for series in measured.series
        if series.mode in COLD
    )
