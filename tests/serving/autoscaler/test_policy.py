"""The policy that a document gives, its schedules, and what contradicts itself."""

from __future__ import annotations

import datetime

import pytest

from serving import endpoint
from serving.autoscaler.policy import Policy, Schedule

DOCUMENT = """\
name: chat
engine: {kind: command, command: [serve], start_timeout_seconds: 90}
replicas: {min: 0, max: 20, target_concurrency: 10}
objectives: {p99_seconds: 2}
autoscaling:
  tolerance_percent: 20
  provisioned_concurrency: 15
  limit: {enabled: true, max: 50}
  schedules:
    - {days: [mon, fri], begins: 22:00, ends: "06:30", min: 4}
"""


def at(text: str) -> float:
    return datetime.datetime.fromisoformat(text).replace(tzinfo=datetime.UTC).timestamp()


def test_a_document_gives_its_policy() -> None:
    policy = Policy.of(endpoint.load(DOCUMENT, "e.yaml"))
    assert (policy.minimum, policy.maximum, policy.target, policy.limit) == (0, 20, 10, 20)
    assert (policy.limit_least, policy.limit_most, policy.learn_limit) == (5, 50, True)
    assert (policy.tolerance, policy.latency_seconds, policy.start_patience_seconds) == (0.2, 1, 90)
    assert policy.schedules == (Schedule(frozenset({0, 4}), 22 * 3600, 6.5 * 3600, 4),)


@pytest.mark.parametrize(
    ("when", "held"),
    [
        ("2026-11-23T21:59:59", False),  # a Monday
        ("2026-11-23T22:00:00", True),
        ("2026-11-24T06:29:59", True),
        ("2026-11-24T06:30:00", False),
        ("2026-11-24T23:00:00", False),
        ("2026-11-28T03:00:00", True),  # the Saturday after Friday's evening
        ("2026-11-29T03:00:00", False),
    ],
)
def test_a_span_over_midnight_belongs_to_the_day_on_which_it_begins(when: str, held: bool) -> None:
    (schedule,) = Policy.of(endpoint.load(DOCUMENT, "e.yaml")).schedules
    assert schedule.holds(at(when)) is held


def test_a_whole_day() -> None:
    sunday = Schedule(frozenset({6}), 0, 86_400, 1)
    assert sunday.holds(at("2026-11-29T00:00:00"))
    assert sunday.holds(at("2026-11-29T23:59:59"))
    assert not sunday.holds(at("2026-11-30T00:00:00"))


@pytest.mark.parametrize(
    "settings",
    [
        {"minimum": 2, "maximum": 1},
        {"target": 20.0, "limit": 10},
        {"target": 0.0},
        {"headroom": float("nan")},
        {"idle_seconds": -1.0},
        {"limit_least": 0},
        {"down_factor": 1.0},
        {"drain_seconds": 0.0},
    ],
)
def test_what_contradicts_itself_is_no_policy(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        Policy(**settings)  # type: ignore[arg-type]
