"""A network link of a chosen speed: two network namespaces and a veth pair, shaped by `tc tbf`.

The server's end is shaped, because what a start waits for is what comes down. Both ends live in namespaces
of their own, so that no address of ours exists on the machine itself. Needs root. A link that an earlier,
killed run left behind is removed when the next one is made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import threading
from collections.abc import Iterator, Sequence

from glowplug.startup import machine
from glowplug.startup.speed import Speed
from imagefs import syscalls

SERVER_ADDRESS = "10.213.77.1"
CLIENT_ADDRESS = "10.213.77.2"
_PREFIX = "glowplug"
_DEVICE = "shaped0"
_NAME = re.compile(rf"{_PREFIX}-(\d+)-(?:server|client)\Z")
_COUNTERS_BYTES = 64 * 1024


@dataclasses.dataclass(frozen=True, slots=True)
class Namespace:
    """A named network namespace."""

    name: str

    @property
    def file(self) -> str:
        """What setns(2) opens."""
        return f"/run/netns/{self.name}"

    def command(self, argv: Sequence[str]) -> list[str]:
        """The same command, on this namespace's network. Not `ip netns exec`, which would also give it a
        mount namespace, and hide what it mounts."""
        return ["nsenter", f"--net={self.file}", "--", *argv]

    def ip(self, *arguments: str) -> str:
        """`ip` inside this namespace."""
        return machine.check_call(["ip", "-n", self.name, *arguments])


@dataclasses.dataclass(frozen=True, slots=True)
class Link:
    """Both ends; what the server listens on is `SERVER_ADDRESS`, reached by the client through the link.
    `counters` is the client's /proc/net/dev, open."""

    server: Namespace
    client: Namespace
    speed: Speed
    counters: int

    def received_bytes(self) -> int:
        """Bytes that came down to the client since the link was made, packet headers included. Cheap, and
        any thread may ask."""
        for line in os.pread(self.counters, _COUNTERS_BYTES, 0).decode().splitlines():
            name, _, numbers = line.partition(":")
            if name.strip() == _DEVICE:
                return int(numbers.split()[0])
        raise AssertionError(f"{_DEVICE} is not in {self.client.name}")


@contextlib.contextmanager
def open_link(speed: Speed) -> Iterator[Link]:
    """A link, up and shaped; its delay is added by whoever listens at the server's end (`registry`). Gone on
    the way out; processes still inside keep their dead end only."""
    _remove_stale()
    server, client = (Namespace(f"{_PREFIX}-{os.getpid()}-{side}") for side in ("server", "client"))
    try:
        for namespace in (server, client):
            machine.check_call(["ip", "netns", "add", namespace.name])
            namespace.ip("link", "set", "lo", "up")
        server.ip("link", "add", _DEVICE, "type", "veth", "peer", "name", _DEVICE, "netns", client.name)
        for namespace, address in ((server, SERVER_ADDRESS), (client, CLIENT_ADDRESS)):
            namespace.ip("address", "add", f"{address}/30", "dev", _DEVICE)
            namespace.ip("link", "set", _DEVICE, "up")
        shape(server, speed.bits_per_second)
        counters = _open_counters(client)
        try:
            yield Link(server, client, speed, counters)
        finally:
            os.close(counters)
    finally:
        _remove((server.name, client.name))


def shape(sender: Namespace, bits_per_second: int, device: str = _DEVICE) -> None:
    """Slow down what a namespace sends by one of its devices."""
    # The burst is two milliseconds' worth, and never less than one 64 KiB segmentation offload packet.
    burst_bytes = max(128 * 1024, bits_per_second // 8 // 500)
    options = ["rate", f"{bits_per_second}bit", "burst", str(burst_bytes), "latency", "20ms"]
    machine.check_call(["tc", "-n", sender.name, "qdisc", "add", "dev", device, "root", "tbf", *options])


def _open_counters(namespace: Namespace) -> int:
    """The namespace's /proc/net/dev: the file belongs to where it was opened, whoever reads it."""
    opened: list[int] = []

    def enter() -> None:
        syscalls.enter_network(namespace.file)
        opened.append(os.open("/proc/thread-self/net/dev", os.O_RDONLY | os.O_CLOEXEC))

    thread = threading.Thread(target=enter, name="link-counters")
    thread.start()
    thread.join()
    if not opened:
        raise machine.CommandError(f"{namespace.name}: its counters cannot be read")
    return opened[0]


def _remove_stale() -> None:
    names = [line.split()[0] for line in machine.check_call(["ip", "netns", "list"]).splitlines() if line]
    for name in names:
        match = _NAME.match(name)
        if match and not os.path.exists(f"/proc/{match[1]}"):
            _remove((name,))


def _remove(names: Sequence[str]) -> None:
    for name in names:
        with contextlib.suppress(machine.CommandError):
            machine.check_call(["ip", "netns", "delete", name])
