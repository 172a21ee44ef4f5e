"""Load, as a real Envoy reports it."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path

import pytest

from serving import service as services
from serving.router import reports
from tests.serving.router import world


def test_in_flight_issued_and_idle(tmp_path: Path) -> None:
    with world.backends("a", "b") as (a, b), world.Front(tmp_path / "e") as front:
        a.delay_seconds = b.delay_seconds = 3.0
        settings = services.RouteSettings(health_path=None)
        there = (a.value(), b.value())
        front.serve(services.Service("s", front.listen, there, settings=settings))
        world.until(front.router.loads)
        assert [(each.in_flight, each.issued) for each in front.router.loads()] == [(0, 0), (0, 0)]
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            answers = [pool.submit(front.get) for _ in range(6)]
            world.until(lambda: sum(each.in_flight for each in front.router.loads()) == 6)
            assert {answer.result()[0] for answer in answers} == {200}
        world.until(lambda: sum(each.in_flight for each in front.router.loads()) == 0)


def test_what_was_turned_away_is_demand_and_nobodys_error(tmp_path: Path) -> None:
    with world.backends("a") as (a,), world.Front(tmp_path / "e") as front:
        a.delay_seconds = 0.5
        settings = services.RouteSettings(health_path=None, max_requests=2)
        front.serve(services.Service("s", front.listen, (a.value(),), settings=settings))
        world.until(front.router.loads)
        dropped, errors = [], []
        for _ in range(3):  # over more than one interval: what comes before the first report is not in it
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                assert {status for status, _ in pool.map(lambda _: front.get(), range(16))} == {200, 429}
            world.until(lambda: sum(each.issued for each in front.router.loads()))
            dropped.append(front.router.dropped()["s"])
            errors.append(sum(each.errors for each in front.router.loads()))
            if dropped[-1]:
                break
        assert max(dropped) > 0
        assert max(errors) == 0


def test_errors_that_are_none_are_taken_out_in_proportion() -> None:
    counts = {("10.0.0.1", 80): reports.Counts(0, 9, 8), ("10.0.0.2", 80): reports.Counts(0, 9, 4)}
    kept = reports.without_dropped(counts, 6)
    assert [each.errors for each in kept.values()] == [4, 2]
    assert reports.without_dropped(counts, 0) == counts
    assert [each.errors for each in reports.without_dropped(counts, 99).values()] == [0, 0]


def _report(node: str, in_flight: int) -> reports.Report:
    return reports.Report(node, 1.0, {"s": {("10.0.0.1", 80): reports.Counts(in_flight, 5, 1)}}, {})


SERVICE = services.Service(
    "s", services.Listen(80), (services.Backend("10.0.0.1", 80), services.Backend("10.0.0.2", 80))
)


def test_loads_are_summed_and_who_is_absent_is_idle() -> None:
    loads = reports.Loads()
    loads.record(_report("x", 2), 0.0)
    loads.record(_report("y", 3), 0.5)
    assert loads.current([SERVICE], 1.0) == [
        services.Load("s", "10.0.0.1", 80, 5, 10, 2, 1.0),
        services.Load("s", "10.0.0.2", 80, 0, 0, 0, 1.0),
    ]


@pytest.mark.parametrize("late", [False, True])
def test_a_silent_envoy_makes_loads_unknown_until_it_is_gone(late: bool) -> None:
    loads = reports.Loads()
    loads.record(_report("x", 2), 10.0)
    if late:
        loads.record(_report("y", 3), 5.0)
    else:
        loads.joined("y", 10.0)
    assert loads.current([SERVICE], 10.1) == []
    loads.left("y")
    assert loads.current([SERVICE], 10.1)[0].in_flight == 2
