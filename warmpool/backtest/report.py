"""A verdict as a table, as a JSON document, as a page. Pure."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping, Sequence

from warmpool.backtest import frontier
from warmpool.backtest.judge import CONSTANT, HIT_RATES, ORACLE, OURS, Case, Verdict

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}.ours{font-weight:600}"
)


def needed(case: Case) -> dict[str, list[float | None]]:
    """Idle node-hours of each policy at each of HIT_RATES; None where it does not get there."""
    return {
        name: [frontier.idle_hours_at(points, rate) for rate in HIT_RATES]
        for name, points in case.points.items()
    }


def title(case: Case) -> str:
    """Which of the two cases it is."""
    return "released nodes return to the pool" if case.returns else "released nodes do not return"


def assumed(verdict: Verdict) -> str:
    """The setting in one sentence."""
    lead = verdict.setup.lead
    middle, high, highest = lead.provisioning_seconds
    return (
        f"{verdict.trace}: one node serves {verdict.setup.rate_per_node:g} of the trace's unit, so demand is "
        f"{verdict.nodes_mean:.1f} nodes in the mean; {verdict.requests} nodes were asked for in "
        f"{verdict.judged_hours:.0f} judged hours ({verdict.gap_hours:.1f} of them without data). "
        f"Provisioning takes p50 {middle:g}, p90 {high:g}, p99 {highest:g} s, a boot "
        f"{lead.boot_seconds[0]:g} to {lead.boot_seconds[1]:g} s more. Seed {verdict.setup.seed}."
    )


def text(verdict: Verdict) -> str:
    """The table for a terminal."""
    lines = [assumed(verdict)]
    for case in verdict.cases:
        cells = needed(case)
        lines += [
            "",
            f"Idle node-hours to reach a hit rate, and as part of the best constant's; {title(case)}:",
        ]
        lines.append(" " * 28 + "".join(f"{f'{rate:.0%}':>16}" for rate in HIT_RATES))
        for name, row in cells.items():
            shown = "".join(f"{_cell(hours, base):>16}" for hours, base in _pairs(row, cells[CONSTANT]))
            lines.append(f"{name:28}{shown}")
        lines += [f"{name}: {what}" for name, what in remarks(verdict, case).items()]
    return "\n".join(lines)


def _pairs(
    row: Sequence[float | None], base: Sequence[float | None]
) -> list[tuple[float | None, float | None]]:
    return list(zip(row, base, strict=True))


def _cell(hours: float | None, base: float | None) -> str:
    if hours is None:
        return "-"
    return f"{hours:.0f}" if not base else f"{hours:.0f} ({hours / base:.2f})"


def remarks(verdict: Verdict, case: Case) -> Mapping[str, str]:
    """What the table does not show of ours."""
    own = [point for point in case.points[OURS] if point.hit_rate >= HIT_RATES[-1]]
    told = {
        "forecast at the end": f"{verdict.model}; reactive in {verdict.reactive_share:.1%} of the looks",
        "waited longer than without a pool": str(
            sum(point.worse for points in case.points.values() for point in points)
        ),
    }
    none = case.points["none"][0]
    if own:
        point = min(own, key=lambda each: each.idle_hours)
        told["ours at 99%"] = (
            f"{point.label}; {point.idle_hours:.0f} idle node-hours are "
            f"{point.idle_hours / max(verdict.peak_idle_hours, 1e-9):.0%} of a fleet held at the training "
            f"peak ({verdict.peak_idle_hours:.0f}); {point.booting_hours:.0f} node-hours of booting, "
            f"{point.started} nodes started; wait p99 {point.p99_wait_seconds:.0f} s, mean "
            f"{point.mean_wait_seconds:.1f} s, without a pool {none.p99_wait_seconds:.0f} s and "
            f"{none.mean_wait_seconds:.0f} s"
        )
    distance = [
        f"{mine / limit:.0f}x at {rate:.0%}"
        for rate, mine, limit in zip(HIT_RATES, needed(case)[OURS], needed(case)[ORACLE], strict=True)
        if mine and limit
    ]
    told["ours against the oracle"] = ", ".join(distance) or "not reached"
    return told


def document(verdict: Verdict) -> dict[str, object]:
    """All of it, for machines."""
    return {
        "trace": verdict.trace,
        "setup": dataclasses.asdict(verdict.setup),
        "requests": verdict.requests,
        "judged_hours": verdict.judged_hours,
        "gap_hours": verdict.gap_hours,
        "nodes_mean": verdict.nodes_mean,
        "peak_idle_hours": verdict.peak_idle_hours,
        "model": verdict.model,
        "reactive_share": verdict.reactive_share,
        "cases": [
            {
                "returns": case.returns,
                "idle_hours_at": {
                    name: dict(zip(map(str, HIT_RATES), row, strict=True))
                    for name, row in needed(case).items()
                },
                "points": {
                    name: [dataclasses.asdict(point) for point in points]
                    for name, points in case.points.items()
                },
            }
            for case in verdict.cases
        ],
    }


def page(verdict: Verdict, plots: Sequence[str]) -> str:
    """A page of its own, with a plot (SVG) for each case."""
    parts = [
        "<!doctype html><meta charset=utf-8><title>Warm pool back-test</title>",
        f"<style>{_STYLE}</style><h1>Warm pool back-test</h1><p>{html.escape(assumed(verdict))}</p>",
    ]
    for case, plot in zip(verdict.cases, plots, strict=True):
        cells = needed(case)
        rows = "".join(
            f"<tr{' class=ours' if name == OURS else ''}><td>{html.escape(name)}</td>"
            + "".join(f"<td>{_cell(hours, base)}</td>" for hours, base in _pairs(row, cells[CONSTANT]))
            + "</tr>"
            for name, row in cells.items()
        )
        head = "".join(f"<th>{rate:.0%} hits</th>" for rate in HIT_RATES)
        told = "".join(
            f"<li>{html.escape(name)}: {html.escape(what)}</li>"
            for name, what in remarks(verdict, case).items()
        )
        parts.append(
            f"<h2>{html.escape(title(case).capitalize())}</h2>{plot}<p>Idle node-hours to reach a hit rate, "
            f"and as part of the best constant pool's.</p><table><tr><th>policy</th>{head}</tr>{rows}</table>"
            f"<ul>{told}</ul>"
        )
    return "".join(parts) + "\n"
