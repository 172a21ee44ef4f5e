"""Nodes for the end-to-end tests: one of each containerd line for all tests that leave it whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fixtures import containerd, node


@pytest.fixture(scope="session")
def node_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[node.Registry]:
    """The registry of all nodes of this run."""
    with node.run_registry(tmp_path_factory.mktemp("node-registry")) as registry:
        yield registry


@pytest.fixture(scope="session", params=containerd.LINES)
def any_node(request: pytest.FixtureRequest, node_registry: node.Registry) -> Iterator[node.Node]:
    """The node of one containerd line; tests that use it run line by line."""
    with node.run(request.param, node_registry) as running:
        yield running


@pytest.fixture
def on_node(any_node: node.Node) -> Iterator[node.Node]:
    """The same, and nothing of this test is left on it for the next: no pods, no images, no mounts."""
    any_node.registry.proxy.clear()
    yield any_node
    any_node.clear()
