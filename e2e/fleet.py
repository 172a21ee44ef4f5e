"""Nodes side by side on one machine: an origin, a switch, and any number of agents that share blocks.

Each node has a network namespace, a state directory, a cache and a database of its own; the origin, Debian's
docker-registry, lies behind a link of its own, whose counter says what left it. Called by peers.py and by
tests/agent/test_peer_fleet.py. Needs root. What a killed run left behind is removed by the next one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from glowplug.startup import lazy, link, machine
from imagefs.fuse import control

_PREFIX = "glowplug-fleet"
_NAME = re.compile(rf"{_PREFIX}-(\d+)-\w+\Z")
_NETWORK = "10.214.77"
_UPLINK = "origin0"
_REGISTRY_PORT = 5000
_PEER_PORT = 7311
_START_SECONDS = 60.0

_REGISTRY = """\
version: 0.1
log: {{level: warn, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {storage}}}}}
http: {{addr: "0.0.0.0:{port}"}}
"""

_AGENT = """\
root = "{folder}/root"
state = "{folder}/state"
socket = "{folder}/snapshotter.sock"

[cache]
directory = "{folder}/cache"
free_floor_percent = 0

[reads]
workers = 1

[registries]
plain_http = true

[http]
listen = "{address}:7310"

[peers]
listen = "{address}:{port}"
members = {members}
token_file = "{token}"
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """One node: its namespace, its address, its folder."""

    name: str
    namespace: link.Namespace
    address: str
    folder: Path

    def command(self, *arguments: str) -> list[str]:
        """A `glowplug` command on this node, with its state and cache."""
        storage = ["--state", str(self.folder / "state"), "--cache", str(self.folder / "cache")]
        verb, *rest = arguments
        return self.namespace.command([str(lazy.COMMAND), verb, *storage, *rest])

    @property
    def settings_file(self) -> Path:
        return self.folder / "agent.toml"

    @property
    def mount_point(self) -> Path:
        return self.folder / "mounted"


@dataclasses.dataclass(frozen=True, slots=True)
class Fleet:
    """`nodes` without agents yet, and the origin they all reach."""

    origin: link.Namespace
    switch: link.Namespace
    nodes: tuple[Node, ...]
    folder: Path

    @property
    def registry(self) -> str:
        """HOST:PORT of the origin."""
        return f"{_NETWORK}.1:{_REGISTRY_PORT}"

    def origin_sent_bytes(self) -> int:
        """Bytes that left the origin since the fleet was made, packet headers included."""
        (interface,) = json.loads(self.origin.ip("-s", "-json", "link", "show", "dev", _UPLINK))
        return int(interface["stats64"]["tx"]["bytes"])

    @contextlib.contextmanager
    def agents(self, nodes: Sequence[Node]) -> Iterator[list[subprocess.Popen[bytes]]]:
        """An agent on each of these nodes, ready; with their device servers gone on the way out."""
        with contextlib.ExitStack() as stack:
            processes = []
            for node in nodes:
                node.settings_file.write_text(self._settings(node))
                stack.callback(_stop_devices, node)
                command = node.namespace.command(
                    [str(lazy.COMMAND), "agent", "run", "--config", str(node.settings_file)]
                )
                processes.append(stack.enter_context(machine.daemon(command, node.folder / "agent.log")))
            for node, process in zip(nodes, processes, strict=True):
                _wait_ready(node, process)
            yield processes

    def _settings(self, node: Node) -> str:
        token = self.folder / "token"
        if not token.exists():
            token.touch(mode=0o600)
            token.write_text(secrets.token_hex(16) + "\n")
        members = json.dumps([f"{each.address}:{_PEER_PORT}" for each in self.nodes])
        return _AGENT.format(
            folder=node.folder, address=node.address, port=_PEER_PORT, members=members, token=token
        )


@contextlib.contextmanager
def open_fleet(count: int, folder: Path, bits_per_second: int | None = None) -> Iterator[Fleet]:
    """`count` nodes and a registry that answers; the origin's link shaped if a speed is given."""
    _remove_stale()
    names = ("switch", "origin", *(f"node{number}" for number in range(count)))
    spaces = {name: link.Namespace(f"{_PREFIX}-{os.getpid()}-{name}") for name in names}
    try:
        for namespace in spaces.values():
            machine.check_call(["ip", "netns", "add", namespace.name])
            namespace.ip("link", "set", "lo", "up")
        switch = spaces["switch"]
        switch.ip("link", "add", "bridge0", "type", "bridge")
        switch.ip("link", "set", "bridge0", "up")
        _plug_in(switch, spaces["origin"], _UPLINK, f"{_NETWORK}.1")
        if bits_per_second is not None:
            link.shape(spaces["origin"], bits_per_second, _UPLINK)
        nodes = []
        for number in range(count):
            name, address = f"node{number}", f"{_NETWORK}.{10 + number}"
            _plug_in(switch, spaces[name], name, address)
            (folder / name).mkdir()
            nodes.append(Node(name, spaces[name], address, folder / name))
        fleet = Fleet(spaces["origin"], switch, tuple(nodes), folder)
        with _registry(fleet):
            yield fleet
    finally:
        _remove([namespace.name for namespace in spaces.values()])


