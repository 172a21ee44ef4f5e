"""From an endpoint to the objects that make its replicas on Kubernetes: one set a version. Pure.

Called by `kubernetes`. A version is a Deployment, a Service and a ConfigMap of one name; its pods have our
supervisor, brought by an init container, run the engine of the user's image, as on any other machine. What a
version's name is made of (`serving.changes`) is all that the pod template holds, so a template never changes,
and a Deployment never rolls by itself: which version has how many replicas is the controller's to decide.

The order of a pod's end: it is deleted, so it leaves the routes; the supervisor is told at once, takes
requests for the notice, then finishes what is in flight. Kubelet's grace is longer than both.
"""

from __future__ import annotations

import json
import math
from pathlib import PurePath
from typing import Any

from cluster import objects
from cluster.objects import Body, Owner
from serving import endpoint
from serving.endpoint import Endpoint
from serving.placement import Security
from serving.providers import enginecommand

LABEL = "glowplug.dev/endpoint"
VERSION_LABEL = "glowplug.dev/version"
DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
ENGINE = "engine"
"""The container that replicas are."""
_BROUGHT = "supervisor"
_SETTINGS, _CONTROL, _RUN, _CACHE = (
    PurePath("/etc/glowplug/engine"),
    PurePath("/etc/glowplug/control"),
    PurePath("/run/glowplug"),
    PurePath("/var/cache/glowplug"),
)
_PROGRAM = "/opt/glowplug"
_LEAST: Body = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
_GRACE_SECONDS = 15
"""Beyond notice and drain, for the engine's own end."""
_PROBE_SECONDS = 2


def name(wanted: Endpoint, version: str) -> str:
    """Of a version's Deployment, Service and ConfigMap."""
    return f"{wanted.name}-{version}"


def control_secret(wanted: Endpoint) -> str:
    """The Secret with the token of the engines' control ports."""
    return f"{wanted.name}-control"


def labels(wanted: Endpoint, version: str | None = None) -> dict[str, str]:
    """What everything of an endpoint, or of a version, is found by."""
    found = {LABEL: wanted.name}
    return found if version is None else {**found, VERSION_LABEL: version}


def deployment(wanted: Endpoint, version: str, owner: Owner | None) -> Body:
    """No replicas at first; `owner`: whom it is deleted with."""
    selected = labels(wanted, version)
    metadata: dict[str, Any] = {
        "name": name(wanted, version),
        "labels": {**selected, "app.kubernetes.io/managed-by": "glowplug"},
    }
    if owner is not None:
        metadata["ownerReferences"] = [owner.body()]
    return {
        "metadata": metadata,
        "spec": {
            "replicas": 0,
            "selector": {"matchLabels": selected},
            "progressDeadlineSeconds": 2**31 - 1,  # updates are judged by the controller
            "template": {"metadata": {"labels": selected}, "spec": _pod(wanted, version)},
        },
    }


def service(wanted: Endpoint, version: str, owner: Owner) -> Body:
    """Headless: it is there for its EndpointSlices, by which other routers find the replicas."""
    return {
        "metadata": _owned(wanted, version, owner),
        "spec": {
            "clusterIP": "None",
            "selector": labels(wanted, version),
            "ports": [{"name": "http", "port": wanted.kubernetes.port, "targetPort": "http"}],
        },
    }


def config_map(wanted: Endpoint, version: str, owner: Owner) -> Body:
    """What the supervisor is told, and the document that this version was made of."""
    return {
        "metadata": _owned(wanted, version, owner),
        "data": {enginecommand.SETTINGS: settings(wanted), "document.json": endpoint.to_json(wanted)},
    }


def document(found: objects.Object) -> Endpoint:
    """The endpoint of a version's ConfigMap. DocumentError."""
    return endpoint.from_json(found.text("data", "document.json"))


def settings(wanted: Endpoint) -> str:
    """The supervisor's settings document. The limit is the document's; it is changed through the control
    port."""
    text = enginecommand.settings(
        wanted,
        address="0.0.0.0",  # noqa: S104  # a pod's interface is its own
        port=wanted.kubernetes.port,
        limit=wanted.replicas.limit,
        folder=_RUN,
        cache=_CACHE,
    )
    remote = {"port": wanted.kubernetes.control_port, "token_file": str(_CONTROL / "token")}
    drain = {"notice_seconds": wanted.drain.notice_seconds, "seconds": wanted.drain.seconds}
    return json.dumps({**json.loads(text), "remote": remote, "drain": drain}, indent=1)


