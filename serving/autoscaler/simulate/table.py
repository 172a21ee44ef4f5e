"""A comparison as text: the default points, and what they say of ours. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from serving.autoscaler.simulate.judgement import Outcome, Verdict

HEAD = (
    f"{'policy':<12} {'parameters':<30} {'late':>8} {'rejected':>8} {'lost':>7} {'hours':>8} {'p50 s':>7} "
    f"{'p99 s':>7} {'peak':>5} {'turns':>5}"
)


def line(each: Outcome) -> str:
    """One run."""
    parts = (part / max(1, each.requests) for part in (each.late, each.rejected, each.lost))
    late, rejected, lost = (f"{part:.3%}" for part in parts)
    return (
        f"{each.policy:<12} {each.parameters:<30} {late:>8} {rejected:>8} {lost:>7} "
        f"{each.replica_hours:8.1f} {each.p50_seconds:7.2f} {each.p99_seconds:7.2f} "
        f"{each.peak_replicas:5d} {each.reversals:5d}"
    )


def said(verdict: Verdict) -> str:
    """What ours is beside another policy's default point, and where it is not below."""
    parts = []
    if verdict.hours_ratio is None:
        parts.append("no setting of ours is as seldom late")
    else:
        parts.append(f"at its lateness {verdict.hours_ratio:.2f} of its replica-hours")
    if verdict.unserved_ratio is None:
        parts.append("no setting of ours costs as little")
    else:
        parts.append(f"at its hours {verdict.unserved_ratio:.2f} of its late or rejected requests")
    below = verdict.frontier - len(verdict.above)
    parts.append(f"below {below} of {verdict.frontier} points of its frontier")
    text = f"against {verdict.other} ({verdict.hours:.1f} h, {verdict.unserved:.3%}): " + "; ".join(parts)
    return text + "".join(f"\n    not below {each}" for each in verdict.above)


def lines(outcomes: Sequence[Outcome], verdicts: Sequence[Verdict]) -> list[str]:
    """All of one scenario."""
    defaults = [line(each) for each in outcomes if each.default]
    return [HEAD, *defaults, *(said(each) for each in verdicts)]
