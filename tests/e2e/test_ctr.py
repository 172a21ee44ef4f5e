"""`ctr` and `glowplug pull`, without CRI and so without its labels, on containerd 1.6, 1.7 and 2.1."""

from __future__ import annotations

import subprocess

import grpc
import pytest
from google.protobuf import empty_pb2

from agent.proto import snapshots_pb2
from tests.fixtures import block_images, filetree, node, pause

pytestmark = pytest.mark.root

_LAZY, _ORDINARY, _LOST = 201, 202, 203


def _glowplug_pull(on_node: node.Node, image: str, namespace: str) -> None:
    options = ["--state", str(on_node.agent.state), "--namespace", namespace]
    options += ["--containerd-address", str(on_node.containerd.socket)]
    command = [block_images.GLOWPLUG, "pull", *options, image]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def _compare(on_node: node.Node, image: str, namespace: str) -> None:
    daemon = on_node.containerd
    daemon.pull(image, "overlayfs", namespace="oracle")
    with (
        daemon.running(image, "glowplug", pause.FOREVER, namespace=namespace) as pid,
        daemon.running(image, "overlayfs", pause.FOREVER, namespace="oracle") as expected,
    ):
        assert filetree.difference(filetree.of_process(pid), filetree.of_process(expected)) == {}
    look = "sha256sum /data/large; cat /data/seed; find /data | sort"
    said = daemon.run(image, "glowplug", look, namespace=namespace)
    assert said == daemon.run(image, "overlayfs", look, namespace="oracle")


def test_an_image_pulled_by_name_runs_in_ctr(on_node: node.Node) -> None:
    image = on_node.registry.push(pause.application(_LAZY), convert=True)
    _glowplug_pull(on_node, image, "default")
    assert on_node.registry.layers_fetched(image) == []
    assert len(on_node.agent.devices()) == 3
    _compare(on_node, image, "default")
    assert len(on_node.agent.mounted()) == 3


def test_ctr_pulls_an_image_without_a_block_image(on_node: node.Node) -> None:
    image = on_node.registry.push(pause.application(_ORDINARY), convert=False)
    mounted = on_node.agent.mounted()
    on_node.containerd.pull(image, "glowplug")
    _compare(on_node, image, "default")
    assert set(on_node.agent.mounted()) <= set(mounted)


def test_two_containerd_namespaces_share_the_layers(on_node: node.Node) -> None:
    image = on_node.registry.push(pause.application(_LAZY), convert=True)
    for namespace in ("one", "two"):
        _glowplug_pull(on_node, image, namespace)
    assert on_node.registry.layers_fetched(image) == []
    for namespace in ("one", "two"):
        _compare(on_node, image, namespace)
    assert len(on_node.agent.mounted()) == 3
    on_node.containerd.ctr("images", "rm", "--sync", image, namespace="one")
    _compare(on_node, image, "two")


def _lose(on_node: node.Node, names: set[str]) -> None:
    """Have the agent forget snapshots without containerd's knowledge, as it does with its database."""
    with grpc.insecure_channel(f"unix:{on_node.agent.socket}") as channel:
        remove = channel.unary_unary(
            "/containerd.services.snapshots.v1.Snapshots/Remove",
            request_serializer=snapshots_pb2.RemoveSnapshotRequest.SerializeToString,
            response_deserializer=empty_pb2.Empty.FromString,
        )
        while names:
            for name in sorted(names):
                try:
                    remove(snapshots_pb2.RemoveSnapshotRequest(key=name), timeout=30)
                except grpc.RpcError as exc:
                    if exc.code() is not grpc.StatusCode.FAILED_PRECONDITION:  # it has children yet
                        raise
                else:
                    names = names - {name}


def test_a_pull_mends_what_the_agent_has_lost(on_node: node.Node) -> None:
    image = on_node.registry.push(pause.application(_LOST), convert=True)
    before = on_node.containerd.snapshots("glowplug", namespace="lost")
    _glowplug_pull(on_node, image, "lost")
    layers = set(on_node.containerd.snapshots("glowplug", namespace="lost")) - set(before)
    assert len(layers) == 3
    _lose(on_node, layers)
    _glowplug_pull(on_node, image, "lost")
    _compare(on_node, image, "lost")


@pytest.mark.parametrize("any_node", ["2.1"], indirect=True)  # since containerd 2
def test_the_transfer_service_says_what_it_pulls(on_node: node.Node) -> None:
    image = on_node.registry.push(pause.application(_LAZY), convert=True)
    on_node.containerd.pull(image, "glowplug")
    assert on_node.registry.layers_fetched(image) == []
    _compare(on_node, image, "default")
