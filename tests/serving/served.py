"""An endpoint that is served for a test by the real command: replicas, Envoy and control plane, and load on
it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from serving import client, errors

ENGINE = Path(__file__).parents[1] / "fixtures" / "named_engine.py"
GLOWPLUG = (sys.executable, "-c", "from glowplug.cli import main; main()")
WAIT_SECONDS = 60.0


def document(name: str = "one", replicas: int = 2, **sections: Any) -> dict[str, Any]:
    """An endpoint whose version is `name`; quick steps."""
    environment = sections.pop("environment", {})
    return {
        "name": "chat",
        "engine": {
            "kind": "command",
            "command": [sys.executable, str(ENGINE), name],
            "environment": environment,
        },
        "replicas": {"min": replicas, "max": 8, "target_concurrency": 64},
        "autoscaling": {"mode": "off"},
        "routing": {"port": 0},
        "update": {"steps_percent": [25, 100], "step_seconds": 1.0, "min_requests": 10},
        "drain": {"notice_seconds": 0.5, "seconds": 20},
        **sections,
    }


class Served:
    """`glowplug serve` in `directory`, a short path: sockets lie in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.state = directory / "s"
        self.process: subprocess.Popen[str] | None = None
        self.url = self.page = ""

    def start(self, wanted: dict[str, Any]) -> None:
        """Returns when it says where it takes requests."""
        self.process = self._run(wanted, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        assert self.url, self.said()
        self.page = (
            self.said().rpartition("status page: ")[2].split()[0] if "status page" in self.said() else ""
        )

    def refused(self, wanted: dict[str, Any]) -> tuple[int, str]:
        """Exit code and last words of a server that must not come up."""
        process = self._run(wanted, stdout=subprocess.PIPE)
        process.communicate(timeout=WAIT_SECONDS)
        return process.returncode, self.said()

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.communicate()

    def stop(self) -> int:
        """As Ctrl-C does. The exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        self.process.communicate(timeout=WAIT_SECONDS)
        return self.process.returncode

    def said(self) -> str:
        return (self.directory / "log").read_text()

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`glowplug endpoint ...` on this endpoint's state."""
        return subprocess.run(
            [*GLOWPLUG, "endpoint", *arguments],
            env={**os.environ, "GLOWPLUG_ENDPOINTS": str(self.state)},
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
        )

    def write(self, wanted: dict[str, Any]) -> str:
        file = self.directory / "endpoint.yaml"
        file.write_text(yaml.safe_dump(wanted))
        return str(file)

    def apply(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return client.Client(self.state, "chat").post(
            "/api/v1/apply", {"document": yaml.safe_dump(wanted), "where": "test"}
        )

    def status(self) -> dict[str, Any]:
        return client.Client(self.state, "chat").get("/api/v1/status")

    def until(self, what: str, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first status of which it holds."""
        deadline = time.monotonic() + WAIT_SECONDS
        status: dict[str, Any] = {}
        while time.monotonic() < deadline:
            with contextlib.suppress(errors.UnavailableError):
                status = self.status()
                if holds(status):
                    return status
            time.sleep(0.05)
        raise AssertionError(
            f"{what}: not within {WAIT_SECONDS:g} s\n{json.dumps(status, indent=1)}\n{self.said()}"
        )

    def until_ready(self, count: int) -> dict[str, Any]:
        """So many replicas, and Envoy has found them healthy, too."""
        return self.until(
            f"{count} ready", lambda status: len(ready(status)) == count and self.answer("/work")[0] != 503
        )

    def answer(self, path: str, **headers: str) -> tuple[int, str]:
        """What one request to the endpoint gets."""
        return answer(f"{self.url}{path}", **headers)

    def pid(self, replica: str) -> int:
        """Of a replica's supervisor."""
        record = json.loads((self.state / "chat" / "replicas" / replica / "record.json").read_text())
        return int(record["handle"].partition(":")[0])

    def processes(self) -> list[int]:
        """Whatever runs with this state directory in its arguments: replicas, Envoy, the server."""
        found = []
        for each in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{each}/cmdline").read_bytes()
                if os.fsencode(f"{self.directory}/") in words and int(each) != os.getpid():
                    found.append(int(each))
        return found

    def _run(self, wanted: dict[str, Any], stdout: int) -> subprocess.Popen[str]:
        file = self.write(wanted)
        with (self.directory / "log").open("w") as log:
            return subprocess.Popen(
                [*GLOWPLUG, "serve", file, "--state", str(self.state), "--status", "127.0.0.1:0", "--plain"],
                stdout=stdout,
                stderr=log,
                text=True,
            )


def answer(url: str, **headers: str) -> tuple[int, str]:
    """Status and body of one GET."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as found:
            return found.status, found.read().decode()
    except urllib.error.HTTPError as exc:
        return exc.code, exc.read().decode()


def ready(status: dict[str, Any]) -> list[dict[str, Any]]:
    return [each for each in status["replicas"] if each["state"] == "ready"]


def settled(version: str) -> Callable[[dict[str, Any]], bool]:
    """The update to `version` is through, and nothing is left of the others."""
    return lambda status: (
        status["phase"] == "steady"
        and status["stable"] == version
        and {each["version"] for each in status["replicas"]} == {version}
    )


@contextlib.contextmanager
def serving(directory: Path, wanted: dict[str, Any]) -> Iterator[Served]:
    """Up for the block; ended, to the last process, after it."""
    served = Served(directory)
    try:
        served.start(wanted)
        yield served
    finally:
        if served.process is not None and served.process.poll() is None:
            served.stop()
        for pid in served.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """One request. Times are of the monotonic clock; `wrong` is None for one that was served whole."""

    began: float
    ended: float
    name: str
    wrong: str | None


class Load:
    """So many clients, each asking again and again, on keep-alive connections; one in `stream_each` asks for
    a stream. Use: `async with Load(url) as load`; `asked` is all of them after it."""

    def __init__(
        self, url: str, clients: int = 16, pause_seconds: float = 0.05, stream_each: int = 20
    ) -> None:
        self._url = url
        self._clients = clients
        self._pause_seconds = pause_seconds
        self._stream_each = stream_each
        self._numbers = itertools.count()
        self._ending = False
        self.asked: list[Asked] = []

    async def __aenter__(self) -> Load:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=WAIT_SECONDS))
        self._tasks = [asyncio.create_task(self._ask_on()) for _ in range(self._clients)]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._ending = True
        await asyncio.gather(*self._tasks)
        await self._session.close()

    @property
    def failed(self) -> list[Asked]:
        return [each for each in self.asked if each.wrong is not None]

    async def _ask_on(self) -> None:
        while not self._ending:
            number = next(self._numbers)
            began = time.monotonic()
            name, wrong = "", None
            try:
                if number % self._stream_each == 0:
                    name, wrong = "stream", await self._stream()
                else:
                    name, wrong = await self._plain(number)
            except (aiohttp.ClientError, TimeoutError) as exc:
                wrong = f"{type(exc).__name__}: {exc}"
            self.asked.append(Asked(began, time.monotonic(), name, wrong))
            await asyncio.sleep(self._pause_seconds)

    async def _plain(self, number: int) -> tuple[str, str | None]:
        async with self._session.get(f"{self._url}/work", headers={"x-request": str(number)}) as answer:
            body = await answer.text()
            if answer.status != 200:
                return "", f"{answer.status} {body}"
            said = json.loads(body)
            return said["name"], None if said["request"] == str(
                number
            ) else f"the answer of {said['request']}"

    async def _stream(self) -> str | None:
        async with self._session.get(f"{self._url}/stream?lines=50") as answer:
            body = await answer.text()
            return (
                None
                if answer.status == 200 and body.endswith("data: [DONE]\n\n")
                else f"cut off: {body[-80:]}"
            )
