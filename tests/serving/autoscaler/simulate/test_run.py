"""A policy against a traffic, and the verb."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from glowplug.verbs import autoscale
from serving import errors
from serving.autoscaler.observation import Observation
from serving.autoscaler.policy import Policy as Settings
from serving.autoscaler.simulate import page, policies, run, scenarios, sweep, traffic
from serving.autoscaler.simulate.fleet import Rules
from serving.autoscaler.simulate.policies import Action
from serving.autoscaler.simulate.run import Endpoint, Faults, Starts
from serving.autoscaler.simulate.traffic import Lognormal
from serving.replica import State

SLOTS = 8
RATES = [(0, 20), (120, 20), (130, 120), (240, 120), (250, 20), (600, 20)]
UP_AND_DOWN = traffic.shape("up and down", RATES, Lognormal(1.0))
QUICK = Starts(5.0, 9.0)


def endpoint(faults: Faults = run.NO_FAULTS, starts: Starts = QUICK) -> Endpoint:
    return Endpoint(SLOTS, np.ones(SLOTS + 1), Rules(SLOTS, 40), starts, most=40, initial=4, faults=faults)


def ours() -> policies.Ours:
    return policies.Ours(Settings(maximum=40, target=6.0, limit=SLOTS, start_seconds=5.0))


class Watching:
    """Asks for one more every minute, and keeps what it saw."""

    name = "watching"
    every_seconds = 1

    def __init__(self) -> None:
        self.seen: list[Observation] = []

    def decide(self, observation: Observation, now: float) -> Action:
        assert observation.at == now
        self.seen.append(observation)
        return Action(4 + int(now) // 60)


def conserved(result: run.Result) -> None:
    each = result.series
    gone = each.finished.sum() + each.rejected.sum() + each.lost.sum()
    assert result.arrived == gone + each.in_flight[-1] + each.held[-1]


def test_the_same_seed_gives_the_same_run_and_nothing_is_lost() -> None:
    one, same = (run.simulate(endpoint(), UP_AND_DOWN, ours(), 7) for _ in range(2))
    other = run.simulate(endpoint(), UP_AND_DOWN, ours(), 8)
    for name in ("arrived", "late", "ready", "wanted"):
        assert (getattr(one.series, name) == getattr(same.series, name)).all()
    assert one.replica_hours == same.replica_hours != other.replica_hours
    assert one.series.ready.max() >= 15
    assert one.series.ready[-1] < one.series.ready.max()
    conserved(one)


def test_what_fails_is_replaced_and_takes_its_requests_with_it() -> None:
    result = run.simulate(endpoint(Faults(failure_seconds=100.0)), UP_AND_DOWN, ours(), 1)
    assert result.series.lost.sum() > 0
    assert result.series.ready[-1] > 0
    conserved(result)


def test_an_observation_is_what_is_there() -> None:
    watching = Watching()
    result = run.simulate(endpoint(starts=Starts(20.0, 20.0)), UP_AND_DOWN, watching, 1)
    assert len(watching.seen) == 600 - run.SETTLE_SECONDS
    for found in watching.seen:
        second = round(found.at) - 1
        demand = found.demand
        assert demand is not None
        assert demand.in_flight == result.series.in_flight[second]
        assert demand.in_flight == sum(each.in_flight or 0 for each in found.instances)
        assert demand.rejected_per_second == result.series.rejected[second]
    latest = watching.seen[-1].instances
    assert len({each.name for each in latest}) == len(latest) == 13
    started = [each for each in latest if each.created_at > 0]
    assert all(each.ready_at == pytest.approx(each.created_at + 20.0) for each in started if each.ready_at)
    assert any(each.state is State.STARTING and each.ready_at is None for each in latest) == (
        max(each.created_at for each in latest) > 580
    )


def test_reports_come_late_and_some_not_at_all() -> None:
    watching = Watching()
    result = run.simulate(endpoint(Faults(late_seconds=3, missing=0.2)), UP_AND_DOWN, watching, 1)
    told = [found for found in watching.seen if found.demand is not None]
    for found in told:
        assert found.demand is not None
        assert found.demand.in_flight == result.series.in_flight[round(found.at) - 1 - 3]
    assert 0.1 < 1 - len(told) / len(watching.seen) < 0.3


def test_an_endpoint_without_load_reports_keeps_its_size() -> None:
    result = run.simulate(endpoint(Faults(missing=1.0)), UP_AND_DOWN, ours(), 1)
    assert set(result.series.wanted.tolist()) == {4}


def test_the_ramp_is_met_within_ten_seconds_of_its_end_with_hardly_a_rejection() -> None:
    """10 to 10,000 a second in a minute, starts of 5 s, a queue worth 10 s."""
    scenario = scenarios.build("ramp", None, 1)
    point = next(each for each in scenarios.points(scenario) if each.policy == "ours" and each.default)
    result = run.simulate(scenario.endpoint, scenario.traffic, point.make(), 1)
    enough = result.series.ready * scenarios.SLOTS >= scenario.in_flight[1 : scenario.traffic.seconds + 1]
    ramp_ends, load_ends = 180, 360
    assert enough[ramp_ends + 10 : load_ends].all()
    assert result.rejected_part < 0.005
    conserved(result)


def test_steady_load_turns_the_size_round_at_most_once_in_ten_minutes() -> None:
    scenario = scenarios.build("steady", None, 1)
    (point,) = (each for each in scenarios.points(scenario) if each.policy == "ours" and each.default)
    outcome = sweep.compare(scenario, [point], lambda _: None).outcomes[0]
    assert outcome.reversals <= 1


def test_a_limit_that_was_set_too_high_is_found_out_by_ours_alone() -> None:
    scenario = scenarios.build("thrashing", None, 1)
    assert scenario.endpoint.speed[[1, 16, 32]].tolist() == pytest.approx([1.0, 1.0, 0.25])
    unserved = {}
    for point in scenarios.points(scenario, dense=False):
        if point.policy in ("ours", "hpa"):
            result = run.simulate(scenario.endpoint, scenario.traffic, point.make(), 1)
            unserved[point.policy] = result.unserved_part
            if point.policy == "ours":
                assert result.series.limit[0] == 40
                assert max(result.series.limit[1_200:1_800]) < 24
    assert unserved["ours"] < unserved["hpa"] / 4


def test_the_verb_writes_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def small() -> tuple[traffic.Traffic, Starts]:
        return UP_AND_DOWN, QUICK

    monkeypatch.setitem(scenarios._MADE, "steady", small)
    out = tmp_path / "out"
    arguments = ["simulate", "steady", "--defaults", "--out", str(out), "--json"]
    found = CliRunner().invoke(autoscale.command, arguments, catch_exceptions=False)
    (document,) = json.loads(found.stdout)
    assert {each["policy"] for each in document["outcomes"]} == {
        "ours", "published", "hpa", "kpa", "static peak", "clairvoyant",
    }  # fmt: skip
    assert len(document["verdicts"]) == 3
    shown = (out / "index.html").read_text()
    for figure in ("frontiers", "replicas", "latency", "cost"):
        assert f"steady-{figure}.svg" in shown
        assert (out / f"steady-{figure}.svg").read_bytes().startswith(b"<?xml")
    again = CliRunner().invoke(autoscale.command, arguments, catch_exceptions=False)
    assert json.loads(again.stdout) == [document]
    (out / "other.json").write_text("{}")
    with pytest.raises(errors.DocumentError, match=r"other\.json"):
        page.write_index(out)


def test_a_scenario_that_there_is_not_is_said_with_those_that_there_are() -> None:
    found = CliRunner().invoke(autoscale.command, ["simulate", "azure-conv"])
    assert found.exit_code == 2
    assert "--traces" in found.output
    assert "flash" in found.output


def test_starts_have_their_median_and_their_tail() -> None:
    random = np.random.default_rng(1)
    drawn = sorted(Starts(20.0, 50.0).draw(random) for _ in range(20_000))
    assert drawn[10_000] == pytest.approx(20.0, rel=0.03)
    assert drawn[19_800] == pytest.approx(50.0, rel=0.08)
    assert math.isclose(Starts(5.0, 5.0).draw(random), 5.0)


def test_only_the_policies_that_are_asked_for_and_with_other_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scenarios._MADE, "steady", lambda: (UP_AND_DOWN, QUICK))
    arguments = ["simulate", "steady", "--defaults", "--policy", "ours", "--policy", "hpa", "--json"]
    unserved = []
    for starts in ("5", "9"), ("60", "120"):
        found = CliRunner().invoke(
            autoscale.command, [*arguments, "--starts", *starts], catch_exceptions=False
        )
        (document,) = json.loads(found.stdout)
        assert [each["policy"] for each in document["outcomes"]] == ["ours", "hpa"]
        assert [each["other"] for each in document["verdicts"]] == ["hpa"]
        assert "s of processor time" in found.stderr
        unserved.append(document["outcomes"][0]["late"] + document["outcomes"][0]["rejected"])
    assert unserved[0] < unserved[1]
    for wrong in ["--starts", "9", "5"], ["--policy", "reactive"]:
        found = CliRunner().invoke(autoscale.command, ["simulate", "steady", "--defaults", *wrong])
        assert found.exit_code == 2
        assert wrong[0] in found.output


def test_what_takes_long_is_run_only_by_its_name(tmp_path: Path) -> None:
    every, usual = scenarios.names(tmp_path), scenarios.usual(tmp_path)
    assert set(every) - set(usual) == {"day", "daily", "shuffled", "servegen-days"}
