"""A back-test as a whole: the world, every policy through it, and the verdict. No I/O.

Called by `glowplug warmpool backtest`. The first part of the trace is for training, the rest is judged, with
released nodes returning to the pool and without. All draws are the same for every policy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from warmpool import errors
from warmpool.backtest import frontier, policies, simulate
from warmpool.backtest.world import LeadModel, World, world
from warmpool.demand import Floats
from warmpool.demand_files import Series
from warmpool.policy import NodeClass, Policy

HIT_RATES = (0.95, 0.98, 0.99)
OURS, CONSTANT, ORACLE = "ours", "best constant in hindsight", "oracle"
_RATIOS = np.geomspace(1e-2, 1e-8, 37)
_POOL_DRAWS = 50_000
_TRAINING_DRAWS = 200


@dataclasses.dataclass(frozen=True, slots=True)
class Setup:
    """What is assumed. `rate_per_node` is the service model: what one node serves, in the trace's unit."""

    rate_per_node: float
    seed: int = 0
    train_seconds: float = 7 * 86_400.0
    look_seconds: float = 30.0
    cap: int = 64
    lead: LeadModel = dataclasses.field(default_factory=LeadModel)


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """All policies, by name, with released nodes returning or not."""

    returns: bool
    points: dict[str, list[frontier.Point]]


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What came of it. `peak_idle_hours` is a fleet held at the training part's peak."""

    trace: str
    setup: Setup
    requests: int
    judged_hours: float
    gap_hours: float
    nodes_mean: float
    peak_idle_hours: float
    model: str
    reactive_share: float
    cases: tuple[Case, ...]


def judge(series: Series, setup: Setup, tell: Callable[[str, float], None]) -> Verdict:
    """Run everything. `tell` hears what is going on, and which part of it is done. InvalidInputError."""
    place = world(series, setup.rate_per_node, setup.seed)
    begin = place.begin + setup.train_seconds
    looks = place.looks(begin, place.end, setup.look_seconds)
    if len(looks) < 2 or not (place.times < begin).any():
        raise errors.InvalidInputError(
            f"{series.name}: {(place.end - place.begin) / 86_400:.1f} days of demand are too few to train on "
            f"{setup.train_seconds / 86_400:g} days and judge the rest"
        )
    policy = Policy(classes={"all": NodeClass(cap=setup.cap)})
    leads = setup.lead.draw(_TRAINING_DRAWS, setup.seed + 1_000)
    seen = policies.Seen(place, looks, leads, setup.cap, policy.hold_seconds)
    known = policies.expected(
        seen, policy, policy.classes["all"], lambda done, of: tell("forecasting", 0.5 * done / of)
    )
    patience = int(policy.release_after_seconds // setup.look_seconds)
    cases = []
    for number, returns in enumerate((False, True)):
        tell("nodes return" if returns else "nodes do not return", 0.5 + 0.25 * number)
        cases.append(Case(returns, _case(setup, seen, policy, known, patience, returns=returns)))
    levels = place.levels(looks)
    training = place.levels(place.looks(place.begin, begin, setup.look_seconds))
    return Verdict(
        series.name,
        setup,
        int(((place.times >= begin) & (place.changes > 0)).sum()),
        (place.end - begin) / 3_600.0,
        float(np.isnan(place.seen(looks)).mean()) * (place.end - begin) / 3_600.0,
        float(levels.mean()),
        float(np.maximum(training.max() - levels, 0.0).sum()) * setup.look_seconds / 3_600.0,
        known.forecast.model,
        known.reactive_share,
        tuple(cases),
    )


def _case(
    setup: Setup,
    seen: policies.Seen,
    policy: Policy,
    known: policies.Expected,
    patience: int,
    *,
    returns: bool,
) -> dict[str, list[frontier.Point]]:
    contestants: list[tuple[str, Iterable[policies.Setting], int]] = [
        ("none", policies.none(seen), 0),
        (CONSTANT, policies.constant(seen), 0),
        ("reactive", policies.sized(seen, policy, known.reactive, _RATIOS), patience),
        ("last value", policies.last_value(seen), patience),
        ("trailing quantile", policies.trailing_quantile(seen), patience),
        ("forecast alone", policies.forecast_alone(seen, policy), patience),
        (OURS, policies.sized(seen, policy, known.forecast, _RATIOS), patience),
        (ORACLE, policies.oracle(seen, returns=returns), 0),
    ]
    draws = draw(seen.world, setup)
    return {
        name: list(_points(seen, draws, settings, wait, returns=returns))
        for name, settings, wait in contestants
    }


def draw(place: World, setup: Setup) -> tuple[Floats, Floats]:
    """Lead times of requests' own nodes and of the pool's, the same for every policy."""
    requests = int((place.changes > 0).sum())
    return setup.lead.draw(requests, setup.seed), setup.lead.draw(_POOL_DRAWS, setup.seed + 500)


def _points(
    seen: policies.Seen,
    draws: tuple[Floats, Floats],
    settings: Iterable[policies.Setting],
    patience: int,
    *,
    returns: bool,
) -> Iterator[frontier.Point]:
    place = seen.world
    for setting in settings:
        run = simulate.Simulation(place.times, place.changes, float(seen.looks[0]), draws, returns=returns)
        run.run(seen.looks, place.end, setting.least, setting.most, patience)
        yield point(setting.label, run.outcome())
        if run.outcome().misses == 0:
            return


def point(label: str, outcome: simulate.Outcome) -> frontier.Point:
    """An outcome as a point of a frontier."""
    waits = outcome.waits if len(outcome.waits) else np.zeros(1)
    return frontier.Point(
        label,
        outcome.hit_rate,
        outcome.idle_hours,
        outcome.booting_hours,
        outcome.started,
        outcome.worse,
        float(waits.mean()),
        float(np.quantile(waits, 0.99)),
    )
