"""An endpoint on Kubernetes under load: real engines in the fake cluster's pods, a real Envoy, and the
operator as a process that is killed in the middle of an update.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import pytest

from serving.router import bootstrap, envoy
from tests.fixtures.kubernetes_api import KubernetesApi
from tests.fixtures.kubernetes_nodes import Processes, nodes
from tests.serving.operator.running import Operator, operating, spec
from tests.serving.router.world import free_port
from tests.serving.served import Load, answer, document, serving
from tests.serving.shortpaths import short_directory


def test_an_update_over_a_killed_operator_fails_no_request(kubernetes_api: KubernetesApi) -> None:
    port = free_port()
    settings = {"routing": {"port": port}, "drain": {"notice_seconds": 2, "seconds": 30}}
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(short_directory())
        pods = stack.enter_context(short_directory())
        stack.enter_context(nodes(kubernetes_api, Processes(kubernetes_api, pods)))
        operator = stack.enter_context(operating(kubernetes_api, directory))
        (directory / "envoy").mkdir(mode=0o700)
        front = envoy.Envoy(
            directory / "envoy",
            bootstrap.Settings("test", str(operator.control), str(directory / "envoy" / "admin.sock")),
            workers=1,
        )
        operator.start()
        operator.put({**spec("one"), **settings})
        operator.until(lambda: operator.status().get("readyReplicas") == 2)
        front.start()
        stack.callback(front.stop)
        url = f"http://127.0.0.1:{port}"
        operator.until(lambda: _answers(url))

        async def update() -> Load:
            async def until(holds: Callable[[], bool]) -> None:
                await asyncio.to_thread(operator.until, holds)

            async with Load(url, clients=8) as load:
                operator.put({**spec("two"), **settings})
                await until(lambda: operator.status().get("phase") == "shifting")
                await asyncio.to_thread(operator.kill)
                operator.start()
                await until(lambda: operator.status().get("phase") == "steady")
                await until(lambda: len(kubernetes_api.objects("v1/pods")) == 2)
            return load

        load = asyncio.run(update())
        assert load.failed == []
        assert {each.name for each in load.asked} >= {"one", "two"}
        assert operator.condition("Ready")["status"] == "True"
        # Its end leaves routes and replicas: requests do not need it.
        assert operator.stop() == 0
        assert answer(f"{url}/work")[0] == 200
        assert len(kubernetes_api.objects("v1/pods")) == 2


@pytest.mark.soak
def test_a_server_elsewhere_has_its_replicas_in_the_cluster(kubernetes_api: KubernetesApi) -> None:
    """`glowplug serve` with the provider: its Envoy and its control plane, the cluster's pods."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(short_directory())
        pods = stack.enter_context(short_directory())
        stack.enter_context(nodes(kubernetes_api, Processes(kubernetes_api, pods)))
        operator = Operator(kubernetes_api, directory)  # for its kubeconfig
        wanted = document(
            provider="kubernetes",
            image="registry.example/team/engine:1",
            kubernetes={
                "supervisor": "registry.example/glowplug-serving:0.1",
                "kubeconfig": str(operator.directory / "kubeconfig"),
            },
        )
        served = stack.enter_context(serving(directory, wanted))
        served.until_ready(2)
        assert served.answer("/work")[0] == 200
        assert served.stop() == 0
        assert kubernetes_api.objects("v1/pods") == []


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError):
        return answer(f"{url}/work")[0] == 200
    return False


@pytest.mark.soak
def test_load_makes_replicas(kubernetes_api: KubernetesApi) -> None:
    """The autoscaler's decision goes through the scale subresource, and is an event that says why."""
    port = free_port()
    wanted = {
        **spec("one"),
        "routing": {"port": port},
        "autoscaling": {"mode": "on"},
        "replicas": {"min": 1, "max": 3, "target_concurrency": 2},
    }
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(short_directory())
        pods = stack.enter_context(short_directory())
        stack.enter_context(nodes(kubernetes_api, Processes(kubernetes_api, pods)))
        operator = stack.enter_context(operating(kubernetes_api, directory))
        (directory / "envoy").mkdir(mode=0o700)
        front = envoy.Envoy(
            directory / "envoy",
            bootstrap.Settings("test", str(operator.control), str(directory / "envoy" / "admin.sock")),
            workers=1,
        )
        operator.start()
        operator.put(wanted)
        operator.until(lambda: operator.status().get("readyReplicas") == 1)
        front.start()
        stack.callback(front.stop)
        url = f"http://127.0.0.1:{port}"
        operator.until(lambda: _answers(url))

        async def grow() -> None:
            async with Load(url, clients=12, pause_seconds=0.0):
                await asyncio.to_thread(operator.until, lambda: operator.status()["readyReplicas"] >= 2)

        asyncio.run(grow())
        assert any("replicas" in each for each in operator.events("Autoscaling"))
        paths = {each.path for each in kubernetes_api.requests if each.method == "PATCH"}
        assert (
            f"/apis/apps/v1/namespaces/default/deployments/chat-{operator.status()['stable']}/scale" in paths
        )
