"""An endpoint's status as one JSON document, and as Prometheus metrics. Pure.

The document is what `glowplug endpoint status --json` prints, what the live view and the page show, and what
/metrics is made of. It holds no endpoint document and no log: those may hold secrets.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from serving import changes
from serving.history import History
from serving.replica import Replica
from serving.router.reports import ACTIVATOR_PREFIX
from serving.traffic import Traffic

if TYPE_CHECKING:
    from serving.router.ads import Node

_SHOWN_SAMPLES = 120
_MODES = ("off", "dry-run", "on")


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, for people. `at` is Unix seconds."""

    at: float
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class View:
    """What the server knows at one moment. `replicas_wanted` and `limit` are in force, whoever said so;
    `autoscaling` is the autoscaler's own words (`autoscaler.shell`)."""

    name: str
    pid: int
    started_at: float
    now: float
    address: tuple[str, int]
    history: History
    weights: Mapping[str, int]
    replicas: Sequence[Replica]
    traffic: Traffic
    events: Sequence[Event]
    envoys: Sequence[Node]
    replicas_wanted: int
    limit: int
    autoscaling: Mapping[str, Any]


def make(view: View) -> dict[str, Any]:
    """The document."""
    wanted, rollout = view.history.wanted, view.history.rollout
    document = wanted.document
    return {
        "name": view.name,
        "pid": view.pid,
        "now": view.now,
        "up_seconds": round(view.now - view.started_at, 1),
        "url": f"http://{view.address[0]}:{view.address[1]}",
        "engine": document.engine.kind,
        "model": document.model,
        "model_name": document.model_name or document.name,
        "revision": wanted.number,
        "note": wanted.note,
        "version": changes.version(document),
        "phase": rollout.phase.value,
        "stable": rollout.stable,
        "candidate": rollout.candidate,
        "weights": dict(view.weights),
        "wanted_replicas": view.replicas_wanted,
        "concurrency_limit": view.limit,
        "autoscaling": dict(view.autoscaling),
        "objectives": document.objectives.model_dump(mode="json", exclude_none=True),
        "replicas": [_replica(each, view.traffic) for each in view.replicas],
        "traffic": [dataclasses.asdict(each) for each in view.traffic.samples()[-_SHOWN_SAMPLES:]],
        "versions": {name: dataclasses.asdict(count) for name, count in view.traffic.versions().items()},
        "events": [dataclasses.asdict(each) for each in view.events],
        "held": view.traffic.held(),
        "envoys": [
            {"node": each.id, "current": each.current, "refused": each.refused}
            for each in view.envoys
            if not each.id.startswith(ACTIVATOR_PREFIX)
        ],
    }


def _replica(replica: Replica, traffic: Traffic) -> dict[str, Any]:
    flow = traffic.of(replica.name)
    return {
        "name": replica.name,
        "version": replica.version,
        "address": None if replica.address is None else f"{replica.address[0]}:{replica.address[1]}",
        "state": replica.state.value,
        "created_at": replica.created_at,
        "ready_at": replica.ready_at,
        "phases": dict(replica.phases),
        "zone": replica.zone,
        "reason": replica.reason,
        "in_flight": flow.in_flight,
        "per_second": round(flow.per_second, 2),
        "issued": flow.issued,
        "errors": flow.errors,
    }


def quantiles(stats: bytes) -> dict[str, float]:
    """P50, P95 and P99 in seconds out of Envoy's /stats?format=json for one histogram (milliseconds there);
    empty before the first request."""
    try:
        found = json.loads(stats)["stats"]
        histograms = next(each["histograms"] for each in found if "histograms" in each)
        names = [float(each) for each in histograms["supported_quantiles"]]
        values = histograms["computed_quantiles"][0]["values"]
        read = {name: each["cumulative"] for name, each in zip(names, values, strict=True)}
        return {f"p{name:g}": read[name] / 1000 for name in (50.0, 95.0, 99.0) if read.get(name) is not None}
    except (ValueError, KeyError, IndexError, TypeError, StopIteration):
        return {}


def metrics(status: Mapping[str, Any]) -> bytes:
    """The Prometheus text format. Replicas are labelled by name, which the fleet keeps short-lived and
    few."""
    return ("\n".join(_lines(status)) + "\n").encode()


