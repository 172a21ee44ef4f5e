"""The measurement as a table for a terminal, and how its figures are written everywhere. Pure."""

from __future__ import annotations

from glowplug.startup.result import BLOCKS, MARKS, PACK, PULLED, Measurement, Series


def seconds(value: float | None) -> str:
    """Seconds as people read them."""
    if value is None:
        return "-"
    return f"{value:.2f} s" if value < 9.95 else f"{value:.1f} s"


def megabytes(value: float) -> str:
    """Bytes as megabytes (10^6)."""
    return f"{value / 1e6:,.0f} MB" if value >= 9.95e6 else f"{value / 1e6:.1f} MB"


def spread(series: Series) -> str:
    """From the fastest to the slowest start."""
    low, high = series.spread
    digits = 2 if high < 9.95 else 1
    return f"{low:.{digits}f} to {high:.{digits}f}"


def columns(measured: Measurement) -> tuple[str, ...]:
    """What `row` has, after the label."""
    marks = [f"to {mark}" for mark in MARKS]
    return (*marks, "from, to", "moved", "requests", "waits", "limit", "of limit")


def row(measured: Measurement, series: Series) -> tuple[str, ...]:
    """One series under `columns`: medians."""
    limit = measured.limit_seconds(series)
    return (
        *(seconds(series.median(mark)) for mark in MARKS),
        spread(series),
        megabytes(series.moved_bytes),
        f"{series.requests:.0f}",
        "-" if series.waits is None else f"{series.waits:.0f}",
        seconds(limit),
        "-" if limit is None else f"{series.ready_seconds / limit:.2f}",
    )


def text(measured: Measurement) -> str:
    """The whole table, under a line that says what was measured."""
    rows = [("", *columns(measured))]
    rows += [(series.label, *row(measured, series)) for series in measured.series]
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(rows[0]))]
    count = len(measured.series[0].starts)
    head = f"{measured.image}, {measured.speed}, medians of {count}; ready: {measured.until}"
    lines = [head, ""]
    for label, *cells in rows:
        body = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append(f"{label.ljust(widths[0])}  {body}")
    return "\n".join([*lines, "", *_ratios(measured)])


def _ratios(measured: Measurement) -> list[str]:
    """How many times sooner each lazy kind is ready than each pull."""
    lines = []
    for series in measured.series:
        if series.mode not in (BLOCKS, PACK):
            continue
        compared = [
            f"{_ratio(series, other)} than {other.label}" for other in measured.series if other.mode in PULLED
        ]
        if compared:
            lines.append(f"{series.label}: {', '.join(compared)}")
    return lines


def _ratio(series: Series, other: Series) -> str:
    sooner = other.ready_seconds / series.ready_seconds
    return f"{sooner:.1f} times sooner" if sooner >= 1 else f"{1 / sooner:.1f} times later"
