"""What the tests of the agent's outside share: an API on a scripted device server, and fetch events."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agent import api, config, outside, store
from agent.rows import ImageRow, LayerRow
from imagefs import fetchlog
from imagefs.cache import CacheStats
from imagefs.fuse import controlmessage, statedirectory

MAPS = tuple(f"sha256:{number:064x}" for number in range(1, 4))
BLOCK_DIGEST = "sha256:" + "b" * 64
REFERENCE = "registry.example/team/app:v1"
_NS = 1_000_000_000


def _zeros(kind: type) -> dict[str, Any]:
    return {field.name: 0 for field in dataclasses.fields(kind)}


def server_status(**fetch: int) -> dict[str, Any]:
    """What a device server answers, by the names that its own code has."""
    cache = {**_zeros(CacheStats), "quota_bytes": 20 << 30, "used_bytes": 3 << 30, "blocks": 768}
    counts = {**_zeros(fetchlog.FetchStats), "threads": 4, **fetch}
    counts["queued"] = {"demand": 2, "boot": 0, "read_ahead": 5, "fill": 0}
    return {
        "devices": [
            {
                "name": digest.replace(":", "-"),
                "map_digest": digest,
                "blob_digest": digest,
                "blob_bytes": 50 << 20,
                "image_bytes": 200 << 20,
                "origins": ["docker://registry.example/team/app"],
                "owners": [f"image:{BLOCK_DIGEST}"],
                "last_error": None,
            }
            for digest in MAPS[:2]
        ],
        "cache": {"directory": "/cache", **cache},
        "fetch": counts,
        "peers": {
            "address": "10.0.0.1:7311",
            "members": 8,
            "down": {"10.0.0.2:7311": "dead"},
            "waiting": 1,
        },
        "fill": {
            "bandwidth_bytes_per_second": 0,
            "copies": [{"owner": "x", "state": "filling", "error": None}],
        },
        "processes": {
            "server": 100,
            "workers": [101, 102],
            "workers_replaced": 0,
            "keepers_replaced": 0,
            "survives_kill": True,
        },
    }


def event(
    number: int,
    wanted: float,
    arrived: float,
    *,
    layer: int = 0,
    priority: str = "demand",
    outcome: str = "origin",
    size: int = 1 << 20,
) -> dict[str, Any]:
    """A fetch event as DeviceClient.events gives it; times in seconds of CLOCK_MONOTONIC."""
    return {
        "number": number,
        "map_digest": MAPS[layer],
        "block": number,
        "priority": priority,
        "reason": priority,
        "wanted_ns": int(wanted * _NS),
        "started_ns": int((wanted + arrived) / 2 * _NS),
        "served_ns": int(arrived * _NS),
        "arrived_ns": int(arrived * _NS),
        "compressed_bytes": size,
        "outcome": outcome,
    }


class DeviceServer:
    """A control socket that answers what it is told to."""

    def __init__(self, state_dir: Path) -> None:
        self.status = server_status()
        self.events: list[dict[str, Any]] = []
        self.asked: list[dict[str, Any]] = []
        self._listener = statedirectory.listen(state_dir / "control.sock", socket.SOCK_STREAM)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                request = controlmessage.receive(connection)
                assert request is not None
                self.asked.append(request)
                if request["op"] == "status":
                    reply: Any = self.status
                else:
                    reply = [each for each in self.events if each["number"] > request["after"]]
                controlmessage.send(connection, {"ok": reply})

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


def image_row(reference: str = REFERENCE) -> ImageRow:
    layers = tuple(
        LayerRow(f"sha256:{number:064x}", f"sha256:{number:064x}", digest, 1000, digest, 50 << 20)
        for number, digest in enumerate(MAPS, 10)
    )
    return ImageRow(
        BLOCK_DIGEST, "sha256:" + "c" * 64, reference, "docker://registry.example/team/app", layers, 1
    )


@dataclasses.dataclass
class World:
    settings: config.Settings
    outside: outside.Outside
    api: api.Api
    store: store.Store

    def tcp(self, path: str, method: str = "GET", **headers: str) -> tuple[int, str, dict[str, str]]:
        """Status, body and headers of an answer on the TCP port."""
        assert self.api.port is not None
        connection = http.client.HTTPConnection("127.0.0.1", self.api.port, timeout=30)
        try:
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            return response.status, response.read().decode(), dict(response.headers)
        finally:
            connection.close()


@contextlib.contextmanager
def running(directory: Path) -> Iterator[World]:
    """The outside of an agent whose state directory this is, with one image in its store."""
    http_settings = config.Http(listen="127.0.0.1:0")
    settings = config.Settings(
        root=directory / "root",
        state=directory,
        socket=directory / "agent.sock",  # any that listens
        http=http_settings,
    )
    seen = outside.Outside(settings)
    rows = store.Store.open(directory / "agent.db")
    rows.put_image(image_row())
    routes = api.Api(settings.api_socket, settings.http.listen)
    seen.show(rows, routes)
    routes.start()
    seen.start()
    try:
        yield World(settings, seen, routes, rows)
    finally:
        seen.stop()
        routes.stop()
        rows.close()
