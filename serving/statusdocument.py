"""An endpoint's status as one JSON document. Pure.

It is what `glowplug endpoint status --json` prints, what the live view and the page show, and what metrics
are made of (`endpointmetrics`). It holds no endpoint document and no log: those may hold secrets.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from serving import changes
from serving.history import History
from serving.replica import Replica
from serving.router.reports import ACTIVATOR_PREFIX
from serving.traffic import Traffic

if TYPE_CHECKING:
    from serving.router.ads import Node

_SHOWN_SAMPLES = 120


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
        **numbers(
            view.name,
            view.weights,
            view.replicas,
            view.traffic,
            wanted=view.replicas_wanted,
            limit=view.limit,
            autoscaling=view.autoscaling,
        ),
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
        "objectives": document.objectives.model_dump(mode="json", exclude_none=True),
        "traffic": [dataclasses.asdict(each) for each in view.traffic.samples()[-_SHOWN_SAMPLES:]],
        "events": [dataclasses.asdict(each) for each in view.events],
        "envoys": [
            {"node": each.id, "current": each.current, "refused": each.refused}
            for each in view.envoys
            if not each.id.startswith(ACTIVATOR_PREFIX)
        ],
    }


def numbers(
    name: str,
    weights: Mapping[str, int],
    replicas: Sequence[Replica],
    traffic: Traffic,
    *,
    wanted: int,
    limit: int,
    autoscaling: Mapping[str, Any],
) -> dict[str, Any]:
    """The part of the document that wherever an endpoint is served has, and that metrics are made of."""
    return {
        "name": name,
        "weights": dict(weights),
        "wanted_replicas": wanted,
        "concurrency_limit": limit,
        "autoscaling": dict(autoscaling),
        "replicas": [_replica(each, traffic) for each in replicas],
        "versions": {version: dataclasses.asdict(count) for version, count in traffic.versions().items()},
        "held": traffic.held(),
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
