"""The kubernetes provider against the fake API server, with pods that a fake controller and kubelet make."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterator
from typing import Any

import kubernetes_validate
import pytest
import yaml

from cluster import objects
from cluster.api import Api
from cluster.connection import Connection, Where
from serving import changes, endpoint, errors
from serving.endpoint import Endpoint
from serving.engine.state import Ration, Rations
from serving.providers import engineclient, manifests
from serving.providers.kubernetes import KubernetesProvider
from serving.replica import Provider, State
from tests.fixtures.kubernetes_api import KubernetesApi
from tests.fixtures.kubernetes_nodes import Nodes, Processes, Scripted, nodes
from tests.serving.providers import conformance
from tests.serving.providers.conformance import names, until
from tests.serving.served import document
from tests.serving.shortpaths import short_directory

SECTIONS: dict[str, object] = {
    "provider": "kubernetes",
    "image": "registry.example/team/engine:1",
    "kubernetes": {"supervisor": "registry.example/glowplug-serving:0.1"},
}
_DEPLOYMENTS = "apps/v1/deployments"


class World:
    """A conformance.Platform."""

    sections = SECTIONS

    def __init__(self, server: KubernetesApi, cluster: Nodes, runtime: Scripted) -> None:
        self.server, self.nodes, self.runtime = server, cluster, runtime
        self._providers: list[KubernetesProvider] = []
        self.provider: Provider = self.again()

    def again(self, **options: Any) -> KubernetesProvider:
        api = Api(Connection(Where(url=self.server.url)), "default")
        self._providers.append(KubernetesProvider("chat", api, **options))
        return self._providers[-1]

    def make_ready(self, names: Collection[str]) -> None:
        self.runtime.ready |= set(names)

    def fail(self, name: str) -> None:
        self.runtime.states[name] = {
            "restarts": 1,
            "waiting": "CrashLoopBackOff",
            "ended": "Error",
            "message": "last words",
        }

    def hold_exits(self) -> None:
        self.runtime.lets_go = False

    def release_exits(self) -> None:
        self.runtime.lets_go = True

    def close(self) -> None:
        for each in self._providers:
            each.close()

    def deployments(self) -> dict[str, int]:
        return {
            each["metadata"]["name"]: each["spec"]["replicas"] for each in self.server.objects(_DEPLOYMENTS)
        }


@pytest.fixture
def world(kubernetes_api: KubernetesApi) -> Iterator[World]:
    runtime = Scripted()
    with nodes(kubernetes_api, runtime) as cluster:
        made = World(kubernetes_api, cluster, runtime)
        yield made
        made.close()


@pytest.mark.parametrize("check", conformance.checks, ids=lambda check: check.__name__)
def test_conformance(world: World, check: Callable[[conformance.Platform], None]) -> None:
    check(world)


def _wanted(**sections: Any) -> Endpoint:
    return endpoint.load(yaml.safe_dump(document(**{**SECTIONS, **sections})), "e")


_FULL = _wanted(
    engine={"kind": "vllm"},
    model="/models/chat",
    resources={"cpus": 1.5, "memory_bytes": 8 << 30, "gpus": 2},
    kubernetes={
        "supervisor": "glowplug-serving:0.1",
        "runtime_class": "glowplug",
        "service_account": "engine",
        "priority_class": "high",
        "node_selector": {"gpu": "h100"},
        "tolerations": [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}],
        "pull_secrets": ["mine"],
        "resources": {"ephemeral-storage": "20Gi"},
        "security": {
            "run_as_user": 1000,
            "capabilities": ["IPC_LOCK"],
            "seccomp": "Unconfined",
            "read_only_root": True,
        },
    },
)


@pytest.mark.parametrize("wanted", [_wanted(), _FULL], ids=["least", "full"])
@pytest.mark.parametrize("api_version", ["1.27", "1.37"])
def test_every_object_is_one_that_the_api_takes(wanted: Endpoint, api_version: str) -> None:
    owner = objects.Owner("apps/v1", "Deployment", "chat", "u", controller=True)
    for kind, body in (
        (objects.DEPLOYMENT, manifests.deployment(wanted, "v", owner)),
        (objects.SERVICE, manifests.service(wanted, "v", owner)),
        (objects.CONFIG_MAP, manifests.config_map(wanted, "v", owner)),
    ):
        whole = {"apiVersion": kind.group_version, "kind": kind.name, **body}
        kubernetes_validate.validate(whole, api_version, strict=True)


def test_what_a_pod_has_of_the_document() -> None:
    (container,) = (spec := manifests.deployment(_FULL, "v", None)["spec"]["template"]["spec"])["containers"]
    assert container["resources"]["limits"] == {
        "cpu": "1500m",
        "memory": str(8 << 30),
        "nvidia.com/gpu": "2",
        "ephemeral-storage": "20Gi",
    }
    assert spec["runtimeClassName"] == "glowplug"
    assert spec["terminationGracePeriodSeconds"] > 20 + 0.5, "kubelet's grace is longer than the drain"
    assert {each["name"] for each in container["volumeMounts"]} <= {each["name"] for each in spec["volumes"]}
    assert changes.version(_FULL) != changes.version(_wanted())


def test_a_pod_may_do_no_more_than_the_document_says() -> None:
    least = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    pod = manifests.deployment(_wanted(), "v", None)["spec"]["template"]["spec"]
    assert pod["securityContext"] == {"seccompProfile": {"type": "RuntimeDefault"}}
    assert pod["containers"][0]["securityContext"] == least, "its user and its root are the image's"
    # What brings the supervisor is ours: it is held to all that Pod Security calls restricted.
    ours = {**least, "runAsNonRoot": True, "readOnlyRootFilesystem": True}
    assert pod["initContainers"][0]["securityContext"] == ours

    pod = manifests.deployment(_FULL, "v", None)["spec"]["template"]["spec"]
    assert pod["securityContext"] == {"seccompProfile": {"type": "Unconfined"}}
    assert pod["containers"][0]["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"], "add": ["IPC_LOCK"]},
        "runAsUser": 1000,
        "runAsNonRoot": True,
        "readOnlyRootFilesystem": True,
    }
    assert {"name": "tmp", "mountPath": "/tmp"} in pod["containers"][0]["volumeMounts"]
    assert pod["initContainers"][0]["securityContext"] == ours


@pytest.mark.parametrize(
    "security",
    [
        {"capabilities": ["CAP_SYS_NICE"]},
        {"capabilities": ["ALL"]},
        {"run_as_user": -1},
        {"privileged": True},
    ],
)
def test_what_a_pod_may_not_be_given(security: Any) -> None:
    with pytest.raises(errors.DocumentError, match=r"kubernetes\.security"):
        _wanted(kubernetes={"supervisor": "glowplug-serving:0.1", "security": security})


def test_a_model_in_a_bucket_has_room_in_the_pod() -> None:
    wanted = _wanted(engine={"kind": "vllm"}, model="s3://models/chat")
    spec = manifests.deployment(wanted, "v", None)["spec"]["template"]["spec"]
    (volume,) = (each for each in spec["volumes"] if each["name"] == "model")
    (mount,) = (each for each in spec["containers"][0]["volumeMounts"] if each["name"] == "model")
    assert "emptyDir" in volume
    assert (mount["mountPath"], mount["readOnly"]) == (wanted.model_cache.directory, False)


def test_a_pod_selector_restarts_and_a_place_is_fixed() -> None:
    place = {"supervisor": "glowplug-serving:0.1"}
    old = _wanted(kubernetes=place)
    (change,) = changes.plan(old, _wanted(kubernetes={**place, "node_selector": {"a": "b"}}))
    assert (change.key, change.effect) == ("kubernetes.node_selector.a", changes.Effect.RESTART)
    with pytest.raises(errors.ConflictError, match=r"kubernetes\.namespace: .* cannot become 'other'"):
        changes.plan(old, _wanted(kubernetes={**place, "namespace": "other"}))


def test_a_name_that_is_taken_back_leaves_nothing_half_made(world: World) -> None:
    world.server.refuse("POST", "/configmaps", 403, "configmaps is forbidden")
    with pytest.raises(errors.ConfigurationError, match="grant it in a Role"):
        world.provider.apply(_wanted())
    world.server.wait(lambda: not world.server.objects(_DEPLOYMENTS))
    assert world.server.objects("v1/services") == []
    world.server.accept()
    world.provider.apply(_wanted())


@pytest.mark.parametrize(
    ("message", "key"),
    [
        ('Deployment.apps "x" is invalid: spec.template.spec.containers[0].image: Required value', "image"),
        ("spec.template.spec.tolerations[0].operator: Unsupported value", "kubernetes.tolerations"),
        ("spec.template.spec.containers[0].securityContext.runAsUser: Invalid value", "kubernetes.security"),
        ("spec.template.spec.containers[0].resources.limits[cpu]: Invalid value", "resources"),
    ],
)
def test_what_the_api_server_refuses_is_named_by_the_documents_key(
    world: World, message: str, key: str
) -> None:
    world.server.refuse("POST", "/deployments", 422, message)
    with pytest.raises(errors.DocumentError, match=f"^{key}: "):
        world.provider.apply(_wanted())


def test_an_image_that_cannot_be_pulled_names_its_key(world: World) -> None:
    world.provider.apply(_wanted())
    world.provider.scale(1)
    until(lambda: len(world.provider.observe()) == 1)
    (replica,) = world.provider.observe()
    world.runtime.states[replica.name] = {"waiting": "ImagePullBackOff", "message": "manifest unknown"}
    until(lambda: names(world.provider, State.FAILED) == [replica.name])
    (replica,) = world.provider.observe()
    assert replica.reason is not None
    assert replica.reason.startswith("ImagePullBackOff: manifest unknown; image: is it there")


def test_a_quota_that_is_used_up_is_a_failed_replica_with_the_remedy(world: World) -> None:
    world.nodes.quota = 1
    world.provider.apply(_wanted())
    world.provider.scale(2)
    until(lambda: bool(names(world.provider, State.FAILED)))
    (failed,) = (each for each in world.provider.observe() if each.state is State.FAILED)
    assert "raise the ResourceQuota, or lower replicas.max" in str(failed.reason)
    world.nodes.quota = None
    until(lambda: not names(world.provider, State.FAILED))


def test_each_start_that_failed_counts(world: World) -> None:
    world.provider.apply(_wanted())
    world.provider.scale(1)
    until(lambda: len(world.provider.observe()) == 1)
    (name,) = names(world.provider, State.STARTING)
    world.runtime.states[name] = {"restarts": 3, "waiting": "CrashLoopBackOff", "ended": "OOMKilled"}
    until(lambda: len(names(world.provider, State.FAILED)) == 3)
    assert "resources.memory_bytes" in str(world.provider.observe()[0].reason)
    world.server.logs["default", name] = lambda query: f"previous={query.get('previous')}\x1b[31m\n"
    assert world.provider.logs(f"{name}/1", 5) == ["previous=true[31m"]
    assert world.provider.logs(name, 5) == ["previous=None[31m"]


def test_somebody_else_scales_at_the_same_moment(world: World) -> None:
    version = world.provider.apply(_wanted())
    name = f"chat-{version}"
    seen = []

    def meddle(item: dict[str, Any]) -> None:
        seen.append(1)
        item["spec"]["replicas"] = 7

    api = world.provider._api  # type: ignore[attr-defined]
    read = api.scale

    def scale(*arguments: Any) -> objects.Scale:
        found: objects.Scale = read(*arguments)
        if len(seen) < 2:
            world.server.modify(_DEPLOYMENTS, "default", name, meddle)
        return found

    api.scale = scale
    world.provider.scale(2)
    assert world.deployments() == {name: 2}
    assert len(seen) == 2
    until(lambda: len(world.provider.observe()) == 2)
    world.server.modify(_DEPLOYMENTS, "default", name, lambda item: item["spec"].update(replicas=5))
    until(lambda: world.provider.scale(2) or world.deployments() == {name: 2})


def test_who_is_kept_but_not_ready_makes_a_shrink_wait(world: World) -> None:
    version = world.provider.apply(_wanted())
    world.provider.scale(2)
    until(lambda: len(names(world.provider, State.STARTING)) == 2)
    first, second = names(world.provider, State.STARTING)
    world.make_ready([first])
    until(lambda: names(world.provider, State.READY) == [first])
    world.provider.scale(1, keep=[second])
    assert world.deployments() == {f"chat-{version}": 2}
    world.make_ready([second])
    until(lambda: world.provider.scale(1, keep=[second]) or names(world.provider, State.READY) == [second])


def test_who_is_drained_while_others_start_is_the_one_that_goes(world: World) -> None:
    world.provider.apply(_wanted())
    world.provider.scale(2)
    until(lambda: len(names(world.provider, State.STARTING)) == 2)
    first, second = names(world.provider, State.STARTING)
    world.make_ready([first])
    until(lambda: names(world.provider, State.READY) == [first])
    world.provider.drain([first])
    until(lambda: names(world.provider, State.STARTING) == [second] and len(world.provider.observe()) == 1)


def test_an_api_server_that_is_away_changes_nothing(world: World) -> None:
    version = world.provider.apply(_wanted())
    world.provider.scale(2)
    until(lambda: len(names(world.provider, State.STARTING)) == 2)
    world.make_ready(names(world.provider, State.STARTING))
    until(lambda: len(names(world.provider, State.READY)) == 2)
    for method in ("GET", "POST", "PATCH", "DELETE"):
        world.server.refuse(method, "/", 503, "away")
    world.server.drop_watches()
    for act in (
        lambda: world.provider.scale(1),
        lambda: world.provider.drain(names(world.provider, State.READY)),
        lambda: world.provider.remove(version),
        lambda: world.provider.apply(_wanted()),
    ):
        with pytest.raises(errors.UnavailableError, match="away"):
            act()
    assert len(names(world.provider, State.READY)) == 2, "what was known stays"
    world.server.accept()
    until(lambda: world.provider.trouble() is None)  # type: ignore[attr-defined]
    assert world.deployments() == {f"chat-{version}": 2}


def test_who_does_not_lead_changes_nothing(world: World) -> None:
    version = world.provider.apply(_wanted())
    second = world.again(may_write=lambda: False)
    for act in (
        lambda: second.apply(_wanted()),
        lambda: second.scale(3, version=version),
        lambda: second.remove(version),
    ):
        with pytest.raises(errors.UnavailableError, match="another controller leads"):
            act()
    assert world.deployments() == {f"chat-{version}": 0}


def test_a_dry_run_is_checked_and_changes_nothing(world: World) -> None:
    dry = world.again(dry_run=True)
    version = dry.apply(_wanted())
    assert world.server.objects(_DEPLOYMENTS) == []
    assert world.provider.apply(_wanted()) == version
    world.provider.scale(2)
    until(lambda: len(names(dry, State.STARTING)) == 2)
    before = world.server.objects(_DEPLOYMENTS)
    dry.scale(1)
    dry.drain(names(dry, State.STARTING))
    dry.remove(version)
    assert world.server.objects(_DEPLOYMENTS) == before
    world.server.refuse("POST", "/deployments", 422, "spec.template: no")
    with pytest.raises(errors.DocumentError):
        dry.apply(_wanted(image="other"))


def test_engines_in_pods_are_told_their_limit_and_asked_how_they_are(kubernetes_api: KubernetesApi) -> None:
    """Real engines, each at an address of its own; no socket but the control port reaches them."""
    with short_directory() as directory, nodes(kubernetes_api, Processes(kubernetes_api, directory)):
        provider = KubernetesProvider("chat", Api(Connection(Where(url=kubernetes_api.url)), "default"))
        with contextlib.closing(provider):
            provider.apply(_wanted())
            provider.set_limit(5)
            provider.scale(2)
            until(lambda: len(names(provider, State.READY)) == 2)
            until(lambda: all(each.vitals is not None for each in provider.observe()))
            provider.set_limit(9)
            until(
                lambda: bool(provider.observe()) and {each.limit for each in provider._heard.values()} == {9}
            )
            first, second = provider.observe()
            ration = Rations(tenants={"acme": Ration(7.0)})
            spent = provider.ration({first.name: ration, second.name: ration, "gone": ration})
            assert set(spent) == {first.name, second.name}
            assert set(spent[first.name]) == {"acme"}
            assert first.address is not None
            stranger = engineclient.Remote((first.address[0], 8_001), "guessed")
            with pytest.raises(errors.UnavailableError, match="401"):
                engineclient.set_limit(stranger, 1)
            assert "start" in first.phases
            assert "pulled" in first.phases
            lines = provider.logs(first.name, 50)
            assert any(json.loads(line).get("in_flight") == 9 for line in lines if line.startswith("{"))
            provider.remove(first.version)
            until(lambda: provider.observe() == [])
