"""Pods as values: where one is in its life, and why it is not further. Pure.

Called by the serving provider, which turns them into replicas. Times are seconds since the epoch. Kubelet's
reasons are passed on as they are: people look them up.

Spec: v1 PodStatus: phase, conditions, containerStatuses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from cluster import objects
from cluster.objects import Body, Meta, Object


@dataclasses.dataclass(frozen=True, slots=True)
class Container:
    """One container's status. `waiting`: why it does not run, with `message`; `exit_code` of its last end."""

    name: str
    ready: bool = False
    started_at: float | None = None
    finished_at: float | None = None
    restarts: int = 0
    waiting: str = ""
    message: str = ""
    exit_code: int | None = None
    ended: str = ""
    """Kubelet's word for its last end: Error, OOMKilled, ..."""


@dataclasses.dataclass(frozen=True, slots=True)
class Pod:
    """`conditions`: the time since which each one holds; those that do not hold are not there."""

    meta: Meta
    phase: str
    node: str
    address: str
    conditions: Mapping[str, float]
    containers: Mapping[str, Container]
    first: Mapping[str, Container]
    """Its init containers."""
    unschedulable: str = ""
    reason: str = ""
    """Of a pod that failed as such: Evicted, NodeLost, ..."""

    @property
    def ready(self) -> bool:
        """Ready, and not on its way out."""
        return "Ready" in self.conditions and self.meta.deleting_at is None


def parse(found: Object) -> Pod:
    """What a v1 Pod says. Fields that make no sense count as not said."""
    conditions, unschedulable = {}, ""
    for each in found.items("status", "conditions"):
        since = objects.seconds(each.get("lastTransitionTime"))
        if each.get("status") == "True":
            conditions[str(each.get("type"))] = since or 0.0
        elif each.get("type") == "PodScheduled" and each.get("reason") == "Unschedulable":
            unschedulable = _text(each, "message") or "Unschedulable"
    return Pod(
        meta=found.meta,
        phase=found.text("status", "phase"),
        node=found.text("spec", "nodeName"),
        address=found.text("status", "podIP"),
        conditions=conditions,
        containers=_containers(found, "containerStatuses"),
        first=_containers(found, "initContainerStatuses"),
        unschedulable=unschedulable,
        reason=": ".join(
            each for each in (found.text("status", "reason"), found.text("status", "message")) if each
        ),
    )


def _containers(found: Object, key: str) -> Mapping[str, Container]:
    read = (_container(each) for each in found.items("status", key))
    return {each.name: each for each in read}


def _container(status: Body) -> Container:
    state = _mapping(status, "state")
    last = _mapping(_mapping(status, "lastState"), "terminated")
    running, waiting = _mapping(state, "running"), _mapping(state, "waiting")
    ended = _mapping(state, "terminated") or last
    began = running or _mapping(state, "terminated")
    restarts, code = status.get("restartCount"), ended.get("exitCode")
    return Container(
        name=_text(status, "name"),
        ready=status.get("ready") is True,
        started_at=objects.seconds(began.get("startedAt")),
        finished_at=objects.seconds(ended.get("finishedAt")),
        restarts=max(0, restarts) if isinstance(restarts, int) else 0,
        waiting=_text(waiting, "reason"),
        message=_text(waiting, "message") or _text(ended, "message"),
        exit_code=code if isinstance(code, int) else None,
        ended=_text(ended, "reason"),
    )


def _mapping(body: Body, key: str) -> Body:
    found = body.get(key)
    return found if isinstance(found, Mapping) else {}


def _text(body: Body, key: str) -> str:
    found = body.get(key)
    return found if isinstance(found, str) else ""
