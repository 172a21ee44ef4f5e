"""The demo's page: two time lines, what they moved, and every block that was fetched, in one HTML file.

Pure: a `Report` in, text out. The page (report.html is its template) holds everything that it shows, works
without a network and without scripts, and follows the reader's light or dark setting. waterfall.py draws the
blocks.
"""

from __future__ import annotations

import dataclasses
import html
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from e2e import timeline, waterfall

WIDTH = 960
_PAGE = string.Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
_BAR = 30
_LEFT = 130
_RIGHT = 70


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """One demo, measured: `pulled` and `lazy` are the same command of the same image."""

    image: str
    command: str
    compressed_bytes: int
    unpacked_bytes: int
    entries: int
    bits_per_second: int
    machine: Mapping[str, str | int]
    pulled: timeline.Start
    lazy: timeline.Start
    layers: Sequence[waterfall.LayerFacts]
    fetches: Sequence[waterfall.Fetch]

    @property
    def ratio(self) -> float:
        """How many times sooner the lazy start was ready."""
        return self.pulled.ready_seconds / self.lazy.ready_seconds


def seconds(value: float) -> str:
    """Seconds as people read them."""
    return f"{value:.2f} s" if value < 9.95 else f"{value:.1f} s"


def megabytes(value: int) -> str:
    """Bytes as megabytes (10^6)."""
    return f"{value / 1e6:,.0f} MB" if value >= 9.5e6 else f"{value / 1e6:.1f} MB"


def terminal(report: Report) -> str:
    """Both time lines as text."""
    longest = report.pulled.ready_seconds
    lines = []
    for name, start in (
        ("download and unpack (containerd)", report.pulled),
        ("lazily (glowplug)", report.lazy),
    ):
        length = max(1, round(start.ready_seconds / longest * 60))
        lines += [f"  {name}", f"    {'█' * length} {seconds(start.ready_seconds)}"]
    lines += ["", f"  {'':24}{'containerd':>14}{'glowplug':>14}"]
    lines += [f"  {label:24}{left:>14}{right:>14}" for label, left, right in _rows(report)]
    return "\n".join(lines)


def document(report: Report) -> dict[str, Any]:
    """Everything on the page, for programs."""
    return {**dataclasses.asdict(report), "ratio": round(report.ratio, 2)}


def _rows(report: Report) -> list[tuple[str, str, str]]:
    pulled, lazy = report.pulled, report.lazy
    rows = [
        (f"to {mark}", seconds(pulled.seconds[mark]), seconds(lazy.seconds[mark])) for mark in timeline.MARKS
    ]
    rows.append(("moved over the link", megabytes(pulled.moved_bytes), megabytes(lazy.moved_bytes)))
    rows.append(("ready sooner by", "1x", f"{report.ratio:.1f}x"))
    return rows


def page(report: Report) -> str:
    """The HTML page."""
    rows = "".join(
        f"<tr><th scope=row>{html.escape(label)}</th><td>{left}</td><td>{right}</td></tr>"
        for label, left, right in _rows(report)
    )
    texts = {
        "ratio": f"{report.ratio:.1f}",
        "rate": f"{report.bits_per_second / 1e9:g} Gbit/s",
        "lazy_ready": seconds(report.lazy.ready_seconds),
        "pulled_ready": seconds(report.pulled.ready_seconds),
        "lazy_moved": megabytes(report.lazy.moved_bytes),
        "pulled_moved": megabytes(report.pulled.moved_bytes),
        "fewer": f"{report.pulled.moved_bytes / max(1, report.lazy.moved_bytes):.1f}",
        "image": report.image,
        "unpacked": megabytes(report.unpacked_bytes),
        "compressed": megabytes(report.compressed_bytes),
        "entries": f"{report.entries:,}",
        "command": report.command,
        **{name: str(value) for name, value in report.machine.items()},
    }
    return _PAGE.substitute(
        {name: html.escape(text) for name, text in texts.items()},
        rows=rows,
        time_lines=_time_lines(report),
        waterfall=waterfall.draw(report.layers, report.fetches, report.lazy, WIDTH),
        touched=waterfall.draw_touched(report.layers, report.fetches, WIDTH),
    )


def _time_lines(report: Report) -> str:
    """Both starts as bars on one time axis."""
    longest = max(report.pulled.ready_seconds, report.lazy.ready_seconds)
    axis = waterfall.Axis(_LEFT, WIDTH - _RIGHT, longest)
    height = 2 * (_BAR + 18) + 26
    parts = [axis.grid(0, height - 22, height - 6)]
    for row, (name, start) in enumerate((("containerd", report.pulled), ("glowplug", report.lazy))):
        top = 8 + row * (_BAR + 18)
        parts.append(f'<text x="{_LEFT - 12}" y="{top + _BAR / 2 + 5}" class="name end">{name}</text>')
        begin = 0.0
        for mark, style in zip(timeline.MARKS, ("mount", "output", "ready"), strict=True):
            end = start.seconds[mark]
            left, right = axis.x(begin), axis.x(end)
            title = f"{name}: {mark} after {seconds(end)}"
            parts.append(
                f'<rect x="{left:.1f}" y="{top}" width="{max(right - left, 0.5):.1f}" height="{_BAR}" '
                f'class="{style}"><title>{title}</title></rect>'
            )
            begin = end
        parts.append(
            f'<text x="{axis.x(begin) + 8:.1f}" y="{top + _BAR / 2 + 5}" class="value">'
            f"{seconds(begin)}</text>"
        )
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="Time lines of both starts">'
        f"{''.join(parts)}</svg>"
    )
