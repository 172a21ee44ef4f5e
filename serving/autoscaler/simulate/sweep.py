"""Every policy with every setting on one scenario, and the figures of each run.

Called by the verb, scenario by scenario. Deterministic: the same arguments give the same outcomes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from serving.autoscaler.simulate import fleet as fleets
from serving.autoscaler.simulate import judgement, run
from serving.autoscaler.simulate.fleet import Floats, Integers
from serving.autoscaler.simulate.judgement import Outcome
from serving.autoscaler.simulate.scenarios import Point, Scenario


@dataclasses.dataclass(frozen=True)
class Kept:
    """A default point with its curves, to be drawn."""

    outcome: Outcome
    series: run.Series


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One scenario's. `demand` is what is in flight at each second if nobody waits, in replicas' slots."""

    scenario: str
    demand: Floats
    outcomes: tuple[Outcome, ...]
    kept: tuple[Kept, ...]

    def of(self, policy: str) -> list[Outcome]:
        """One policy's outcomes."""
        return [each for each in self.outcomes if each.policy == policy]

    def verdicts(self, others: Sequence[str] = ("hpa", "kpa", "published")) -> list[judgement.Verdict]:
        """Ours against each that was run."""
        ours = self.of("ours")
        return [judgement.verdict(ours, self.of(other)) for other in others if ours and self.of(other)]


def compare(scenario: Scenario, points: Sequence[Point], said: Callable[[Outcome], None]) -> Comparison:
    """Run them all; `said` hears of each."""
    outcomes, kept = [], []
    for point in points:
        result = run.simulate(scenario.endpoint, scenario.traffic, point.make(), scenario.seed)
        found = outcome(scenario.name, point, result)
        outcomes.append(found)
        if point.default:
            kept.append(Kept(found, result.series))
        said(found)
    demand = scenario.in_flight[: scenario.traffic.seconds] / scenario.endpoint.slots
    return Comparison(scenario.name, demand, tuple(outcomes), tuple(kept))


def outcome(scenario: str, point: Point, result: run.Result) -> Outcome:
    """A run in figures."""
    series = result.series
    latencies = series.histograms.sum(axis=0)
    return Outcome(
        scenario=scenario,
        policy=point.policy,
        parameters=point.parameters,
        default=point.default,
        requests=result.arrived,
        late=int(series.late.sum()),
        rejected=int(series.rejected.sum()),
        lost=int(series.lost.sum()),
        replica_hours=result.replica_hours,
        p50_seconds=quantile(latencies, 0.50),
        p99_seconds=quantile(latencies, 0.99),
        peak_replicas=int((series.starting + series.ready + series.draining).max(initial=0)),
        reversals=judgement.most_reversals(series.wanted[run.SETTLE_SECONDS :].tolist()),
    )


def quantile(histogram: Integers, part: float) -> float:
    """The upper edge of the bucket in which it lies, 0 of nothing."""
    total = histogram.sum()
    if not total:
        return 0.0
    index = int(np.searchsorted(np.cumsum(histogram), part * total))
    return float(fleets.bucket_seconds()[min(index, fleets.BUCKETS - 1)])
