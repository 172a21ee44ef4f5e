"""Placeholder pods, and what nodes and pods say about the pool. Pure.

Called by `providers.kubernetes` and by the demand that is read from pods. A placeholder asks for what a whole
node has, at a negative priority: while it waits, the cluster's autoscaler makes a node for it; while it runs,
a pod of ordinary priority evicts it at once. Preemption does not look at warmth, so a new node has a taint
that placeholders tolerate and real pods do not, until it is warm.

What makes a pod real work of a class: it asks for one of the class's resources, and its node selector and
required node affinity do not exclude the class's labels. Labels that the class does not speak of count as
fitting.

Spec: Kubernetes Pod, Node, taints and tolerations, node affinity; the annotations are those of the cluster
autoscaler and of Karpenter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kubernetes.utils import quantity

from cluster.objects import Body, Object, seconds
from warmpool.provider import Machine, Stage
from warmpool.settings import KubernetesClass, KubernetesProvider

POOL_LABEL = "glowplug.dev/warmpool"
CLASS_LABEL = "glowplug.dev/node-class"
RETIRED_TAINT = "glowplug.dev/retired"
_GOING_TAINTS = frozenset(
    {
        RETIRED_TAINT,
        "karpenter.sh/disrupted",
        "karpenter.sh/disruption",
        "ToBeDeletedByClusterAutoscaler",
        "node.kubernetes.io/out-of-service",
    }
)


@dataclasses.dataclass(frozen=True, slots=True)
class Taker:
    """A pod of real work: `share` is the part of a node of each class that it takes, by class that it fits.
    `node` is "" while it waits; `images` are what its containers run."""

    node: str
    shares: Mapping[str, float]
    images: tuple[str, ...] = ()


def body(settings: KubernetesProvider, pool: str, node_class: str) -> Body:
    """A placeholder, as it is created."""
    wanted = settings.classes[node_class]
    tolerations = [each.model_dump(exclude_defaults=True) for each in wanted.tolerations]
    return {
        "metadata": {
            "generateName": f"{pool}-{node_class}-",
            "labels": {POOL_LABEL: pool, CLASS_LABEL: node_class, "app.kubernetes.io/managed-by": "glowplug"},
            "annotations": {
                # Without these, consolidation would take away what is held on purpose.
                "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
                "karpenter.sh/do-not-disrupt": "true",
            },
        },
        "spec": {
            "priorityClassName": settings.priority_class,
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "nodeSelector": dict(wanted.node_selector),
            "tolerations": [*tolerations, {"key": settings.startup_taint, "operator": "Exists"}],
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 65_535,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "placeholder",
                    "image": settings.image,
                    "resources": {"requests": dict(wanted.resources), "limits": dict(wanted.resources)},
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                }
            ],
        },
    }


def machines(
    settings: KubernetesProvider,
    pool: str,
    placeholders: Iterable[Object],
    nodes: Mapping[str, Sequence[Object]],
    takers: Iterable[Taker],
    now: float,
) -> list[Machine]:
    """Every machine of every class, by name. `nodes` by class; `takers` with a node are at work."""
    busy = {each.node for each in takers if each.node}
    on_node: dict[str, Object] = {}
    found: list[Machine] = []
    for pod in sorted(placeholders, key=lambda each: each.meta.created_at):
        node_class = pod.meta.labels.get(CLASS_LABEL, "")
        if pod.meta.labels.get(POOL_LABEL) != pool or node_class not in settings.classes:
            continue
        where = pod.text("spec", "nodeName")
        if pod.meta.deleting_at is None and where and pod.text("status", "phase") not in _ENDED:
            on_node[where] = pod
        elif pod.meta.deleting_at is None:
            found.append(_waiting(settings, pod, node_class, now))
    known = {each.meta.name for several in nodes.values() for each in several}
    for node_class, several in nodes.items():
        for node in several:
            pod_there = on_node.get(node.meta.name)
            found.append(_node(settings, node, node_class, pod_there, node.meta.name in busy, now))
    for where, pod in on_node.items():
        if where not in known:
            node_class = pod.meta.labels[CLASS_LABEL]
            reason = f"node {where} is gone, or has lost the labels of its class"
            requested_at = pod.meta.created_at
            found.append(Machine(pod.meta.name, node_class, Stage.FAILED, now, requested_at, reason=reason))
    return sorted(found, key=lambda each: each.name)


_ENDED = frozenset({"Failed", "Succeeded"})


def _waiting(settings: KubernetesProvider, pod: Object, node_class: str, now: float) -> Machine:
    asked = pod.meta.created_at
    if pod.text("status", "phase") in _ENDED:
        why = pod.text("status", "reason") or pod.text("status", "message") or "it ended"
        return Machine(pod.meta.name, node_class, Stage.FAILED, asked, asked, reason=f"placeholder: {why}")
    if now - asked > settings.refused_after_seconds:
        scheduled = _condition(pod, "PodScheduled")
        said = str(scheduled.get("message") or "nobody said why")[:300]
        reason = f"no node in {settings.refused_after_seconds:.0f} s: {said}"
        return Machine(pod.meta.name, node_class, Stage.FAILED, asked, asked, reason=reason)
    return Machine(pod.meta.name, node_class, Stage.REQUESTED, asked, asked)


def _node(
    settings: KubernetesProvider, node: Object, node_class: str, pod: Object | None, busy: bool, now: float
) -> Machine:
    made_at = node.meta.created_at
    ready = _condition(node, "Ready")
    is_ready = ready.get("status") == "True"
    since = seconds(ready.get("lastTransitionTime")) or made_at
    admitted = is_ready and settings.startup_taint not in _taints(node)
    requested_at = None
    if pod is not None and pod.meta.created_at <= made_at:
        requested_at = pod.meta.created_at  # a younger placeholder found the node there
    machine = Machine(
        node.meta.name, node_class, Stage.UP, since, requested_at, made_at, address(node), admitted
    )
    if busy:
        return dataclasses.replace(machine, stage=Stage.HANDED)
    if node.meta.deleting_at is not None or _taints(node) & _GOING_TAINTS:
        return dataclasses.replace(machine, stage=Stage.LEAVING, reason="being removed")
    if node.at("spec", "unschedulable") is True:
        return dataclasses.replace(machine, stage=Stage.FAILED, reason="cordoned")
    if not is_ready:
        # A node that never was ready has its startup taint yet; how long it may take is not said here.
        broken = settings.startup_taint not in _taints(node) and now - since > settings.broken_after_seconds
        reason = f"not ready since {now - since:.0f} s: {str(ready.get('message') or 'no word of it')[:300]}"
        stage = Stage.FAILED if broken else Stage.BOOTING
        return dataclasses.replace(machine, stage=stage, reason=reason if broken else "")
    return machine if pod is not None else dataclasses.replace(machine, stage=Stage.FREE)


def address(node: Object) -> str | None:
    """Where other machines reach this node."""
    said = {str(each.get("type")): str(each.get("address")) for each in node.items("status", "addresses")}
    return said.get("InternalIP") or said.get("Hostname")


def taints_without(node: Object, key: str) -> list[Body]:
    """A node's taints but for one."""
    return [each for each in node.items("spec", "taints") if each.get("key") != key]


