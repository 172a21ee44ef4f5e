"""The rest of a cluster around the fake API server: scheduler, preemption, an autoscaler that makes nodes,
kubelets.

Everything is in the API server; a `step` is one round of all of them, so that a test says when things happen.
The scheduler looks at node selectors, NoSchedule taints, resources and priorities, as far as placeholders and
their takers need it. The autoscaler makes a node for a pod that fits nowhere, unless the pod's priority is
below -10, and takes away nodes on which nothing runs (`reap`). Not here: affinity, zones, limits of volumes,
disruption budgets.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import time
from collections.abc import Iterator
from typing import Any

from cluster import connection
from cluster.api import Api
from tests.fixtures.kubernetes_api import KubernetesApi
from tests.warmpool.providers.platform import CLASSES
from warmpool.provider import Provider
from warmpool.providers.kubernetes import Kubernetes
from warmpool.settings import KubernetesProvider

Object = dict[str, Any]
NAMESPACE = "glowplug-warmpool"
PODS, NODES = "v1/pods", "v1/nodes"
SETTINGS = KubernetesProvider.model_validate(
    {
        "kind": "kubernetes",
        "namespace": NAMESPACE,
        "classes": {
            name: {
                "node_selector": {"example.com/pool": name},
                "resources": {"nvidia.com/gpu": "8"},
                "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
            }
            for name in CLASSES
        },
    }
)


class Cluster:
    """See the module."""

    def __init__(self, server: KubernetesApi, settings: KubernetesProvider = SETTINGS) -> None:
        self.server = server
        self.settings = settings
        self.ahead_seconds = 0.0
        self.refused: set[str] = set()
        self._numbers = itertools.count(1)
        self._providers: list[Kubernetes] = []
        server.put(
            "scheduling.k8s.io/v1/priorityclasses",
            {"metadata": {"name": settings.priority_class}, "value": -5, "preemptionPolicy": "Never"},
        )

    # -- Platform ----------------------------------------------------------------------------------

    def provider(self) -> Provider:
        api = Api(connection.Connection(connection.Where(url=self.server.url)), NAMESPACE)
        made = Kubernetes(api, self.settings, "default", clock=self.now)
        self._providers.append(made)
        return made

    def settle(self) -> None:
        self.reap()
        for _ in range(6):
            self.step()
        self._caught_up()

    def work(self, node_class: str, count: int) -> None:
        """As many pods, each of which takes a whole node."""
        mine = [each for each in self._pods() if each["metadata"]["labels"].get("work") == node_class]
        for _ in range(count - len(mine)):
            self.add_pod(node_class)
        for each in mine[count:]:
            self.server.delete(PODS, "default", each["metadata"]["name"])
        for _ in range(3):
            self.step(make=False)
        self._caught_up()

    def finish(self, name: str) -> None:
        for each in self._pods():
            if each["spec"].get("nodeName") == name:
                self.server.delete(PODS, each["metadata"]["namespace"], each["metadata"]["name"])
        for _ in range(3):
            self.step()
        self._caught_up()

    def refuse(self, node_class: str) -> None:
        self.refused.add(node_class)

    def accept(self, node_class: str) -> None:
        self.refused.discard(node_class)

    @contextlib.contextmanager
    def throttled(self) -> Iterator[None]:
        with self._failing(429):
            yield

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        with self._failing(503):
            yield

    # -- what tests do beyond it -------------------------------------------------------------------

    def now(self) -> float:
        return time.time() + self.ahead_seconds

    def close(self) -> None:
        for each in self._providers:
            each.close()

    def add_pod(self, node_class: str, gpus: int = 8) -> str:
        """A real pod that waits."""
        name = f"work-{next(self._numbers)}"
        self.server.put(
            PODS,
            {
                "metadata": {"name": name, "labels": {"work": node_class}},
                "spec": {
                    "nodeSelector": {"example.com/pool": node_class},
                    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
                    "containers": [{"name": "c", "resources": {"requests": {"nvidia.com/gpu": str(gpus)}}}],
                },
                "status": {"phase": "Pending"},
            },
        )
        return name

    def nodes(self) -> list[Object]:
        return self.server.objects(NODES)

    def pod_on(self, node: str) -> list[str]:
        return [each["metadata"]["name"] for each in self._pods() if each["spec"].get("nodeName") == node]

    def set_ready(self, node: Object, ready: bool) -> None:
        """The kubelet says so, or its silence does."""
        node["status"]["conditions"] = [
            {
                "type": "Ready",
                "status": "True" if ready else "Unknown",
                "lastTransitionTime": _time(self.now()),
            }
        ]
        self.server.put(NODES, node)

    def reap(self) -> None:
        """The autoscaler takes nodes away on which nothing runs."""
        for node in self.nodes():
            if not self.pod_on(node["metadata"]["name"]):
                self.server.delete(NODES, "", node["metadata"]["name"])

    def step(self, make: bool = True) -> None:
        """One round: kubelets, the scheduler, the autoscaler."""
        for node in self.nodes():
            if not node["status"].get("conditions"):
                self.set_ready(node, True)
        waiting = [each for each in self._pods() if not each["spec"].get("nodeName")]
        for pod in sorted(waiting, key=lambda each: -self._priority(each)):
            node = self._place(pod)
            if node is not None:
                pod["spec"]["nodeName"] = node["metadata"]["name"]
                pod["status"] = {"phase": "Running"}
                self.server.put(PODS, pod)
            elif make and self._priority(pod) >= -10 and not self._on_its_way(pod):
                self._make(pod)

    # -- inside ------------------------------------------------------------------------------------

    def _pods(self) -> list[Object]:
        return self.server.objects(PODS)

    def _priority(self, pod: Object) -> int:
        name = pod["spec"].get("priorityClassName")
        found = [
            each["value"]
            for each in self.server.objects("scheduling.k8s.io/v1/priorityclasses")
            if each["metadata"]["name"] == name
        ]
        return int(found[0]) if found else 0

    def _place(self, pod: Object) -> Object | None:
        """Where there is room, or where there is when pods of lower priority go."""
        for evicting in (False, True):
            for node in self.nodes():
                there = [
                    each for each in self._pods() if each["spec"].get("nodeName") == node["metadata"]["name"]
                ]
                lower = [each for each in there if self._priority(each) < self._priority(pod)]
                staying = [each for each in there if not (evicting and each in lower)]
                if not _may_run(pod, node) or _gpus(pod) + sum(map(_gpus, staying)) > 8:
                    continue
                for each in lower if evicting else []:
                    self.server.delete(PODS, each["metadata"]["namespace"], each["metadata"]["name"])
                return node
        return None

    def _on_its_way(self, pod: Object) -> bool:
        """Whether as many nodes are coming for such pods as such pods wait."""
        name = pod["spec"]["nodeSelector"]["example.com/pool"]
        empty = [
            each
            for each in self.nodes()
            if each["metadata"]["labels"]["example.com/pool"] == name
            and not each["spec"].get("unschedulable")
            and "glowplug.dev/retired" not in [taint["key"] for taint in each["spec"].get("taints") or []]
            and not self.pod_on(each["metadata"]["name"])
        ]
        waiting = [
            each
            for each in self._pods()
            if not each["spec"].get("nodeName")
            and each["spec"]["nodeSelector"].get("example.com/pool") == name
        ]
        return len(empty) >= len(waiting)

    def _make(self, pod: Object) -> None:
        name = pod["spec"]["nodeSelector"]["example.com/pool"]
        if name in self.refused:
            long_ago = self.now() - self.settings.refused_after_seconds - 1
            pod["metadata"]["creationTimestamp"] = _time(long_ago)
            pod["status"] = {
                "phase": "Pending",
                "conditions": [{"type": "PodScheduled", "status": "False", "message": "no such nodes"}],
            }
            self.server.put(PODS, pod)
            return
        number = next(self._numbers)
        self.server.put(
            NODES,
            {
                "metadata": {
                    "name": f"node-{number}",
                    "labels": {"example.com/pool": name, "kubernetes.io/hostname": f"node-{number}"},
                    "creationTimestamp": _time(self.now() + 1),
                },
                "spec": {
                    "taints": [
                        {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"},
                        {"key": self.settings.startup_taint, "effect": "NoSchedule"},
                    ]
                },
                "status": {"addresses": [{"type": "InternalIP", "address": f"127.0.0.{number % 250 + 1}"}]},
            },
        )

    def _caught_up(self) -> None:
        """Until the providers' watches have seen every pod as it is."""
        for each in self._providers:
            until = time.monotonic() + 10
            while (
                each._watching
                and {key: value.node for key, value in each._watcher.current().items()} != self._takers()
            ):
                assert time.monotonic() < until, "the watch did not catch up"
                time.sleep(0.005)

    def _takers(self) -> dict[str, str]:
        return {
            f"{pod['metadata']['namespace']}/{pod['metadata']['name']}": pod["spec"].get("nodeName") or ""
            for pod in self._pods()
            if pod["metadata"]["labels"].get("work")
        }

    @contextlib.contextmanager
    def _failing(self, status: int) -> Iterator[None]:
        self.server.refuse("GET", "/nodes$", status, "ordered by the test")
        yield
        self.server.accept()


def _may_run(pod: Object, node: Object) -> bool:
    labels = node["metadata"]["labels"]
    tolerated = {each.get("key") for each in pod["spec"].get("tolerations") or []}
    taints = [each["key"] for each in node["spec"].get("taints") or [] if each["effect"] == "NoSchedule"]
    ready = [each["status"] for each in node["status"].get("conditions") or [] if each["type"] == "Ready"]
    return (
        all(labels.get(key) == value for key, value in pod["spec"]["nodeSelector"].items())
        and all(key in tolerated for key in taints)
        and ready == ["True"]
        and not node["spec"].get("unschedulable")
    )


def _gpus(pod: Object) -> int:
    return sum(
        int(each["resources"].get("requests", {}).get("nvidia.com/gpu", 0))
        for each in pod["spec"]["containers"]
    )


def _time(at: float) -> str:
    return datetime.datetime.fromtimestamp(int(at), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
