"""How many nodes to hold ready: `decide(state, observation, now)`. Pure.

Called by the controller at each look, and by the back-test. Whoever calls keeps the state that comes back
and hands it in again; `State.to_json` writes it for a restart. A call fits models when that is due, which
takes up to half a second a pool: not for an event loop.

What is expected comes from `warmpool.outlook`, the size follows from costs (`warmpool.size`), then from what
bounds it: floor, cap, budget, what the provider gives. Growing is immediate. Shrinking waits until the pool
has been too large for a while, and a node that is there is kept while it is worth a part of what a new one
must be worth: between the two sizes nothing is done. While demand is unknown for a short time only, nothing
is let go, and nothing asked for but successors of nodes that failed. What a class cannot get now, its
substitutes hold in addition.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from warmpool import errors, memory, size
from warmpool import outlook as outlooks
from warmpool.observation import (
    COMING,
    Clamp,
    Decision,
    Explanation,
    Mode,
    Node,
    NodeState,
    Observation,
    Pool,
    PoolDecision,
)
from warmpool.outlook import Memory, Outlook
from warmpool.policy import NodeClass, Policy

_RELEASED_FIRST = (NodeState.REQUESTED, NodeState.BOOTING, NodeState.WARMING, NodeState.WARM)
_BUDGET_ROUNDS = 40


@dataclasses.dataclass(frozen=True, slots=True)
class State:
    """The policy, which is not kept over a restart, and a memory for each class, which is."""

    policy: Policy
    memories: dict[str, Memory] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """All that a successor needs."""
        return memory.write(self.memories)

    @classmethod
    def from_json(cls, policy: Policy, text: str) -> State:
        """The state that `to_json` wrote, under this policy. InvalidInputError."""
        known = memory.read(text)
        return cls(policy, {name: each for name, each in known.items() if name in policy.classes})


@dataclasses.dataclass(slots=True)
class _Plan:
    """One pool while it is thought about: grown to `least`, shrunk to `most`, left alone in between."""

    pool: Pool
    settings: NodeClass
    outlook: Outlook
    held: list[Node]
    blocked: bool
    holds: bool
    least: int = 0
    most: int = 0
    clamps: list[Clamp] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def bound(self, rule: str, low: int, high: int) -> None:
        """Keep both sizes between `low` and `high`."""
        before = self.least
        self.least = max(low, min(high, self.least))
        self.most = max(low, min(high, self.most))
        if self.least != before:
            self.clamps.append(Clamp(rule, before, self.least))

    @property
    def room(self) -> int:
        """How many more nodes the provider would give now, by what is known."""
        if self.blocked:
            return 0
        return self.settings.cap if self.pool.quota is None else max(0, self.pool.quota)


def decide(state: State, observation: Observation, now: float) -> tuple[State, Decision]:
    """What to do about each observed pool, and the state for the next call. ConfigurationError for a class
    that the policy does not name."""
    policy = state.policy
    memories = dict(state.memories)
    plans: dict[str, _Plan] = {}
    for pool in observation.pools:
        name = pool.node_class
        settings = policy.classes.get(name)
        if settings is None:
            raise errors.ConfigurationError(f"{name}: the policy has no such class; add it to policy.classes")
        memories[name], outlook = outlooks.learn(
            policy, settings, memories.get(name, Memory()), pool.wanted, pool.nodes, now
        )
        held = [node for node in pool.nodes if node.state in COMING or node.state is NodeState.WARM]
        blocked = pool.blocked_until is not None and now < pool.blocked_until
        unknown_since = memories[name].record.at[-1]
        holds = pool.wanted is None and now - unknown_since < policy.hold_seconds
        plans[name] = _Plan(pool, settings, outlook, held, blocked, holds)
        _worth(policy, plans[name], 1.0)
    _budget(policy, list(plans.values()))
    _substitute(plans)
    decisions = []
    for name, plan in plans.items():
        since = memories[name].surplus_since
        surplus = len(plan.held) > plan.most
        since = (now if since is None else since) if surplus else None
        memories[name] = dataclasses.replace(memories[name], surplus_since=since)
        may_shrink = since is not None and now - since >= policy.release_after_seconds
        decisions.append(_decision(plan, may_shrink))
    return State(policy, memories), Decision(now, tuple(decisions))


def _worth(policy: Policy, plan: _Plan, scarcity: float) -> None:
    """Sizes by what nodes cost, `scarcity` times as much as they do, and the class's own bounds."""
    settings, outlook = plan.settings, plan.outlook
    idle_per_miss = scarcity * settings.idle_cost_per_minute / 60.0 / settings.miss_cost
    plan.clamps, plan.notes = [], []
    # Twice the cap, so that the explanation says how much the cap cuts.
    saved, idle = size.sides(
        np.array([outlook.rate]), np.array([outlook.dispersion]), outlook.leads, 2 * settings.cap
    )
    plan.least, plan.most = (
        int(size.worth_holding(saved, idle, part * idle_per_miss)[0]) for part in (1.0, policy.keep)
    )
    if plan.holds:
        failed = plan.pool.count(NodeState.FAILED)
        plan.least = plan.most = len(plan.held) + failed
        plan.notes.append("demand is unknown: nothing is let go")
        plan.bound("floor", settings.floor, max(settings.floor, len(plan.held), settings.cap))
        return
    plan.bound("floor", settings.floor, 2 * settings.cap)
    plan.bound("cap", settings.floor, settings.cap)


