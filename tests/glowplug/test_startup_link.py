"""The shaped link: it carries bytes, counts them, is shaped towards the client, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from glowplug.startup import link, machine
from glowplug.startup.speed import Speed

pytestmark = pytest.mark.root

RATE = 200 * 10**6
SPEED = Speed(RATE)

SEND = """\
import socket, sys
server = socket.create_server((sys.argv[1], 7000))
print("listening", flush=True)
server.accept()[0].sendall(bytes(int(sys.argv[2])))
"""
RECEIVE = """\
import socket, sys
connection, size = socket.create_connection((sys.argv[1], 7000)), 0
while data := connection.recv(1 << 20):
    size += len(data)
print(size)
"""


def namespaces() -> str:
    return machine.check_call(["ip", "netns", "list"])


def test_bytes_come_through_and_are_counted() -> None:
    size = 3_000_000
    with link.open_link(SPEED) as over:
        before = over.received_bytes()
        send = over.server.command([sys.executable, "-c", SEND, link.SERVER_ADDRESS, str(size)])
        with subprocess.Popen(send, stdout=subprocess.PIPE) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == b"listening\n"
            receive = [sys.executable, "-c", RECEIVE, link.SERVER_ADDRESS]
            assert int(machine.check_call(over.client.command(receive))) == size
        moved = over.received_bytes() - before
    assert size < moved < size * 1.1


def test_only_the_way_down_is_shaped() -> None:
    with link.open_link(SPEED) as over:
        queues = {
            side.name: json.loads(machine.check_call(["tc", "-n", side.name, "-json", "qdisc", "show"]))
            for side in (over.server, over.client)
        }
        (down,) = [q for q in queues[over.server.name] if q["kind"] == "tbf"]
        assert down["options"]["rate"] == RATE // 8
        assert not [q for q in queues[over.client.name] if q["kind"] == "tbf"]


def test_this_machine_has_no_address_of_the_link() -> None:
    with link.open_link(SPEED), pytest.raises(OSError, match=r".+"), socket.socket() as probe:
        probe.bind((link.SERVER_ADDRESS, 0))


def test_nothing_is_left_even_after_an_error() -> None:
    names: list[str] = []

    def fail_inside() -> None:
        with link.open_link(SPEED) as over:
            names.extend([over.server.name, over.client.name])
            assert all(name in namespaces() for name in names)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert len(names) == 2
    assert not any(name in namespaces() for name in names)


def test_what_a_killed_run_left_is_removed_by_the_next() -> None:
    with subprocess.Popen(["true"]) as ended:
        pass
    stale = f"glowplug-{ended.pid}-server"
    machine.check_call(["ip", "netns", "add", stale])
    with link.open_link(SPEED):
        assert stale not in namespaces()
        assert f"glowplug-{os.getpid()}-server" in namespaces()
