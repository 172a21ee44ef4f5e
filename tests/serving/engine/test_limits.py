"""Limits in tokens and units at a real engine's port: what is charged, refused, clamped and shown."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serving.engine import running
from tests.serving.engine.running import Engine

COEFFICIENTS = {"request": 0.5, "input": 0.25, "output": 0.125, "cached": 0.0}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = running.stub(TOKEN_SECONDS="0.002")
    with running.engine(tmp_path_factory.mktemp("limits"), engine=engine, limit=4) as found:
        found.wait_for("ready")
        yield found


@pytest.fixture
def engine(shared: Engine) -> Iterator[Engine]:
    yield shared
    ration(shared)


def ration(engine: Engine, output_tokens: int | None = None, units: bool = False, **tenants: Any) -> Any:
    """What each has had."""
    document = {
        "tenants": tenants,
        "output_tokens": output_tokens,
        "coefficients": COEFFICIENTS if units else None,
    }
    status, answer = engine.tell("POST", "/rations", document)
    assert status == 200, answer
    return answer["tenants"]


def complete(engine: Engine, tenant: str, tokens: int, **more: Any) -> tuple[int, Any, bytes]:
    body = {"max_tokens": tokens, "prompt": "one two three", **more}
    return engine.ask("/v1/completions", body, {"x-glowplug-tenant": tenant})


def test_a_request_is_charged_what_the_engine_says(engine: Engine) -> None:
    rations = {"acme": {"per_second": 1_000.0}}
    ration(engine, **rations)
    assert complete(engine, "acme", 10)[0] == 200
    assert ration(engine, **rations)["acme"] == {
        "admitted": 1,
        "charged": pytest.approx(13),
        "refused": 0,
        "refused_cost": 0.0,
    }
    status, headers, body = complete(engine, "acme", 20, stream=True)
    assert (status, body.count(b"data:"), b"usage" in body) == (200, 21, False)
    assert headers["content-type"].startswith("text/event-stream")
    assert ration(engine, **rations)["acme"]["charged"] == pytest.approx(36)
    body = complete(engine, "acme", 2, stream=True, stream_options={"include_usage": True})[2]
    assert b'"usage"' in body  # who asked for it gets it
    assert ration(engine, **rations)["acme"]["charged"] == pytest.approx(41)


def test_who_has_used_up_its_tokens_is_told_which_and_when(engine: Engine) -> None:
    rations = {"small": {"per_second": 5.0}, "large": {}}
    ration(engine, **rations)
    assert complete(engine, "small", 300)[0] == 200  # in debt now, for a minute
    status, headers, body = complete(engine, "small", 1)
    error = json.loads(body)["error"]
    assert (status, error["type"], error["limit"]) == (429, "rate_limit_exceeded", "tokens_per_second")
    assert 30 < int(headers["retry-after"]) <= 61
    assert "small" in error["message"]
    for tenant in ("large", "nobody"):
        assert complete(engine, tenant, 1)[0] == 200
    assert ration(engine, **rations)["small"]["refused"] == 1
    assert engine.ask("/v1/completions", {"max_tokens": 1, "prompt": "x"})[0] == 200


def test_priority_and_length_are_clamped_for_everybody(engine: Engine) -> None:
    ration(engine, output_tokens=7, back={"priority": 5})
    for tenant, priority, sent in (("nobody", -9, 0), ("back", -9, 5), ("back", 6, 6)):
        assert complete(engine, tenant, 500, priority=priority)[0] == 200
        passed = json.loads(engine.ask("/last")[2])
        assert (passed["priority"], passed["max_tokens"]) == (sent, 7)
    assert complete(engine, "back", 3)[0] == 200
    assert json.loads(engine.ask("/last")[2])["priority"] == 5
    echoed = json.loads(engine.ask("/echo", {"priority": "high"})[2])  # not a field of the OpenAI API
    assert echoed["bytes"] == len(b'{"priority": "high"}')


def test_units_are_in_flight_while_requests_are(engine: Engine) -> None:
    ration(engine, units=True)
    before = engine.status()["counters"]["unit_micros"]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(complete, engine, "nobody", 400, prompt="x " * 40)
        running.until(lambda: engine.status()["units_in_flight"] > 0.5)
        assert answer.result()[0] == 200
    status = engine.status()
    assert status["units_in_flight"] == 0
    assert status["counters"]["unit_micros"] - before == pytest.approx(1e6 * (0.5 + 0.25 * 40 + 0.125 * 400))
    assert "glowplug_engine_in_flight_units 0.0" in engine.ask("/metrics")[2].decode()


def test_a_tenant_can_be_limited_in_units(engine: Engine) -> None:
    rations = {"acme": {"per_second": 2.0, "measure": "units"}}
    ration(engine, units=True, **rations)
    assert complete(engine, "acme", 8)[0] == 200
    assert ration(engine, units=True, **rations)["acme"]["charged"] == pytest.approx(0.5 + 0.75 + 1.0)
    complete(engine, "acme", 100)
    status, _, body = complete(engine, "acme", 8)
    assert (status, json.loads(body)["error"]["limit"]) == (429, "units_per_second")


def test_what_the_engine_did_not_do_is_not_charged(engine: Engine) -> None:
    rations = {"acme": {"per_second": 1_000.0}}
    ration(engine, **rations)
    tenant = {"x-glowplug-tenant": "acme"}
    assert engine.ask("/status/422", {"prompt": "word " * 90}, tenant)[0] == 422
    assert engine.ask("/v1/nowhere", {"prompt": "word " * 90}, tenant)[0] == 404
    engine.tell("POST", "/limit", {"in_flight": 1, "queue_requests": 0})
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        full = pool.submit(complete, engine, "nobody", 300)
        running.until(lambda: engine.status()["in_flight"] == 1)
        status, _, body = complete(engine, "acme", 50)
        assert (status, json.loads(body)["error"]["limit"]) == (429, "in_flight")
        assert full.result()[0] == 200
    engine.tell("POST", "/limit", {"in_flight": 4, "queue_requests": 64})
    assert ration(engine, **rations)["acme"]["charged"] == pytest.approx(0)


def test_who_leaves_a_stream_pays_for_what_it_got(engine: Engine) -> None:
    rations = {"acme": {"per_second": 1e6}}
    ration(engine, **rations)
    client = http.client.HTTPConnection("127.0.0.1", engine.port)
    with contextlib.closing(client):
        body = json.dumps({"max_tokens": 100_000, "prompt": "one two", "stream": True})
        headers = {"content-type": "application/json", "x-glowplug-tenant": "acme"}
        client.request("POST", "/v1/completions", body, headers)
        answer = client.getresponse()
        for _ in range(100):
            answer.readline()
        running.until(lambda: engine.status()["in_flight"] == 1)
    running.until(lambda: engine.status()["in_flight"] == 0)
    charged = ration(engine, **rations)["acme"]["charged"]
    assert 50 <= charged < 100_000


def test_an_answer_without_usage_is_measured_by_its_bytes(engine: Engine) -> None:
    rations = {"acme": {"per_second": 1e6}}
    ration(engine, **rations)
    assert engine.ask("/echo", {"text": "x" * 4_000}, {"x-glowplug-tenant": "acme"})[0] == 200
    assert 500 < ration(engine, **rations)["acme"]["charged"] < 5_000


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"tenant": {}},
        {"tenants": {"a": {"per_second": 0}}},
        {"tenants": {"a": {"per_second": 1, "measure": "bytes"}}},
        {"tenants": {"a": {"priority": 1.5}}},
        {"output_tokens": 0},
        {"coefficients": {"request": 1}},
        {"coefficients": {"request": 1, "input": -1, "output": 1, "cached": 1}},
    ],
)
def test_rations_that_are_none_change_nothing(engine: Engine, document: Any) -> None:
    ration(engine, output_tokens=3)
    status, answer = engine.tell("POST", "/rations", document)
    assert (status, bool(answer["error"])) == (400, True)
    complete(engine, "nobody", 500)
    assert json.loads(engine.ask("/last")[2])["max_tokens"] == 3
