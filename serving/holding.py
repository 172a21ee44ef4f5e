"""The endpoint's activator: kept running beside Envoy, and adopted by the server that comes after this one.

Owned by the server's loop. Envoy gives the activator requests only while no replica is healthy; it holds them
until one is (`serving/activator/`). It is offered to Envoy once it listens, and no sooner: a request that is
sent to nobody is a failed one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import socket
import time
from pathlib import Path

from serving import detached, errors, ports, wholefile

_AGAIN_SECONDS = 2.0
_DEADLINE = "24h"
"""The routes' own timeouts end a wait, and can be changed while it lasts: `routing` in the document."""
_STOP_SECONDS = 10.0
_CONNECT_SECONDS = 0.2
_ADDRESS = "127.0.0.1"

_log = logging.getLogger(__name__)


class Holding:
    """`control` is the router's address, `directory` where the activator's handle and log lie."""

    def __init__(self, directory: Path, name: str, control: str) -> None:
        self._file = directory / "activator.json"
        self._log_file = directory / "activator.log"
        self._name = name
        self._control = control
        self._sessions = detached.Sessions()
        self._handle, self._port = self._recorded()
        self._listens = False
        self._started_at = 0.0

    def ensure(self) -> tuple[str, int] | None:
        """Where it takes requests; None while it does not."""
        ended = self._sessions.ended(self._handle)
        if ended is not None:
            self._listens = False
            if time.monotonic() - self._started_at >= _AGAIN_SECONDS:
                self._start()
        elif not self._listens:
            with contextlib.suppress(OSError):
                socket.create_connection((_ADDRESS, self._port), _CONNECT_SECONDS).close()
                self._listens = True
        return (_ADDRESS, self._port) if self._listens else None

    def stop(self) -> None:
        """End it; who still waits there is told to come again."""
        self._sessions.tell(self._handle, signal.SIGTERM)
        until = time.monotonic() + _STOP_SECONDS
        while self._sessions.ended(self._handle) is None and time.monotonic() < until:
            time.sleep(0.02)
        self._sessions.kill(self._handle)
        self._file.unlink(missing_ok=True)

    def _start(self) -> None:
        self._started_at = time.monotonic()
        self._port = ports.probe(_ADDRESS, 0)
        command = [
            *(*detached.GLOWPLUG, "activator", "--name", self._name, "--control", self._control),
            *("--service", f"{self._name}={_ADDRESS}:{self._port}", "--drain", "1s"),
            *("--deadline", _DEADLINE),
        ]
        self._sessions.start(command, self._log_file, self._known)
        _log.info("%s: its activator is started", self._name)

    def _known(self, handle: str) -> None:
        self._handle = handle
        wholefile.write(self._file, json.dumps({"handle": handle, "port": self._port}))

    def _recorded(self) -> tuple[str, int]:
        try:
            found = json.loads(self._file.read_bytes())
            return str(found["handle"]), int(found["port"])
        except FileNotFoundError:
            return "", 0
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise errors.ConfigurationError(f"{self._file} cannot be read ({exc}); remove it") from exc
