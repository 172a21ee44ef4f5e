"""What is expected of one node class, from what was seen of it: the half of a decision that knows demand and
lead times, and no pool. Pure.

Called by `warmpool.decide` at each look, and by the back-test. `learn` remembers, refits when that is due,
and tells what to expect: by the forecast or, where history is short or the circuit breaker is open, by what
was asked for lately. The breaker compares requests that came with requests that were expected, over a fading
window, and goes on judging while it is open.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from warmpool import arrivals, demand, leadtime
from warmpool.demand import Floats
from warmpool.forecast import choice, models
from warmpool.observation import Mode, Node
from warmpool.policy import NodeClass, Policy

_DAY_SECONDS = 86_400.0
_LEAST_HISTORY_SECONDS = _DAY_SECONDS
"""Shorter histories have seen no day: the reactive rule does as well."""
_JUDGED_DAYS = 3
_LEARNED_DAYS = 14
_LEAD_POINTS = 6


@dataclasses.dataclass(frozen=True, slots=True)
class Fitted:
    """What a refit left: when, by which model, its path, and what was learned of requests (None: too little
    to learn from). `losses` are what the back-test found."""

    at: float
    model: str = ""
    outline: arrivals.Outline = arrivals.NOTHING_SAID
    fit: arrivals.Fit | None = None
    losses: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Trust:
    """The circuit breaker: requests that came and that were expected lately, both fading; until when it is
    open, and why."""

    came: float = 0.0
    expected: float = 0.0
    open_until: float = 0.0
    reason: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Memory:
    """What is known of one class from earlier looks. `rate` is what the forecast expected at the last one,
    followed or not; `surplus_since` is since when the pool is too large."""

    record: demand.Record = dataclasses.field(default_factory=demand.Record)
    rhythm: arrivals.Rhythm | None = None
    learned: leadtime.Learned = dataclasses.field(default_factory=leadtime.Learned)
    fitted: Fitted | None = None
    trust: Trust = Trust()
    rate: float = 0.0
    surplus_since: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Outlook:
    """Requests a second, how uncertain that is (the dispersion of a negative binomial), and lead times that
    are equally likely. `losses` are what the models lost in the back-test that chose this one."""

    mode: Mode
    model: str
    rate: float
    dispersion: float
    leads: Floats
    breaker: str = ""
    losses: Mapping[str, float] = dataclasses.field(default_factory=dict)


def learn(
    policy: Policy,
    settings: NodeClass,
    memory: Memory,
    wanted: int | None,
    nodes: tuple[Node, ...],
    now: float,
) -> tuple[Memory, Outlook]:
    """What is remembered after this look, and what is expected now."""
    before = memory.record.last
    change = 0 if wanted is None or before is None else wanted - before
    known_seconds = 0.0
    rhythm = arrivals.Rhythm(now)
    if memory.rhythm is not None:
        passed_seconds = max(0.0, now - memory.rhythm.at)
        known_seconds = 0.0 if wanted is None or before is None else passed_seconds
        # In a gap what was expected is taken for what came: quiet would be news that nobody had.
        unseen_rate = 0.0 if known_seconds else memory.rate
        rhythm = memory.rhythm.after(now, max(0, change), max(0, -change), unseen_rate)
    trust = _judged(policy, memory, known_seconds, max(0, change), now)
    learned = memory.learned.seen(nodes)
    leads = leadtime.quantiles(learned, settings.lead_time, leadtime.ages(nodes, now), _LEAD_POINTS)
    record = memory.record.seen(now, wanted)
    fitted = memory.fitted
    if fitted is None or not 0 <= now - fitted.at < policy.refit_seconds:
        record = record.since(now - policy.history_days * _DAY_SECONDS)
        fitted = refit(policy, record, float(np.median(leads)), now)
    forecast = _by_forecast(fitted, rhythm, record, leads, now)
    outlook = forecast
    if forecast is None or trust.reason:
        outlook = Outlook(
            Mode.REACTIVE,
            "requests of late",
            arrivals.reactive(rhythm),
            arrivals.REACTIVE_DISPERSION,
            leads,
            trust.reason,
        )
    assert outlook is not None
    rate = outlook.rate if forecast is None else forecast.rate
    return Memory(record, rhythm, learned, fitted, trust, rate, memory.surplus_since), outlook


def refit(policy: Policy, record: demand.Record, lead_seconds: float, now: float) -> Fitted:
    """Choose a model by what it would have said, and learn how requests follow from it and from the
    rhythm."""
    if not record.at or now - record.at[0] < _LEAST_HISTORY_SECONDS:
        return Fitted(now)
    steps = demand.grid(record, record.at[0], now, policy.step_seconds)
    levels = demand.filled(steps.level)
    if not len(levels):
        return Fitted(now)
    day = round(_DAY_SECONDS / policy.step_seconds)
    chosen = choice.choose(models.candidates(policy.step_seconds), levels, day, _JUDGED_DAYS)
    # What is learned with must not have known what is learned from. Of the days that were judged there are
    # forecasts; before them, the day before is one.
    early = levels[: len(levels) - len(chosen.past)]
    said = np.concatenate([early[:day], early[:-day] if len(early) > day else early[:0]])[: len(early)]
    past = arrivals.Outline(
        steps.begin, policy.step_seconds, tuple(np.concatenate([said, chosen.past]).tolist())
    )
    cells = demand.grid(record, now - _LEARNED_DAYS * _DAY_SECONDS, now, arrivals.CELL_SECONDS)
    coming = arrivals.Outline(
        steps.end, policy.step_seconds, tuple(round(each, 3) for each in chosen.path.tolist())
    )
    losses = {name: round(loss, 4) for name, loss in chosen.losses.items()}
    return Fitted(now, chosen.model, coming, arrivals.fit(cells, past, lead_seconds), losses)


def _by_forecast(
    fitted: Fitted, rhythm: arrivals.Rhythm, record: demand.Record, leads: Floats, now: float
) -> Outlook | None:
    """What is expected by what was learned; None where nothing was."""
    fit = fitted.fit
    if fit is None:
        return None
    level = next((each for each in reversed(record.wanted) if each is not None), 0)
    rows = arrivals.features(
        np.array([rhythm.rises]),
        np.array([rhythm.falls]),
        np.array([float(level)]),
        fitted.outline.turns(np.array([now]), fit.lead_seconds),
    )
    rate = float(fit.rates(rows)[0])
    return Outlook(Mode.FORECAST, fitted.model, rate, fit.dispersion, leads, losses=fitted.losses)


def _judged(policy: Policy, memory: Memory, known_seconds: float, rises: int, now: float) -> Trust:
    """The breaker after this look, by what was expected since the last one."""
    breaker, trust = policy.breaker, memory.trust
    if trust.reason and now >= trust.open_until:
        return Trust()
    if memory.fitted is None or memory.fitted.fit is None:
        return trust
    fade = float(np.exp(-known_seconds / breaker.window_seconds))
    came = trust.came * fade + rises
    expected = trust.expected * fade + memory.rate * known_seconds
    if trust.reason:
        return Trust(came, expected, trust.open_until, trust.reason)
    much, little = max(came, expected), min(came, expected)
    if much <= breaker.excess * little + breaker.slack_requests:
        return Trust(came, expected)
    reason = f"{came:.0f} nodes were asked for lately where the forecast had expected {expected:.0f}"
    return Trust(came, expected, now + breaker.open_seconds, reason)
