"""What is asked of an API server over HTTP, and what its refusals become."""

from __future__ import annotations

import threading

import pytest

from cluster import errors, objects
from cluster.api import Api, with_conflicts
from tests.fixtures.kubernetes_api import KubernetesApi


def _deployment(name: str = "d", replicas: int = 1) -> dict[str, object]:
    return {"metadata": {"name": name, "labels": {"app": name}}, "spec": {"replicas": replicas}}


def test_an_object_from_birth_to_death(api: Api) -> None:
    made = api.create(objects.DEPLOYMENT, _deployment())
    assert (made.meta.name, made.meta.namespace, made.meta.generation) == ("d", "default", 1)
    assert made.meta.uid
    assert made.meta.created_at > 0
    with pytest.raises(errors.ConflictError):
        api.create(objects.DEPLOYMENT, _deployment())
    changed = api.patch(objects.DEPLOYMENT, "d", {"metadata": {"labels": {"app": None, "b": "c"}}})
    assert (changed.meta.labels, changed.meta.generation) == ({"b": "c"}, 1)
    assert api.get(objects.DEPLOYMENT, "d") == changed
    with pytest.raises(errors.ConflictError):
        api.patch(objects.DEPLOYMENT, "d", {"spec": {"replicas": 9}}, version=made.meta.version)
    with pytest.raises(errors.ConflictError, match="uid"):
        api.delete(objects.DEPLOYMENT, "d", uid="another")
    api.delete(objects.DEPLOYMENT, "d", uid=made.meta.uid)
    api.delete(objects.DEPLOYMENT, "d")
    with pytest.raises(errors.NotFoundError, match="'d' not found"):
        api.get(objects.DEPLOYMENT, "d")


def test_apply_takes_away_what_it_no_longer_says_and_leaves_the_rest(
    api: Api, kubernetes_api: KubernetesApi
) -> None:
    api.apply(objects.CONFIG_MAP, "c", {"data": {"a": "1", "b": "2"}})

    def somebody_else(item: dict[str, dict[str, str]]) -> None:
        item["data"]["theirs"] = "3"

    kubernetes_api.modify("v1/configmaps", "default", "c", somebody_else)
    found = api.apply(objects.CONFIG_MAP, "c", {"data": {"a": "4"}})
    assert found.at("data") == {"a": "4", "theirs": "3"}
    version = found.meta.version
    assert api.apply(objects.CONFIG_MAP, "c", {"data": {"a": "4"}}).meta.version == version, "nothing new"


def test_a_dry_run_changes_nothing(api: Api, kubernetes_api: KubernetesApi) -> None:
    api.create(objects.DEPLOYMENT, _deployment())
    before = kubernetes_api.objects("apps/v1/deployments")
    api.create(objects.DEPLOYMENT, _deployment("e"), dry_run=True)
    api.apply(objects.DEPLOYMENT, "f", {"spec": {}}, dry_run=True)
    api.patch(objects.DEPLOYMENT, "d", {"spec": {"replicas": 3}}, dry_run=True)
    assert api.set_scale(objects.DEPLOYMENT, "d", 4, dry_run=True).replicas == 4
    api.delete(objects.DEPLOYMENT, "d", dry_run=True)
    assert kubernetes_api.objects("apps/v1/deployments") == before


