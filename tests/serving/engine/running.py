"""A `glowplug engine` of its own for a test, and how one talks to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.fixtures import block_images

STUB = Path(__file__).parents[2] / "fixtures" / "stub_engine.py"
_START_SECONDS = 120.0
_END_SECONDS = 40.0

QUICK = {"stall_seconds": 2.0, "probe_interval_seconds": 0.5, "probe_timeout_seconds": 1.0}


def stub(**environment: str) -> dict[str, Any]:
    """The small engine of the tests, as a document's `engine`."""
    return {"kind": "command", "command": [sys.executable, str(STUB)], "environment": environment}


class Engine:
    """The supervisor as a process. Its child is found in its status."""

    def __init__(self, directory: Path, document: Mapping[str, Any]) -> None:
        self.control = directory / "engine.sock"
        self.log = directory / "log"
        self.run = directory / "run"
        settings = {
            "port": 0,
            "control": str(self.control),
            "run_directory": str(self.run),
            "drain": {"notice_seconds": 0, "seconds": 30},
            **document,
        }
        config = directory / "engine.yaml"
        config.write_text(yaml.safe_dump(settings))
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [block_images.GLOWPLUG, "engine", "--config", config],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.port = 0

    def wait_for(self, state: str, seconds: float = _START_SECONDS, **facts: Any) -> dict[str, Any]:
        """The status, once it says this."""
        until = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                status = self.status()
                self.port = status["address"][1]
                if status["state"] == state and facts.items() <= status.items():
                    return status
            if self.process.poll() is not None or time.monotonic() > until:
                raise AssertionError(f"not {state} {facts}\n{self.log.read_text()[-4_000:]}")
            time.sleep(0.02)

    def status(self) -> dict[str, Any]:
        return self.tell("GET", "/status")[1]

    def tell(self, method: str, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
        """Say something on the control socket."""
        connection = http.client.HTTPConnection("engine", timeout=10)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(self.control))
        with contextlib.closing(connection):
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def ask(
        self, path: str, body: Any = None, headers: Mapping[str, str] | None = None, seconds: float = 60
    ) -> tuple[int, Mapping[str, str], bytes]:
        """A request on the port, on a connection of its own."""
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        ) as connection:
            data = None if body is None else json.dumps(body)
            sent = {"content-type": "application/json", **(headers or {})}
            connection.request("GET" if data is None else "POST", path, data, sent)
            response = connection.getresponse()
            return (
                response.status,
                {name.lower(): value for name, value in response.getheaders()},
                response.read(),
            )

    def complete(self, tokens: int, **more: Any) -> tuple[int, Mapping[str, str], bytes]:
        return self.ask("/v1/completions", {"max_tokens": tokens, **more})

    def events(self, name: str) -> list[dict[str, Any]]:
        """What the supervisor said in its log."""
        lines = [
            line for line in self.log.read_text(errors="replace").splitlines() if line.startswith('{"time"')
        ]
        return [each for each in map(json.loads, lines) if each["event"] == f"engine_{name}"]

    def end(self) -> int:
        """Drain; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(_END_SECONDS)

    def destroy(self) -> None:
        """The supervisor, and so its child."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@contextlib.contextmanager
def engine(directory: Path, **document: Any) -> Iterator[Engine]:
    """One that is started here and gone afterwards."""
    running = Engine(directory, document)
    try:
        yield running
    finally:
        running.destroy()


def until(true: Callable[[], object]) -> None:
    """Wait for something that is bound to happen."""
    deadline = time.monotonic() + _START_SECONDS
    while not true():
        assert time.monotonic() < deadline, "what is waited for does not happen"
        time.sleep(0.005)


def group(leader: int) -> set[int]:
    """All processes of a group, zombies too."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[2]) == leader:
                found.add(int(stat.parent.name))
    return found


def children(parent: int, word: str) -> set[int]:
    """Processes that it started, with this in their command line."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            ours = int(stat.read_text().rpartition(")")[2].split()[1]) == parent
            if ours and word in stat.with_name("cmdline").read_text():
                found.add(int(stat.parent.name))
    return found


def gone(pid: int, seconds: float = 20.0) -> bool:
    """Whether a process ends within that time; a zombie has."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False