def _pod(wanted: Endpoint, version: str) -> Body:
    place = wanted.kubernetes
    grace = math.ceil(wanted.drain.notice_seconds + wanted.drain.seconds) + _GRACE_SECONDS
    volumes: list[Body] = [
        {"name": "program", "emptyDir": {}},
        {"name": "run", "emptyDir": {"medium": "Memory"}},
        {"name": "cache", "emptyDir": {}},
        {"name": "settings", "configMap": {"name": name(wanted, version)}},
        # The image's user may be anybody; nobody else is in the pod.
        {"name": "control", "secret": {"secretName": control_secret(wanted), "defaultMode": 0o444}},
    ]
    if place.security.read_only_root:
        volumes.append({"name": "tmp", "emptyDir": {}})
    if wanted.model is not None:
        local = {"hostPath": {"path": wanted.model, "type": "Directory"}}
        volumes.append({"name": "model", **(local if _is_local(wanted.model) else {"emptyDir": {}})})
    pod: dict[str, Any] = {
        "terminationGracePeriodSeconds": grace,
        "automountServiceAccountToken": place.service_account is not None,
        "enableServiceLinks": False,
        "securityContext": {"seccompProfile": {"type": place.security.seccomp}},
        "initContainers": [
            {
                "name": _BROUGHT,
                "image": place.supervisor,
                "command": ["cp", "-a", f"{_PROGRAM}/.", "/brought/"],
                "volumeMounts": [{"name": "program", "mountPath": "/brought"}],
                "securityContext": {**_LEAST, "runAsNonRoot": True, "readOnlyRootFilesystem": True},
            }
        ],
        "containers": [_engine(wanted)],
        "volumes": volumes,
    }
    optional = {
        "runtimeClassName": place.runtime_class,
        "serviceAccountName": place.service_account,
        "priorityClassName": place.priority_class,
        "nodeSelector": dict(place.node_selector),
        "tolerations": [each.model_dump(exclude_none=True) for each in place.tolerations],
        "imagePullSecrets": [{"name": each} for each in place.pull_secrets],
    }
    return {**pod, **{key: value for key, value in optional.items() if value}}


def _engine(wanted: Endpoint) -> Body:
    place = wanted.kubernetes
    mounts: list[Body] = [
        {"name": "program", "mountPath": _PROGRAM, "readOnly": True},
        {"name": "run", "mountPath": str(_RUN)},
        {"name": "cache", "mountPath": str(_CACHE)},
        {"name": "settings", "mountPath": str(_SETTINGS), "readOnly": True},
        {"name": "control", "mountPath": str(_CONTROL), "readOnly": True},
    ]
    if wanted.model is not None:
        local = _is_local(wanted.model)
        place_of_model = wanted.model if local else wanted.model_cache.directory
        mounts.append({"name": "model", "mountPath": place_of_model, "readOnly": local})
    if place.security.read_only_root:
        mounts.append({"name": "tmp", "mountPath": "/tmp"})  # noqa: S108  # the container's own
    starts = math.ceil(enginecommand.start_timeout_seconds(wanted) / _PROBE_SECONDS)
    return {
        "name": ENGINE,
        "image": wanted.image,
        "command": [f"{_PROGRAM}/current/bin/glowplug", "engine"],
        "args": ["--config", str(_SETTINGS / enginecommand.SETTINGS), "--instance", "$(POD_NAME)"],
        "env": [{"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
        "ports": [
            {"name": "http", "containerPort": place.port},
            {"name": "control", "containerPort": place.control_port},
        ],
        # The last lines of its log are its reason.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "startupProbe": {**_probe("/startupz"), "failureThreshold": starts},
        "readinessProbe": _probe("/readyz"),
        "livenessProbe": {**_probe("/livez"), "periodSeconds": 10, "timeoutSeconds": 5},
        "resources": _resources(wanted),
        "volumeMounts": mounts,
        "securityContext": _security(place.security),
    }


def _security(wanted: Security) -> Body:
    found: dict[str, Any] = dict(_LEAST)
    if wanted.capabilities:
        found["capabilities"] = {"drop": ["ALL"], "add": list(wanted.capabilities)}
    if wanted.run_as_user is not None:
        found |= {"runAsUser": wanted.run_as_user, "runAsNonRoot": wanted.run_as_user != 0}
    if wanted.read_only_root:
        found["readOnlyRootFilesystem"] = True
    return found


def _probe(path: str) -> dict[str, Any]:
    return {"httpGet": {"path": path, "port": "http"}, "periodSeconds": _PROBE_SECONDS}


def _resources(wanted: Endpoint) -> Body:
    found = dict(wanted.kubernetes.resources)
    if wanted.resources.cpus is not None:
        found["cpu"] = f"{round(wanted.resources.cpus * 1000)}m"
    if wanted.resources.memory_bytes is not None:
        found["memory"] = str(wanted.resources.memory_bytes)
    if wanted.resources.gpus:
        found[wanted.kubernetes.gpu_resource] = str(wanted.resources.gpus)
    return {"requests": found, "limits": found} if found else {}


def _is_local(model: str) -> bool:
    """Whether it is a directory of the node; else it is brought to the pod."""
    return model.startswith("/")


def _owned(wanted: Endpoint, version: str, owner: Owner) -> Body:
    return {
        "name": name(wanted, version),
        "labels": labels(wanted, version),
        "ownerReferences": [owner.body()],
    }
