"""The benchmark's part `cri`: what kubelet would wait for. The agent under containerd, or containerd alone.

Each cold run has an agent, a device server, a block cache and a containerd of its own, all on the link's
client side. What it is compared with is the same container from containerd's overlayfs, pulled before, its
page cache dropped. Then, on loopback: an image of 70 layers, and the agent's restart with 200 snapshots.
Needs root.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from agent import images
from e2e import workloads
from glowplug.startup import lazy, link, machine, registry
from tests.fixtures import containerd, cri, node, pause

_POLL_SECONDS = 0.005
_LAYERS = 70
_SNAPSHOTS = 200
_IDLE_SECONDS = 5.0
_UPKEEP_SECONDS = 6.0
"""A round of the agent's upkeep, and a little."""


@dataclasses.dataclass(frozen=True, slots=True)
class Start:
    """Seconds of one start, and what came over the link until it was ready; `again` is the start of the next
    pod once the image is here whole, page cache dropped."""

    pull: float
    ready: float
    moved_bytes: int
    again: float


def push_pause(server: registry.Registry, folder: Path) -> str:
    """Put the pods' own image into a registry behind a link; its name."""
    layout = pause.image().write_layout(folder / "pause")
    name = f"{server.host}/pause:latest"
    copy = ["skopeo", "copy", "-q", "--dest-tls-verify=false", f"oci:{layout}:latest", f"docker://{name}"]
    machine.check_call(server.link.server.command(copy))
    return name


def cold(over: link.Link, workload: workloads.Workload, image: str, sandbox_image: str) -> Start:
    """One start from nothing: PullImage, then a container of it, by the agent."""
    with _folder() as folder, contextlib.ExitStack() as stack:
        agent = node.Agent(folder, folder / "containerd/certs.d", over.client.command([]), workers=0)
        stack.callback(agent.stop_devices)
        stack.callback(machine.unmount_below, folder)
        stack.callback(agent.stop)
        agent.start()
        with _containerd(over, folder, image, sandbox_image, agent.socket) as daemon:
            machine.drop_page_cache()
            before = over.received_bytes()
            began = time.monotonic()
            daemon.cri.pull_image(image)
            pulled = time.monotonic() - began
            ready = _start(daemon, image, workload.command)
            moved_bytes = over.received_bytes() - before
            _bring_whole(agent, image, workload)
            machine.drop_page_cache()
            return Start(pulled, ready, moved_bytes, _start(daemon, image, workload.command))


def _bring_whole(agent: node.Agent, image: str, workload: workloads.Workload) -> None:
    """Have all of the image on the node, its layers in files of their own, and the agent know of them."""
    machine.check_call(
        [str(lazy.COMMAND), "prefetch", "--state", str(agent.state), "--wait", f"docker://{image}"]
    )
    lazy.await_layer_files(agent.cache, len(workload.layers), workload.unpacked_bytes)
    time.sleep(images.FILES_SECONDS + _UPKEEP_SECONDS)


@contextlib.contextmanager
def unpacked(over: link.Link, image: str, sandbox_image: str) -> Iterator[containerd.Containerd]:
    """A containerd that has pulled and unpacked the image with its own snapshotter."""
    with _folder() as folder, _containerd(over, folder, image, sandbox_image, None) as daemon:
        daemon.cri.pull_image(image)
        yield daemon


def start_unpacked(daemon: containerd.Containerd, image: str, command: Sequence[str]) -> float:
    """Seconds to ready of a container from local files that are not in memory."""
    machine.drop_page_cache()
    return _start(daemon, image, command)


def _start(daemon: containerd.Containerd, image: str, command: Sequence[str]) -> float:
    """Seconds from CreateContainer to the line `ready`; the pod stands already, as on both sides."""
    pod = daemon.cri.run_pod()
    began = time.monotonic()
    container = daemon.cri.start_container(pod, image, command)
    log = Path(daemon.cri.container_status(container).log_path)
    while f" {workloads.READY}" not in (log.read_text() if log.exists() else ""):
        if daemon.cri.container_status(container).state == cri.EXITED:
            raise machine.CommandError(f"{image} ended before it was ready: {log.read_text()[-2000:]}")
        time.sleep(_POLL_SECONDS)
    seconds = time.monotonic() - began
    daemon.cri.remove_pod(pod.id)
    return seconds


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """What a node costs, on loopback: seconds, bytes, and the part of a core that an idle agent takes."""

    pull_layers_seconds: float
    restart_seconds: float
    agent_bytes: int
    idle_cores: float


def loopback() -> Node:
    """An image of 70 layers pulled, 200 snapshots made, the agent killed and started, left alone."""
    with tempfile.TemporaryDirectory(prefix="glowplug-bench-") as name, node.run_registry(Path(name)) as own:
        image = own.push(pause.tall(_LAYERS, 1), convert=True)
        with node.run("1.6", own) as running:
            began = time.monotonic()
            running.cri.pull_image(image)
            pulled = time.monotonic() - began
            running.containerd.stop()  # which would collect snapshots that it did not make
            node.prepare_snapshots(running.agent, _SNAPSHOTS)
            running.agent.stop(signal.SIGKILL)
            began = time.monotonic()
            running.agent.start()
            restarted = time.monotonic() - began
            time.sleep(_IDLE_SECONDS)
            assert running.agent.process is not None
            pid = running.agent.process.pid
            before = _cpu_seconds(pid)
            time.sleep(_IDLE_SECONDS)
            idle = (_cpu_seconds(pid) - before) / _IDLE_SECONDS
            node_bytes = _resident_bytes(pid)
            running.containerd.start()
            return Node(pulled, restarted, node_bytes, idle)


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _containerd(
    over: link.Link, folder: Path, image: str, sandbox_image: str, proxy_socket: Path | None
) -> contextlib.AbstractContextManager[containerd.Containerd]:
    return containerd.serve(
        containerd.binaries("1.6"),
        folder / "containerd",
        sandbox_image=sandbox_image,
        registries=[image.partition("/")[0]],
        proxy_socket=proxy_socket,
        prefix=over.client.command([]),
    )


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A short name, because sockets lie in it."""
    folder = Path(tempfile.mkdtemp(prefix="glowplug-cri-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def convert(over: link.Link, folder: Path, image: str) -> None:
    """Convert in place, on the registry's side."""
    lazy.Glowplug(folder, over).convert(image)
