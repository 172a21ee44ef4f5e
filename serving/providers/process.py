"""Replicas as processes of this machine: the fleet's launcher that needs nothing but the engine.

A replica is a session of its own (`serving.detached`), so that Ctrl-C in the server's terminal does not reach
it and all that it started can be ended together; it goes on when the server is killed.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from serving import detached, endpoint, errors
from serving.endpoint import Endpoint
from serving.engine.requestlog import requirements
from serving.models import place
from serving.providers import enginecommand
from serving.providers.record import Record


class ProcessLauncher:
    """See the module; one thread. `cache`: what engines keep from one start for the next."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._sessions = detached.Sessions()

    def check(self, wanted: Endpoint) -> None:
        """See fleet.Launcher."""
        engine = wanted.engine
        match engine:
            case endpoint.CommandEngine():
                require_program("engine.command", engine.command[0])
            case endpoint.VllmEngine():
                require_program("engine.python", engine.python)
        require_model(wanted)
        require_request_log(wanted)

    def start(
        self,
        record: Record,
        wanted: Endpoint,
        folder: Path,
        known: Callable[[str], None],
        image: str | None = None,
    ) -> None:
        """See fleet.Launcher. `image`: containerd's name of the one that the engine's program runs in."""
        settings = folder / enginecommand.SETTINGS
        settings.write_text(
            enginecommand.settings(
                wanted,
                address=record.address[0],
                port=record.address[1],
                limit=record.limit,
                folder=folder,
                cache=self._cache,
                image=image,
            )
        )
        settings.chmod(0o600)  # the engine's environment may hold secrets
        command = [*detached.GLOWPLUG, "engine", "--config", str(settings)]
        self._sessions.start(command, folder / enginecommand.LOG, known)

    def ended(self, record: Record) -> str | None:
        """See fleet.Launcher."""
        return self._sessions.ended(record.handle)

    def stop(self, record: Record) -> None:
        """See fleet.Launcher."""
        self._sessions.tell(record.handle, signal.SIGTERM)

    def kill(self, record: Record) -> None:
        """See fleet.Launcher."""
        self._sessions.kill(record.handle)

    def close(self) -> None:
        """See fleet.Launcher."""


def require_program(key: str, program: str) -> None:
    """DocumentError where there is no such program."""
    if shutil.which(program) is None:
        raise errors.DocumentError(
            f"{key}: {program!r} is no program on this machine; install it or name its path"
        )


def require_request_log(wanted: Endpoint) -> None:
    """ConfigurationError where a library for it is missing."""
    if wanted.request_log is not None:
        requirements.check(wanted.request_log)


def require_model(wanted: Endpoint) -> None:
    """DocumentError where the model is a directory that is not there."""
    local = wanted.model is not None and isinstance(place.parse(wanted.model), place.Directory)
    if local and not Path(str(wanted.model)).exists():
        raise errors.DocumentError(
            f"model: {wanted.model} does not exist on this machine; name a directory that does"
        )
