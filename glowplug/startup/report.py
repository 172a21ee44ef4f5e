"""The page of a benchmark: what was measured, as one HTML file.

Measurements in, text out. The page (its template is report.html, package data) holds everything that it
shows, works without a network and without scripts, and follows the reader's light or dark setting. `plots`
and `waterfall` draw.
"""

from __future__ import annotations

import html
import shlex
import string
from collections.abc import Sequence
from importlib import resources

from glowplug.startup import plots, table, waterfall
from glowplug.startup.result import BLOCKS, MODES, PACK, PULLED, WARM, Measurement, Series

WIDTH = 960
_DRAWN = (PACK, BLOCKS)
"""Whose blocks are drawn, the first of them open."""


def page(measurements: Sequence[Measurement]) -> str:
    """The HTML page of one or more measurements."""
    template = string.Template(
        resources.files("glowplug.startup").joinpath("report.html").read_text(encoding="utf-8")
    )
    return template.substitute(
        headline=html.escape(_headline(measurements)),
        summary=_summary(measurements) if len(measurements) > 1 else "",
        measurements="".join(_measurement(measured) for measured in measurements),
        machine=html.escape(", ".join(f"{name} {value}" for name, value in measurements[0].machine.items())),
    )


def _headline(measurements: Sequence[Measurement]) -> str:
    """How many times sooner the faster lazy start is ready than the faster pull."""
    ratios = []
    for measured in measurements:
        pulled = [series.ready_seconds for series in measured.series if series.mode in PULLED]
        lazy = [series.ready_seconds for series in measured.series if series.mode in (BLOCKS, PACK)]
        if pulled and lazy:
            ratios.append(min(pulled) / min(lazy))
    if not ratios:
        return "Time to ready"
    low, high = f"{min(ratios):.1f}", f"{max(ratios):.1f}"
    return f"{low if low == high else f'{low} to {high}'} times sooner ready than pulled"


def _summary(measurements: Sequence[Measurement]) -> str:
    """Median seconds to ready of every mode, one line a measurement."""
    head = "".join(f"<th scope=col>{mode}</th>" for mode in MODES)
    lines = []
    for measured in measurements:
        cells = []
        for mode in MODES:
            series = measured.of(mode)
            cells.append(f"<td>{table.seconds(series.ready_seconds if series else None)}</td>")
        name = html.escape(f"{measured.image}, {measured.speed}")
        lines.append(f"<tr><th scope=row>{name}</th>{''.join(cells)}</tr>")
    return (
        '<section><h2>To ready, medians</h2><div class="scroll"><table><thead><tr><td></td>'
        f"{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></section>"
    )


def _measurement(measured: Measurement) -> str:
    facts = [
        f"{table.megabytes(measured.source_bytes)} as the source image is stored",
        f"{table.megabytes(measured.unpacked_bytes)} unpacked" if measured.unpacked_bytes else "",
        f"medians of {len(measured.series[0].starts)}",
        f"ready: {measured.until}",
    ]
    command = shlex.join(measured.command) or "the image's own command"
    sections = [
        f'<h2 class="image">{html.escape(measured.image)}, {html.escape(str(measured.speed))}</h2>',
        f"<p>{html.escape(', '.join(filter(None, facts)))}</p><pre>{html.escape(command)}</pre>",
        _section("From the command to ready", _BARS_TEXT, plots.bars(measured, WIDTH), _BARS_LEGEND),
        f'<section><h3>Figures</h3><div class="scroll">{_table(measured)}</div></section>',
    ]
    if drawn := plots.flow(measured, WIDTH):
        sections.append(_section("Bytes over time", _FLOW_TEXT, drawn, plots.flow_legend(measured)))
    shown = [series for mode in _DRAWN if (series := measured.of(mode)) and series.typical.fetches]
    sections += [_blocks(measured, series, opened=number == 0) for number, series in enumerate(shown)]
    return f"<article>{''.join(sections)}</article>"


_BARS_TEXT = (
    "Medians; the thin line goes from the fastest to the slowest start. The dashed line is the physical "
    "limit: the bytes that this kind of start moved, over the link, and then a warm start of the same run. "
    "Who works while bytes arrive may come before it."
)
_BARS_LEGEND = (
    '<li class="mount">until the root filesystem is mounted</li>'
    '<li class="output">until the first output</li><li class="ready">until ready</li>'
)
_FLOW_TEXT = "What had come over the link until the typical start was ready. Dashed: what the link can carry."
_WATERFALL_TEXT = (
    "One line per fetched block, from the moment it was wanted (pale: it waited its turn) through its "
    "transfer (full) to its arrival, verified. Hover for the details."
)
_WATERFALL_LEGEND = (
    '<li class="demand">demand: a read was waiting for it</li>'
    '<li class="ahead">ahead: fetched before anything asked</li>'
)
_TOUCHED_TEXT = "Every block of every layer, in order. Pale ones never left the registry."


def _section(title: str, text: str, drawn: str, legend: str) -> str:
    return (
        f'<section><h3>{title}</h3><p>{text}</p><ul class="legend">{legend}</ul>'
        f'<div class="scroll">{drawn}</div></section>'
    )


def _table(measured: Measurement) -> str:
    head = "".join(f"<th scope=col>{name}</th>" for name in table.columns(measured))
    lines = []
    for series in measured.series:
        cells = "".join(f"<td>{cell}</td>" for cell in table.row(measured, series))
        style = ' class="reference"' if series.mode == WARM else ""
        lines.append(f"<tr{style}><th scope=row>{html.escape(series.label)}</th>{cells}</tr>")
    return f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _blocks(measured: Measurement, series: Series, *, opened: bool) -> str:
    """The typical start's blocks: when they came, and which ever did."""
    start = series.typical
    drawn = waterfall.draw(measured.layers, start.fetches, start, WIDTH)
    touched = waterfall.draw_touched(measured.layers, start.fetches, WIDTH)
    return (
        f"<details{' open' if opened else ''}><summary>{html.escape(series.label)}: its blocks</summary>"
        + _section("Which block was wanted when, and when it came", _WATERFALL_TEXT, drawn, _WATERFALL_LEGEND)
        + _section("What was touched", _TOUCHED_TEXT, touched, "")
        + "</details>"
    )
