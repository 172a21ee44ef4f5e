"""What differs between kinds of engine: how they are started, watched and probed.

Used by the supervisor, on its event loop, through `Kind`. vLLM serves the supervisor's port itself (`gate`,
`entry`) and is probed in each of its API server processes; a command listens on a port of its own behind the
supervisor's `proxy`.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import os
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import aiohttp

import serving
from serving import errors
from serving.endpoint import CommandEngine, VllmEngine
from serving.engine import container, gate, processors, vllm
from serving.engine.container import Bind
from serving.engine.ledger import Ledger
from serving.engine.listener import Giver
from serving.engine.model import Model
from serving.engine.proxy import Proxy
from serving.engine.settings import Settings

_SITE = "/glowplug"
"""Where our package is bound in a container."""


class Outcome(enum.Enum):
    """What came of a probe: all but FAILED come from a process that lives."""

    ANSWERED = "answered"
    REFUSED = "refused"
    """A status below 500 that says no: what vLLM answers for a model that generates nothing."""
    SHED = "shed"
    """429 or 503: full, or, of a command that starts, not yet."""
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Plan:
    """How to start the child."""

    command: Sequence[str]
    environment: Mapping[str, str]


class Kind(Protocol):
    """One kind of engine."""

    proxied: bool
    """Whether requests go through the supervisor."""
    start_timeout_seconds: float
    ready_by: Collection[Outcome]
    """The outcomes of a probe that end a start."""

    def plan(self, listener: socket.socket) -> Plan:
        """How to start it. ConfigurationError."""

    def servers(self) -> Mapping[int, int]:
        """The progress of each server process that is up, by its number."""

    def up(self) -> bool:
        """Whether all server processes are there to be probed."""

    async def probe(self, server: int) -> tuple[Outcome, str]:
        """Ask one server process, and why it failed. The caller sets the time."""

    async def close(self) -> None:
        """Let go of connections."""


class Vllm:
    """vLLM in an interpreter of its own."""

    proxied = False
    ready_by: Collection[Outcome] = (Outcome.ANSWERED, Outcome.REFUSED)

    def __init__(
        self, settings: Settings, engine: VllmEngine, model: Model, directory: Path, ledger: Ledger
    ) -> None:
        self._settings, self._engine, self._model = settings, engine, model
        self._directory, self._ledger = directory, ledger
        self._cpus = settings.cpus or processors.available()
        self._giver = Giver(directory)
        self.start_timeout_seconds = engine.start_timeout_seconds

    def plan(self, listener: socket.socket) -> Plan:
        settings, engine, where = self._settings, self._engine, self._model.where
        assert where is not None
        self._giver.give(listener)
        arguments = vllm.arguments(settings, engine, where, self._checkpoint(where), self._cpus)
        program = [engine.python, "-m", "serving.engine.entry", *arguments]
        package = os.fspath(Path(serving.__file__).parent)
        own = {**vllm.environment(settings, where, self._cpus), **engine.environment}
        own[gate.RUN_DIRECTORY] = os.fspath(self._directory)
        if settings.container is not None:
            own["PYTHONPATH"] = _SITE
            binds = [Bind(os.fspath(self._directory), os.fspath(self._directory), writable=True)]
            binds += [Bind(package, f"{_SITE}/serving"), Bind(where, where)]
            if settings.cache_directory is not None:
                Path(settings.cache_directory).mkdir(parents=True, exist_ok=True)
                binds.append(Bind(settings.cache_directory, settings.cache_directory, writable=True))
            return Plan(container.command(settings.container, program, own, binds), dict(os.environ))
        # Only our package, not the environment that it lies in: vLLM's pins differ from ours.
        site = self._directory / "site"
        site.mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (site / "serving").symlink_to(package)
        return Plan(program, {**os.environ, **own, "PYTHONPATH": os.fspath(site)})

    def _checkpoint(self, where: str) -> vllm.Checkpoint:
        if where.startswith("s3://"):
            return vllm.Checkpoint()
        config = Path(where) / "config.json"
        try:
            return vllm.read_checkpoint(config.read_text())
        except (OSError, ValueError) as exc:
            raise errors.ConfigurationError(
                f"model: {self._settings.model}: no readable config.json ({exc}); "
                "name a folder with a checkpoint"
            ) from exc

    def servers(self) -> Mapping[int, int]:
        return {each.number: each.progress for each in self._ledger.slots()}

    def up(self) -> bool:
        beating = [each for each in self._ledger.slots() if each.heartbeat_ns]
        return len(beating) >= vllm.api_servers(self._engine, self._cpus)

    async def probe(self, server: int) -> tuple[Outcome, str]:
        # A connection of its own: one that is kept alive would be to whoever had the slot before.
        connector = aiohttp.UnixConnector(os.fspath(gate.server_socket(self._directory, server)))
        headers = {"content-type": "application/json"}
        if key := self._key():
            headers["authorization"] = f"Bearer {key}"
        async with aiohttp.ClientSession(connector=connector) as session:
            return await _ask(
                session, "POST", "http://engine/v1/completions", vllm.probe_body(self._settings), headers
            )

    def _key(self) -> str | None:
        """vLLM's own API key, if its settings give it one: the probe is asked for it as everybody is."""
        arguments = self._engine.arguments
        for name, value in itertools.pairwise([*arguments, ""]):
            if name == "--api-key":
                return value
            if name.startswith("--api-key="):
                return name.partition("=")[2]
        return self._engine.environment.get("VLLM_API_KEY") or os.environ.get("VLLM_API_KEY")

    async def close(self) -> None:
        self._giver.close()


