"""How many nodes to hold ready: `decide(state, observation, now)`. Pure.

Called by the controller at each look, and by the back-test. Whoever calls keeps the state that comes back
and hands it in again; `State.to_json` is for keeping it over a restart. A call fits models when that is due,
which takes up to a few tenths of a second a pool: not for an event loop.
"""

from __future__ import annotations

import dataclasses
import json
import math

from warmpool import errors
from warmpool.observation import (
    COMING,
    Clamp,
    Decision,
    Explanation,
    Mode,
    NodeState,
    Observation,
    Pool,
    PoolDecision,
)
from warmpool.policy import NodeClass, Policy


@dataclasses.dataclass(frozen=True, slots=True)
class Memory:
    """What is known of one class from earlier looks: the last known demand, and when nodes were asked for."""

    wanted: int | None = None
    requests: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class State:
    """The policy, which is not kept, and a memory for each class, which is."""

    policy: Policy
    memories: dict[str, Memory] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """All that a successor needs."""
        return json.dumps(
            {"version": 1, "pools": {k: dataclasses.asdict(v) for k, v in self.memories.items()}}
        )

    @classmethod
    def from_json(cls, policy: Policy, text: str) -> State:
        """The state that `to_json` wrote, under this policy. InvalidInputError."""
        try:
            pools = json.loads(text)["pools"]
            memories = {
                name: Memory(each["wanted"], tuple(float(at) for at in each["requests"]))
                for name, each in pools.items()
            }
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise errors.InvalidInputError(
                f"the warm pool's state is not one that this version wrote ({exc}): remove it to begin anew"
            ) from exc
        return cls(policy, memories)


def decide(state: State, observation: Observation, now: float) -> tuple[State, Decision]:
    """What to do about each observed pool, and the state for the next call."""
    memories = dict(state.memories)
    decisions = []
    for pool in observation.pools:
        settings = state.policy.classes.get(pool.node_class)
        if settings is None:
            raise errors.ConfigurationError(
                f"{pool.node_class}: the policy has no such class; add it to classes"
            )
        memory, decision = _pool(settings, memories.get(pool.node_class, Memory()), pool, now)
        memories[pool.node_class] = memory
        decisions.append(decision)
    return State(state.policy, memories), Decision(now, tuple(decisions))


def _pool(settings: NodeClass, memory: Memory, pool: Pool, now: float) -> tuple[Memory, PoolDecision]:
    """Reactive: as many as were asked for within the last lead time."""
    lead_seconds = settings.lead_time.p99_seconds
    requests = tuple(at for at in memory.requests if at > now - lead_seconds)
    if pool.wanted is not None and memory.wanted is not None:
        requests += (now,) * max(0, pool.wanted - memory.wanted)
    memory = Memory(memory.wanted if pool.wanted is None else pool.wanted, requests)
    held = [node for node in pool.nodes if node.state in COMING or node.state is NodeState.WARM]
    mode = Mode.REACTIVE if pool.wanted is not None else Mode.HOLD
    wish = len(requests) if mode is Mode.REACTIVE else max(len(requests), len(held))
    size = max(settings.floor, min(settings.cap, wish))
    clamps = () if size == wish else (Clamp("cap" if size < wish else "floor", wish, size),)
    explanation = Explanation(
        mode, "requests of the last lead time", lead_seconds, float(wish), math.nan, clamps
    )
    surplus = held[: max(0, len(held) - size)]
    return memory, PoolDecision(
        pool.node_class,
        size,
        max(0, size - len(held)),
        tuple(node.name for node in surplus),
        tuple(node.name for node in pool.nodes if node.state is NodeState.FAILED),
        explanation,
    )
