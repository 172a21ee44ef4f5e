"""The operator as a process, with real kopf, against the fake API server with pods that a test scripts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cluster import objects
from serving import changes
from serving.operator import definition, resource
from tests.deploy.test_kustomize_serving import granted, used
from tests.fixtures.kubernetes_api import KubernetesApi
from tests.fixtures.kubernetes_nodes import Nodes, Scripted, nodes
from tests.serving.operator.running import COLLECTION, TOKEN, Operator, operating, spec
from tests.serving.shortpaths import short_directory

_DEPLOYMENTS = "apps/v1/deployments"


class World:
    def __init__(self, operator: Operator, runtime: Scripted, cluster: Nodes) -> None:
        self.operator, self.runtime, self.nodes = operator, runtime, cluster
        self.server = operator.server

    def version(self, **sections: object) -> str:
        return changes.version(resource.wanted("chat", "default", spec(**sections)).document)  # type: ignore[arg-type]

    def replicas(self) -> dict[str, int]:
        return {
            each["metadata"]["labels"]["glowplug.dev/version"]: each["spec"]["replicas"]
            for each in self.server.objects(_DEPLOYMENTS)
        }


@pytest.fixture
def world(kubernetes_api: KubernetesApi) -> Iterator[World]:
    runtime = Scripted()
    runtime.ready.add("*")
    with short_directory() as directory, nodes(kubernetes_api, runtime) as cluster:
        with operating(kubernetes_api, directory) as operator:
            yield World(operator, runtime, cluster)


def test_from_a_resource_to_replicas_and_back_to_nothing(world: World) -> None:
    operator, server = world.operator, world.server
    operator.start()
    operator.put(spec())
    operator.until(lambda: operator.condition("Ready")["status"] == "True")
    status = operator.status()
    assert (status["readyReplicas"], status["wantedReplicas"], status["phase"]) == (2, 2, "steady")
    assert status["stable"] == world.version()
    assert operator.condition("Valid")["status"] == "True"
    service = server.get("v1/services", "default", "chat")
    assert service["spec"]["ports"][0]["targetPort"] == 8080

    ready = f'glowplug_endpoint_replicas{{endpoint="chat",state="ready",version="{world.version()}"}} 2'
    operator.until(lambda: ready in operator.metrics())
    assert "glowplug_operator_leading 1" in operator.metrics()

    # The scale subresource, as kubectl scale and the HPA use it.
    assert operator.api.scale(definition.KIND, "chat").current == 2
    operator.api.set_scale(definition.KIND, "chat", 3)
    operator.until(lambda: operator.status()["readyReplicas"] == 3)
    operator.api.set_scale(definition.KIND, "chat", 99)
    operator.until(lambda: operator.status()["wantedReplicas"] == 8)  # replicas.max
    assert "8 replicas, not 3" in operator.events("Scaled")

    # Deleted, it stays until its replicas have drained.
    world.runtime.lets_go = False
    operator.api.delete(definition.KIND, "chat")
    operator.until(lambda: all("deletionTimestamp" in each["metadata"] for each in server.objects("v1/pods")))
    assert server.objects(COLLECTION)
    assert server.objects("v1/pods")
    world.runtime.lets_go = True
    operator.until(lambda: not server.objects(COLLECTION))
    for collection in ("v1/pods", "v1/services", "v1/secrets", "v1/configmaps", _DEPLOYMENTS):
        assert server.objects(collection) == []
    assert operator.stop() == 0

    # It may do what it did, and what it may do beyond that is for days that are worse.
    did = used(each for each in server.requests if each.authorization == f"Bearer {TOKEN}")
    assert did <= granted()
    assert granted() - did <= {("", "pods", "delete"), ("", "pods", "patch")}


def test_what_is_wrong_with_a_document_is_its_condition_and_nothing_changes(world: World) -> None:
    operator = world.operator
    operator.start()
    operator.put({**spec(), "replicas": {"min": 3, "max": 1}})
    operator.until(lambda: operator.condition("Valid")["status"] == "False")
    assert (
        "replicas.max: 1 is below min (3); raise max or lower min" in operator.condition("Valid")["message"]
    )
    assert world.replicas() == {}
    operator.put(spec())
    operator.until(lambda: operator.condition("Ready")["status"] == "True")
    version = world.version()
    operator.put(spec(drain={"notice": 1}))
    operator.until(lambda: operator.condition("Valid")["status"] == "False")
    assert (
        "drain.notice: unknown key; did you mean drain.notice_seconds?"
        in operator.condition("Valid")["message"]
    )
    assert any("did you mean" in each for each in operator.events("Invalid"))
    assert world.replicas() == {version: 2}

    # The next operator finds the bad document, and goes on serving the good one.
    operator.kill()
    pod = world.server.objects("v1/pods")[0]["metadata"]["name"]
    world.server.delete("v1/pods", "default", pod)
    operator.start()
    operator.until(lambda: operator.status()["readyReplicas"] == 2)
    world.server.modify(
        _DEPLOYMENTS, "default", f"chat-{version}", lambda item: item["spec"].update(replicas=1)
    )
    operator.until(lambda: world.replicas() == {version: 2})
    assert operator.condition("Valid")["status"] == "False"


def test_an_update_that_fails_is_rolled_back_once(world: World) -> None:
    operator = world.operator
    operator.start()
    operator.put(spec())
    operator.until(lambda: operator.condition("Ready")["status"] == "True")
    good, bad = world.version(), world.version(version="two")
    world.runtime.ready = {each["metadata"]["name"] for each in world.server.objects("v1/pods")}
    operator.put(spec("two"))
    operator.until(lambda: len(world.server.objects("v1/pods")) == 4)
    assert operator.status()["candidate"] == bad
    for each in world.server.objects("v1/pods"):
        name = each["metadata"]["name"]
        if name not in world.runtime.ready:
            world.runtime.states[name] = {
                "restarts": 2,
                "waiting": "CrashLoopBackOff",
                "ended": "Error",
                "message": "no such model",
            }
    operator.until(lambda: operator.status().get("refused") == bad and world.replicas() == {good: 2})
    (event,) = operator.events("RolledBack")
    assert "no such model" in event

    # Neither the next rounds nor the next operator try it again.
    operator.kill()
    operator.start()
    operator.until(lambda: operator.status()["readyReplicas"] == 2)
    operator.put({**spec("two"), "metadata": {"owner": "me"}})
    operator.until(
        lambda: (
            operator.status()["observedGeneration"]
            == world.server.get(COLLECTION, "default", "chat")["metadata"]["generation"]
        )
    )
    assert world.replicas() == {good: 2}
    world.runtime.ready.add("*")
    operator.put(spec("three"))
    operator.until(lambda: operator.status()["phase"] == "shifting")
    assert operator.status()["candidate"] == world.version(version="three")
    assert "refused" not in operator.status()


@pytest.mark.soak
def test_an_operator_killed_in_an_update_is_succeeded_by_one_that_goes_on(world: World) -> None:
    operator = world.operator
    operator.start()
    operator.put(spec())
    operator.until(lambda: operator.condition("Ready")["status"] == "True")
    old, new = world.version(), world.version(version="two")
    world.runtime.ready = {each["metadata"]["name"] for each in world.server.objects("v1/pods")}
    operator.put(spec("two"))
    operator.until(lambda: world.replicas() == {old: 2, new: 2})
    operator.kill()
    world.runtime.ready.add("*")
    operator.start()
    operator.until(lambda: operator.status()["phase"] == "shifting")
    assert world.replicas() == {old: 2, new: 2}, "the old version keeps its replicas until the last step"


@pytest.mark.soak
def test_one_leads_and_the_other_waits(world: World) -> None:
    operator = world.operator
    operator.start()
    operator.put(spec())
    operator.until(lambda: operator.condition("Ready")["status"] == "True")
    with short_directory() as directory, operating(world.server, directory) as second:
        second.start()
        leases = world.server.get("coordination.k8s.io/v1/leases", "default", "glowplug-operator")
        holder = leases["spec"]["holderIdentity"]
        second.until(lambda: "metrics: " in second.said())
        assert not second.control.exists()
        assert "glowplug_operator_leading 0" in second.metrics(), "one that waits can be looked at, too"
        # The first is told by the lease that another took over: it ends, the second goes on.
        assert operator.stop() == 0, "which lets the lease go"
        second.until(second.control.exists)
        leases = world.server.get("coordination.k8s.io/v1/leases", "default", "glowplug-operator")
        assert leases["spec"]["holderIdentity"] not in ("", holder)
        second.put(spec(replicas=3))
        second.until(lambda: second.status()["readyReplicas"] == 3)


def test_an_operator_that_lost_its_lease_changes_nothing_and_ends(world: World) -> None:
    operator = world.operator
    operator.start()
    operator.put(spec())
    operator.until(lambda: operator.condition("Ready")["status"] == "True")
    world.server.modify(
        "coordination.k8s.io/v1/leases",
        "default",
        "glowplug-operator",
        lambda item: item["spec"].update(holderIdentity="another", leaseDurationSeconds=600),
    )
    assert operator.process is not None
    assert operator.process.wait(60) == 7, operator.said()
    operator.put(spec(replicas=4))
    assert world.replicas() == {world.version(): 2}


@pytest.mark.soak
def test_a_service_of_somebody_else_is_left_alone(world: World) -> None:
    operator = world.operator
    operator.api.create(objects.SERVICE, {"metadata": {"name": "chat"}, "spec": {"ports": []}})
    operator.start()
    operator.put(spec())
    operator.until(lambda: "there is a Service chat already" in operator.condition("Valid")["message"])
    assert world.server.get("v1/services", "default", "chat")["spec"] == {"ports": []}