def test_scaling_only_what_was_read(api: Api, kubernetes_api: KubernetesApi) -> None:
    api.create(objects.DEPLOYMENT, _deployment())
    read = api.scale(objects.DEPLOYMENT, "d")
    assert api.set_scale(objects.DEPLOYMENT, "d", 3, version=read.version).replicas == 3
    with pytest.raises(errors.ConflictError):
        api.set_scale(objects.DEPLOYMENT, "d", 5, version=read.version)
    assert api.scale(objects.DEPLOYMENT, "d").replicas == 3

    def add_one() -> int:
        read = api.scale(objects.DEPLOYMENT, "d")
        return api.set_scale(objects.DEPLOYMENT, "d", read.replicas + 1, version=read.version).replicas

    threads = [threading.Thread(target=with_conflicts, args=(add_one,)) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert api.scale(objects.DEPLOYMENT, "d").replicas == 7, "no increment is lost"


def test_conflicts_without_end_are_an_error() -> None:
    calls = []

    def action() -> None:
        calls.append(1)
        raise errors.ConflictError("again")

    with pytest.raises(errors.ConflictError):
        with_conflicts(action)
    assert len(calls) > 2


def test_a_list_comes_in_pages_and_is_selected(api: Api, kubernetes_api: KubernetesApi) -> None:
    for number in range(1_100):
        labels = {"kind": "odd" if number % 2 else "even"}
        kubernetes_api.put("v1/pods", {"metadata": {"name": f"p{number:04d}", "labels": labels}})
    kubernetes_api.put("v1/pods", {"metadata": {"name": "x", "namespace": "other"}})
    assert len(api.list(objects.POD).objects) == 1_100
    assert len(api.list(objects.POD, everywhere=True).objects) == 1_101
    assert len(api.list(objects.POD, labels={"kind": "odd"}).objects) == 550
    kubernetes_api.put("v1/nodes", {"metadata": {"name": "n"}})
    (node,) = api.list(objects.NODE).objects
    assert node.key == "n"
    assert api.patch(objects.NODE, "n", {"spec": {"unschedulable": True}}).at("spec", "unschedulable") is True


def test_eviction_respects_budgets(api: Api, kubernetes_api: KubernetesApi) -> None:
    kubernetes_api.put("v1/pods", {"metadata": {"name": "p"}})
    kubernetes_api.protected.add(("default", "p"))
    with pytest.raises(errors.DisruptionError):
        api.evict("p")
    kubernetes_api.protected.clear()
    api.evict("p")
    api.evict("p")
    assert kubernetes_api.objects("v1/pods") == []


def test_what_an_owner_has_goes_with_it(api: Api, kubernetes_api: KubernetesApi) -> None:
    owner = api.create(objects.DEPLOYMENT, _deployment())
    mine = objects.Owner("apps/v1", "Deployment", "d", owner.meta.uid, controller=True)
    made = api.create(objects.CONFIG_MAP, {"metadata": {"name": "c", "ownerReferences": [mine.body()]}})
    assert made.meta.owners == (mine,)
    api.delete(objects.DEPLOYMENT, "d")
    assert kubernetes_api.objects("v1/configmaps") == []


def test_logs_are_bounded(api: Api, kubernetes_api: KubernetesApi) -> None:
    kubernetes_api.logs["default", "p"] = lambda query: (
        f"{query['container']} {query['tailLines']}\n" * 400_000
    )
    assert api.logs("p", container="engine", lines=7).startswith("engine 7\n")
    assert len(api.logs("p", container="engine", lines=7)) <= 1 << 20


@pytest.mark.parametrize(
    ("status", "message", "expected", "says"),
    [
        (401, "Unauthorized", errors.ForbiddenError, "expired"),
        (403, 'pods is forbidden: User "x" cannot list', errors.ForbiddenError, "Role"),
        (403, "exceeded quota: gpus, requested: 1, used: 8, limited: 8", errors.QuotaError, "exceeded quota"),
        (404, "gone", errors.NotFoundError, "gone"),
        (409, "modified", errors.ConflictError, "modified"),
        (410, "too old", errors.ExpiredError, "too old"),
        (422, "spec.x: Invalid value", errors.InvalidError, "spec.x"),
        (429, "slow down", errors.UnavailableError, "slow down"),
        (500, "etcd", errors.UnavailableError, "etcd"),
        (503, "no", errors.UnavailableError, "503"),
    ],
)
def test_every_refusal_is_the_error_of_who_can_act(
    api: Api,
    kubernetes_api: KubernetesApi,
    status: int,
    message: str,
    expected: type[errors.ClusterError],
    says: str,
) -> None:
    kubernetes_api.refuse("GET", "/pods", status, message)
    with pytest.raises(expected, match=says) as found:
        api.list(objects.POD)
    assert type(found.value) is expected
