"""A comparison as figures: what the endpoint had and needed over time, latencies, cost, frontiers.

Called by `page`. matplotlib without a display; every function gives SVG or PNG bytes of one figure.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import figure

from serving.autoscaler.simulate import judgement, sweep
from serving.autoscaler.simulate.run import LATENCY_WINDOW_SECONDS
from serving.autoscaler.simulate.sweep import Comparison, Kept

_MOST_POINTS = 600
COLOURS = {
    "ours": "#d1495b",
    "reactive": "#e08e79",
    "published": "#8d6a9f",
    "hpa": "#3066be",
    "kpa": "#2a9d8f",
    "static peak": "#8a8a8a",
    "clairvoyant": "#e9b44c",
}


def over_time(comparison: Comparison) -> bytes:
    """Replicas and demand, one panel for each policy."""
    drawn, axes = _panels(comparison.kept, "replicas")
    demand = comparison.demand
    for ax, kept in zip(axes, comparison.kept, strict=True):
        series = kept.series
        ready = series.ready.astype(np.float64)
        there = ready + series.starting
        _line(ax, there, color="#bbbbbb", linewidth=0.8, label="with those that start")
        _line(ax, ready, color=COLOURS[kept.outcome.policy], linewidth=1.2, label="ready")
        _line(ax, demand, color="black", linewidth=0.7, alpha=0.7, label="demand")
        ax.set_ylim(0, 1.6 * max(1.0, demand.max()))
    axes[0].legend(fontsize=7, loc="upper right")
    return _bytes(drawn)


def latencies(comparison: Comparison) -> bytes:
    """Percentiles of the time in flight, one panel for each policy."""
    drawn, axes = _panels(comparison.kept, "seconds")
    for ax, kept in zip(axes, comparison.kept, strict=True):
        windows = kept.series.histograms
        step = max(1, len(windows) // _MOST_POINTS)
        windows = np.add.reduceat(windows, np.arange(0, len(windows), step), axis=0)
        minutes = np.arange(len(windows)) * step * LATENCY_WINDOW_SECONDS / 60
        for part, style in ((0.5, ":"), (0.95, "--"), (0.99, "-")):
            values = [sweep.quantile(each, part) or np.nan for each in windows]
            ax.plot(
                minutes,
                values,
                style,
                color=COLOURS[kept.outcome.policy],
                linewidth=0.9,
                label=f"p{part:.0%}"[:-1],
            )
        ax.set_yscale("log")
    axes[0].legend(fontsize=7, loc="upper right")
    return _bytes(drawn)


def cost(comparison: Comparison) -> bytes:
    """Replica-hours so far."""
    drawn = figure.Figure(figsize=(9, 3.2), layout="constrained")
    ax = drawn.subplots()
    for kept in comparison.kept:
        series = kept.series
        hours = np.cumsum(series.starting + series.ready + series.draining) / 3_600
        _line(ax, hours, color=COLOURS[kept.outcome.policy], label=kept.outcome.policy)
    ax.set_xlabel("minutes")
    ax.set_ylabel("replica-hours so far")
    ax.legend(fontsize=7)
    return _bytes(drawn)


def frontiers(comparison: Comparison) -> bytes:
    """Every point, each policy's frontier as steps, its default as a star."""
    drawn = figure.Figure(figsize=(9, 5), layout="constrained")
    ax = drawn.subplots()
    floor = 0.5 / max(1, *(each.requests for each in comparison.outcomes))
    for policy, colour in COLOURS.items():
        outcomes = comparison.of(policy)
        if not outcomes:
            continue
        best = judgement.frontier(outcomes)
        ax.scatter(*_places(outcomes, floor), s=9, color=colour, alpha=0.35)
        ax.step(*_places(best, floor), where="post", color=colour, linewidth=1.3, label=policy)
        ax.scatter(*_places([one for one in outcomes if one.default], floor), s=110, marker="*", color=colour)
    ax.set_yscale("log")
    ax.set_xlabel("replica-hours")
    ax.set_ylabel("late, rejected or lost (part of requests)")
    ax.set_title(f"{comparison.scenario}: stars are defaults, the lowest line is no such request", fontsize=9)
    ax.legend(fontsize=8)
    return _bytes(drawn)


def _places(outcomes: Sequence[judgement.Outcome], floor: float) -> tuple[list[float], list[float]]:
    return [each.replica_hours for each in outcomes], [max(each.unserved, floor) for each in outcomes]


def _panels(kept: Sequence[Kept], what: str) -> tuple[figure.Figure, list[Any]]:
    drawn = figure.Figure(figsize=(9, 1.5 * len(kept) + 0.5), layout="constrained")
    axes = drawn.subplots(len(kept), 1, sharex=True, squeeze=False)[:, 0].tolist()
    for ax, each in zip(axes, kept, strict=True):
        outcome = each.outcome
        ax.set_title(
            f"{outcome.policy} ({outcome.parameters}): {outcome.unserved:.3%} late, rejected or lost, "
            f"{outcome.replica_hours:.1f} replica-hours",
            fontsize=8,
            loc="left",
        )
        ax.set_ylabel(what, fontsize=8)
        ax.tick_params(labelsize=7)
    axes[-1].set_xlabel("minutes", fontsize=8)
    return drawn, axes


def _line(ax: Any, values: npt.NDArray[np.float64], **style: Any) -> None:
    """At most so many points: of more, the largest of each piece."""
    step = max(1, len(values) // _MOST_POINTS)
    largest = np.maximum.reduceat(values, np.arange(0, len(values), step))
    ax.plot(np.arange(len(largest)) * step / 60, largest, **style)


def _bytes(drawn: figure.Figure) -> bytes:
    made = io.BytesIO()
    # Without the date, so that the same comparison gives the same file.
    drawn.savefig(made, format="svg", metadata={"Date": None})
    return made.getvalue()
