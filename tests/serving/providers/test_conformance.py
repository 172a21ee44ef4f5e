"""The fleet of this machine does what every Provider does; `test_kubernetes` has the other's."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest

from serving.endpoint import Endpoint
from serving.providers import fleet
from serving.providers.record import Record
from serving.replica import Provider
from tests.serving.providers import conformance
from tests.serving.shortpaths import short_directory


class Launcher:
    """Replicas are ports that answer /readyz as the test says."""

    def __init__(self) -> None:
        self.ready: set[str] = set()
        self.dead: dict[str, str] = {}
        self.told: set[str] = set()
        self.lets_go = True
        self._servers: dict[str, http.server.ThreadingHTTPServer] = {}

    def check(self, wanted: Endpoint) -> None:
        pass

    def start(self, record: Record, wanted: Endpoint, folder: Path, known: Callable[[str], None]) -> None:
        ready = self.ready

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200 if record.name in ready else 503)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(record.address, Handler)
        self._servers[record.name] = server
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        (folder / "log").write_text("last words\n")
        known("handle")

    def ended(self, record: Record) -> str | None:
        if record.name in self.told and self.lets_go:
            return "left"
        return self.dead.get(record.name)

    def stop(self, record: Record) -> None:
        self.told.add(record.name)

    def kill(self, record: Record) -> None:
        self.told.add(record.name)

    def close(self) -> None:
        pass

    def end(self) -> None:
        for each in self._servers.values():
            each.shutdown()
            each.server_close()


class World:
    """A conformance.Platform."""

    sections: dict[str, object] = {}  # noqa: RUF012

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.launcher = Launcher()
        self._fleets: list[fleet.Fleet] = []
        self.provider: Provider = self.again()

    def again(self) -> Provider:
        self._fleets.append(fleet.Fleet(self._directory, self.launcher))
        return self._fleets[-1]

    def make_ready(self, names: Collection[str]) -> None:
        self.launcher.ready |= set(names)

    def fail(self, name: str) -> None:
        self.launcher.dead[name] = "ended with code 7"

    def hold_exits(self) -> None:
        self.launcher.lets_go = False

    def release_exits(self) -> None:
        self.launcher.lets_go = True

    def close(self) -> None:
        for each in self._fleets:
            each.close()
        self.launcher.end()


@pytest.fixture
def world() -> Iterator[World]:
    with short_directory() as directory:
        made = World(directory)
        yield made
        made.close()


@pytest.mark.parametrize("check", conformance.checks, ids=lambda check: check.__name__)
def test_conformance(world: World, check: Callable[[conformance.Platform], None]) -> None:
    check(world)
