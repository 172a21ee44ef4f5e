"""The block waterfall: every fetched block of a start as a bar on one time axis, by layer. Pure."""

from __future__ import annotations

import html
from collections.abc import Sequence

from glowplug.startup.axis import Axis
from glowplug.startup.result import MARKS, Fetch, Layer, Start

_LEFT = 16
_RIGHT = 16
_ROW = 4.0
_HEAD = 30
_CELL = 11


def draw(layers: Sequence[Layer], fetches: Sequence[Fetch], start: Start, width: int) -> str:
    """All fetches, one row each in the order in which they were wanted, layer by layer, top layer first."""
    last = max([start.ready_seconds, *(fetch.arrived_seconds for fetch in fetches)])
    axis = Axis(_LEFT, width - _RIGHT, last * 1.02)
    top = 34.0
    body = []
    for number in reversed(range(len(layers))):
        own = sorted((f for f in fetches if f.layer == number), key=lambda f: (f.wanted_seconds, f.block))
        body.append(
            f'<text x="{_LEFT}" y="{top + 19:.1f}" class="name">{_summary(layers[number], own)}</text>'
        )
        top += _HEAD
        for fetch in own:
            body.append(_bar(fetch, axis, top, layers[number].name))
            top += _ROW
        top += 8
    marks = "".join(
        # On two heights in turns: two moments may be close to one another.
        _moment(mark, start.seconds[mark], axis, 12 + 12 * (number % 2), top)
        for number, mark in enumerate(MARKS)
        if mark in start.seconds
    )
    return (
        f'<svg viewBox="0 0 {width} {top + 24:.0f}" role="img" aria-label="Waterfall of fetched blocks">'
        f"{axis.grid(30, top, top + 16)}{''.join(body)}{marks}</svg>"
    )


def _summary(layer: Layer, own: Sequence[Fetch]) -> str:
    moved = sum(fetch.compressed_bytes for fetch in own)
    return (
        f"{html.escape(layer.name)}: {len(own)} of {layer.blocks} blocks, "
        f"{moved / 1e6:.1f} of {layer.compressed_bytes / 1e6:.1f} MB"
    )


def _bar(fetch: Fetch, axis: Axis, top: float, layer: str) -> str:
    style = "demand" if fetch.demand else "ahead"
    wanted, started, arrived = (
        axis.x(moment) for moment in (fetch.wanted_seconds, fetch.started_seconds, fetch.arrived_seconds)
    )
    title = html.escape(
        f"{layer}, block {fetch.block}: {fetch.reason}; wanted at {fetch.wanted_seconds:.3f} s, "
        f"asked for at {fetch.started_seconds:.3f} s, arrived at {fetch.arrived_seconds:.3f} s, "
        f"{fetch.compressed_bytes / 1e6:.2f} MB"
    )
    place = f'y="{top:.1f}" height="{_ROW - 0.8:.1f}"'
    return (
        f'<g><title>{title}</title><rect x="{wanted:.1f}" {place} width="{max(started - wanted, 0):.1f}" '
        f'class="{style} wait"/><rect x="{started:.1f}" {place} width="{max(arrived - started, 1):.1f}" '
        f'class="{style}"/></g>'
    )


def _moment(mark: str, seconds: float, axis: Axis, top: float, bottom: float) -> str:
    x = axis.x(seconds)
    anchor = "end" if x > axis.right - 60 else "mid"
    return (
        f'<line x1="{x:.1f}" y1="{top + 6:.1f}" x2="{x:.1f}" y2="{bottom:.1f}" class="moment"/>'
        f'<text x="{x:.1f}" y="{top:.1f}" class="{anchor}">{mark} {seconds:.2f} s</text>'
    )


def draw_touched(layers: Sequence[Layer], fetches: Sequence[Fetch], width: int) -> str:
    """Every block of the image as a cell: on demand, ahead, or never fetched."""
    per_row = (width - _LEFT - _RIGHT) // _CELL
    top = 0
    parts = []
    for number in reversed(range(len(layers))):
        layer = layers[number]
        came = {fetch.block: fetch for fetch in fetches if fetch.layer == number}
        parts.append(f'<text x="{_LEFT}" y="{top + 17}" class="name">{html.escape(layer.name)}</text>')
        top += 26
        for block in range(layer.blocks):
            fetch = came.get(block)
            style = "pale" if fetch is None else "demand" if fetch.demand else "ahead"
            note = "never fetched" if fetch is None else f"{fetch.reason}, {fetch.arrived_seconds:.3f} s"
            x, y = _LEFT + block % per_row * _CELL, top + block // per_row * _CELL
            parts.append(
                f'<rect x="{x}" y="{y}" width="{_CELL - 2}" height="{_CELL - 2}" rx="2" class="{style}">'
                f"<title>block {block}: {html.escape(note)}</title></rect>"
            )
        top += -(-layer.blocks // per_row) * _CELL + 8
    label = 'role="img" aria-label="Blocks that were fetched"'
    return f'<svg viewBox="0 0 {width} {top}" {label}>{"".join(parts)}</svg>'
