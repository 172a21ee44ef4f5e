"""Metrics: what a scrape shows, with and without the parts that it asks; and that labels stay few."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import subprocess
from collections.abc import Mapping
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent import metrics, observer
from agent.devicefeed import Look
from agent.starts import Settled
from tests.agent.outside_world import server_status


def _made(look: Look, inventory: metrics.Inventory | None) -> tuple[metrics.Metrics, observer.Recorder]:
    made = metrics.Metrics()
    sources = metrics.Sources(
        lambda: look,
        lambda: {"server": 1, "worker": 2, "keeper": 0},
        lambda: {"start": 7, "running": 3},
        lambda: inventory,
    )
    made.read_from(sources)
    return made, observer.Recorder([made])


_INVENTORY = metrics.Inventory({"active": 2, "committed": 5, "view": 0}, 1, 3, 1)


def _samples(made: metrics.Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(made.render().decode())
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def _value(samples: Mapping[Any, float], name: str, **labels: str) -> float | None:
    return samples.get((name, frozenset(labels.items())))


def test_what_happened_is_counted_and_timed() -> None:
    made, recorder = _made(Look(None, "dead"), _INVENTORY)
    recorder.pulled("r1", lazy=True, seconds=0.3, layers=3)
    recorder.pulled("r2", lazy=False, seconds=0.3, layers=0, reason="no block image")
    recorder.phase("r1", "mount", 0.004)
    recorder.grpc("Prepare", "ALREADY_EXISTS", 0.002)
    made.on_settled(Settled("r1", {"reads": 1.5}, 2.5, 10))
    found = _samples(made)
    assert _value(found, "glowplug_pulls_total", kind="lazy", reason="") == 1
    assert _value(found, "glowplug_pulls_total", kind="ordinary", reason="no block image") == 1
    assert _value(found, "glowplug_pull_seconds_sum", kind="lazy") == 0.3
    assert _value(found, "glowplug_start_phase_seconds_bucket", phase="mount", le="0.005") == 1
    assert _value(found, "glowplug_start_phase_seconds_sum", phase="reads") == 1.5
    assert _value(found, "glowplug_start_seconds_sum") == 2.5
    assert _value(found, "glowplug_grpc_request_seconds_count", method="Prepare", code="ALREADY_EXISTS") == 1
    assert _value(found, "glowplug_events_total", kind="ordinary_pull", level="info") == 1


def test_what_the_device_server_and_the_store_say() -> None:
    status = server_status(
        fetched_bytes=1000,
        boot_bytes=600,
        frame_answers=5,
        peer_bytes=200,
        cache_bytes=30,
        cache_hits=4,
        failed_reads=2,
    )
    made, _ = _made(Look(status, None), _INVENTORY)
    found = _samples(made)
    assert _value(found, "glowplug_device_server_up") == 1
    assert _value(found, "glowplug_read_bytes_total", source="origin") == 1000
    assert _value(found, "glowplug_frame_answers_total") == 5
    assert _value(found, "glowplug_boot_pack_bytes_total") == 600
    assert _value(found, "glowplug_read_bytes_total", source="peer") == 200
    assert _value(found, "glowplug_read_bytes_total", source="cache") == 30
    assert _value(found, "glowplug_read_blocks_total", source="cache") == 4
    assert _value(found, "glowplug_read_errors_total") == 2
    assert _value(found, "glowplug_fetch_queue_blocks", priority="read_ahead") == 5
    assert _value(found, "glowplug_cache_quota_bytes") == 20 << 30
    assert _value(found, "glowplug_handovers_total", process="worker") == 2
    assert _value(found, "glowplug_demand_misses_total", when="running") == 3
    assert _value(found, "glowplug_snapshots", kind="committed") == 5
    assert _value(found, "glowplug_snapshots_quarantined") == 1
    assert _value(found, "glowplug_peers", state="down") == 1
    assert _value(found, "glowplug_fill_copies", state="filling") == 1


def test_a_scrape_survives_a_dead_device_server_and_store() -> None:
    made, _ = _made(Look(None, "dead"), None)
    found = _samples(made)
    assert _value(found, "glowplug_device_server_up") == 0
    assert _value(found, "glowplug_store_up") == 0
    assert _value(found, "glowplug_cache_used_bytes") is None
    assert _value(found, "process_resident_memory_bytes")


def test_labels_are_words_of_a_small_set() -> None:
    made, recorder = _made(Look(None, "dead"), _INVENTORY)
    recorder.pulled("r", lazy=False, seconds=0, layers=0, reason="sha256:" + "a" * 64)
    recorder.pulled("r", lazy=False, seconds=0, layers=0, reason="GET https://registry.example: refused")
    for number in range(1000):
        recorder.event(f"kind{number}", "x")
    found = _samples(made)
    assert _value(found, "glowplug_pulls_total", kind="ordinary", reason="other") == 2
    assert sum(name == "glowplug_events_total" for name, _ in found) < 80
    assert "sha256" not in made.render().decode()


def test_every_metric_has_a_base_unit_and_is_in_the_documentation() -> None:
    status = server_status()
    made, recorder = _made(Look(status, None), _INVENTORY)
    recorder.grpc("Stat", "OK", 0.1)
    text = made.render().decode()
    page = (metrics_page := _page()).read_text()
    ours = set(re.findall(r"^# TYPE (glowplug_\w+) ", text, re.MULTILINE))
    assert ours
    for name in ours:
        assert f"`{name}`" in page, f"{name} is not in {metrics_page}"
        assert not re.search(r"_(ms|milliseconds|kib|mib|mb|percent)(_|$)", name)
    documented = set(re.findall(r"`(glowplug_\w+)`", page))
    assert documented == ours


def _page() -> pathlib.Path:
    return pathlib.Path(__file__).parents[2] / "docs" / "metrics.md"


_needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not there (Debian's package prometheus)"
)


@_needs_promtool
def test_the_alert_rules_fire_when_they_should() -> None:
    rules = _page().parents[1] / "deploy" / "prometheus" / "alerts.test.yaml"
    checked = subprocess.run(["promtool", "test", "rules", rules], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@_needs_promtool
def test_prometheus_s_own_linter_finds_nothing() -> None:
    made, recorder = _made(Look(server_status(), None), _INVENTORY)
    recorder.pulled("r1", lazy=True, seconds=0.3, layers=3)
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=made.render(), capture_output=True, check=False
    )
    assert checked.returncode == 0, checked.stderr.decode()


def _used(name: str) -> dict[str, str]:
    """The expressions of a file in deploy/, by where they stand."""
    text = (_page().parents[1] / "deploy" / name).read_text()
    if name.endswith(".json"):
        panels = json.loads(text)["panels"]
        return {
            f"{panel['title']} {target['refId']}": target["expr"]
            for panel in panels
            for target in panel.get("targets", ())
        }
    return {line: line.partition("expr:")[2] for line in text.splitlines() if "expr:" in line}


@pytest.mark.parametrize("name", ["grafana/glowplug.json", "prometheus/alerts.yaml"])
def test_dashboard_and_alerts_ask_for_metrics_that_there_are(name: str) -> None:
    made, recorder = _made(Look(server_status(), None), _INVENTORY)
    recorder.pulled("r", lazy=False, seconds=0, layers=0, reason="unavailable")
    recorder.phase("r", "mount", 0.1)
    recorder.grpc("Stat", "OK", 0.1)
    there = {series for series, _ in _samples(made)}
    used = _used(name)
    assert used
    for where, expression in used.items():
        asked = set(re.findall(r"\b(?:glowplug|process)_\w+", expression))
        assert asked, where
        assert asked <= there, where
