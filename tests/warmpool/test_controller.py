"""A pool's rounds: growth, hand-over, faults, restarts."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.warmpool.harness import SIZE_BYTES, TEXT, WARMTH, Pool
from warmpool import errors
from warmpool.observation import NodeState
from warmpool.orders import Admit, Hold, Replace
from warmpool.provider import Stage
from warmpool.warmth import Cached, Task, Verb


def grown(pool: Pool) -> Pool:
    """With its floor of two warm nodes."""
    pool.steps(12)
    assert [(each.stage, each.admitted) for each in pool.machines()] == [(Stage.UP, True)] * 2
    return pool


def test_a_pool_grows_to_its_floor_and_is_admitted() -> None:
    pool = grown(Pool())
    assert pool.names("big") == set()
    report = pool.step()
    assert report.given == ()
    assert [node.state for node in report.roster.nodes["gpu"]] == [NodeState.WARM] * 2


def test_a_node_is_admitted_only_once_its_agent_has_everything() -> None:
    pool = Pool(TEXT + WARMTH, with_agents=True)
    assert pool.agents is not None
    pool.agents.slow = True
    report = pool.steps(12)
    assert not any(each.admitted for each in pool.machines())
    assert {node.state for node in report.roster.nodes["gpu"]} == {NodeState.WARMING}
    assert all("base:v1: 0 of" in node.reason for node in report.roster.nodes["gpu"])
    for name in pool.names():
        pool.agents.cached[name]["base:v1"] = Cached(SIZE_BYTES, SIZE_BYTES, True, False, True)
    pool.step()
    assert not any(each.admitted for each in pool.machines()), "what is not pinned may go again"
    pool.step()
    assert all(each.admitted for each in pool.machines())


def test_work_that_waits_is_let_onto_cold_nodes_when_nothing_warm_is_left() -> None:
    pool = Pool(TEXT + WARMTH, with_agents=True)
    assert pool.agents is not None
    pool.agents.slow = True
    pool.steps(12)
    pool.demand.now["gpu"] = 1
    report = pool.step()
    admitted = [each for each in report.given if isinstance(each, Admit)]
    assert len(admitted) == 1
    assert "waits" in admitted[0].because
    assert pool.world.take("gpu", 1) == [admitted[0].name]
    report = pool.step()
    assert (report.roster.tally.hits, report.roster.tally.misses) == ({}, {"gpu": 1})


def test_warm_nodes_that_are_taken_are_hits_and_are_asked_for_again() -> None:
    pool = grown(Pool())
    pool.demand.now["gpu"] = 2
    assert len(pool.world.take("gpu", 2)) == 2
    report = pool.step()
    assert report.roster.tally.hits == {"gpu": 2}
    assert report.roster.tally.misses == {}
    assert sum(each.stage is Stage.REQUESTED for each in pool.machines()) >= 2
    assert pool.steps(2).roster.tally.hits == {"gpu": 2}, "counted once"


def test_where_nobody_takes_nodes_they_are_handed_over() -> None:
    pool = grown(Pool(hand_over="served"))
    pool.demand.now["gpu"] = 1
    pool.step()
    assert sum(each.stage is Stage.HANDED for each in pool.machines()) == 1


def test_images_follow_the_endpoints_and_go_when_nobody_wants_them() -> None:
    pool = Pool(TEXT + WARMTH, with_agents=True)
    assert pool.agents is not None
    pool.demand.images = {"gpu": {"llm:v1": 0.9, "rare:v1": 0.1}}
    report = pool.steps(12)
    assert [each.image for each in report.images["gpu"]] == ["base:v1", "llm:v1", "rare:v1"]
    assert [each.image for each in report.images["big"]] == ["base:v1"]
    assert all(set(pool.agents.cached[name]) == {"base:v1", "llm:v1", "rare:v1"} for name in pool.names())
    name = min(pool.names())
    pool.agents.cached[name]["somebody's"] = Cached(1, 1, True, True, True)
    pool.demand.images = {"gpu": {"llm:v2": 1.0}}
    pool.steps(3)
    assert set(pool.agents.cached[name]) == {"base:v1", "llm:v2", "somebody's"}
    unpinned = {task.image for _, task in pool.agents.done if task.verb is Verb.UNPIN}
    assert unpinned == {"llm:v1", "rare:v1"}
    before = len(pool.agents.done)
    pool.steps(3)
    assert len(pool.agents.done) == before, "nothing is asked for twice"


def test_a_node_whose_agent_is_silent_is_replaced() -> None:
    pool = Pool(TEXT + WARMTH, with_agents=True)
    assert pool.agents is not None
    pool.steps(12)
    broken, kept = sorted(pool.names())
    pool.agents.silent.add(broken)
    pool.steps(4)
    assert pool.names() == {broken, kept}, "one silence is no death"
    pool.steps(10)
    assert broken not in pool.names()
    assert kept in pool.names()
    assert len(pool.names()) == 2


def test_a_node_that_never_gets_warm_is_replaced() -> None:
    pool = Pool(TEXT + WARMTH, with_agents=True)
    assert pool.agents is not None
    pool.steps(12)
    pool.agents.slow = True
    first = pool.names()
    for name in first:
        pool.agents.cached[name].clear()
    report = pool.steps(70)
    assert first.isdisjoint(pool.names())
    replaced = [each.text for each in pool.controller.events if "taken away" in each.text]
    assert any("not warm" in text for text in replaced), report


def test_a_node_past_its_time_goes_when_another_is_warm() -> None:
    pool = Pool(TEXT + WARMTH, with_agents=True)
    pool.steps(12)
    old = pool.names()
    pool.steps(1, 86_400.0)
    for _ in range(40):
        pool.step()
        warm = [each for each in pool.machines() if each.admitted and each.stage is Stage.UP]
        assert len(warm) >= 2, "there is no dip"
    assert old.isdisjoint(pool.names())
    assert len(pool.names()) == 2


# -- faults --------------------------------------------------------------------------------------------


def test_unknown_demand_releases_nothing() -> None:
    pool = grown(Pool())
    pool.demand.now["gpu"] = 6
    pool.world.take("gpu", 2)
    pool.steps(8)
    before = pool.names()
    pool.demand.now["gpu"] = None
    pool.steps(60)
    assert before <= pool.names()


def test_a_provider_that_is_away_is_left_alone_and_found_again() -> None:
    pool = grown(Pool())
    pool.world.away = True
    asked = [pool.step() for _ in range(20)]
    assert all(report.given == () for report in asked)
    assert all("provider" in report.trouble for report in asked)
    tries = sum("left alone" not in report.trouble["provider"] for report in asked)
    assert 1 < tries < 8, "less and less often"
    pool.world.away = False
    report = pool.steps(8)
    assert not report.trouble
    assert len(pool.names()) == 2


def test_throttling_stops_the_round() -> None:
    pool = Pool()
    pool.steps(1)
    pool.world.throttled = True
    pool.steps(2)
    assert pool.controller.errors_total == {("", "ThrottledError"): 1}
    pool.world.throttled = False
    pool.steps(12)
    assert len(pool.names()) == 2


def test_no_capacity_holds_up_one_class_only() -> None:
    pool = Pool(TEXT.replace("big: {floor: 0", "big: {floor: 1"))
    pool.world.refused.add("gpu")
    reports = [pool.step() for _ in range(12)]
    assert pool.names() == set()
    assert len(pool.names("big")) == 1
    seen = [each.observation.pools[0] for each in reports if each.observation is not None]
    assert any(each.blocked_until is not None and "no machine of" in each.blocked for each in seen)
    tries = pool.controller.errors_total["gpu", "CapacityError"]
    assert 1 < tries < 7, "backed off"
    pool.world.refused.clear()
    pool.steps(20)
    assert len(pool.names()) == 2


def test_machines_that_do_not_boot_are_replaced_less_and_less_often() -> None:
    pool = Pool()
    pool.world._natures["gpu"] = dataclasses.replace(pool.world.nature("gpu"), failure_share=1.0)
    pool.steps(120)
    assert 4 <= pool.world._count <= 30, "not one after another"
    assert pool.controller.errors_total["gpu", "UnavailableError"] >= 3
    pool.world._natures["gpu"] = dataclasses.replace(pool.world.nature("gpu"), failure_share=0.0)
    pool.steps(40)
    assert sum(each.admitted for each in pool.machines()) == 2


def test_a_class_without_capacity_is_tried_elsewhere() -> None:
    pool = Pool(TEXT.replace("gpu: {floor: 2", "gpu: {substitutes: [big], floor: 2"))
    pool.world.refused.add("gpu")
    pool.steps(20)
    assert len(pool.names("big")) >= 1


def test_leadership_that_is_lost_in_the_middle_stops_the_rest() -> None:
    pool = Pool(TEXT.replace("big: {floor: 0", "big: {floor: 1"))
    pool.election.after = 2  # for the round, and for its first order
    report = pool.step()
    assert len(pool.names()) + len(pool.names("big")) == max(
        each.count for each in report.given if isinstance(each, Hold) and each not in report.failed
    )
    assert [each for each in report.given if each in report.failed] == list(report.given[1:])
    report = pool.step()
    assert (report.leading, report.given) == (False, ())


def test_a_follower_does_nothing() -> None:
    pool = Pool()
    pool.election.held = False
    assert pool.steps(5).given == ()
    assert pool.machines() == []


def test_a_dry_run_changes_nothing() -> None:
    pool = Pool()
    pool.controller._dry_run = True
    report = pool.step()
    assert [each for each in report.given if isinstance(each, Hold)] == [Hold("gpu", 2, 0)]
    assert pool.machines() == []
    assert pool.store.data is None


# -- restarts ------------------------------------------------------------------------------------------


def test_a_successor_goes_on_where_the_last_one_was() -> None:
    pool = grown(Pool())
    pool.demand.now["gpu"] = 5
    pool.world.take("gpu", 2)
    pool.steps(8)
    before, hits = pool.names(), pool.step().roster.tally.hits
    pool.restart()
    reports = [pool.step() for _ in range(8)]
    assert before <= pool.names()
    assert not any(isinstance(each, Replace) for report in reports for each in report.given)
    assert reports[0].roster.tally.hits == hits
    assert {record.since for record in reports[0].roster.records.values()} != {pool.now}


def test_a_successor_without_state_releases_nothing_for_a_while() -> None:
    pool = grown(Pool())
    for _ in range(4):
        pool.world.make("gpu")
    pool.steps(8)
    assert len(pool.names()) >= 6 - 4
    for _ in range(8 - len(pool.names())):
        pool.world.make("gpu")
    pool.store.data = None
    pool.restart()
    pool.steps(30)
    assert len(pool.names()) == 8, "adopted"
    pool.steps(60)
    assert len(pool.names()) == 2


def test_state_that_cannot_be_read_is_not_written_over() -> None:
    pool = grown(Pool())
    kept = pool.store.data
    pool.restart()
    pool.store.error = errors.UnavailableError("the API server is away")
    report = pool.steps(3)
    assert "away" in report.trouble["state"]
    assert report.given == ()
    pool.store.error = None
    pool.step()
    assert pool.store.data is not None
    assert kept is not None
    assert not any("begins without" in each.text for each in pool.controller.events)


def test_state_that_cannot_be_written_stops_nobody_and_is_told() -> None:
    pool = Pool()
    pool.step()
    pool.store.error = errors.UnavailableError("the API server is away")
    pool.demand.now["gpu"] = 1
    report = pool.steps(12)
    assert "state" in report.trouble or len(pool.names()) == 2
    assert len(pool.names()) >= 2


@pytest.mark.parametrize("data", [b"", b"nonsense", b"\x1f\x8b\x08\x00"])
def test_state_that_is_damaged_is_adopted_anew(data: bytes) -> None:
    pool = grown(Pool())
    before = pool.names()
    pool.store.data = data
    pool.restart()
    pool.steps(4)
    assert pool.names() == before
    assert any("is not used" in each.text for each in pool.controller.events)


class _Killed(BaseException):
    """What SIGKILL is to a controller: nothing of it runs on."""


@hypothesis_settings(max_examples=30, deadline=None)
@given(st.integers(0, 12), st.integers(0, 25), st.integers(0, 6))
def test_a_controller_that_is_killed_at_any_call_releases_nothing(steps: int, call: int, wanted: int) -> None:
    pool = Pool()
    pool.demand.now["gpu"] = wanted
    pool.steps(steps + 1)
    pool.world.take("gpu", wanted)
    removed: list[str] = []
    calls = [call]
    remove, check = pool.world.remove, pool.world.check

    def dying() -> None:
        if calls[0] == 0:
            raise _Killed
        calls[0] -= 1
        check()

    pool.world.remove = lambda name: (removed.append(name), remove(name))[0]  # type: ignore[method-assign]
    pool.world.check = dying  # type: ignore[method-assign]
    try:
        pool.steps(3)
    except _Killed:
        pool.world.check = check  # type: ignore[method-assign]
    calls[0] = 10_000
    before = pool.names()
    removed.clear()
    pool.restart()
    pool.steps(4)
    assert before <= pool.names()
    assert removed == []


def test_tasks_are_ordered_so_that_there_is_room() -> None:
    pool = Pool(TEXT + WARMTH, with_agents=True)
    assert pool.agents is not None
    pool.demand.images = {"gpu": {"old:v1": 1.0}}
    pool.steps(12)
    pool.agents.done.clear()
    pool.demand.images = {"gpu": {"new:v1": 1.0}}
    pool.step()
    name = pool.agents.done[0][0]
    mine = [task for node, task in pool.agents.done if node == name]
    assert mine == [Task(Verb.UNPIN, "old:v1"), Task(Verb.PREFETCH, "new:v1"), Task(Verb.PIN, "new:v1")]


def test_a_report_of_a_settled_pool_says_why() -> None:
    pool = grown(Pool())
    report = pool.step()
    assert report.decision is not None
    (gpu,) = [each for each in report.decision.pools if each.node_class == "gpu"]
    assert gpu.explanation.clamps[0].rule == "floor"
