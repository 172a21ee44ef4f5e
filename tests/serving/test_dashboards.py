"""The dashboard and the alert rules of serving: that they ask for metrics that there are, and fire."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from serving import endpointmetrics
from serving.engine import metrics
from serving.engine.gpus import Reading
from serving.engine.requestlog import keeper
from serving.engine.state import Counters, Limits, State
from tests.serving.test_statuspage import made_status

_DEPLOY = Path(__file__).parents[2] / "deploy"
_needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not there (Debian's package prometheus)"
)


def _said() -> bytes:
    """Everything that an endpoint's server and an engine show."""
    status = made_status()
    status["latency"] = {"p50": 0.02, "p95": 0.03, "p99": 0.04}
    status["autoscaling"]["demand"]["service_seconds"] = 0.3
    return endpointmetrics.render([status])


def _engine() -> bytes:
    facts = metrics.Facts(
        state=State.READY,
        limits=Limits(4, 64, 10.0),
        in_flight=1,
        waiting=0,
        units_in_flight=0.0,
        counters=Counters(),
        starts=1,
        hangs=0,
        phases={},
        logged=keeper.Totals(),
        dropped_spans=0,
        gpus=Reading(1, 0.5, 1, 2),
    )
    return metrics.render(facts)


def _expressions(name: str) -> dict[str, str]:
    """Of a file in deploy/, by where they stand."""
    text = (_DEPLOY / name).read_text()
    if name.endswith(".json"):
        return {
            f"{panel['title']} {target['refId']}": target["expr"]
            for panel in json.loads(text)["panels"]
            for target in panel.get("targets", ())
        }
    (group,) = yaml.safe_load(text)["groups"]
    return {rule["alert"]: rule["expr"] for rule in group["rules"]}


@pytest.mark.parametrize("name", ["grafana/serving.json", "prometheus/serving-alerts.yaml"])
def test_dashboard_and_alerts_ask_for_metrics_that_there_are(name: str) -> None:
    there = set(re.findall(r"^(\w+)(?:\{| )", (_said() + _engine()).decode(), re.MULTILINE))
    used = _expressions(name)
    assert len(used) > 8
    for where, expression in used.items():
        asked = set(re.findall(r"\bglowplug_\w+", expression))
        assert asked, where
        assert asked <= there, where


def test_every_metric_of_an_endpoint_is_documented() -> None:
    page = (_DEPLOY.parent / "docs" / "serving.md").read_text()
    shown = set(re.findall(r"^# TYPE (\w+)", _said().decode(), re.MULTILINE))
    assert {name for name in shown if f"`{name}`" not in page} == set()


@_needs_promtool
def test_the_alert_rules_fire_when_they_should() -> None:
    rules = _DEPLOY / "prometheus" / "serving-alerts.test.yaml"
    checked = subprocess.run(["promtool", "test", "rules", rules], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@_needs_promtool
def test_prometheus_s_own_linter_finds_nothing() -> None:
    checked = subprocess.run(["promtool", "check", "metrics"], input=_said(), capture_output=True)
    assert checked.returncode == 0, checked.stderr.decode()
