"""From machines to nodes, and from decisions to orders."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from warmpool import backoff, lifecycle, orders
from warmpool.backoff import PROVIDER, Wait
from warmpool.lifecycle import Roster
from warmpool.observation import Decision, Explanation, Mode, NodeState, PoolDecision
from warmpool.orders import Admit, Hold, Order, Replace, Rules, Serve
from warmpool.provider import HELD, Machine, Stage
from warmpool.settings import Agents, Backoff, Warmth
from warmpool.warmth import Reading, Verdict

_SETTINGS = Warmth(
    agents=Agents(token_file="t"),
    stale_after_seconds=100.0,
    warm_within_seconds=1_000.0,
    recycle_after_seconds=50_000.0,
)
_WARM, _COLD = Verdict((), ()), Verdict(("base: not there",), ())
_HEARD, _SILENT = Reading(), Reading(error="no route")


def machine(name: str = "a", stage: Stage = Stage.UP, made_at: float = 0.0, **changes: object) -> Machine:
    return dataclasses.replace(Machine(name, "gpu", stage, made_at, made_at, made_at), **changes)  # type: ignore[arg-type]


def decision(
    size: int, request: int = 0, release: tuple[str, ...] = (), replace: tuple[str, ...] = ()
) -> Decision:
    why = Explanation(Mode.REACTIVE, "test", 1.0, 1.0, 0.5)
    return Decision(0.0, (PoolDecision("gpu", size, request, release, replace, why),))


def advanced(
    before: Roster, now: float, *machines: Machine, reading: Reading = _HEARD, verdict: Verdict | None = _WARM
) -> Roster:
    readings = {each.name: reading for each in machines}
    verdicts = {} if verdict is None or reading.error else {each.name: verdict for each in machines}
    return lifecycle.advance(before, machines, readings, verdicts, _SETTINGS, now)


def state(roster: Roster, name: str = "a") -> NodeState:
    return roster.records[name].state


def test_times_are_kept_from_look_to_look() -> None:
    roster = advanced(Roster(), 10.0, machine(stage=Stage.BOOTING), verdict=None)
    roster = advanced(roster, 20.0, machine(made_at=15.0), verdict=_COLD)
    roster = advanced(roster, 30.0, machine(made_at=15.0))
    roster = advanced(roster, 40.0, machine(made_at=15.0))
    (node,) = roster.nodes["gpu"]
    assert (node.state, node.booted_at, node.warm_at) == (NodeState.WARM, 15.0, 30.0)
    assert lifecycle.from_json(lifecycle.to_json(roster)).records == roster.records


def test_silence_is_death_only_after_a_while() -> None:
    roster = advanced(Roster(), 10.0, machine())
    roster = advanced(roster, 60.0, machine(), reading=_SILENT)
    assert state(roster) is NodeState.WARMING
    roster = advanced(roster, 120.0, machine(), reading=_SILENT)
    assert state(roster) is NodeState.FAILED
    assert "no route" in roster.nodes["gpu"][0].reason
    roster = advanced(roster, 130.0, machine())
    assert state(roster) is NodeState.WARM


def test_a_controller_that_was_away_itself_blames_nobody() -> None:
    roster = advanced(Roster(), 10.0, machine())
    roster = advanced(roster, 5_000.0, machine(), reading=_SILENT)
    assert state(roster) is not NodeState.FAILED


def test_who_just_came_gives_a_cold_node_its_time() -> None:
    old = machine(made_at=1.0)
    roster = advanced(Roster(), 90_000.0, old, verdict=_COLD)
    assert state(roster) is NodeState.WARMING
    for now in (90_090.0, 90_180.0, 91_001.0):
        roster = advanced(dataclasses.replace(roster, at=now - 15.0), now, old, verdict=_COLD)
    assert state(roster) is NodeState.FAILED
    roster = advanced(roster, 99_000.0, old, verdict=_COLD)
    assert state(roster) is NodeState.WARMING, "the controller was away itself"


def test_handed_over_at_the_first_look_counts_for_nothing() -> None:
    roster = advanced(Roster(), 10.0, machine(stage=Stage.HANDED), verdict=None)
    assert (roster.tally.hits, roster.tally.misses) == ({}, {})
    roster = advanced(roster, 20.0, machine(), machine("b", stage=Stage.HANDED))
    assert roster.tally.misses == {"gpu": 1}
    roster = advanced(roster, 30.0, machine(stage=Stage.HANDED), machine("b", stage=Stage.HANDED))
    assert (roster.tally.hits, roster.tally.misses) == ({"gpu": 1}, {"gpu": 1})


def test_one_node_at_a_time_is_past_its_time_and_is_to_be_had_until_then() -> None:
    old = [machine(name, made_at=1.0) for name in "ab"]
    roster = advanced(advanced(Roster(), 1.0, *old), 60_000.0, *old)
    assert roster.ageing["gpu"].name == "a"
    assert [node.name for node in roster.nodes["gpu"]] == ["b"]
    assert lifecycle.retire(roster, "gpu", 2) is None
    assert lifecycle.retire(roster, "gpu", 1) == "a"
    given = orders.plan(decision(2, request=1), old, roster, {}, {}, Rules(), 60_000.0)
    assert given == (Admit("gpu", "a", "warm"), Admit("gpu", "b", "warm"), Hold("gpu", 3, 2))


def test_the_free_are_nobody_s() -> None:
    roster = advanced(Roster(), 1.0, machine(stage=Stage.FREE))
    assert roster.nodes == {}
    given = orders.plan(decision(0), [machine(stage=Stage.FREE)], roster, {}, {}, Rules(), 1.0)
    assert given == (Admit("gpu", "a", "warm"),)


def test_an_order_to_serve_and_what_work_has_already() -> None:
    handed = machine(stage=Stage.HANDED)
    roster = advanced(Roster(), 1.0, handed, verdict=None)
    given = orders.plan(decision(0), [handed], roster, {"gpu": 4}, {}, Rules(served=True), 1.0)
    assert given == (Admit("gpu", "a", "work has it already"), Serve("gpu", 4))


def test_nothing_is_released_while_that_is_forbidden() -> None:
    held = [machine(name, admitted=True) for name in "ab"]
    roster = advanced(Roster(), 1.0, *held)
    for may, said in ((False, ()), (True, (Hold("gpu", 1, 2, ("a",)),))):
        given = orders.plan(decision(1, release=("a",)), held, roster, {}, {}, Rules(may_release=may), 1.0)
        assert given == said


_machines = st.lists(
    st.builds(
        Machine,
        st.sampled_from("abcdefgh"),
        st.just("gpu"),
        st.sampled_from(Stage),
        st.floats(0, 1_000),
        st.none() | st.floats(0, 1_000),
        st.none() | st.floats(0, 1_000),
        admitted=st.booleans(),
    ),
    unique_by=lambda each: each.name,
    max_size=8,
)


@given(_machines, st.integers(0, 6), st.booleans(), st.integers(0, 8), st.booleans(), st.data())
def test_orders_keep_their_rules(
    machines: list[Machine], request: int, blocked: bool, wanted: int, may_release: bool, data: st.DataObject
) -> None:
    roster = lifecycle.advance(
        Roster(at=0.5),
        machines,
        {each.name: _HEARD for each in machines},
        {each.name: data.draw(st.sampled_from([_WARM, _COLD])) for each in machines},
        _SETTINGS,
        900.0,
    )
    nodes = roster.nodes.get("gpu", ())
    failed = tuple(node.name for node in nodes if node.state is NodeState.FAILED)
    names = [node.name for node in nodes if node.state not in (NodeState.HANDED, NodeState.FAILED)]
    release = tuple(data.draw(st.lists(st.sampled_from(names), unique=True)) if names and not request else [])
    waits = {"gpu": Wait(1, 1_000.0, "no capacity")} if blocked else {}
    given: tuple[Order, ...] = orders.plan(
        decision(3, request, release, failed),
        machines,
        roster,
        {"gpu": wanted},
        waits,
        Rules(False, may_release),
        900.0,
    )
    stages = {each.name: each.stage for each in machines}
    held = sum(each.stage in HELD for each in machines)
    for order in given:
        if isinstance(order, Replace):
            assert stages[order.name] is not Stage.HANDED
        elif isinstance(order, Hold):
            assert not (blocked and order.count > order.before)
            assert order.count >= 0
            if not may_release:
                assert order.count >= held - len(failed) - len(roster.ageing)
    admitted = [order for order in given if isinstance(order, Admit)]
    urgent = [order for order in admitted if "waits" in order.because]
    assert len(urgent) <= max(0, wanted - sum(stage is Stage.HANDED for stage in stages.values()))
    assert not any(
        machine.admitted for machine in machines if machine.name in {each.name for each in admitted}
    )


@given(
    st.lists(st.tuples(st.sampled_from(["", "gpu", "big"]), st.booleans(), st.floats(0, 0.999)), max_size=12),
    st.floats(0, 100),
)
def test_waits_grow_are_bounded_and_end(steps: list[tuple[str, bool, float]], least: float) -> None:
    settings = Backoff(first_seconds=10.0, most_seconds=100.0)
    waits: backoff.Waits = {}
    for number, (key, ok, draw) in enumerate(steps):
        now = 1_000.0 * number
        waits = (
            backoff.succeeded(waits, key)
            if ok
            else backoff.failed(waits, key, settings, now, "why", draw, least)
        )
        if not ok:
            assert now + max(7.5, least) <= waits[key].until <= now + max(125.0, least)
        assert (key in waits) is not ok
        blocked = backoff.blocking(waits, "gpu", now)
        assert (blocked is not None) == any(
            waits[name].until > now for name in ("gpu", PROVIDER) if name in waits
        )
    assert backoff.from_json(backoff.to_json(waits)) == waits
