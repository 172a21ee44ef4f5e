"""Endpoints' metrics in the Prometheus text format: the one of `glowplug serve`, an operator's many. Pure.

Made of `statusdocument.numbers`, and of the latency where whoever serves knows it. The format wants each
family once, with the samples of all endpoints; what is not known of an endpoint is left out, because a demand
that is unknown is not one of zero. Replicas are labelled by name: they are short-lived and few.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_MODES = ("off", "dry-run", "on")


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
    """One metric with its samples: the labels besides the endpoint's, and the value as text."""

    name: str
    kind: str
    text: str
    samples: list[tuple[str, str]]


def render(statuses: Iterable[Mapping[str, Any]], others: Iterable[Family] = ()) -> bytes:
    """The text; `others` are families of whoever serves, which have no endpoint."""
    lines = [
        line for each in others for line in _head(each) + [each.name + _braced(*s) for s in each.samples]
    ]
    merged: dict[str, list[str]] = {}
    for status in statuses:
        label = f'endpoint="{status["name"]}"'
        for family in (*_families(status), *_autoscaler(status["autoscaling"])):
            found = merged.setdefault(family.name, _head(family))
            found += [
                family.name + _braced(f"{label},{labels}" if labels else label, value)
                for labels, value in family.samples
            ]
    return ("\n".join([*lines, *(line for found in merged.values() for line in found)]) + "\n").encode()


def _head(family: Family) -> list[str]:
    return [f"# HELP {family.name} {family.text}", f"# TYPE {family.name} {family.kind}"]


def _braced(labels: str, value: str) -> str:
    return f"{{{labels}}} {value}" if labels else f" {value}"


def gauge(name: str, text: str, value: object) -> Family:
    """A family of one sample without labels of its own."""
    return Family(name, "gauge", text, [("", str(value))])


def _families(status: Mapping[str, Any]) -> Iterator[Family]:
    replicas, versions = status["replicas"], sorted(status["versions"].items())
    counts = Counter((each["state"], each["version"]) for each in replicas)
    yield Family(
        "glowplug_endpoint_replicas",
        "gauge",
        "Replicas by state and version.",
        [(f'state="{state}",version="{version}"', str(n)) for (state, version), n in sorted(counts.items())],
    )
    yield gauge(
        "glowplug_endpoint_replicas_wanted", "Replicas that there should be.", status["wanted_replicas"]
    )
    yield Family(
        "glowplug_endpoint_weight_percent",
        "gauge",
        "Part of the traffic by version.",
        [(f'version="{version}"', str(weight)) for version, weight in sorted(status["weights"].items())],
    )
    for field, name, text in (
        ("issued", "requests", "Requests given to replicas"),
        ("errors", "failed_requests", "Requests that replicas failed"),
    ):
        yield Family(
            f"glowplug_endpoint_{name}_total",
            "counter",
            f"{text}, by version.",
            [(f'version="{version}"', str(count[field])) for version, count in versions],
        )
    yield Family(
        "glowplug_endpoint_in_flight",
        "gauge",
        "Requests in flight at the last report, by replica.",
        [(f'replica="{each["name"]}"', str(each["in_flight"])) for each in replicas],
    )
    yield gauge("glowplug_endpoint_held", "Requests that wait for a replica to be up.", status["held"])
    yield Family(
        "glowplug_endpoint_start_seconds",
        "gauge",
        "From a replica's start to ready.",
        [
            (f'replica="{each["name"]}"', f"{each['ready_at'] - each['created_at']:.3f}")
            for each in replicas
            if each["ready_at"] is not None
        ],
    )
    yield gauge(
        "glowplug_endpoint_concurrency_limit",
        "Requests that each replica admits at a time.",
        status["concurrency_limit"],
    )
    yield Family(
        "glowplug_endpoint_latency_seconds",
        "summary",
        "Of requests since Envoy started, as it saw them.",
        [
            (f'quantile="{float(name.removeprefix("p")) / 100:g}"', f"{value:.6f}")
            for name, value in status.get("latency", {}).items()
        ],
    )


def _autoscaler(said: Mapping[str, Any]) -> Iterator[Family]:
    yield Family(
        "glowplug_autoscaler_mode",
        "gauge",
        "1 for the mode it is in.",
        [(f'mode="{mode}"', str(int(mode == said["mode"]))) for mode in _MODES],
    )
    if "because" not in said:
        return
    demand = said["demand"]
    known = {} if demand is None else demand
    for name, text, value in (
        ("replicas", "Replicas that it decided on.", said["replicas"]),
        ("limit", "Requests in flight on a replica that it decided on.", said["limit"]),
        ("target", "Requests in flight that a replica should hold in the mean.", said["target"]),
        ("demand_known", "Whether all load reports came in time.", int(demand is not None)),
        ("in_flight", "Requests at replicas, in their queues included.", known.get("in_flight")),
        ("held", "Requests that wait at the activator.", known.get("held")),
        ("queued", "Requests that wait in the replicas' queues.", known.get("queued")),
        ("issued_per_second", "Requests given to replicas.", known.get("issued_per_second")),
        ("rejected_per_second", "Requests turned away for want of room.", known.get("rejected_per_second")),
        ("service_seconds", "Mean time of a request in service.", known.get("service_seconds")),
        ("decision_seconds", "What the last decision took.", said["decision_seconds"]),
    ):
        if value is not None:
            yield gauge(f"glowplug_autoscaler_{name}", text, f"{value:.9g}")
    yield Family(
        "glowplug_autoscaler_utilization_ratio",
        "gauge",
        "In use at the ready replica that uses most of it.",
        [(f'resource="{resource}"', f"{used:.4g}") for resource, used in said["utilization"].items()],
    )
    rules = dict.fromkeys(each["rule"] for each in said["because"]["clamps"])
    yield Family(
        "glowplug_autoscaler_clamped",
        "gauge",
        "1 for each rule that changed the last decision.",
        [(f'rule="{rule}"', "1") for rule in rules],
    )
    yield Family(
        "glowplug_autoscaler_decisions_total", "counter", "Decisions made.", [("", str(said["decisions"]))]
    )
    yield Family(
        "glowplug_autoscaler_changes_total",
        "counter",
        "Decisions that changed the number of replicas.",
        [(f'direction="{direction}"', str(count)) for direction, count in said["changes"].items()],
    )
