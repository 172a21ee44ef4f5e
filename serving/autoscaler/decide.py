"""How many replicas an endpoint should have, and how many requests each may take: `decide`.

Pure; called about once a second (any cadence does) by the autoscaler's loop and by the simulator, with the
time as an argument. `State` is all that it remembers, goes to JSON and back, and gives the same decisions
after a restart.

    observation --sound?--> demand --horizontal--> need --steps, windows, tolerance--> size
                   |no                                                                  |
                   +--> the last size, and why -----------------------------------------+
                                                                                        v
                        replicas <-- quota <-- maximum <-- starts <-- minimum <-- floors

Invariants, whatever the observation:
- The size is never above the quota, nor above the maximum, nor below the minimum but for these two.
- It is lowered only by a sound observation, after a window of sound ones, while no replica is starting
  (Kubernetes deletes those that are not ready first), in steps.
- Constant demand gives a constant size; more demand at any past second, at the same time in service, never
  fewer replicas. Not so where growth is taken on, or a time of day: who has had as much all along does not
  grow.
- What is wrong with an observation is said in the explanation. A clock that jumps ages nothing: windows are
  kept on a clock of observed time (`seen_seconds`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from serving.autoscaler import forecast, horizontal, windows
from serving.autoscaler import limit as limits
from serving.autoscaler.observation import Clamp, Demand, Explanation, Instance, Observation
from serving.autoscaler.policy import Policy
from serving.replica import State as ReplicaState

STALE_SECONDS = 2.5
"""Older observations are no basis for anything."""
GAP_SECONDS = 30.0
"""A longer time between two decisions is a clock that jumped, or a controller that slept."""
_LARGEST = 1e12
"""Of anything that is counted. More is a mistake."""
_EXTRA_STARTS = 2.0
_EXTRA_SECONDS = 10.0
"""What was ordered ahead of demand is kept until it had so many starts' time, and no less, to be needed."""
_NEWEST_STARTS = 0.5
"""What the latest starts count in the time that a start takes."""
_READY, _STARTING = ReplicaState.READY, ReplicaState.STARTING
"""By names of our own: to take a member out of its class takes longer than to compare it."""


@dataclasses.dataclass(frozen=True, slots=True)
class State:
    """See the module. `at` is the `now` of the last decision, on whatever clock that was, and `started_at`
    when the newest replica was ready, on that of replicas; every other stamp is on the clock of observed
    time. `step_*` is the size that a second's step up is measured from."""

    policy: Policy
    replicas: int
    limit: int
    at: float | None = None
    seen_seconds: float = 0.0
    learned: limits.Learned = dataclasses.field(default_factory=limits.Learned)
    season: forecast.Season = dataclasses.field(default_factory=forecast.Season)
    load: horizontal.Load = dataclasses.field(default_factory=horizontal.Load)
    steady: windows.Peak = dataclasses.field(default_factory=windows.Peak)
    ahead: windows.Peak = dataclasses.field(default_factory=windows.Peak)
    idle_seconds: float = 0.0
    start_seconds: float | None = None
    started_at: float = 0.0
    step_from: int = 0
    step_seconds: float = 0.0

    @classmethod
    def initial(cls, policy: Policy) -> State:
        """Before anything was seen."""
        return cls(policy, policy.minimum, policy.limit)

    def under(self, policy: Policy) -> State:
        """The same memories under other settings: a document changed. The limit starts from its setting
        again, where that is what changed."""
        if policy.limit == self.policy.limit and policy.learn_limit:
            return dataclasses.replace(self, policy=policy)
        return dataclasses.replace(self, policy=policy, limit=policy.limit, learned=limits.Learned())

    def to_json(self) -> dict[str, Any]:
        """As plain values; the policy is the document's, and not among them."""
        value = dataclasses.asdict(dataclasses.replace(self, policy=Policy()))
        del value["policy"]
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any], policy: Policy) -> State:
        """What `to_json` gave, also by way of JSON text. TypeError, KeyError and ValueError for what it did
        not give."""
        load = value["load"]
        history = tuple(windows.Bucket(**each) for each in load["history"])
        return cls(
            **{
                **value,
                "policy": policy,
                "learned": limits.Learned.from_json(value["learned"]),
                "season": forecast.Season.from_json(value["season"]),
                "load": horizontal.Load(**{**load, "history": history}),
                "steady": _peak(value["steady"]),
                "ahead": _peak(value["ahead"]),
            }
        )


def _peak(value: Mapping[str, Any]) -> windows.Peak:
    return windows.Peak(tuple((float(stamp), float(each)) for stamp, each in value["entries"]))


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """`replicas` in all, those that start included; `limit`: how many requests each may have in flight, and
    `target` how many it should have in the mean."""

    state: State
    replicas: int
    limit: int
    target: float
    because: Explanation


