"""What a controller shows: document, text, metrics, page, and over HTTP."""

from __future__ import annotations

import http.client
import json
import re
import select
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.warmpool.harness import TEXT, WARMTH, Pool
from warmpool import board, errors, view

_ROOT = Path(__file__).parents[2]
_needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not there (Debian's package prometheus)"
)


def shown(pool: Pool) -> dict[str, Any]:
    report = pool.step()
    return view.document("test", report, pool.controller.events, pool.controller.errors_total)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """Of a pool with a hit, a class that is held back, a node that is not warm and trouble."""
    pool = Pool(TEXT.replace("big: {floor: 0", "big: {floor: 1") + WARMTH, with_agents=True)
    assert pool.agents is not None
    pool.world.refused.add("big")
    pool.steps(12)
    pool.world.take("gpu", 1)
    pool.demand.now["gpu"] = 1
    pool.agents.slow = True
    pool.demand.trouble = {"<place>": "it's away & gone"}
    pool.steps(10)
    return shown(pool)


def test_the_document_is_json_and_whole(document: dict[str, Any]) -> None:
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    gpu, big = document["pools"]
    assert (gpu["node_class"], gpu["hits"], gpu["misses"]) == ("gpu", 1, 0)
    assert gpu["states"]["warming"] >= 1
    assert any("base:v1: 0 of" in lack for node in gpu["nodes"] for lack in node["lacking"])
    assert "no machine of this class" in big["blocked"]
    assert {each["kind"] for each in document["errors_total"]} == {"CapacityError"}


def test_the_text_says_why(document: dict[str, Any]) -> None:
    lines = "\n".join(line for pool in document["pools"] for line in view.explained(pool))
    for said in (
        "to be held",
        "by reactive",
        "floor: ",
        "handed over: 1, of them warm 1",
        "held back",
        "base:v1",
    ):
        assert said in lines


def test_nothing_is_known_before_the_first_round() -> None:
    empty = view.document("test", None, (), {})
    assert (empty["pools"], empty["leading"]) == ([], False)
    assert b"glowplug_warmpool_leading 0" in view.metrics(empty)
    assert "warm pool test" in view.page(empty)


def test_the_page_escapes_what_others_say(document: dict[str, Any]) -> None:
    page = view.page(document)
    assert "&lt;place&gt;" in page
    assert "<place>" not in page
    assert "<script" not in page


@_needs_promtool
def test_prometheus_s_own_linter_finds_nothing(document: dict[str, Any]) -> None:
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=view.metrics(document), capture_output=True
    )
    assert checked.returncode == 0, checked.stderr.decode()


@_needs_promtool
def test_the_alert_rules_fire_when_they_should() -> None:
    rules = _ROOT / "deploy/prometheus/warmpool-alerts.test.yaml"
    checked = subprocess.run(["promtool", "test", "rules", rules], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_alerts_and_docs_name_the_metrics_that_there_are(document: dict[str, Any]) -> None:
    there = set(re.findall(r"^(glowplug_warmpool_\w+)", view.metrics(document).decode(), re.MULTILINE))
    rules = yaml.safe_load((_ROOT / "deploy/prometheus/warmpool-alerts.yaml").read_text())
    for rule in rules["groups"][0]["rules"]:
        asked = set(re.findall(r"\bglowplug_\w+", rule["expr"]))
        assert asked
        assert asked <= there, rule["alert"]
    dashboard = json.loads((_ROOT / "deploy/grafana/warmpool.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            asked = set(re.findall(r"\bglowplug_\w+", target["expr"]))
            assert asked
            assert asked <= there, panel["title"]
    page = (_ROOT / "docs/warmpool.md").read_text()
    for name in there:
        assert f"`{name}" in page or f"`_{name.removeprefix('glowplug_warmpool_')}`" in page, name


@pytest.fixture
def address(document: dict[str, Any]) -> Iterator[tuple[str, int]]:
    shown = board.Board(Pool().settings)
    shown.put(document)
    with board.serve("127.0.0.1:0", shown) as port:
        yield "127.0.0.1", port


def ask(address: tuple[str, int], path: str, method: str = "GET", host: str = "") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*address, timeout=20)
    connection.request(method, path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer.status, data


def test_over_http(address: tuple[str, int], document: dict[str, Any]) -> None:
    assert ask(address, "/healthz") == (200, b"ok\n")
    assert json.loads(ask(address, "/api/v1/status")[1]) == document
    assert ask(address, "/metrics")[1] == view.metrics(document)
    assert b"<h1>" in ask(address, "/")[1]
    assert ask(address, "/etc/passwd")[0] == 404
    assert ask(address, "/api/v1/status", method="POST")[0] == 501
    assert ask(address, "/api/v1/status", host="evil.example")[0] == 421
    for host in ("localhost:1", socket.gethostname(), "[::1]:80", "10.0.0.1"):
        assert ask(address, "/healthz", host=host)[0] == 200


def test_connections_are_bounded(address: tuple[str, int]) -> None:
    idle = [socket.create_connection(address, timeout=20) for _ in range(40)]
    ended: list[socket.socket] = []
    while len(ended) < 40 - 32:  # those that are served say nothing yet
        ended, _, _ = select.select(idle, [], [], 10.0)
        assert ended
    assert all(each.recv(1) == b"" for each in ended)
    for each in idle:
        each.close()


def test_a_loop_that_hangs_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = board.Board(Pool().settings)
    assert shown.healthy
    monkeypatch.setattr(shown, "_healthy_seconds", 0.0)
    assert not shown.healthy


@pytest.mark.parametrize("listen", ["nowhere", "127.0.0.1:x", "127.0.0.1:99999999", "256.0.0.1:1"])
def test_an_address_that_cannot_be_had_is_the_settings_fault(listen: str) -> None:
    with (
        pytest.raises(errors.ConfigurationError, match=r"status\.listen"),
        board.serve(listen, board.Board(Pool().settings)),
    ):
        pass
