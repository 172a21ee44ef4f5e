"""The warm pool's manifests, and whether they fit what the controller does."""

from __future__ import annotations

from typing import Any

import kubernetes_validate
import pytest

from tests.deploy.test_kustomize import _VERSIONS, Objects, _build
from tests.warmpool.providers.nodemaker import SETTINGS
from warmpool import document, placeholders
from warmpool.settings import KubernetesProvider, Settings

_NAME = "glowplug-warmpool"


@pytest.fixture(scope="module")
def objects() -> Objects:
    return _build("warmpool")


def settings(objects: Objects) -> Settings:
    (text,) = (each["data"]["pool.yaml"] for key, each in objects.items() if key[0] == "ConfigMap")
    return document.parse(text, "pool.yaml")


@pytest.mark.parametrize("version", _VERSIONS)
def test_every_object_is_one_that_the_api_takes(objects: Objects, version: str) -> None:
    assert len(objects) >= 8
    for each in objects.values():
        kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize("version", _VERSIONS)
def test_a_placeholder_is_a_pod_that_the_api_takes(version: str) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", **placeholders.body(SETTINGS, "default", "gpu")}
    kubernetes_validate.validate(pod, version, strict=True)


def test_the_priority_is_between_work_and_the_autoscaler_s_cut_off(objects: Objects) -> None:
    provider = settings(objects).provider
    assert isinstance(provider, KubernetesProvider)
    made = objects["PriorityClass", provider.priority_class]
    assert -10 < made["value"] < 0
    assert made["preemptionPolicy"] == "Never"
    assert made["globalDefault"] is False


def test_the_parts_fit_each_other(objects: Objects) -> None:
    pool = settings(objects)
    assert isinstance(pool.provider, KubernetesProvider)
    assert pool.provider.namespace == _NAME
    spec: dict[str, Any] = objects["Deployment", _NAME]["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    (container,) = spec["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == set(volumes)
    assert ("ConfigMap", volumes["settings"]["configMap"]["name"]) in objects
    assert container["args"][-1] == f"{mounts['settings']}/pool.yaml"
    assert pool.warmth.agents is not None
    assert str(pool.warmth.agents.token_file).startswith(mounts["peers"])
    assert pool.status.listen == f"0.0.0.0:{container['ports'][0]['containerPort']}"
    assert ("ServiceAccount", spec["serviceAccountName"]) in objects
    for key, each in objects.items():
        if key[0].endswith("RoleBinding"):
            assert (each["roleRef"]["kind"], each["roleRef"]["name"]) in objects
            assert each["subjects"][0]["namespace"] == _NAME


def _may(rules: list[dict[str, Any]]) -> set[tuple[str, str, str]]:
    """(verb, resource, name); no name is any."""
    return {
        (verb, resource, name)
        for rule in rules
        for verb in rule["verbs"]
        for resource in rule["resources"]
        for name in rule.get("resourceNames", [""])
    }


def test_the_controller_may_do_what_it_does_and_no_more(objects: Objects) -> None:
    state = f"{_NAME}-{settings(objects).name}"
    assert _may(objects["Role", _NAME]["rules"]) == {
        ("create", "pods", ""),
        ("delete", "pods", ""),
        ("create", "configmaps", ""),
        ("get", "configmaps", state),
        ("patch", "configmaps", state),
        ("create", "leases", ""),
        ("get", "leases", state),
        ("patch", "leases", state),
    }
    assert _may(objects["ClusterRole", _NAME]["rules"]) == {
        ("list", "pods", ""),
        ("watch", "pods", ""),
        ("get", "nodes", ""),
        ("list", "nodes", ""),
        ("patch", "nodes", ""),
    }
