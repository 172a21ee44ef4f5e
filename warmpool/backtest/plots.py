"""The frontiers as a picture, by matplotlib: SVG that can stand in a page."""

from __future__ import annotations

import io

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from warmpool.backtest import frontier, report
from warmpool.backtest.judge import HIT_RATES, OURS, Case

_LOWEST_HIT_RATE = 0.8


def frontiers(case: Case) -> str:
    """Idle node-hours against the part of requests that missed, on a logarithmic scale: what is to be small
    is to the lower left."""
    figure = Figure(figsize=(8.5, 4.8), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for name, points in case.points.items():
        best = [each for each in frontier.frontier(points) if _LOWEST_HIT_RATE <= each.hit_rate < 1]
        if best:
            axes.plot(
                [1 - each.hit_rate for each in best],
                [each.idle_hours for each in best],
                marker=".",
                label=name,
                linewidth=2.5 if name == OURS else 1.0,
                zorder=3 if name == OURS else 2,
            )
    for rate in HIT_RATES:
        axes.axvline(1 - rate, color="0.85", zorder=1)
    axes.set(xscale="log", yscale="log", xlabel="part of requests that missed", ylabel="idle node-hours")
    axes.set_title(report.title(case))
    axes.legend(fontsize="small", loc="center left")
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]