def _budget(policy: Policy, plans: Sequence[_Plan]) -> None:
    """Where all pools together cost too much, idle time is held to be dearer, by one factor for all, until
    they fit: what goes first is what saves fewest misses for its cost."""
    budget = policy.budget_per_hour
    if budget is None or _cost_per_hour(plans) <= budget:
        return
    wanted = [plan.least for plan in plans]
    low, high = 1.0, 1e12
    for _ in range(_BUDGET_ROUNDS):
        middle = (low * high) ** 0.5
        for plan in plans:
            _worth(policy, plan, middle)
        low, high = (low, middle) if _cost_per_hour(plans) <= budget else (middle, high)
    for plan, before in zip(plans, wanted, strict=True):
        _worth(policy, plan, high)
        if not plan.holds:
            plan.most = plan.least  # keeping costs as much as getting
        if plan.least != before:
            plan.clamps.append(Clamp("budget", before, plan.least))


def _cost_per_hour(plans: Sequence[_Plan]) -> float:
    return sum(plan.least * plan.settings.idle_cost_per_minute * 60.0 for plan in plans)


def _substitute(plans: dict[str, _Plan]) -> None:
    """What a class lacks and cannot get, its substitutes hold in addition, within their own caps."""
    for name, plan in plans.items():
        lacking = plan.least - len(plan.held) - plan.room
        for other in (plans[each] for each in plan.settings.substitutes if each in plans):
            able = min(other.settings.cap - other.least, max(0, other.room - (other.least - len(other.held))))
            taken = min(lacking, able)
            if taken <= 0:
                continue
            other.least += taken
            other.most = max(other.most + taken, other.least)
            other.clamps.append(Clamp(f"in place of {name}", other.least - taken, other.least))
            plan.notes.append(f"{taken} held as {other.pool.node_class} instead")
            lacking -= taken
        if lacking > 0 and plan.blocked:
            plan.notes.append(f"{lacking} cannot be had now: {plan.pool.blocked}")


def _decision(plan: _Plan, may_shrink: bool) -> PoolDecision:
    pool, outlook, held = plan.pool, plan.outlook, plan.held
    target = max(plan.least, min(plan.most, len(held)))
    if target < len(held) and not may_shrink:
        plan.clamps.append(Clamp("too large not for long enough", target, len(held)))
        target = len(held)
    surplus = sorted(held, key=lambda node: (_RELEASED_FIRST.index(node.state), -node.since, node.name))
    if outlook.losses:
        ranked = sorted(outlook.losses.items(), key=lambda each: each[1])
        plan.notes.append("models by their loss: " + ", ".join(f"{name} {loss:.2f}" for name, loss in ranked))
    lead_seconds = float(np.median(outlook.leads))
    explanation = Explanation(
        Mode.HOLD if plan.holds else outlook.mode,
        outlook.model,
        lead_seconds,
        outlook.rate * lead_seconds,
        size.covered(outlook.rate, outlook.dispersion, outlook.leads, target),
        tuple(plan.clamps),
        outlook.breaker,
        "; ".join(plan.notes),
    )
    return PoolDecision(
        pool.node_class,
        target,
        min(max(0, target - len(held)), plan.room),
        tuple(node.name for node in surplus[: max(0, len(held) - target)]),
        tuple(node.name for node in pool.nodes if node.state is NodeState.FAILED),
        explanation,
    )
