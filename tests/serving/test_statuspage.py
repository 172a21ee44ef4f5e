"""The page and the metrics, whatever an engine put into a text."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st

from serving import endpoint, endpointmetrics, statusdocument, statuspage, traffic
from serving.autoscaler import explanation, observation, shell
from serving.history import History
from serving.replica import Replica, State
from serving.router.reports import Counts, Report
from tests.serving.served import document


def _autoscaling(reason: str) -> dict[str, Any]:
    """What a shell says after two decisions that are all `reason`."""
    because = observation.Explanation(
        reason, 5.0, 6.0, reason, (observation.Clamp("maximum", 4, 2),), note=reason
    )
    sample = shell.Sample(1.0, 5.0, 1.0, 0.0, 1, 1, 2, 16)
    return {
        "mode": "on",
        "replicas": 2,
        "limit": 16,
        "target": 8.0,
        "demand": dataclasses.asdict(observation.Demand(4.0, 1.0, rejected_per_second=2.5)),
        "because": dataclasses.asdict(because),
        "words": explanation.in_words(because),
        "decisions": 2,
        "changes": {"up": 1, "down": 0},
        "decision_seconds": 0.0004,
        "utilization": {"gpu": 0.97},
        "series": [dataclasses.asdict(dataclasses.replace(sample, at=at)) for at in (1.0, 2.0)],
    }


def made_status(reason: str = "", phases: dict[str, float] | None = None) -> dict[str, Any]:
    seen = traffic.Traffic("chat")
    replicas = [
        Replica("r1", "v", ("127.0.0.1", 1), State.READY, 1.0, 4.0, phases or {}, "", reason),
        Replica("r2", "v", ("127.0.0.1", 2), State.FAILED, 1.0, reason=reason),
    ]
    seen.settle(replicas)
    for at in range(3):
        seen.report(Report("envoy", 1.0, {"chat": {("127.0.0.1", 1): Counts(2, 10, 1)}}, {}), float(at))
    history = History().with_document(endpoint.load(yaml.safe_dump(document()), "e"), 1.0)
    view = statusdocument.View(
        name="chat",
        pid=1,
        started_at=1.0,
        now=time.time(),
        address=("127.0.0.1", 80),
        history=history,
        weights={"v": 100},
        replicas=replicas,
        traffic=seen,
        events=[statusdocument.Event(1.0, reason)],
        envoys=[],
        replicas_wanted=2,
        limit=16,
        autoscaling=_autoscaling(reason),
    )
    return statusdocument.make(view)


def test_clients_are_told_what_the_model_is_called() -> None:
    assert made_status()["model_name"] == "chat"  # no model_name: the endpoint's own


def test_requests_are_summed_by_replica_and_version() -> None:
    status = made_status()
    first = status["replicas"][0]
    assert (first["in_flight"], first["issued"], first["errors"]) == (2, 30, 3)
    assert status["versions"] == {"v": {"issued": 30, "errors": 3}}
    text = endpointmetrics.render([status]).decode()
    assert 'glowplug_endpoint_requests_total{endpoint="chat",version="v"} 30' in text
    assert 'glowplug_endpoint_failed_requests_total{endpoint="chat",version="v"} 3' in text


def test_what_is_unknown_of_demand_is_left_out() -> None:
    status = made_status()
    text = endpointmetrics.render([status]).decode()
    assert 'glowplug_autoscaler_rejected_per_second{endpoint="chat"} 2.5' in text
    assert 'glowplug_autoscaler_clamped{endpoint="chat",rule="maximum"} 1' in text
    assert "glowplug_autoscaler_service_seconds" not in text
    status["autoscaling"]["demand"] = None
    text = endpointmetrics.render([status]).decode()
    assert "glowplug_autoscaler_in_flight" not in text
    assert 'glowplug_autoscaler_demand_known{endpoint="chat"} 0' in text
    status["autoscaling"] = {"mode": "off"}
    text = endpointmetrics.render([status]).decode()
    assert 'glowplug_autoscaler_mode{endpoint="chat",mode="off"} 1' in text
    assert "Nothing is decided" in statuspage.render(status)


_PHASES = st.dictionaries(st.text(max_size=5), st.floats(0, 10), max_size=4)


@given(st.text(alphabet="<>&\"'ab", max_size=30), _PHASES)
def test_no_text_becomes_markup(reason: str, phases: dict[str, float]) -> None:
    page = statuspage.render(made_status(f"<script>{reason}", phases))
    assert "<script" not in page
    assert "http-equiv" in page


def test_quantiles_are_envoy_s() -> None:
    stats = b"""{"stats": [{"histograms": {"supported_quantiles": [0, 50, 95, 99, 100], "computed_quantiles":
    [
        {"name": "x", "values": [{"interval": null, "cumulative": 1}, {"interval": 2, "cumulative": 20},
        {"interval": 2, "cumulative": 30}, {"interval": 2, "cumulative": 40}, {"interval": 2, "cumulative":
        50}]}]}}]}"""
    assert statusdocument.quantiles(stats) == {"p50": 0.02, "p95": 0.03, "p99": 0.04}
    for none in (b"", b"[]", b'{"stats": []}', b'{"stats": [{"histograms": {}}]}'):
        assert statusdocument.quantiles(none) == {}
