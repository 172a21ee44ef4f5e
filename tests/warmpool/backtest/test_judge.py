"""The back-test as a whole: nobody peeks, the sums are right, ours is better than what it is judged by."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from glowplug.verbs import warmpool as verb
from warmpool import decide, errors
from warmpool.backtest import frontier, judge, policies, simulate, world
from warmpool.demand_files import Series
from warmpool.observation import Node, NodeState, Observation, Pool
from warmpool.policy import NodeClass, Policy

_DAY = 86_400.0


def _series(days: int = 4, seed: int = 1, gap: bool = True) -> Series:
    """Long rises and falls, some noise, bursts of an hour or so, and an hour that nobody knows of."""
    random = np.random.default_rng(seed)
    bins = np.arange(days * 144)
    bursts = np.repeat(random.poisson(0.15, len(bins) // 6), 6) * random.integers(0, 6, len(bins))
    rate = 25 + 18 * np.sin(2 * np.pi * bins / 144) + 2 * bursts
    if gap:
        rate[2 * 144 + 30 : 2 * 144 + 36] = np.nan
    return Series("days", 0.0, 600.0, np.maximum(rate, 0.0))


def _seen(series: Series, train_days: float = 2.0) -> policies.Seen:
    place = world.world(series, 1.0, 0)
    looks = place.looks(train_days * _DAY, place.end, 60.0)
    return policies.Seen(place, looks, world.LeadModel().draw(200, 9), 40, 300.0)


def _sizes(series: Series) -> dict[str, list[policies.Setting]]:
    seen = _seen(series)
    policy = Policy(classes={"all": NodeClass(cap=40)})
    known = policies.expected(seen, policy, policy.classes["all"])
    ratios = np.array([1e-4, 1e-6])
    return {
        "reactive": list(policies.sized(seen, policy, known.reactive, ratios)),
        "last value": list(policies.last_value(seen)),
        "trailing quantile": list(policies.trailing_quantile(seen)),
        "forecast alone": list(policies.forecast_alone(seen, policy)),
        "ours": list(policies.sized(seen, policy, known.forecast, ratios)),
    }


def test_another_future_changes_no_decision_before_it() -> None:
    """The change begins in the middle of a bin: what is left of that bin is future, too."""
    series = _series(3)
    bin_ = 2 * 144 + 50
    other = series.values.copy()
    other[bin_:] = np.where(np.arange(len(other) - bin_) % 2, 80.0, 3.0)
    changed = Series(series.name, 0.0, 600.0, other)
    before, after = (_sizes(each) for each in (series, changed))
    looks = _seen(series).looks
    places = [_seen(each).world for each in (series, changed)]
    first = min(float(place.times[np.searchsorted(place.times, 600.0 * bin_)]) for place in places)
    same = looks < first
    for name, settings in before.items():
        for one, two in zip(settings, after[name], strict=True):
            assert np.array_equal(one.least[same], two.least[same]), name
            assert np.array_equal(one.most[same], two.most[same]), name
    assert any(
        not np.array_equal(one.least, two.least)
        for one, two in zip(before["ours"], after["ours"], strict=True)
    ), "and it does change those behind it"


def test_the_world_is_the_trace() -> None:
    series = _series()
    place = world.world(series, 2.5, 7)
    ends = 600.0 * (np.arange(len(series.values)) + 1) - 1e-6
    known = ~np.isnan(series.values)
    assert np.array_equal(place.levels(ends)[known], np.ceil(series.values[known] / 2.5))
    assert np.isnan(place.seen(600.0 * np.flatnonzero(~known) + 1.0)).all()
    assert not ((place.times[:, None] // 600.0).astype(int) == np.flatnonzero(~known)).any(), "gaps are quiet"


def test_lead_times_have_the_quantiles_that_were_asked_for() -> None:
    drawn = world.LeadModel(boot_seconds=(0.0, 0.0)).draw(200_000, 3)
    assert np.quantile(drawn, [0.5, 0.9, 0.99]) == pytest.approx([22.7, 42.0, 51.8], rel=0.01)


@pytest.fixture(scope="module")
def verdict() -> judge.Verdict:
    setup = judge.Setup(1.0, train_seconds=3 * _DAY, look_seconds=60.0, cap=40)
    return judge.judge(_series(5), setup, lambda what, part: None)


def test_ours_needs_less_than_every_other_and_the_oracle_less_than_ours(verdict: judge.Verdict) -> None:
    for case in verdict.cases:
        needed = {name: frontier.idle_hours_at(points, 0.95) for name, points in case.points.items()}
        ours = needed.pop(judge.OURS)
        assert ours is not None
        assert ours < 0.8 * (needed.pop(judge.CONSTANT) or np.inf)
        assert ours > (needed.pop(judge.ORACLE) or np.inf) > 0
        for name in ("last value", "trailing quantile", "forecast alone"):
            assert needed[name] is None or ours < needed[name], name
        assert sum(point.worse for points in case.points.values() for point in points) == 0
        assert case.points["none"][0].hit_rate == 0


def test_the_frontier() -> None:
    points = [
        frontier.Point("", hit, idle, 0, 0, 0, 0, 0)
        for hit, idle in ((0.5, 10), (0.9, 20), (0.8, 30), (1, 60))
    ]
    assert [point.hit_rate for point in frontier.frontier(points)] == [0.5, 0.9, 1]
    assert frontier.idle_hours_at(points, 0.95) == pytest.approx(40)
    assert frontier.idle_hours_at(points, 0.4) == 10
    assert frontier.idle_hours_at(points[:3], 0.95) is None


def test_decide_itself_does_what_the_sweep_says() -> None:
    """`decide` in the loop with a simulated pool, node by node, against the point of the sweep that has its
    costs: the sweep's shortcut (all sizes at once) leaves nothing out that matters."""
    series = _series(3, gap=False)
    seen = _seen(series, 2.0)
    looks = seen.looks
    settings = NodeClass(cap=40, miss_cost=20_000.0)
    policy = Policy(classes={"all": settings}, release_after_seconds=0.0)
    draws = judge.draw(seen.world, judge.Setup(1.0))
    state = decide.State(policy, {"all": policies.remembered(seen, policy)})
    run = simulate.Simulation(seen.world.times, seen.world.changes, float(looks[0]), draws, returns=False)
    for number, now in enumerate(looks.tolist()):
        wanted = int(seen.world.levels(np.array([now]))[0])
        asked, at = run.warm
        nodes = [Node(f"c{each}", NodeState.BOOTING, ask, ask) for each, ask in enumerate(run.coming)]
        nodes += [
            Node(f"w{each}", NodeState.WARM, came, ask, ask, came)
            for each, (ask, came) in enumerate(zip(asked.tolist(), at.tolist(), strict=True))
        ]
        state, decision = decide.decide(state, Observation(now, (Pool("all", wanted, tuple(nodes)),)), now)
        until = float(looks[number + 1]) if number + 1 < len(looks) else seen.world.end
        run.step(now, until, decision.pools[0].size)
    known = policies.expected(seen, policy, settings)
    (swept,) = policies.sized(seen, policy, known.forecast, np.array([1 / 60.0 / 20_000.0]))
    other = simulate.Simulation(seen.world.times, seen.world.changes, float(looks[0]), draws, returns=False)
    other.run(looks, seen.world.end, swept.least, swept.most, 0)
    mine, theirs = run.outcome(), other.outcome()
    assert mine.worse == 0
    assert mine.hit_rate == pytest.approx(theirs.hit_rate, abs=0.05)
    assert mine.idle_hours == pytest.approx(theirs.idle_hours, rel=0.2)


def test_too_short_a_trace_is_refused() -> None:
    with pytest.raises(errors.InvalidInputError, match="too few"):
        judge.judge(_series(1), judge.Setup(1.0), lambda what, part: None)


def test_the_command(tmp_path: Path) -> None:
    series = _series(3)
    trace = tmp_path / "trace.csv"
    rows = "\n".join(f"{600 * each},{'' if np.isnan(v) else v}" for each, v in enumerate(series.values))
    trace.write_text(f"start_s,rate\n{rows}\n")
    document, page = tmp_path / "r.json", tmp_path / "r.html"
    result = CliRunner().invoke(
        verb.command,
        [
            *("backtest", str(trace), "--rate-per-node", "2", "--train-days", "2", "--cap", "20"),
            *("--json", str(document), "--report", str(page)),
        ],
        catch_exceptions=False,
    )
    assert result.exit_code == 0
    assert "best constant in hindsight" in result.stdout
    kept = json.loads(document.read_text())
    assert [case["returns"] for case in kept["cases"]] == [False, True]
    assert page.read_text().count("<svg") == 2
