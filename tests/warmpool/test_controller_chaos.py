"""Any order of work, faults, kills and time: what never happens to a pool."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings, stateful
from hypothesis import strategies as st

from tests.warmpool.harness import TEXT, WARMTH, Pool
from warmpool import errors
from warmpool.provider import HELD, Stage

_CAP = 8
_CLASSES = st.sampled_from(["gpu", "big"])


class Chaos(stateful.RuleBasedStateMachine):
    """Machines are taken away by the controller only; each removal is looked at when it happens."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(TEXT + WARMTH, with_agents=True)
        assert self.pool.agents is not None
        self.agents = self.pool.agents
        self.forbidden = False
        remove = self.pool.world.remove

        def looked_at(name: str) -> None:
            (machine,) = [each for each in self.pool.world.machines() if each.name == name]
            assert machine.stage is not Stage.HANDED, "work lost its node"
            assert not self.forbidden, "released by a controller that knows nothing yet"
            remove(name)

        self.pool.world.remove = looked_at  # type: ignore[method-assign]

    @stateful.rule(seconds=st.sampled_from([1.0, 15.0, 60.0, 600.0]), count=st.integers(1, 5))
    def time_passes(self, seconds: float, count: int) -> None:
        self.pool.steps(count, seconds)

    @stateful.rule(node_class=_CLASSES, count=st.integers(1, 4))
    def work_comes(self, node_class: str, count: int) -> None:
        wanted = self.pool.demand.now[node_class]
        if wanted is not None:
            self.pool.demand.now[node_class] = wanted + count
        self.pool.world.take(node_class, count)

    @stateful.rule(node_class=_CLASSES)
    def work_is_done(self, node_class: str) -> None:
        for machine in self.pool.machines(node_class):
            if machine.stage is Stage.HANDED:
                self.pool.world.give_back(machine.name)
                break
        wanted = self.pool.demand.now[node_class]
        if wanted:
            self.pool.demand.now[node_class] = wanted - 1

    @stateful.rule(node_class=_CLASSES, known=st.booleans())
    def demand_is_known_or_not(self, node_class: str, known: bool) -> None:
        self.pool.demand.now[node_class] = 0 if known else None

    @stateful.rule(fault=st.sampled_from(["away", "throttled", "refused", "store", "slow", "none"]))
    def something_fails_or_nothing_does(self, fault: str) -> None:
        world = self.pool.world
        world.away, world.throttled = fault == "away", fault == "throttled"
        world.refused = {"gpu"} if fault == "refused" else set()
        self.pool.store.error = errors.UnavailableError("away") if fault == "store" else None
        self.agents.slow = fault == "slow"

    @stateful.rule(data=st.data())
    def an_agent_falls_silent(self, data: st.DataObject) -> None:
        names = sorted(self.pool.names() | self.pool.names("big"))
        if names:
            self.agents.silent.symmetric_difference_update({data.draw(st.sampled_from(names))})

    @stateful.rule(keeps=st.booleans())
    def the_controller_is_killed(self, keeps: bool) -> None:
        if not keeps:
            self.pool.store.data = None
        self.pool.restart()
        self.agents.silent.clear()
        self.forbidden = not keeps and not self.agents.slow
        self.pool.step(1.0)
        self.forbidden = False

    @stateful.invariant()
    def no_class_outgrows_its_cap(self) -> None:
        for name in ("gpu", "big"):
            held = [each for each in self.pool.machines(name) if each.stage in HELD]
            given_back = [each for each in held if each.made_at is not None]
            # One more may be there for a node past its time; work that is done gives nodes back.
            assert len(held) - len(given_back) <= _CAP + 1

    @stateful.invariant()
    def what_is_told_is_whole(self) -> None:
        for event in self.pool.controller.events:
            assert event.text

    def teardown(self) -> None:
        """When all is well again, the pool gets to its floor."""
        self.something_fails_or_nothing_does("none")
        self.agents.silent.clear()
        self.pool.demand.now = {"gpu": 0, "big": 0}
        self.pool.steps(60, 60.0)
        warm: list[Any] = [each for each in self.pool.machines() if each.stage is Stage.UP and each.admitted]
        assert len(warm) >= 2


TestChaos = Chaos.TestCase
TestChaos.settings = settings(max_examples=12, stateful_step_count=15, deadline=None)


@pytest.mark.soak
class TestChaosForLong(Chaos.TestCase):  # type: ignore[misc]
    settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
