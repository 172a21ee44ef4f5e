"""The live proof's arithmetic: its schedule, and what it makes of answers."""

from __future__ import annotations

import random

import pytest

from e2e import autoscale
from serving.stress import arrivals
from serving.stress.judgement import Sample


def test_the_schedule_follows_the_phases() -> None:
    sent = autoscale.schedule(autoscale.PHASES, 1.0, random.Random(2))
    times = [each.at_seconds for each in sent]
    assert times == sorted(times)
    begin = 0.0
    for phase in autoscale.PHASES:
        count = sum(begin <= each < begin + phase.seconds for each in times)
        mean = (phase.first_per_second + phase.last_per_second) / 2 * phase.seconds
        assert 0.4 * mean < count < 1.4 * mean, phase
        begin += phase.seconds


def _sent(*times: float) -> list[arrivals.Arrival]:
    return [arrivals.Arrival(each, arrivals.Tokens(1, 1)) for each in times]


def test_each_second_has_what_became_of_its_requests() -> None:
    sent = _sent(0.1, 0.2, 1.5, 2.0)
    answers = [Sample(200, 0.3), Sample(200, 2.0), Sample(429, 0.1), Sample(0, 1.0)]
    counts = {"starting": 0, "draining": 0, "wanted": 1, "limit": 4, "in_flight": 0, "queued": 0, "held": 0}
    seen = [{"second": 1, "ready": 1, **counts}, {"second": 3, "ready": 2, **counts}]
    found = autoscale.series(sent, answers, seen, late=1.0)
    assert found.arrived.tolist() == [2, 1, 1, 0]
    assert (found.finished.tolist(), found.late.tolist()) == ([1, 0, 1, 0], [0, 0, 1, 0])
    assert (found.rejected.tolist(), found.lost.tolist()) == ([0, 1, 0, 0], [0, 0, 0, 1])
    assert found.ready.tolist() == [0, 1, 1, 2]
    assert found.histograms.sum() == 2


def test_a_phase_is_judged_by_when_its_requests_were_due() -> None:
    phases = (autoscale.Phase("a", 1, 1, 1), autoscale.Phase("b", 1, 1, 1))
    answers = [Sample(200, 0.3), Sample(200, 2.0), Sample(429, 0.1), Sample(0, 1.0)]
    first, second = autoscale.by_phase(phases, _sent(0.1, 0.9, 1.0, 1.5), answers, late=1.0)
    assert (first["requests"], first["late"], first["refused"], first["lost"]) == (2, 1, 0, 0)
    assert (second["requests"], second["late"], second["refused"], second["lost"]) == (2, 0, 1, 1)


@pytest.mark.parametrize(("begin", "needed", "seconds"), [(1.0, 2, 2), (3.5, 2, 1), (1.0, 5, None)])
def test_how_long_until_there_were_enough(begin: float, needed: int, seconds: int | None) -> None:
    seen = [{"second": second, "ready": ready} for second, ready in ((1, 1), (2, 1), (3, 2), (4, 3))]
    assert autoscale.enough_after(seen, begin, needed) == seconds
