"""Decisions as text: what was seen, over which window, by which formula, what clamped it. Pure.

`lines` is `glowplug autoscale explain`, of what the endpoint's server answers (`shell.Autoscaler.explained`):
one line a run of equal decisions, and below it its last explanation. `in_words` is one decision for events,
the status page and the live view.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from typing import Any

from serving.autoscaler.observation import Explanation


def lines(name: str, explained: Mapping[str, Any], since_seconds: float) -> Iterator[str]:
    """The whole text, oldest decision first. `since_seconds`: how far back."""
    mode = explained["mode"]
    if mode == "off":
        yield f"{name}: autoscaling.mode is off; replicas are what the document or `endpoint scale` says"
    elif mode == "dry-run":
        yield f"{name}: autoscaling.mode is dry-run; nothing of this is done"
    if used := explained.get("utilization"):
        parts = ", ".join(f"{resource} {part:.0%}" for resource, part in used.items())
        yield f"{name}: in use now, at the ready replica that uses most of it: {parts}"
    now = explained["now"]
    runs = [each for each in explained["runs"] if now - each["ended_at"] <= since_seconds]
    if not runs:
        yield f"{name}: nothing was decided in the last {since_seconds:g} s"
    for run in runs:
        yield from _run(run)


def _run(run: Mapping[str, Any]) -> Iterator[str]:
    why = run["because"]
    span = _clock(run["began_at"])
    if run["count"] > 1:
        span += f" to {_clock(run['ended_at'])}, {run['count']} times"
    would = "" if run["applied"] else " (dry run)"
    size = f"{run['replicas']} replicas, limit {run['limit']}, target {run['target']:.4g}{would}"
    yield f"{span}: {size}"
    yield f"    signal   {why['signal']}: {_range(run)}{_window(why)}"
    yield f"    formula  {why['formula']}"
    for clamp in why["clamps"]:
        yield f"    clamp    {clamp['rule']}: {clamp['before']} -> {clamp['after']}"
    if why["note"]:
        yield f"    note     {why['note']}"


def _range(run: Mapping[str, Any]) -> str:
    low, high, last = run["low"], run["high"], run["because"]["value"]
    if last is None:
        return "not known"
    return f"{last:.4g}" if low == high else f"{last:.4g}, between {low:.4g} and {high:.4g}"


def _window(why: Mapping[str, Any]) -> str:
    return f", over {why['window_seconds']:.3g} s" if why["window_seconds"] else ""


def _clock(at: float) -> str:
    return datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%H:%M:%S")


def in_words(because: Explanation) -> str:
    """An explanation in one line."""
    clamps = (f"{each.rule}: {each.before} -> {each.after}" for each in because.clamps)
    return "; ".join([because.formula, *clamps, *filter(None, [because.note])])
