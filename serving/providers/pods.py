"""From a pod to the replicas that it stands for. Pure.

Called by `kubernetes`. A pod is one replica; each start of its engine that failed before is one more, FAILED,
for as long as the pod has not become ready, because that is what an update is given up by. Reasons are
kubelet's, with the document's key that is to be changed, where there is one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.pods import Container, Pod
from serving.providers import manifests
from serving.replica import Replica, State, Vitals

ZONE_LABEL = "topology.kubernetes.io/zone"
_KEPT_FAILED = 10
_REMEDIES = {
    "ErrImagePull": "image: is it there, and may the cluster pull it (kubernetes.pull_secrets)?",
    "ImagePullBackOff": "image: is it there, and may the cluster pull it (kubernetes.pull_secrets)?",
    "InvalidImageName": "image: name it as in registry.example/team/image:tag",
    "ErrImageNeverPull": "image: it is on none of the nodes; push it to a registry",
    "CreateContainerConfigError": "kubernetes: something that the pod names is not in its namespace",
    "CreateContainerError": "image: the container runtime refuses it",
    "RunContainerError": "engine.command: the container runtime cannot run it",
}
_OUT_OF_MEMORY = "resources.memory_bytes: give it more"


@dataclasses.dataclass(frozen=True, slots=True)
class Heard:
    """What a replica's control port said, and what it was told there."""

    phases: Mapping[str, float]
    limit: int | None = None
    request_log: Mapping[str, Any] | None = None
    vitals: Vitals | None = None


def replicas(pod: Pod, port: int, heard: Heard | None, leaving: bool) -> Sequence[Replica]:
    """The pod's replica, and its failed starts before it. `leaving`: it was told to go, and kubelet has not
    heard of it yet."""
    version = pod.meta.labels.get(manifests.VERSION_LABEL, "")
    engine = pod.containers.get(manifests.ENGINE, Container(manifests.ENGINE))
    state, reason = (State.DRAINING, None) if leaving else _state(pod, engine)
    ready_at = pod.conditions.get("Ready")
    own = Replica(
        name=pod.meta.name,
        version=version,
        address=(pod.address, port) if pod.address else None,
        state=state,
        created_at=pod.meta.created_at,
        ready_at=ready_at,
        phases=phases(pod, engine, heard),
        zone=pod.meta.labels.get(ZONE_LABEL, ""),
        reason=reason,
        vitals=None if heard is None else heard.vitals,
    )
    if ready_at is not None or state is State.DRAINING:
        return [own]
    failed = [
        Replica(
            name=f"{pod.meta.name}/{number}",
            version=version,
            address=None,
            state=State.FAILED,
            created_at=pod.meta.created_at,
            reason=_ended(engine),
        )
        for number in range(max(1, engine.restarts - _KEPT_FAILED + 1), engine.restarts + 1)
    ]
    return [*failed, own]


def phases(pod: Pod, engine: Container, heard: Heard | None) -> Mapping[str, float]:
    """The parts of the pod's start, in seconds: `scheduled`, `prepared` (volumes, our supervisor), `pulled`
    (the image, or what of it a start waits for), then the engine's own, or `ready` while they are not known.
    Kubelet writes whole seconds."""
    marks = [("scheduled", pod.conditions.get("PodScheduled"))]
    finished = [each.finished_at for each in pod.first.values()]
    if finished and None not in finished:
        marks.append(("prepared", max(each for each in finished if each is not None)))
    marks.append(("pulled", engine.started_at))
    if heard is None or not heard.phases:
        marks.append(("ready", pod.conditions.get("Ready")))
    found, before = {}, pod.meta.created_at
    for name, at in marks:
        if at is None:
            break
        found[name] = max(0.0, at - before)
        before = max(before, at)
    return found if heard is None else {**found, **heard.phases}


def _state(pod: Pod, engine: Container) -> tuple[State, str | None]:
    if pod.meta.deleting_at is not None:
        return State.DRAINING, None
    if pod.phase == "Failed":
        return State.FAILED, pod.reason or _ended(engine)
    if pod.ready and pod.address:
        return State.READY, None
    if engine.waiting in _REMEDIES:
        return State.FAILED, f"{_said(engine)}; {_REMEDIES[engine.waiting]}"
    for each in pod.first.values():
        if each.waiting in _REMEDIES:
            return State.FAILED, f"{_said(each)}; kubernetes.supervisor: is it there, and may it be pulled?"
    if engine.waiting == "CrashLoopBackOff":
        return State.STARTING, f"it is started again later: {_ended(engine)}"
    if pod.unschedulable:
        return State.STARTING, f"no node takes it: {pod.unschedulable}"
    if "Ready" not in pod.conditions and engine.started_at is not None:
        return State.STARTING, "its readiness probe does not pass yet"
    return State.STARTING, None


def _said(container: Container) -> str:
    return f"{container.waiting}: {container.message}" if container.message else container.waiting


def _ended(container: Container) -> str:
    """Why the engine ended, the last time."""
    if container.ended == "OOMKilled":
        return f"OOMKilled; {_OUT_OF_MEMORY}"
    words = [f"ended with code {container.exit_code}" if container.exit_code is not None else "ended"]
    words += [each for each in (container.ended, container.message) if each and each != "Error"]
    return ": ".join(words)
