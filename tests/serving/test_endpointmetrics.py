"""Metrics of several endpoints, read by Prometheus' own parser."""

from __future__ import annotations

import collections

from prometheus_client import parser

from serving import endpointmetrics
from tests.serving.test_statuspage import made_status


def test_each_family_is_said_once_with_the_samples_of_all_endpoints() -> None:
    first, second = made_status(), {**made_status(), "name": "other"}
    first["latency"] = {"p50": 0.02}
    second["autoscaling"] = {"mode": "off"}
    leads = endpointmetrics.gauge("glowplug_operator_leading", "1 where it leads.", 1)
    text = endpointmetrics.render([first, second], [leads]).decode()
    heads = collections.Counter(line.split()[2] for line in text.splitlines() if line.startswith("# TYPE"))
    assert set(heads.values()) == {1}
    samples = {
        (each.name, tuple(sorted(each.labels.items()))): each.value
        for family in parser.text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
        for each in family.samples
    }
    assert samples["glowplug_operator_leading", ()] == 1
    for name in ("chat", "other"):
        assert samples["glowplug_endpoint_replicas_wanted", (("endpoint", name),)] == 2
        assert samples["glowplug_endpoint_requests_total", (("endpoint", name), ("version", "v"))] == 30
    latency = "glowplug_endpoint_latency_seconds"
    assert samples[latency, (("endpoint", "chat"), ("quantile", "0.5"))] == 0.02
    assert not any(name == latency and ("endpoint", "other") in labels for name, labels in samples)
    assert ("glowplug_autoscaler_replicas", (("endpoint", "other"),)) not in samples


def test_nobody_is_served_yet() -> None:
    assert endpointmetrics.render([]) == b"\n"