@contextlib.contextmanager
def _registry(fleet: Fleet) -> Iterator[None]:
    settings = fleet.folder / "registry.yaml"
    settings.write_text(_REGISTRY.format(storage=fleet.folder / "registry", port=_REGISTRY_PORT))
    command = fleet.origin.command(["docker-registry", "serve", str(settings)])
    with machine.daemon(command, fleet.folder / "registry.log"):
        code = (
            "import socket,time\n"
            "for _ in range(400):\n"
            f"    if not socket.socket().connect_ex(('127.0.0.1', {_REGISTRY_PORT})): break\n"
            "    time.sleep(0.05)\n"
        )
        machine.check_call(fleet.origin.command([sys.executable, "-S", "-c", code]))
        yield


@contextlib.contextmanager
def reading(nodes: Sequence[Node], image: str, fleet: Fleet) -> Iterator[list[subprocess.Popen[str]]]:
    """On each of these nodes, all at once: mount an image of the fleet's registry and hash its files in the
    order of their names. Unmounted on the way out."""
    readers = []
    try:
        for node in nodes:
            node.mount_point.mkdir(exist_ok=True)
            mount = node.command(
                "mount", "--plain-http", f"docker://{fleet.registry}/{image}:1", str(node.mount_point)
            )
            script = f"{shlex.join(mount)} >&2 && cd {node.mount_point} && find . -xdev -type f -print0"
            script += " | LC_ALL=C sort -z | xargs -0 cat | sha256sum"
            with (node.folder / "read.log").open("wb") as log:
                readers.append(
                    subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, stderr=log, text=True)
                )
        yield readers
    finally:
        for reader in readers:
            with reader:  # closes the pipe, waits
                pass
        for node in nodes:
            unmount(node)


def hashes(readers: Sequence[subprocess.Popen[str]]) -> list[str]:
    """What each has read, as sha256 in hex."""
    return [reader.communicate()[0].split()[0] for reader in readers]


def unmount(node: Node) -> None:
    """Take away what a node has at its mount point, if anything."""
    umount = [str(lazy.COMMAND), "umount", "--force", "--state", str(node.folder / "state")]
    with contextlib.suppress(machine.CommandError):
        machine.check_call([*umount, str(node.mount_point)])


def forget(node: Node) -> None:
    """Back to a node that never saw an image."""
    _stop_devices(node)
    for name in ("cache", "state", "root"):
        shutil.rmtree(node.folder / name, ignore_errors=True)
    (node.folder / "snapshotter.sock").unlink(missing_ok=True)


def _plug_in(switch: link.Namespace, space: link.Namespace, device: str, address: str) -> None:
    switch.ip("link", "add", device, "type", "veth", "peer", "name", device, "netns", space.name)
    switch.ip("link", "set", device, "master", "bridge0", "up")
    space.ip("address", "add", f"{address}/24", "dev", device)
    space.ip("link", "set", device, "up")


def _wait_ready(node: Node, process: subprocess.Popen[bytes]) -> None:
    """The snapshotter's socket is the last thing to be there, the peers' listener before it."""
    until = time.monotonic() + _START_SECONDS
    while not (node.folder / "snapshotter.sock").exists():
        if process.poll() is not None or time.monotonic() > until:
            raise machine.CommandError(
                f"the agent of {node.name} did not start: {(node.folder / 'agent.log').read_text()[-2000:]}"
            )
        time.sleep(0.02)


def _stop_devices(node: Node) -> None:
    client = control.DeviceClient.connect(node.folder / "state")
    if client is not None:
        client.stop()


def _remove_stale() -> None:
    names = [line.split()[0] for line in machine.check_call(["ip", "netns", "list"]).splitlines() if line]
    stale = [(name, match[1]) for name in names if (match := _NAME.match(name))]
    _remove([name for name, pid in stale if not os.path.exists(f"/proc/{pid}")])


def _remove(names: Sequence[str]) -> None:
    for name in names:
        with contextlib.suppress(machine.CommandError):
            machine.check_call(["ip", "netns", "delete", name])
