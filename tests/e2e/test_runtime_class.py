"""Mode "runtime-class": pods of the RuntimeClass start lazily, all others on containerd's own snapshotter."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import containerdconfig, containerdprobe, install
from glowplug.startup import machine
from tests.fixtures import containerd, cri, node, pause
from tests.fixtures.proto import cri_pb2

pytestmark = pytest.mark.root

_IMAGE, _OTHER = 301, 302


@contextlib.contextmanager
def _node(line: str, registry: node.Registry) -> Iterator[node.Node]:
    """A node whose containerd was configured after it had run without us, as on a real one."""
    folder = Path(tempfile.mkdtemp(prefix="glowplug-node-"))
    folder.chmod(0o711)
    sandbox_image = registry.push([pause.root_layer()], convert=False)
    agent = node.Agent(folder, folder / "containerd/certs.d")
    programs = containerd.binaries(line)
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(agent.stop_devices)
            stack.callback(machine.unmount_below, folder)
            stack.callback(agent.stop)
            agent.start()
            serving = containerd.serve(
                programs, folder / "containerd", sandbox_image=sandbox_image, registries=[registry.proxy.host]
            )
            daemon = stack.enter_context(serving)
            file, program = daemon.folder / "config.toml", programs.directory / "containerd"
            wanted = containerdconfig.Wanted(
                agent.socket, agent.root, install.platform(), mode="runtime-class"
            )
            effective = containerdprobe.effective(program, file)
            line_found = containerdprobe.line(program)
            plan = containerdconfig.plan(line_found, file.read_text(), file, effective, wanted)
            file.write_text(plan.main)
            if plan.drop_in is not None:
                drop_in = file.parent / containerdconfig.DROP_IN
                drop_in.parent.mkdir()
                drop_in.write_text(plan.drop_in)
            daemon.stop()
            daemon.start()
            yield node.Node(registry, agent, daemon, sandbox_image)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _pull(client: cri.Client, image: str, pod: cri.Pod) -> None:
    """As kubelet does for a pod of the class whose annotation says so."""
    pod.config.annotations["io.containerd.cri.runtime-handler"] = containerdconfig.HANDLER
    request = cri_pb2.PullImageRequest(image=cri_pb2.ImageSpec(image=image), sandbox_config=pod.config)
    client._image("PullImage", request, cri_pb2.PullImageResponse)


@pytest.mark.parametrize("line", ["1.7", "2.1"])
def test_pods_of_the_class_are_lazy_and_the_others_as_ever(line: str, node_registry: node.Registry) -> None:
    with _node(line, node_registry) as running:
        client, daemon = running.cri, running.containerd
        lazy = node_registry.push(pause.application(_IMAGE), convert=True)
        pod = client.run_pod(runtime_handler=containerdconfig.HANDLER)
        _pull(client, lazy, pod)
        container = client.start_container(pod, lazy, pause.FOREVER)
        assert client.exec_sync(container, ["cat", "/data/seed"]).exit_code == 0
        assert node_registry.layers_fetched(lazy) == []
        assert len(running.agent.mounted()) == 3

        ours = set(daemon.snapshots("glowplug"))
        ordinary = node_registry.push(pause.application(_OTHER), convert=True)
        client.pull_image(ordinary)
        with client.running(ordinary, pause.FOREVER) as other:
            assert client.exec_sync(other, ["cat", "/data/seed"]).exit_code == 0
        assert len(node_registry.layers_fetched(ordinary)) == 3
        assert set(daemon.snapshots("glowplug")) == ours

        # Pulled without the annotation, it is unpacked for the class when the class first wants it.
        with client.running(ordinary, pause.FOREVER, runtime_handler=containerdconfig.HANDLER) as other:
            assert client.exec_sync(other, ["cat", "/data/seed"]).exit_code == 0
        assert set(daemon.snapshots("glowplug")) > ours
        client.remove_pod(pod.id)