def taker(settings: KubernetesProvider, pod: Object) -> Taker | None:
    """A pod as real work; None for placeholders, for what has ended, and for what takes nothing of ours."""
    if POOL_LABEL in pod.meta.labels or pod.text("status", "phase") in _ENDED:
        return None
    asked = requests(pod)
    shares = {
        name: share
        for name, each in settings.classes.items()
        if fits(pod, each.node_selector) and (share := _share(asked, each)) > 0
    }
    images = {str(each.get("image") or "") for each in pod.items("spec", "containers")} - {""}
    return Taker(pod.text("spec", "nodeName"), shares, tuple(sorted(images))) if shares else None


def wanted(
    settings: KubernetesProvider, handed: Mapping[str, int], takers: Iterable[Taker]
) -> dict[str, int]:
    """Nodes that real work has or waits for, by class. A pod that several classes fit is counted for the
    first of them that the settings name."""
    waiting = dict.fromkeys(settings.classes, 0.0)
    for each in takers:
        if not each.node:
            first = next(name for name in settings.classes if name in each.shares)
            waiting[first] += each.shares[first]
    return {name: handed.get(name, 0) + math.ceil(share - 1e-9) for name, share in waiting.items()}


def chances(settings: KubernetesProvider, takers: Iterable[Taker]) -> dict[str, dict[str, float]]:
    """By class, the part of the pods there that run each image."""
    pods = dict.fromkeys(settings.classes, 0)
    counts: dict[str, dict[str, int]] = {name: {} for name in settings.classes}
    for each in takers:
        first = next(name for name in settings.classes if name in each.shares)
        pods[first] += 1
        for image in each.images:
            counts[first][image] = counts[first].get(image, 0) + 1
    return {
        name: {image: count / pods[name] for image, count in several.items()}
        for name, several in counts.items()
    }


