"""An endpoint whose replicas are containers of a block image, started lazily through the node's agent."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures import node, pause, tars
from tests.serving.served import Served, ready, serving, settled
from tests.serving.shortpaths import short_directory

pytestmark = pytest.mark.root

_SEED = 301
# A first process of a container that handles no SIGTERM does not get it.
_SERVER = "/bin/busybox httpd -f -p 127.0.0.1:$PORT -h /www & trap 'kill $!' TERM; wait"


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as made:
        yield made


def _image(word: str) -> list[bytes]:
    site = tars.Builder().directory(b"./").directory(b"www/")
    site.file(b"www/health", b"ok\n").file(b"www/work", word.encode())
    return [pause.root_layer(_SEED), bytes(site)]


def _document(on_node: node.Node, image: str) -> dict[str, Any]:
    return {
        "name": "chat",
        "image": image,
        "provider": "containerd",
        "containerd": {
            "address": str(on_node.containerd.socket),
            "namespace": "default",
            "agent_state": str(on_node.agent.state),
        },
        "engine": {
            "kind": "command",
            "command": ["/bin/sh", "-c", _SERVER],
        },
        "replicas": {"min": 2},
        "routing": {"port": 0},
        "update": {"steps_percent": [100], "step_seconds": 1},
        "drain": {"notice_seconds": 0.5, "seconds": 10},
    }


def _containers(on_node: node.Node) -> list[str]:
    return on_node.containerd.ctr("containers", "ls", "-q").split()


@pytest.mark.parametrize("any_node", ["1.6"], indirect=True)
def test_replicas_are_containers_of_a_block_image(on_node: node.Node, directory: Path) -> None:
    first = on_node.registry.push(_image("one"), convert=True)
    second = on_node.registry.push(_image("two"), convert=True)
    with serving(directory, _document(on_node, first)) as served:
        status = served.until_ready(2)
        assert served.answer("/work") == (200, "one")
        assert on_node.registry.layers_fetched(first) == [], "a replica's start pulled the image"
        assert sorted(_containers(on_node)) == sorted(f"chat-{each['name']}" for each in ready(status))

        _refused(served, on_node)

        # A supervisor that is killed leaves its container to whoever replaces it.
        victim = ready(status)[0]["name"]
        os.kill(served.pid(victim), signal.SIGKILL)
        served.until("it is replaced", lambda now: len(ready(now)) == 2 and victim not in str(ready(now)))
        assert f"chat-{victim}" not in _containers(on_node)

        served.apply(_document(on_node, second))
        served.until("the update is through", settled(served.status()["version"]))
        assert served.answer("/work") == (200, "two")
        assert served.stop() == 0
    assert _containers(on_node) == []


def _refused(served: Served, on_node: node.Node) -> None:
    """An image that does not exist changes nothing."""
    before = served.status()["revision"]
    absent = served.command("apply", served.write(_document(on_node, "docker://127.0.0.1:1/no/such:image")))
    assert absent.returncode in (3, 8)
    assert "image: " in absent.stderr
    assert served.status()["revision"] == before
