"""A network link of a chosen speed: two network namespaces and a veth pair, shaped by `tc tbf`.

The server's end is shaped, because what a start waits for is what comes down. Both ends live in namespaces
of their own, so that no address of ours exists on the machine itself. Needs root. A link that an earlier,
killed run left behind is removed when the next one is made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Sequence

from glowplug.startup import machine

SERVER_ADDRESS = "10.213.77.1"
CLIENT_ADDRESS = "10.213.77.2"
_PREFIX = "glowplug"
_DEVICE = "shaped0"
_NAME = re.compile(rf"{_PREFIX}-(\d+)-(?:server|client)\Z")


@dataclasses.dataclass(frozen=True, slots=True)
class Namespace:
    """A named network namespace."""

    name: str

    def command(self, argv: Sequence[str]) -> list[str]:
        """The same command, on this namespace's network. Not `ip netns exec`, which would also give it a
        mount namespace, and hide what it mounts."""
        return ["nsenter", f"--net=/run/netns/{self.name}", "--", *argv]

    def ip(self, *arguments: str) -> str:
        """`ip` inside this namespace."""
        return machine.check_call(["ip", "-n", self.name, *arguments])


@dataclasses.dataclass(frozen=True, slots=True)
class Link:
    """Both ends; what the server listens on is `SERVER_ADDRESS`, reached by the client through the link."""

    server: Namespace
    client: Namespace
    bits_per_second: int

    def received_bytes(self) -> int:
        """Bytes that came down to the client since the link was made, packet headers included."""
        (interface,) = json.loads(self.client.ip("-s", "-json", "link", "show", "dev", _DEVICE))
        return int(interface["stats64"]["rx"]["bytes"])


@contextlib.contextmanager
def open_link(bits_per_second: int) -> Iterator[Link]:
    """A link, up and shaped. Gone on the way out; processes still inside keep their dead end only."""
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
        shape(server, bits_per_second)
        yield Link(server, client, bits_per_second)
    finally:
        _remove((server.name, client.name))


def shape(sender: Namespace, bits_per_second: int, device: str = _DEVICE) -> None:
    """Slow down what a namespace sends by one of its devices."""
    # The burst is two milliseconds' worth, and never less than one 64 KiB segmentation offload packet.
    burst_bytes = max(128 * 1024, bits_per_second // 8 // 500)
    options = ["rate", f"{bits_per_second}bit", "burst", str(burst_bytes), "latency", "20ms"]
    machine.check_call(["tc", "-n", sender.name, "qdisc", "add", "dev", device, "root", "tbf", *options])


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
