"""Pods over CRI, on containerd 1.6, 1.7 and 2.1: what kubelet would see. The oracle is
containerd's overlayfs."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from tests.fixtures import cri, filetree, node, pause

pytestmark = pytest.mark.root

_LAZY, _ORDINARY, _ZSTD, _ROOT = 101, 102, 103, 104
_LOOK = "sha256sum /data/large; cat /data/seed /data/opaque/*; find /data /etc | sort; id"


def _start_and_compare(on_node: node.Node, image: str) -> None:
    """Start a container from a pulled image; the same image on overlayfs must be the same files, and a
    command must say the same there."""
    daemon = on_node.containerd
    daemon.pull(image, "overlayfs", namespace="oracle")
    with (
        on_node.cri.running(image, pause.FOREVER) as container,
        daemon.running(image, "overlayfs", pause.FOREVER, namespace="oracle") as pid,
    ):
        expected = filetree.of_process(pid)
        assert len(expected.entries) > 20
        assert filetree.difference(filetree.of_process(on_node.cri.pid(container)), expected) == {}
        said = on_node.cri.exec_sync(container, ["sh", "-c", _LOOK])
        assert on_node.cri.container_status(container).state == cri.RUNNING
    assert said.stdout.decode() == daemon.run(image, "overlayfs", _LOOK, namespace="oracle")


def test_a_pod_starts_without_a_pull_and_leaves_nothing_behind(on_node: node.Node) -> None:
    image = on_node.registry.push(pause.application(_LAZY), convert=True)
    on_node.cri.pull_image(image)
    assert on_node.registry.layers_fetched(image) == []
    status = on_node.cri.image_status(image)
    assert status is not None
    with on_node.cri.running(image, pause.FOREVER) as container:
        said = on_node.cri.exec_sync(
            container, ["sh", "-c", "cat /data/seed; echo out >/data/new; cat /data/new"]
        )
        assert (said.exit_code, said.stdout.splitlines()[1]) == (0, b"out")
        assert on_node.registry.layers_fetched(image) == []
        assert len(on_node.agent.mounted()) == 3
        assert len(on_node.agent.devices()) == 3
    on_node.cri.remove_image(image)
    on_node.wait_until_clean()
    assert on_node.cri.image_status(image) is None


def test_the_files_are_those_of_an_ordinary_pull(on_node: node.Node) -> None:
    image = on_node.registry.push(pause.application(_LAZY), convert=True)
    on_node.cri.pull_image(image)
    assert on_node.registry.layers_fetched(image) == []
    _start_and_compare(on_node, image)


def test_an_image_without_a_block_image_is_pulled_as_ever(on_node: node.Node) -> None:
    image = on_node.registry.push(pause.application(_ORDINARY), convert=False)
    mounted = on_node.agent.mounted()
    on_node.cri.pull_image(image)
    assert len(on_node.registry.layers_fetched(image)) == 3
    _start_and_compare(on_node, image)
    assert set(on_node.agent.mounted()) <= set(mounted)


@pytest.mark.parametrize("converted_first", [True, False])
def test_a_layer_shared_with_an_image_that_is_not_converted(
    on_node: node.Node, converted_first: bool
) -> None:
    converted = on_node.registry.push(pause.application(_LAZY, _ROOT), convert=True)
    ordinary = on_node.registry.push(pause.application(_ORDINARY, _ROOT), convert=False)
    order = [converted, ordinary] if converted_first else [ordinary, converted]
    for image in order:
        on_node.cri.pull_image(image)
    for image in order:
        _start_and_compare(on_node, image)
    # What is left is whole when the other has gone, whichever of them brought the layer.
    on_node.cri.remove_image(order[0])
    _start_and_compare(on_node, order[1])


@pytest.mark.parametrize("convert", [True, False])
def test_layers_of_zstd(on_node: node.Node, convert: bool) -> None:
    layers = pause.application(_ZSTD)
    image = on_node.registry.push(layers, convert=convert, encoding="zstd")
    on_node.cri.pull_image(image)
    assert len(on_node.registry.layers_fetched(image)) == (0 if convert else 3)
    _start_and_compare(on_node, image)


def test_an_image_of_seventy_layers(on_node: node.Node) -> None:
    image = on_node.registry.push(pause.tall(70, _LAZY), convert=True)
    on_node.cri.pull_image(image)
    assert on_node.registry.layers_fetched(image) == []
    with on_node.cri.running(image, pause.FOREVER) as container:
        said = on_node.cri.exec_sync(container, ["sh", "-c", "cat /layers/last; echo; ls /layers"])
        assert said.stdout.split() == [b"69", *(b"%03d" % number for number in range(1, 70)), b"last"]


def test_kubelet_sees_what_images_use(on_node: node.Node) -> None:
    image = on_node.registry.push(pause.application(_LAZY), convert=True)
    on_node.cri.pull_image(image)
    assert image in [tag for each in on_node.cri.images() for tag in each.repo_tags]
    until = time.monotonic() + cri.DEADLINE_SECONDS
    while not (usage := on_node.cri.image_filesystems()[0]).used_bytes.value:
        assert time.monotonic() < until, "containerd has not asked for what snapshots use"
        time.sleep(0.1)
    if on_node.containerd.line != "1.6":  # which makes the path up from its own root
        assert Path(usage.fs_id.mountpoint) == on_node.agent.root


@pytest.mark.parametrize("any_node", ["2.1"], indirect=True)  # since containerd 2
def test_a_pod_in_a_user_namespace_copies_nothing_up(on_node: node.Node) -> None:
    image = on_node.registry.push(pause.application(_LAZY), convert=True)
    on_node.cri.pull_image(image, user_namespace=True, runtime_handler="newer")
    with on_node.cri.running(image, pause.FOREVER, user_namespace=True, runtime_handler="newer") as container:
        said = on_node.cri.exec_sync(
            container, ["sh", "-c", "stat -c '%u %g' /data/large /bin; echo x >/data/new"]
        )
        assert (said.exit_code, said.stdout) == (0, b"1000 0\n0 0\n")
        first_line = on_node.cri.exec_sync(container, ["cat", "/proc/self/uid_map"]).stdout.split()
        assert first_line == [b"0", b"%d" % cri.USER_NAMESPACE_START, b"%d" % cri.USER_NAMESPACE_LENGTH]
        mounts = Path(f"/proc/{on_node.cri.pid(container)}/mountinfo").read_text()
        upper = re.search(r" / / .*upperdir=([^, ]+)", mounts)
        assert upper is not None
        # The directory of the new file, and the file: all else is read through id-mapped lower layers.
        assert sorted(path.name for path in Path(upper[1]).rglob("*")) == ["data", "new"]
        assert (Path(upper[1]) / "data/new").stat().st_uid == cri.USER_NAMESPACE_START