def decide(state: State, observation: Observation, now: float) -> Decision:
    """The next state, and what is to be done. `now` is in seconds since the epoch (schedules are by it), and
    on the same clock as the observation's times."""
    there = [each for each in observation.instances if each.state is _READY or each.state is _STARTING]
    if state.at is None:  # whoever decided before had reasons: what is there is the first size
        state = dataclasses.replace(state, replicas=max(state.replicas, len(there)))
    wrong = _unsound(state, observation, now)
    demand = observation.demand if wrong is None else None
    if demand is None:
        settled = _unknown(state, wrong or "no load report came in time")
    else:
        settled = _sized(state, demand, there, now)
    size, clamps = _clamped(state, settled, observation, there, now)
    because = settled.because
    if clamps:
        because = dataclasses.replace(because, clamps=(*because.clamps, *clamps))
    following = dataclasses.replace(
        settled.state,
        replicas=size,
        at=now if math.isfinite(now) else state.at,
    )
    limit = following.limit
    return Decision(following, size, limit, state.policy.target_at(limit), because)


@dataclasses.dataclass(frozen=True, slots=True)
class _Settled:
    """A size before the clamps."""

    state: State
    size: int
    because: Explanation


def _unsound(state: State, observation: Observation, now: float) -> str | None:
    """What is wrong with an observation, None if nothing is."""
    if state.at is not None and not 0 <= now - state.at <= GAP_SECONDS:
        return f"{now - state.at:+.4g} s since the last decision: the clock jumped, or nobody decided"
    if not abs(now - observation.at) <= STALE_SECONDS:
        return f"the observation is {now - observation.at:.4g} s old"
    demand = observation.demand
    if demand is None:
        return None
    for field in dataclasses.fields(demand):
        value = getattr(demand, field.name)
        if value is not None and not 0 <= value <= _LARGEST:
            return f"{field.name} is {value}"
    if demand.queued > demand.in_flight:
        return f"{demand.queued:g} queued of {demand.in_flight:g} in flight: these contradict one another"
    if demand.in_flight == 0 and demand.issued_per_second == 0:
        flying = sum(each.in_flight or 0.0 for each in observation.instances)
        if flying > 0:
            return f"nothing in flight, but the replicas have {flying:g}: these contradict one another"
    return None


def _unknown(state: State, why: str) -> _Settled:
    because = Explanation("unknown", None, 0.0, f"the last size, {state.replicas}", note=why)
    return _Settled(state, state.replicas, because)


def _sized(state: State, demand: Demand, there: list[Instance], now: float) -> _Settled:
    """The size by demand, within the steps that are allowed."""
    policy = state.policy
    elapsed = now - state.at if state.at is not None else 0.0
    start_seconds, started_at = _start_noted(state, there)
    start = policy.start_seconds if start_seconds is None else start_seconds
    ready = sum([each.state is _READY for each in there])
    capacity = horizontal.Capacity(ready, policy.target_at(state.limit), state.limit)
    load = horizontal.noted(state.load, demand, capacity, elapsed, policy.level_seconds)
    need = horizontal.need(load, demand, capacity, policy, start)
    seen = state.seen_seconds + elapsed
    lowers = seen // policy.down_seconds > state.seen_seconds // policy.down_seconds
    steady = state.steady.pushed(seen, need.steady, policy.down_window_seconds)
    coming = need.ahead if need.ahead > need.steady else 0.0
    ahead = state.ahead.pushed(seen, coming, max(_EXTRA_SECONDS, _EXTRA_STARTS * start))
    quiet = demand.in_flight == demand.held == demand.issued_per_second == demand.rejected_per_second == 0
    season = state.season
    if policy.predict:
        without = math.ceil(max(steady.value, ahead.value) - 1e-9)
        season = _foreseen(state, season, need, without, start, elapsed, now)
    learned, limit, relimited = _limited(state, there, elapsed, now)
    step_from, step_seconds = _step_noted(state, elapsed)
    state = dataclasses.replace(
        state,
        limit=limit,
        seen_seconds=seen,
        learned=learned,
        season=season,
        load=load,
        steady=steady,
        ahead=ahead,
        idle_seconds=state.idle_seconds + elapsed if quiet else 0.0,
        start_seconds=start_seconds,
        started_at=started_at,
        step_from=step_from,
        step_seconds=step_seconds,
    )
    resting = "" if season.trusted else "the forecast rests: a day cost more than it saved"
    note = "; ".join(filter(None, (relimited, resting)))
    because = Explanation("demand", need.level, need.window_seconds, need.formula, note=note)
    return _moved(state, need, because, quiet, lowers)


def _foreseen(
    state: State,
    season: forecast.Season,
    need: horizontal.Need,
    without: int,
    start_seconds: float,
    elapsed: float,
    now: float,
) -> forecast.Season:
    """The time of day with what it brought now, and what it was good for; `without` it the size would be."""
    season = forecast.learned(season, need.level, elapsed, now)
    floor = _floor(season, state.policy, state.limit, start_seconds, now)
    return forecast.scored(season, need.steady, without, floor, elapsed, start_seconds)


