"""What only placeholders do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fixtures.kubernetes_api import KubernetesApi
from tests.warmpool.providers import nodemaker
from tests.warmpool.providers.nodemaker import NODES, PODS, Cluster
from warmpool import errors, placeholders
from warmpool.provider import Provider, Stage


@pytest.fixture
def cluster(kubernetes_api: KubernetesApi) -> Iterator[Cluster]:
    made = nodemaker.Cluster(kubernetes_api)
    yield made
    made.close()


def taints(cluster: Cluster) -> list[str]:
    (node,) = cluster.nodes()
    return [each["key"] for each in node["spec"].get("taints") or []]


def one(cluster: Cluster) -> tuple[Provider, str]:
    provider = cluster.provider()
    provider.hold("gpu", 1)
    cluster.settle()
    (machine,) = provider.observe()
    return provider, machine.name


def test_a_cold_node_is_closed_to_work_and_open_to_its_placeholder(cluster: Cluster) -> None:
    provider, name = one(cluster)
    pod = cluster.add_pod("gpu")
    cluster.step(make=False)
    assert pod not in cluster.pod_on(name)
    provider.admit(name)
    assert taints(cluster) == ["nvidia.com/gpu"], "only ours is taken away"
    cluster.step(make=False)
    assert cluster.pod_on(name) == [pod], "and the placeholder is gone at once"


def test_work_that_comes_while_a_node_is_being_replaced_keeps_it(cluster: Cluster) -> None:
    provider, name = one(cluster)
    provider.admit(name)
    provider.observe()
    pod = cluster.add_pod("gpu")
    cluster.step(make=False)
    assert cluster.pod_on(name) == [pod]
    provider.replace(name)
    assert placeholders.RETIRED_TAINT not in taints(cluster)
    assert cluster.pod_on(name) == [pod]


def test_a_node_that_is_replaced_is_closed_before_its_placeholder_goes(cluster: Cluster) -> None:
    provider, name = one(cluster)
    cluster.server.refuse("DELETE", "/pods/", 503, "ordered by the test")
    with pytest.raises(errors.UnavailableError):
        provider.replace(name)
    assert placeholders.RETIRED_TAINT in taints(cluster)
    cluster.server.accept()
    provider.replace(name)
    assert cluster.pod_on(name) == []
    assert [each.stage for each in provider.observe()] == [Stage.LEAVING]


def test_somebody_else_s_change_of_a_node_is_kept(cluster: Cluster) -> None:
    provider, name = one(cluster)
    cluster.server.modify(
        NODES, "", name, lambda node: node["spec"]["taints"].append({"key": "other", "effect": "NoExecute"})
    )
    provider.admit(name)
    assert taints(cluster) == ["nvidia.com/gpu", "other"]


def test_a_quota_is_no_capacity_and_a_missing_right_is_the_settings_fault(cluster: Cluster) -> None:
    provider = cluster.provider()
    cluster.server.refuse("POST", "/pods$", 403, 'pods "p" is forbidden: exceeded quota: gpus')
    with pytest.raises(errors.CapacityError, match="quota"):
        provider.hold("gpu", 1)
    cluster.server.accept()
    cluster.server.refuse("POST", "/pods$", 403, "pods is forbidden: may not create")
    with pytest.raises(errors.ConfigurationError, match="may not"):
        provider.hold("gpu", 1)


def test_demand_is_work_that_runs_and_work_that_waits(cluster: Cluster) -> None:
    provider = cluster.provider()
    cluster.work("gpu", 2)
    assert provider.wanted() == {"gpu": 2, "big": 0}  # type: ignore[attr-defined]
    cluster.settle()  # nodes come, closed
    for machine in provider.observe():
        assert (machine.stage, machine.admitted) == (Stage.FREE, False)
        provider.admit(machine.name)
    cluster.work("gpu", 3)
    assert provider.wanted() == {"gpu": 3, "big": 0}  # type: ignore[attr-defined]
    assert len(cluster.server.objects(PODS)) == 3