def requests(pod: Object) -> dict[str, float]:
    """What a pod asks for: its containers together, or an init container that asks for more."""
    out: dict[str, float] = {}
    for container in pod.items("spec", "containers"):
        for name, amount in _asked(container).items():
            out[name] = out.get(name, 0.0) + amount
    for container in pod.items("spec", "initContainers"):
        for name, amount in _asked(container).items():
            out[name] = max(out.get(name, 0.0), amount)
    return out


def fits(pod: Object, labels: Mapping[str, str]) -> bool:
    """Whether a pod may run on nodes with these labels, as far as the labels say."""
    selector = pod.at("spec", "nodeSelector")
    if isinstance(selector, Mapping) and any(labels.get(k, v) != v for k, v in selector.items()):
        return False
    affinity = pod.at("spec", "affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution")
    terms = affinity.get("nodeSelectorTerms") if isinstance(affinity, Mapping) else None
    if not isinstance(terms, list) or not terms:
        return True
    return any(isinstance(each, Mapping) and _term(each, labels) for each in terms)


def _term(term: Body, labels: Mapping[str, str]) -> bool:
    expressions = term.get("matchExpressions")
    if not isinstance(expressions, list):
        return True
    return all(_expression(each, labels) for each in expressions if isinstance(each, Mapping))


def _expression(said: Body, labels: Mapping[str, str]) -> bool:
    key = str(said.get("key"))
    if key not in labels:
        return True
    values = said.get("values")
    among = labels[key] in values if isinstance(values, list) else False
    match said.get("operator"):
        case "In":
            return among
        case "NotIn":
            return not among
        case "DoesNotExist":
            return False
        case _:
            return True


def _asked(container: Body) -> dict[str, float]:
    resources: Any = container.get("resources")
    said: Any = (
        resources.get("requests") or resources.get("limits") if isinstance(resources, Mapping) else None
    )
    if not isinstance(said, Mapping):
        return {}
    return {str(name): amount for name, text in said.items() if (amount := _quantity(text)) > 0}


def _share(asked: Mapping[str, float], node_class: KubernetesClass) -> float:
    return max(
        (
            asked.get(name, 0.0) / whole
            for name, text in node_class.resources.items()
            if (whole := _quantity(text)) > 0
        ),
        default=0.0,
    )


def _quantity(text: object) -> float:
    """0 for what is none."""
    try:
        found = float(quantity.parse_quantity(text))
    except (ValueError, ArithmeticError, TypeError):
        return 0.0
    return found if math.isfinite(found) else 0.0


def _taints(node: Object) -> set[str]:
    return {str(each.get("key")) for each in node.items("spec", "taints")}


def _condition(found: Object, kind: str) -> Body:
    return next((each for each in found.items("status", "conditions") if each.get("type") == kind), {})