class Command:
    """Any program that serves HTTP on $PORT."""

    proxied = True
    ready_by: Collection[Outcome] = (Outcome.ANSWERED,)

    def __init__(self, settings: Settings, engine: CommandEngine, model: Model, proxy: Proxy) -> None:
        self._settings, self._engine, self._model, self._proxy = settings, engine, model, proxy
        self._cpus = settings.cpus or processors.available()
        self.start_timeout_seconds = engine.start_timeout_seconds

    def plan(self, listener: socket.socket) -> Plan:
        engine, where = self._engine, self._model.where
        port = _free_port()
        self._proxy.connect(port)
        own = {"OMP_NUM_THREADS": str(self._cpus), **engine.environment, "PORT": str(port)}
        if where is not None:
            own["MODEL"] = where
        if self._settings.container is None:
            return Plan(engine.command, {**os.environ, **own})
        binds = [Bind(where, where)] if where is not None and where.startswith("/") else []
        words = container.command(self._settings.container, engine.command, own, binds)
        return Plan(words, dict(os.environ))

    def servers(self) -> Mapping[int, int]:
        return {0: self._proxy.progress}

    def up(self) -> bool:
        return True

    async def probe(self, server: int) -> tuple[Outcome, str]:
        return await _ask(self._proxy.session, "GET", self._proxy.url(self._engine.health_path), None, {})

    async def close(self) -> None:
        await self._proxy.close()


async def _ask(
    session: aiohttp.ClientSession, method: str, url: str, body: bytes | None, headers: Mapping[str, str]
) -> tuple[Outcome, str]:
    try:
        async with session.request(
            method, url, data=body, headers=headers, allow_redirects=False
        ) as response:
            text = (await response.content.read(200)).decode("utf-8", "replace")
    except (aiohttp.ClientError, OSError) as exc:
        return Outcome.FAILED, str(exc) or type(exc).__name__
    if response.status < 300:
        return Outcome.ANSWERED, ""
    if response.status in (429, 503):
        return Outcome.SHED, f"status {response.status}: {text}"
    failed = response.status >= 500
    return Outcome.FAILED if failed else Outcome.REFUSED, f"status {response.status}: {text}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
