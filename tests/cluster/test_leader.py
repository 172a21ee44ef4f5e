"""One leads at a time: two candidates, one of them frozen, an API server that is away."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest

from cluster import objects
from cluster.api import Api
from cluster.leader import Leader
from cluster.lease import Timing
from tests.cluster.waiting import until
from tests.fixtures.kubernetes_api import KubernetesApi

_QUICK = Timing(duration_seconds=1, deadline_seconds=0.7, retry_seconds=0.05)
"""The shortest that a Lease can say."""


@contextlib.contextmanager
def _candidate(api: Api, name: str) -> Iterator[tuple[Leader, list[bool]]]:
    told: list[bool] = []
    leader = Leader(api, "lead", timing=_QUICK, identity=name, on_change=told.append)
    leader.start()
    try:
        yield leader, told
    finally:
        leader.stop()


def test_the_second_waits_and_follows_at_once_when_the_first_lets_go(api: Api) -> None:
    with _candidate(api, "a") as (first, told):
        until(first.holds)
        with _candidate(api, "b") as (second, _):
            until(lambda: second.holder == "a")
            assert not second.holds()
            first.stop()
            assert not first.holds()
            until(second.holds)
            assert second.term > first.term
        assert told == [True, False]
    assert api.get(objects.LEASE, "lead").text("spec", "holderIdentity") == ""


def test_a_frozen_leader_knows_at_once_that_it_leads_no_more(api: Api) -> None:
    now = [0.0]
    frozen = Leader(api, "lead", timing=_QUICK, identity="frozen", clock=lambda: now[0])
    frozen._attempt()
    assert frozen.holds()
    with _candidate(api, "other") as (other, _):
        until(other.holds)  # by its own clock the lease ran out; the frozen one's stood still
        now[0] += 100.0  # it thaws
        assert not frozen.holds(), "before it asked anybody"
        frozen._attempt()
        assert not frozen.holds()
        assert frozen.holder == "other"
        assert other.holds()


def test_wall_clocks_do_not_matter(api: Api, kubernetes_api: KubernetesApi) -> None:
    """The other's renewTime lies a day behind, and it is alive: its lease changes."""
    with _candidate(api, "a") as (first, _):
        until(first.holds)
        stop = threading.Event()

        def skew(item: dict[str, dict[str, str]]) -> None:
            item["spec"]["renewTime"] = "2001-01-01T00:00:00.000000Z"

        with _candidate(api, "b") as (second, told):
            for _ in range(30):
                kubernetes_api.modify("coordination.k8s.io/v1/leases", "default", "lead", skew)
                stop.wait(0.05)
                assert not second.holds()
            assert told == []


def test_without_the_api_server_leadership_ends_by_the_clock(
    api: Api, kubernetes_api: KubernetesApi, caplog: pytest.LogCaptureFixture
) -> None:
    with _candidate(api, "a") as (leader, told):
        until(leader.holds)
        kubernetes_api.refuse("GET", "/leases", 503, "away")
        until(lambda: told == [True, False])
        assert not leader.holds()
        assert "away" in str(leader.trouble())
        kubernetes_api.accept()
        until(leader.holds)
        assert leader.trouble() is None
    assert caplog.text.count("away") == 1, "said once, not with each attempt"


def test_a_lease_that_was_taken_between_look_and_write_is_not_led(
    api: Api, kubernetes_api: KubernetesApi
) -> None:
    api.create(objects.LEASE, {"metadata": {"name": "lead"}, "spec": {}})
    leader = Leader(api, "lead", timing=_QUICK, identity="late")
    look = leader._look

    def slow_look() -> object:
        found = look()
        kubernetes_api.modify(
            "coordination.k8s.io/v1/leases",
            "default",
            "lead",
            lambda item: item["spec"].update(holderIdentity="fast", leaseDurationSeconds=60),
        )
        return found

    leader._look = slow_look  # type: ignore[assignment, method-assign]
    leader.start()
    try:
        until(lambda: leader.holder == "fast")
        assert not leader.holds()
    finally:
        leader.stop()
    assert api.get(objects.LEASE, "lead").text("spec", "holderIdentity") == "fast", "not ours to release"