def _floor(season: forecast.Season, policy: Policy, limit: int, start_seconds: float, now: float) -> int:
    """The replicas that the time of day asks for, trusted or not."""
    expected = forecast.expected(season, now, start_seconds) if math.isfinite(now) else None
    if expected is None or expected < 1:  # less is no reason to keep an endpoint from going to zero
        return 0
    capacity = horizontal.Capacity(0, policy.target_at(limit), limit)
    return math.ceil(horizontal.replicas(expected, policy.headroom, capacity) - 1e-9)


def _start(state: State) -> float:
    return state.policy.start_seconds if state.start_seconds is None else state.start_seconds


def _limited(
    state: State, there: list[Instance], elapsed: float, now: float
) -> tuple[limits.Learned, int, str]:
    """The limit of a replica, where it is learned, and why it is another one."""
    if not state.policy.learn_limit:
        return state.learned, state.limit, ""
    learned = limits.noted(state.learned, state.limit, there, elapsed, now)
    return limits.adjusted(learned, state.limit, state.policy)


def _start_noted(state: State, there: list[Instance]) -> tuple[float | None, float]:
    """`start_seconds` and `started_at` with the starts that came to their end since: the median of these, and
    a part of what was known."""
    since = state.started_at
    ended = [(at, each) for each in there if (at := each.ready_at) is not None and at > since]
    seconds = sorted([at - each.created_at for at, each in ended])
    if not seconds or not 0 <= seconds[len(seconds) // 2] < math.inf:
        return state.start_seconds, since
    known, median = state.start_seconds, seconds[len(seconds) // 2]
    mixed = median if known is None else known + _NEWEST_STARTS * (median - known)
    return mixed, max([at for at, _ in ended])


def _step_noted(state: State, elapsed: float) -> tuple[int, float]:
    """`step_from` and `step_seconds`: a second's step is measured from the size at its beginning, however
    often it is asked."""
    seconds = state.step_seconds + elapsed
    if seconds < windows.GRAIN_SECONDS and state.step_from:
        return state.step_from, seconds
    return state.replicas, 0.0


def _moved(state: State, need: horizontal.Need, because: Explanation, quiet: bool, lowers: bool) -> _Settled:
    """Towards the need, by a step. `lowers`: it is time for one down; when that is does not hang on earlier
    ones, or a size that was lowered sooner could be above one that had been larger."""
    policy, size = state.policy, state.replicas
    wanted = max(0 if quiet else 1, math.ceil(need.ahead - 1e-9))
    if quiet and size == 0:  # what came before it was idle is still in the windows
        wanted = 0
    clamps = []
    if wanted > size:
        most = math.ceil(max(state.step_from, 1) * policy.up_factor) + policy.up_step
        if wanted > most:
            clamps.append(Clamp("a second's step up", wanted, max(size, most)))
            because = dataclasses.replace(because, clamps=tuple(clamps))
        return _Settled(state, max(size, min(wanted, most)), because)
    kept = max(state.steady.value, state.ahead.value)
    lower = math.ceil(kept * (1 + policy.tolerance) - 1e-9)
    idle = policy.minimum == 0 and state.idle_seconds >= policy.idle_seconds
    lower = 0 if idle else max(1, lower)
    if lower >= size:
        return _Settled(state, size, because)
    note = f"{kept:.4g} replicas at most in the last {policy.down_window_seconds:g} s"
    if state.seen_seconds < policy.down_window_seconds and not idle:
        note, lower = f"nothing is lowered before {policy.down_window_seconds:g} s were seen", size
    elif not idle and not lowers:
        note, lower = f"lowered once in {policy.down_seconds:g} s", size
    elif not idle and lower < (least := math.floor(size * policy.down_factor)):
        clamps.append(Clamp("a step down", lower, least))
        lower = least
    because = dataclasses.replace(
        because,
        clamps=tuple(clamps),
        note="; ".join(filter(None, (because.note, note))),
    )
    return _Settled(state, lower, because)


def _clamped(
    state: State, settled: _Settled, observation: Observation, there: list[Instance], now: float
) -> tuple[int, list[Clamp]]:
    """Floors first, what bounds from above last: the quota outranks them all."""
    policy = state.policy
    clamps: list[Clamp] = []
    size = settled.size

    def rule(name: str, bounded: int) -> None:
        nonlocal size
        if bounded != size:
            clamps.append(Clamp(name, size, bounded))
            size = bounded

    provisioned = math.ceil(policy.provisioned / policy.target_at(state.limit))
    rule("provisioned concurrency", max(size, provisioned))
    rule("schedule", max([size, *(each.minimum for each in policy.schedules if each.holds(now))]))
    if policy.predict and state.season.trusted:
        floor = _floor(state.season, policy, state.limit, _start(state), now)
        rule("expected at this time of day", max(size, floor))
    rule("minimum", max(size, policy.minimum))
    patience = policy.start_patience_seconds
    if [each for each in there if each.state is _STARTING and now - each.created_at <= patience]:
        rule("a replica is starting", max(size, state.replicas))
    rule("maximum", min(size, policy.maximum))
    if observation.quota is not None:
        rule("quota", min(size, observation.quota if observation.quota >= 0 else state.replicas))
    return size, clamps
