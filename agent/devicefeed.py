"""The device server's numbers and events, for whoever looks: metrics, starts, the status page, readiness.

Owned by the daemon. `status` asks at most once a second, however many ask us; a device server that is gone is
an error that is told (`Look.error`), never one that is raised, and costs one failed connection, not a wait.
Events are read on from the last number seen. A thread reads them every second while a start runs
(`Starts.running`), else only when somebody looks: an idle agent polls nothing. Also counted here: servers
that were replaced, which a server cannot know of itself.
"""

from __future__ import annotations

import dataclasses
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agent.observer import Observer
from agent.starts import Starts
from imagefs import errors, unixsocket
from imagefs.fuse import controlmessage

_FRESH_SECONDS = 1.0
_POLL_SECONDS = 1.0
_ANSWER_SECONDS = 5.0

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Look:
    """One look at the device server: its `status`, or why there is none."""

    status: Mapping[str, Any] | None
    error: str | None


class DeviceFeed:
    """See the module."""

    def __init__(
        self,
        state_dir: Path,
        starts: Starts,
        observer: Observer,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._observer = observer
        self._state_dir = state_dir
        self._starts = starts
        self._clock = clock
        self._lock = threading.Lock()
        self._looked_at = float("-inf")
        self._look = Look(None, "not asked yet")
        self._server: int | None = None
        self._replaced = {"server": 0, "worker": 0, "keeper": 0}
        self._seen: dict[str, int] = {}
        self._last_number = 0
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="device-feed", daemon=True)

    def start(self) -> None:
        """Begin to follow starts."""
        self._starts.on_running = self._wake.set
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def status(self) -> Look:
        """Devices, cache, fetch counters and processes, at most a second old."""
        with self._lock:
            if self._clock() - self._looked_at >= _FRESH_SECONDS:
                self._look = self._ask()
                self._looked_at = self._clock()
            return self._look

    def replaced(self) -> dict[str, int]:
        """How many processes of each kind were replaced since we look."""
        with self._lock:
            return dict(self._replaced)

    def follow(self) -> None:
        """Hand the events since the last time to the starts."""
        with self._lock:
            try:
                events = self._request({"op": "events", "after": self._last_number})
            except (OSError, errors.ImagefsError) as exc:
                _log.debug("no fetch events: %s", exc)
                events = []
            if events:
                self._last_number = int(events[-1].get("number", self._last_number))
        self._starts.absorb(events)

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait()
            self._wake.clear()
            while self._starts.running() and not self._stopping:
                try:
                    self.follow()
                except Exception:
                    _log.exception("fetch events could not be read")  # the next start is another try
                self._wake.wait(_POLL_SECONDS)
                self._wake.clear()

    def _ask(self) -> Look:
        try:
            status = self._request({"op": "status"})
        except (OSError, errors.ImagefsError) as exc:
            return Look(None, f"the device server of {self._state_dir} does not answer: {exc}")
        self._note_processes(status["processes"])
        return Look(status, None)

    def _note_processes(self, processes: Mapping[str, Any]) -> None:
        server = int(processes["server"])
        if self._server is not None and server != self._server:
            self._count("server", 1)
            self._seen = {}  # its counts begin anew
        self._server = server
        for kind, field in (("worker", "workers_replaced"), ("keeper", "keepers_replaced")):
            count = int(processes.get(field, 0))
            self._count(kind, count - self._seen.get(kind, 0))
            self._seen[kind] = count

    def _count(self, kind: str, count: int) -> None:
        if count > 0:
            self._replaced[kind] += count
            where = self._state_dir / "server.log"
            text = f"the device server's {kind} was replaced ({count}): {where} says why"
            self._observer.event("handover", text, level="warning", process=kind, count=count)

    def _request(self, request: Mapping[str, Any]) -> Any:
        """One try: DeviceClient waits for a server that is being started, and a scrape must not."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_ANSWER_SECONDS)
            unixsocket.connect(connection, self._state_dir / "control.sock")
            controlmessage.send(connection, request)
            reply = controlmessage.receive(connection, controlmessage.MAX_REPLY_BYTES)
        if reply is None:
            raise ConnectionResetError("it went away")
        if "error" in reply:
            raise controlmessage.decode_error(reply)
        return reply.get("ok")
