"""The controller: how an update goes over, what takes it back, and that traffic never goes to who is not
ready."""

from __future__ import annotations

import dataclasses
import json

from hypothesis import given
from hypothesis import strategies as st

from serving import controller
from serving.controller import Count, Decision, Phase, Rollout, Target
from serving.endpoint import Update
from serving.replica import Replica, State

UPDATE = Update(steps_percent=(10, 50, 100), step_seconds=5, min_requests=20, max_error_percent=5)
STEADY = Rollout(stable="old")


def _replicas(version: str, *states: State) -> list[Replica]:
    return [
        Replica(
            f"{version}{number}", version, ("127.0.0.1", 1 + number), state, float(number), reason="it broke"
        )
        for number, state in enumerate(states)
    ]


def _target(version: str = "new", replicas: int = 2, update: Update = UPDATE) -> Target:
    return Target(version, replicas, update)


def _decide(
    rollout: Rollout,
    target: Target,
    replicas: list[Replica],
    counts: dict[str, Count],
    now: float,
    reported_at: float | None = None,
) -> Decision:
    """With a report of this very moment, if not said otherwise."""
    seen = controller.Observation(replicas, counts, now if reported_at is None else reported_at)
    return controller.decide(rollout, target, seen, now)


OLD = _replicas("old", State.READY, State.READY)
NEW = _replicas("new", State.READY, State.READY)


def test_the_first_version_has_all_the_traffic() -> None:
    decision = _decide(Rollout(), _target(), [], {}, 1.0)
    assert decision.rollout.stable == "new"
    assert (decision.scale, decision.weights) == ({"new": 2}, {"new": 100})


def test_a_new_version_starts_beside_the_old_one_without_traffic() -> None:
    decision = _decide(STEADY, _target(), OLD, {}, 1.0)
    assert decision.rollout.phase is Phase.STARTING
    assert decision.scale == {"old": 2, "new": 2}
    assert decision.weights == {"old": 100, "new": 0}
    waiting = _decide(decision.rollout, _target(), [*OLD, NEW[0]], {}, 2.0)
    assert waiting.weights == {"old": 100, "new": 0}


def test_traffic_goes_over_in_steps_and_then_the_old_version_goes() -> None:
    rollout, weights = STEADY, []
    for now in range(40):
        decision = _decide(rollout, _target(), [*OLD, *NEW], {}, float(now))
        rollout = decision.rollout
        if not weights or weights[-1] != decision.weights:
            weights.append(decision.weights)
        if rollout.phase is not Phase.STEADY:
            assert decision.remove == ()
    assert weights == [
        {"old": 100, "new": 0},
        {"old": 90, "new": 10},
        {"old": 50, "new": 50},
        {"old": 0, "new": 100},
        {"new": 100},
    ]
    assert rollout.stable == "new"
    assert decision.remove == ("old",)


def _shifting(step: int = 1) -> Rollout:
    return Rollout("old", "new", Phase.SHIFTING, step=step, since=100.0, base=Count(50, 1))


def _rolled_back(decision: Decision, why: str) -> None:
    assert decision.rolled_back is not None
    assert why in decision.rolled_back
    assert decision.rollout.stable == "old"
    assert decision.rollout.candidate is None
    assert decision.weights == {"old": 100}
    assert decision.scale == {"old": 2}
    assert decision.remove == ("new",)


def test_errors_above_the_limit_take_it_back() -> None:
    counts = {"new": Count(50 + 20, 1 + 2)}
    decision = _decide(_shifting(), _target(), [*OLD, *NEW], counts, 101.0)
    _rolled_back(decision, "2 of 20 requests to new failed, 10.0 %")


def test_too_few_requests_are_no_verdict() -> None:
    counts = {"new": Count(50 + 19, 1 + 19)}
    decision = _decide(_shifting(), _target(), [*OLD, *NEW], counts, 101.0)
    assert decision.rolled_back is None


def test_a_step_that_was_not_reported_in_full_does_not_pass() -> None:
    """Errors that are still under way to us would be found out when nothing can be taken back."""
    for reported_at in (0.0, 104.9):
        decision = _decide(_shifting(2), _target(), [*OLD, *NEW], {}, 1_000.0, reported_at)
        assert decision.rollout == _shifting(2)
    assert _decide(_shifting(2), _target(), [*OLD, *NEW], {}, 1_000.0, 105.0).rollout.stable == "new"


