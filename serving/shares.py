"""One budget, several places where it is spent: who gets how much of it now. Pure.

Called once a second by `rationing`, with what the replicas have charged and refused. Each tenant's rate is
divided (`division`) by what was asked for, the refused part too, averaged over a few seconds. The shares add
up to the rate. A holder that cannot be reached keeps its last share, and the others divide what is left: so
even while the control plane is away, or half of the replicas are, no more than the rate is given out. What
was saved in a bucket before a change is the one interval by which a tenant may exceed its rate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from serving import division
from serving.autoscaler.units import Coefficients
from serving.endpoint import Endpoint, Units
from serving.engine.state import Measure, Ration, Rations, Spent
from serving.service import Key

_WEIGHT = 0.5
"""Of the latest second in the demand."""


Place = tuple[str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class Budget:
    """What an endpoint's tenants may have, all replicas together."""

    tenants: Mapping[str, Ration] = dataclasses.field(default_factory=dict)
    output_tokens: int | None = None
    coefficients: Coefficients | None = None

    @property
    def empty(self) -> bool:
        """Whether there is nothing to be said."""
        return not self.tenants and self.output_tokens is None and self.coefficients is None


@dataclasses.dataclass(frozen=True, slots=True)
class State:
    """What is remembered from one second to the next, by holder and tenant. Made by `heard`, then never
    changed."""

    spent: dict[Place, Spent] = dataclasses.field(default_factory=dict)
    demand: dict[Place, float] = dataclasses.field(default_factory=dict)
    given: dict[Place, float] = dataclasses.field(default_factory=dict)
    """The share that it may be using, at the most."""
    told: dict[Place, float] = dataclasses.field(default_factory=dict)
    """What it was told last, whether it heard that or not."""
    silent: frozenset[str] = frozenset()
    """Who was told and did not answer."""


def budget(wanted: Endpoint, keys: Collection[Key]) -> Budget:
    """Of an endpoint with these keys. Tenants of whom an engine need know nothing are left out."""
    tenants = {}
    for key in keys:
        rate, measure = key.tokens_per_second, Measure.TOKENS
        if key.units_per_second is not None:
            rate, measure = key.units_per_second, Measure.UNITS
        if rate is not None or key.priority:
            tenants[key.tenant] = Ration(rate, measure, key.priority)
    return Budget(tenants, wanted.limits.output_tokens, coefficients(wanted.units))


def coefficients(given: Units | None) -> Coefficients | None:
    """What the document says of units, as those who count them take it."""
    if given is None:
        return None
    return Coefficients(
        given.request_seconds,
        given.input_token_seconds,
        given.output_token_seconds,
        given.cached_token_seconds,
    )


def rations(wanted: Budget, state: State, holders: Collection[str]) -> dict[str, Rations]:
    """What each holder is to be told. Those who are silent are told again what they were told, or less."""
    given: dict[tuple[str, str], float] = {}
    for tenant, ration in wanted.tenants.items():
        if ration.per_second is None:
            continue
        kept = {
            holder: min(ration.per_second, state.given[holder, tenant])
            for holder in state.silent & set(holders)
            if (holder, tenant) in state.given
        }
        demand = {holder: state.demand.get((holder, tenant), 0.0) for holder in holders if holder not in kept}
        again = _again(ration.per_second, kept, {holder: state.told[holder, tenant] for holder in kept})
        for holder, share in (again | division.divide(ration.per_second, demand, kept)).items():
            given[holder, tenant] = share
    return {
        holder: Rations(
            {
                tenant: dataclasses.replace(ration, per_second=given.get((holder, tenant)))
                for tenant, ration in wanted.tenants.items()
            },
            wanted.output_tokens,
            wanted.coefficients,
        )
        for holder in holders
    }


def _again(total: float, kept: Mapping[str, float], told: Mapping[str, float]) -> dict[str, float]:
    """What the silent are told: as before, or less where all that they may have is more than there is."""
    return {
        holder: min(share, division.divide(total, {holder: 1.0}, _without(kept, holder))[holder])
        for holder, share in told.items()
    }


def _without(kept: Mapping[str, float], holder: str) -> dict[str, float]:
    return {name: share for name, share in kept.items() if name != holder}


def heard(
    state: State,
    told: Mapping[str, Rations],
    answers: Mapping[str, Mapping[str, Spent]],
    seconds: float,
) -> State:
    """What those who were told and answered have charged and refused, over the last so many seconds."""
    new = State(silent=frozenset(told) - answers.keys())
    for holder, rations_ in told.items():
        for tenant, ration in rations_.tenants.items():
            place = (holder, tenant)
            share = ration.per_second
            if share is not None:
                new.told[place] = share
            if holder in new.silent:  # it may have heard this, or only what it was told before
                _keep(state, new, place)
                if share is not None:
                    new.given[place] = max(share, state.given.get(place, 0.0))
            else:
                if share is not None:
                    new.given[place] = share
                if tenant in answers[holder]:
                    _learn(state, new, place, answers[holder][tenant], seconds)
    return new


def _keep(state: State, new: State, place: Place) -> None:
    if place in state.spent:
        new.spent[place] = state.spent[place]
        new.demand[place] = state.demand[place]


def _learn(state: State, new: State, place: Place, now: Spent, seconds: float) -> None:
    before = state.spent.get(place)
    if before is None or now.admitted < before.admitted or now.refused < before.refused:
        before = Spent(0, 0.0, 0, 0.0)  # another engine by the same name
    cost = max(0.0, now.charged - before.charged) + max(0.0, now.refused_cost - before.refused_cost)
    known = state.demand.get(place, 0.0)
    new.demand[place] = known + _WEIGHT * (cost / max(seconds, 1e-3) - known)
    new.spent[place] = now
