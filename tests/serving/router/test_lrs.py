"""Load, as a real Envoy reports it."""

from __future__ import annotations

import concurrent.futures
import dataclasses
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
            dropped.append(sum(each.dropped for each in front.router.pressure("s").totals.values()))
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
    loads.left("y", 10.1)
    assert loads.current([SERVICE], 10.1)[0].in_flight == 2


def test_pressure_is_unknown_until_every_envoy_has_spoken_or_is_long_gone() -> None:
    loads = reports.Loads()

    def unknown(at: float, *connected: str) -> str | None:
        return loads.pressure(SERVICE, connected, at).unknown

    assert unknown(0.0) == "no Envoy reports"
    loads.record(_report("activator/a", 2), 0.0)
    assert unknown(0.1) == "no Envoy reports"
    loads.joined("x", 0.0)
    assert unknown(0.1) == "the first report of x is awaited"
    loads.record(_report("x", 2), 0.5)
    loads.record(_report("y", 3), 0.5)
    assert unknown(0.6, "x", "y", "activator/a") is None
    assert unknown(0.6, "x", "y", "z") == "z is connected and does not report"
    assert unknown(3.9) == "activator/a has not reported for 3.9 s"
    loads.left("activator/a", 3.9)
    loads.record(_report("x", 2), 4.0)
    assert unknown(4.05) == "y has not reported for 3.5 s"
    loads.left("y", 4.0)
    assert unknown(4.1) == "activator/a ended its reports 0.2 s ago"
    for second in range(5, 16):
        loads.record(_report("x", 2), float(second))
    assert unknown(15.0) is None
    assert loads.pressure(SERVICE, (), 15.0).loads[0].in_flight == 2


def test_totals_grow_with_every_report_and_end_with_the_envoy() -> None:
    loads = reports.Loads()
    held = {"s": {("10.0.0.9", 80): reports.Counts(3, 4, 0)}}
    loads.record(reports.Report("activator/a", 1.0, held, {}), 0.0)
    for second in range(3):
        report = _report("x", 2)
        counts = {"s": {**report.counts["s"], **held["s"]}}  # what waits at an activator went to nobody yet
        loads.record(dataclasses.replace(report, counts=counts, dropped={"s": 7}), float(second))
    loads.record(_report("y", 2), 2.0)
    found = loads.pressure(SERVICE, (), 2.1).totals
    assert found == {"x": reports.Total(15, 21, 3.0), "y": reports.Total(5, 0, 1.0)}
    loads.left("x", 2.2)
    assert loads.pressure(SERVICE, (), 2.3).totals.keys() == {"y"}
