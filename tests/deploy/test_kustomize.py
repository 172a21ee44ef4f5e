"""The manifests, built by a real kustomize (kubectl's) and validated against the API's own schemas."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from agent import config
from tests.fixtures import debian

_FOLDER = Path(__file__).parents[2] / "deploy/kustomize"
_BUILDS = ["base", "overlays/example", "overlays/runtime-class", "overlays/uninstall"]
_VERSIONS = ["1.27", "1.37"]
"""The API of the oldest cluster that is of interest, and of the newest whose schemas there are."""

Objects = dict[tuple[str, str], dict[str, Any]]


def _build(folder: str) -> Objects:
    kubectl = debian.unpacked("kubectl", "trixie", ["kubectl"]) / "usr/bin/kubectl"
    built = subprocess.run([kubectl, "kustomize", _FOLDER / folder], capture_output=True, text=True)
    assert (built.returncode, built.stderr) == (0, "")
    return {
        (each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(built.stdout) if each
    }


def _settings(objects: Objects, values: dict[str, str]) -> config.Settings:
    (text,) = (each["data"]["agent.toml"] for key, each in objects.items() if key[0] == "ConfigMap")
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return config.parse(text, "agent.toml")


def _pod(objects: Objects) -> dict[str, Any]:
    spec: dict[str, Any] = objects["DaemonSet", "glowplug-installer"]["spec"]["template"]["spec"]
    return spec


_NODE = {"NODE_NAME": "n1", "NODE_IP": "10.0.0.7", "API_URL": "https://10.96.0.1:443"}


@pytest.mark.parametrize("folder", _BUILDS)
@pytest.mark.parametrize("version", _VERSIONS)
def test_every_object_is_one_that_the_api_takes(folder: str, version: str) -> None:
    objects = _build(folder)
    assert len(objects) >= 8
    for each in objects.values():
        kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize("folder", _BUILDS)
def test_an_object_that_the_api_does_not_take_is_found(folder: str) -> None:
    (daemonset,) = (each for key, each in _build(folder).items() if key[0] == "DaemonSet")
    daemonset["spec"]["template"]["spec"]["hostPid"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(daemonset, _VERSIONS[-1], strict=True)


@pytest.mark.parametrize("folder", _BUILDS)
def test_the_parts_fit_each_other(folder: str) -> None:
    objects = _build(folder)
    daemonset, pod = objects["DaemonSet", "glowplug-installer"], _pod(objects)
    labels = daemonset["spec"]["template"]["metadata"]["labels"]
    assert daemonset["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert ("ServiceAccount", pod["serviceAccountName"]) in objects
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == set(volumes)
    assert ("ConfigMap", volumes["settings"]["configMap"]["name"]) in objects
    for key, each in objects.items():
        if key[0].endswith("RoleBinding"):
            assert (each["roleRef"]["kind"], each["roleRef"]["name"]) in objects
            assert each["subjects"][0]["name"] == "glowplug-agent"
            assert each["subjects"][0]["namespace"] == "glowplug-system"
    settings = _settings(objects, _NODE)
    assert settings.http.listen == "10.0.0.7:7310"
    assert settings.kubernetes.node_name == "n1"


def test_no_right_is_given_that_the_agents_do_not_use() -> None:
    rules = {
        (key[0], each["metadata"].get("namespace")): each["rules"]
        for key, each in _build("base").items()
        if key[0] in ("Role", "ClusterRole")
    }
    assert rules == {
        ("Role", "glowplug-system"): [
            {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]}
        ],
        ("ClusterRole", None): [{"apiGroups": [""], "resources": ["events"], "verbs": ["create"]}],
    }
    for folder in _BUILDS:
        assert "*" not in json.dumps([each.get("rules") for each in _build(folder).values()])


def test_what_the_overlays_change() -> None:
    example = _build("overlays/example")
    pod = _pod(example)
    assert pod["containers"][0]["image"] == "registry.example/tools/glowplug-agent:0.1"
    assert pod["hostNetwork"] is True
    assert pod["nodeSelector"] == {"kubernetes.io/os": "linux", "nvidia.com/gpu.present": "true"}
    assert example["Role", "glowplug-pull-secrets"]["metadata"]["namespace"] == "team-a"
    service = example["Service", "glowplug-peers"]
    labels = example["DaemonSet", "glowplug-installer"]["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    settings = _settings(example, _NODE)
    assert settings.peers.advertise == f"10.0.0.7:{service['spec']['ports'][0]['port']}"
    by_class = _build("overlays/runtime-class")
    assert by_class["RuntimeClass", "glowplug"]["handler"] == "glowplug"
    assert _environment(by_class)["GLOWPLUG_MODE"] == "runtime-class"
    assert _environment(_build("overlays/uninstall"))["GLOWPLUG_ACTION"] == "uninstall"


def _environment(objects: Objects) -> dict[str, str]:
    return {each["name"]: each.get("value", "") for each in _pod(objects)["containers"][0]["env"]}