def _lines(status: Mapping[str, Any]) -> Iterator[str]:
    endpoint = f'endpoint="{status["name"]}"'
    yield "# HELP glowplug_endpoint_replicas Replicas by state and version."
    yield "# TYPE glowplug_endpoint_replicas gauge"
    counts: dict[tuple[str, str], int] = {}
    for each in status["replicas"]:
        key = (each["state"], each["version"])
        counts[key] = counts.get(key, 0) + 1
    for (state, version), count in sorted(counts.items()):
        yield f'glowplug_endpoint_replicas{{{endpoint},state="{state}",version="{version}"}} {count}'
    yield "# HELP glowplug_endpoint_replicas_wanted Replicas that there should be."
    yield "# TYPE glowplug_endpoint_replicas_wanted gauge"
    yield f"glowplug_endpoint_replicas_wanted{{{endpoint}}} {status['wanted_replicas']}"
    yield "# HELP glowplug_endpoint_weight_percent Part of the traffic by version."
    yield "# TYPE glowplug_endpoint_weight_percent gauge"
    for version, weight in sorted(status["weights"].items()):
        yield f'glowplug_endpoint_weight_percent{{{endpoint},version="{version}"}} {weight}'
    for field, name, text in (
        ("issued", "requests", "Requests given to replicas"),
        ("errors", "failed_requests", "Requests that replicas failed"),
    ):
        yield f"# HELP glowplug_endpoint_{name}_total {text}, by version."
        yield f"# TYPE glowplug_endpoint_{name}_total counter"
        for version, count in sorted(status["versions"].items()):
            yield f'glowplug_endpoint_{name}_total{{{endpoint},version="{version}"}} {count[field]}'
    yield "# HELP glowplug_endpoint_in_flight Requests in flight at the last report, by replica."
    yield "# TYPE glowplug_endpoint_in_flight gauge"
    for each in status["replicas"]:
        yield f'glowplug_endpoint_in_flight{{{endpoint},replica="{each["name"]}"}} {each["in_flight"]}'
    yield "# HELP glowplug_endpoint_held Requests that wait for a replica to be up."
    yield "# TYPE glowplug_endpoint_held gauge"
    yield f"glowplug_endpoint_held{{{endpoint}}} {status['held']}"
    yield "# HELP glowplug_endpoint_start_seconds From a replica's start to ready."
    yield "# TYPE glowplug_endpoint_start_seconds gauge"
    for each in status["replicas"]:
        if each["ready_at"] is not None:
            took = each["ready_at"] - each["created_at"]
            yield f'glowplug_endpoint_start_seconds{{{endpoint},replica="{each["name"]}"}} {took:.3f}'
    yield "# HELP glowplug_endpoint_concurrency_limit Requests that each replica admits at a time."
    yield "# TYPE glowplug_endpoint_concurrency_limit gauge"
    yield f"glowplug_endpoint_concurrency_limit{{{endpoint}}} {status['concurrency_limit']}"
    yield "# HELP glowplug_endpoint_latency_seconds Of requests since Envoy started, as it saw them."
    yield "# TYPE glowplug_endpoint_latency_seconds summary"
    for name, value in status.get("latency", {}).items():
        quantile = float(name.removeprefix("p")) / 100
        yield f'glowplug_endpoint_latency_seconds{{{endpoint},quantile="{quantile:g}"}} {value:.6f}'
    yield from _autoscaler_lines(endpoint, status["autoscaling"])


def _autoscaler_lines(endpoint: str, said: Mapping[str, Any]) -> Iterator[str]:
    """What is not known is left out: a demand that is unknown is not one of zero."""
    yield "# HELP glowplug_autoscaler_mode 1 for the mode it is in."
    yield "# TYPE glowplug_autoscaler_mode gauge"
    for mode in _MODES:
        yield f'glowplug_autoscaler_mode{{{endpoint},mode="{mode}"}} {int(mode == said["mode"])}'
    if "because" not in said:
        return
    demand = said["demand"]
    known = {} if demand is None else demand
    gauges = [
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
    ]
    for name, text, value in gauges:
        if value is not None:
            yield f"# HELP glowplug_autoscaler_{name} {text}"
            yield f"# TYPE glowplug_autoscaler_{name} gauge"
            yield f"glowplug_autoscaler_{name}{{{endpoint}}} {value:.9g}"
    yield "# HELP glowplug_autoscaler_utilization_ratio In use at the ready replica that uses most of it."
    yield "# TYPE glowplug_autoscaler_utilization_ratio gauge"
    for resource, used in said["utilization"].items():
        yield f'glowplug_autoscaler_utilization_ratio{{{endpoint},resource="{resource}"}} {used:.4g}'
    yield "# HELP glowplug_autoscaler_clamped 1 for each rule that changed the last decision."
    yield "# TYPE glowplug_autoscaler_clamped gauge"
    for clamp in {each["rule"]: each for each in said["because"]["clamps"]}.values():
        yield f'glowplug_autoscaler_clamped{{{endpoint},rule="{clamp["rule"]}"}} 1'
    yield "# HELP glowplug_autoscaler_decisions_total Decisions made."
    yield "# TYPE glowplug_autoscaler_decisions_total counter"
    yield f"glowplug_autoscaler_decisions_total{{{endpoint}}} {said['decisions']}"
    yield "# HELP glowplug_autoscaler_changes_total Decisions that changed the number of replicas."
    yield "# TYPE glowplug_autoscaler_changes_total counter"
    for direction, count in said["changes"].items():
        yield f'glowplug_autoscaler_changes_total{{{endpoint},direction="{direction}"}} {count}'
