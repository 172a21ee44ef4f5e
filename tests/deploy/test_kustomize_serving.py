"""The operator's manifests, built by a real kustomize; its rights are those that it uses."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click.testing
import kubernetes_validate
import pytest
import yaml

from glowplug.verbs import operator as verb
from glowplug.verbs import router as router_verb
from serving import endpoint
from serving.operator import definition, tending
from serving.providers import manifests
from tests.fixtures import debian
from tests.fixtures.kubernetes_api import Seen

_FOLDER = Path(__file__).parents[2] / "deploy/kustomize/serving"
_OURS = ("glowplug-operator", "glowplug-envoy")
_ENDPOINT = endpoint.load(
    "name: chat\nimage: i\nprovider: kubernetes\nengine: {kind: vllm}\nmodel: /m\n"
    "kubernetes: {supervisor: s}\n",
    "e",
)
Objects = dict[tuple[str, str], dict[str, Any]]
Right = tuple[str, str, str]
"""API group, resource, verb."""


def build() -> Objects:
    kubectl = debian.unpacked("kubectl", "trixie", ["kubectl"]) / "usr/bin/kubectl"
    built = subprocess.run([kubectl, "kustomize", _FOLDER], capture_output=True, text=True)
    assert (built.returncode, built.stderr) == (0, "")
    return {
        (each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(built.stdout) if each
    }


def granted() -> set[Right]:
    (role,) = (each for key, each in build().items() if key[0] == "Role")
    return {
        (group, resource, one)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for one in rule["verbs"]
    }


_PATH = re.compile(
    r"/(?:api/v1|apis/(?P<group>[^/]+)/[^/]+)(?:/namespaces/[^/]+)?/(?P<resource>[a-z]+)"
    r"(?:/(?P<name>[^/]+))?(?:/(?P<subresource>[a-z]+))?\Z"
)


def used(requests: Iterable[Seen]) -> set[Right]:
    """What an API server would have asked the Role for."""
    found = set()
    for each in requests:
        match = _PATH.match(each.path)
        if match is None:
            continue  # discovery, which everybody may
        by_method = {"POST": "create", "PATCH": "patch", "DELETE": "delete", "PUT": "update"}
        one = by_method.get(each.method) or (
            "watch" if each.query.get("watch") else "get" if match["name"] else "list"
        )
        resource = "/".join(filter(None, (match["resource"], match["subresource"])))
        found.add((match["group"] or "", resource, one))
    return found


@pytest.mark.parametrize("version", ["1.27", "1.37"])
def test_every_object_is_one_that_the_api_takes(version: str) -> None:
    objects = build()
    assert len(objects) >= 9
    for each in objects.values():
        kubernetes_validate.validate(each, version, strict=True)
    objects["Deployment", "glowplug-operator"]["spec"]["template"]["spec"]["hostPid"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(objects["Deployment", "glowplug-operator"], version, strict=True)


def test_the_committed_definition_is_the_documents() -> None:
    text = (_FOLDER / "crd.yaml").read_text()
    assert yaml.safe_load(text) == definition.document(), (
        "write it again: glowplug operator crd > deploy/kustomize/serving/crd.yaml"
    )
    assert click.testing.CliRunner().invoke(verb.command, ["crd"]).output == text


def test_the_parts_fit_each_other() -> None:
    objects = build()
    for name in _OURS:
        deployment = objects["Deployment", name]
        pod = deployment["spec"]["template"]
        assert deployment["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        volumes = {each["name"] for each in pod["spec"]["volumes"]}
        for container in (*pod["spec"]["containers"], *pod["spec"].get("initContainers", ())):
            assert {each["name"] for each in container["volumeMounts"]} <= volumes
    envoy = objects["Deployment", "glowplug-envoy"]["spec"]["template"]
    assert tending.ENVOY_LABELS.items() <= envoy["metadata"]["labels"].items()
    assert (
        envoy["metadata"]["labels"].items()
        >= objects["PodDisruptionBudget", "glowplug-envoy"]["spec"]["selector"]["matchLabels"].items()
    )
    service = objects["Service", "glowplug-operator"]
    labels = objects["Deployment", "glowplug-operator"]["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    binding = objects["RoleBinding", "glowplug-operator"]
    assert binding["subjects"][0]["namespace"] == "glowplug-serving"
    assert not any(key[0].startswith("ClusterRole") for key in objects), "its namespace is all it has"


def test_the_policies_are_about_pods_and_ports_that_there_are() -> None:
    found = build()
    replica = manifests.deployment(_ENDPOINT, "v", None)["spec"]["template"]
    pods = [replica, *(found["Deployment", name]["spec"]["template"] for name in _OURS)]
    policies = [each["spec"] for key, each in found.items() if key[0] == "NetworkPolicy"]

    def selected(by: dict[str, Any]) -> list[dict[str, Any]]:
        exist = {each["key"] for each in by.get("matchExpressions", ()) if each["operator"] == "Exists"}
        return [
            pod
            for pod in pods
            if by.get("matchLabels", {}).items() <= pod["metadata"]["labels"].items()
            and exist <= pod["metadata"]["labels"].keys()
        ]

    for policy in policies:
        (pod,) = selected(policy["podSelector"])
        named = {each["name"] for part in pod["spec"]["containers"] for each in part["ports"]}
        assert {port["port"] for rule in policy["ingress"] for port in rule["ports"]} <= named
        for rule in policy["ingress"]:
            assert all(selected(source["podSelector"]) for source in rule.get("from", ()))
    guarded = [pod for policy in policies for pod in selected(policy["podSelector"])]
    assert len(guarded) == 2
    assert replica in guarded
    assert found["Deployment", "glowplug-operator"]["spec"]["template"] in guarded


def test_the_commands_are_ones_that_the_verbs_take(tmp_path: Path) -> None:
    objects = build()
    pod = objects["Deployment", "glowplug-operator"]["spec"]["template"]["spec"]
    context = verb.run.make_context("run", list(pod["containers"][0]["args"]))
    assert context.params["listen"].endswith(
        f":{objects['Service', 'glowplug-operator']['spec']['ports'][0]['port']}"
    )
    ports = {each["name"]: each["containerPort"] for each in pod["containers"][0]["ports"]}
    assert context.params["metrics_address"] == ("0.0.0.0", ports["metrics"])
    (container,) = objects["Deployment", "glowplug-envoy"]["spec"]["template"]["spec"]["initContainers"]
    arguments = [each.replace("$(POD_NAME)", "envoy-1") for each in container["args"]]
    arguments = [each.replace("--output=/config", f"--output={tmp_path}") for each in arguments]
    result = click.testing.CliRunner().invoke(router_verb.bootstrap, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "glowplug-operator" in (tmp_path / "envoy.json").read_text()


def test_no_right_is_more_than_its_namespaces() -> None:
    assert not any("*" in word for right in granted() for word in right)