def test_errors_of_the_step_before_count_no_more() -> None:
    counts = {"new": Count(1_000, 1)}
    decision = _decide(_shifting(), _target(), [*OLD, *NEW], counts, 101.0)
    assert decision.rolled_back is None


def test_counts_that_began_anew_are_taken_as_they_are() -> None:
    """The server was killed and started again: its sums are smaller than the base that it stored."""
    counts = {"new": Count(30, 0)}
    decision = _decide(_shifting(), _target(), [*OLD, *NEW], counts, 101.0)
    assert decision.rolled_back is None
    worse = _decide(_shifting(), _target(), [*OLD, *NEW], {"new": Count(30, 30)}, 101.0)
    _rolled_back(worse, "30 of 30")


def test_failed_starts_take_it_back_and_say_why() -> None:
    starting = Rollout("old", "new", Phase.STARTING, since=100.0)
    failed = _replicas("new", State.FAILED, State.FAILED, State.FAILED)
    decision = _decide(starting, _target(), [*OLD, *failed], {}, 101.0)
    _rolled_back(decision, "it broke")
    assert _decide(starting, _target(), [*OLD, *failed[:2]], {}, 101.0).rolled_back is None


def test_replicas_that_are_never_ready_take_it_back() -> None:
    starting = Rollout("old", "new", Phase.STARTING, since=100.0)
    slow = [*OLD, *_replicas("new", State.READY, State.STARTING)]
    late = 100.0 + UPDATE.ready_seconds + 1
    _rolled_back(_decide(starting, _target(), slow, {}, late), "only 1 of 2 replicas of new")


def test_a_candidate_of_which_nobody_is_ready_any_more_is_taken_back_at_once() -> None:
    gone = [*OLD, *_replicas("new", State.STARTING, State.FAILED)]
    _rolled_back(_decide(_shifting(), _target(), gone, {}, 101.0), "no replica of new is ready")


def test_one_replica_that_died_stops_the_shift_and_does_not_take_it_back() -> None:
    hurt = [*OLD, *_replicas("new", State.READY, State.FAILED)]
    decision = _decide(_shifting(), _target(), hurt, {}, 1_000.0)
    assert decision.rolled_back is None
    assert decision.weights == {"old": 50, "new": 50}


def test_the_old_document_in_the_middle_of_an_update_ends_it() -> None:
    decision = _decide(_shifting(), _target("old"), [*OLD, *NEW], {}, 101.0)
    assert decision.weights == {"old": 100}
    assert decision.remove == ("new",)
    assert decision.rolled_back is None


def test_a_third_version_takes_the_candidate_s_place() -> None:
    decision = _decide(_shifting(), _target("third"), [*OLD, *NEW], {}, 101.0)
    assert decision.rollout.candidate == "third"
    assert decision.weights == {"old": 100, "third": 0}
    assert decision.remove == ("new",)


_STATES = st.sampled_from(list(State))
_LOOKS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c"]),  # the version wanted
        st.dictionaries(st.sampled_from(["a", "b", "c"]), st.lists(_STATES, max_size=3)),
        st.dictionaries(
            st.sampled_from(["a", "b", "c"]), st.builds(Count, st.integers(0, 100), st.integers(0, 100))
        ),
        st.floats(0, 20),
    ),
    max_size=30,
)


@given(_LOOKS, st.integers(0, 3))
def test_whatever_is_seen_the_rules_hold(looks: list[object], wanted: int) -> None:
    rollout, now = Rollout(), 0.0
    for version, states, counts, passed in looks:  # type: ignore[misc]
        now += passed
        replicas = [each for name, of in states.items() for each in _replicas(name, *of)]
        decision = _decide(rollout, _target(version, wanted), replicas, counts, now)
        assert sum(decision.weights.values()) == controller.WHOLE
        assert decision.rollout.stable in decision.scale
        assert decision.scale[decision.rollout.stable] == wanted
        assert not set(decision.remove) & (set(decision.weights) | set(decision.scale))
        for name, weight in decision.weights.items():
            ready = sum(each.version == name and each.state is State.READY for each in replicas)
            if weight and name == decision.rollout.candidate and decision.rollout.phase is not rollout.phase:
                assert ready >= wanted, "traffic to a version that was not ready as a whole"
        # What is stored is what was decided.
        stored = json.loads(json.dumps(decision.rollout.to_json()))
        assert Rollout.from_json(stored) == decision.rollout
        rollout = decision.rollout
        if decision.rolled_back is not None:
            assert dataclasses.replace(rollout, since=0.0) == Rollout(stable=rollout.stable)
