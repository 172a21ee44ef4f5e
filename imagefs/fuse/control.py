"""The device server as its clients see it: its settings, its start, and a client of its control socket.

Called by the verbs and the agent, on their own threads. The messages are controlmessage.py's.

STATE/ (0700, ours) holds lock (who starts processes), settings.json, devices.json, fills.json, starts.json,
maps/, devices/ (the mount), keeper.sock, keeper.lock, control.sock, peer.sock, handover.json, server.log.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imagefs import errors, privatedirectory, unixsocket
from imagefs.fuse import controlmessage, coverage, statedirectory
from imagefs.fuse.coverage import Coverage as Coverage
from imagefs.fuse.devices import LayerSpec as LayerSpec
from imagefs.fuse.devices import PackSpec as PackSpec
from imagefs.fuse.devices import device_name, encode_pack, encode_spec, write_atomically
from imagefs.fuse.mapfiles import MapFiles
from imagefs.origin.connect import Options
from imagefs.peersettings import PeerSettings

_START_SECONDS = 20.0
_RESTART_SECONDS = 15.0
"""How long a client waits for a server that its keeper is starting again."""
_ANSWER_SECONDS = 120
"""More than an origin may take that is asked for a block map; a server that hangs must not hold up for good
who watches it, or is to stop."""
_ATTEMPTS = 3
_LOG_TAIL_BYTES = 2000
_BUILD = ("imagefs.fuse.keeper", "imagefs.fuse.server", "imagefs.fuse.worker", "imagefs.fuse.layers")

WORKERS = 4
"""FUSE processes: more than processors, so that the disk has a next request while an answer is copied. On two
cores four of them bring a large library in 0.82 to 0.89 of the time of two (docs/benchmarks.md)."""


@dataclasses.dataclass(frozen=True, slots=True)
class ServerSettings:
    """What the device server of `state_dir` is started with. `workers` is the number of FUSE processes,
    `connections` that of parallel requests to one origin, `layer_files` whether whole layers get files
    (layerfiles.py), `origins` how this client's origins are reached (each attach brings its own)."""

    state_dir: Path
    cache_dir: Path
    cache_quota_bytes: int
    free_floor_bytes: int
    workers: int = WORKERS
    read_deadline_seconds: float = 60.0
    connections: int = 8
    layer_files: bool = True
    origins: Options = dataclasses.field(default_factory=Options)


@dataclasses.dataclass(frozen=True, slots=True)
class Recorded:
    """Reads in order of time: (number in `map_digests`, offset, length, microseconds since the start). They
    may reach beyond the end of the layer image. `left_out`: how many more there were than is kept."""

    map_digests: tuple[str, ...]
    reads: Sequence[tuple[int, int, int, int]]
    left_out: int


def free_floor_bytes(cache_dir: Path, percent: int) -> int:
    """A share of the filesystem that holds (or will hold) the cache, in bytes."""
    place = cache_dir
    while not place.exists():
        place = place.parent
    stat = os.statvfs(place)
    return stat.f_blocks * stat.f_frsize * percent // 100


def encode_settings(value: ServerSettings) -> bytes:
    """As JSON."""
    document = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    for name in ("state_dir", "cache_dir"):
        document[name] = os.path.abspath(document[name])
    document["origins"] = value.origins.to_json()
    return json.dumps(document, indent=1).encode()


def decode_settings(data: bytes) -> ServerSettings:
    """Inverse of encode_settings. Raises ConfigurationError."""
    try:
        document = json.loads(data)
        document["origins"] = Options.from_json(document["origins"])
        for name in ("state_dir", "cache_dir"):
            document[name] = Path(document[name])
        return ServerSettings(**document)
    except (ValueError, KeyError, TypeError) as exc:
        raise errors.ConfigurationError(f"settings.json of the device server: {exc!r}") from exc


def kept_settings(wanted: ServerSettings) -> dict[str, object]:
    """What the server of this state directory was started with and keeps, where something else is wanted:
    field -> its value. Empty for a server that was just started."""
    try:
        running = decode_settings((wanted.state_dir / "settings.json").read_bytes())
    except (OSError, errors.ConfigurationError):
        return {}
    names = [field.name for field in dataclasses.fields(ServerSettings)]
    return {name: getattr(running, name) for name in names if getattr(running, name) != getattr(wanted, name)}


class DeviceClient:
    """A client of one state directory's device server. Each request is a connection of its own, so that one
    client may be used from several threads, and outlives a restart of the server."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings

    @classmethod
    def ensure(cls, settings: ServerSettings) -> DeviceClient:
        """A client of the running server; keeper and server are started if there are none. Returns when the
        server takes requests. ConfigurationError if it cannot start."""
        client = cls(settings)
        client._ensure_running()
        return client

    @classmethod
    def connect(cls, state_dir: Path) -> DeviceClient | None:
        """A client of the running server, for what must not start one: status, detach, stop. None without.
        ConfigurationError if the state directory is not ours."""
        privatedirectory.check(state_dir)
        client = cls(ServerSettings(state_dir, state_dir, 0, 0))
        return client if client._answers_within(_RESTART_SECONDS) else None

    def attach(
        self, owner: str, layers: Sequence[LayerSpec], origins: Options, pack: PackSpec | None = None
    ) -> list[Path]:
        """Make layers readable for `owner`, a name of the client's choice (a mount id). All or none.
        Attaching twice counts once. A boot pack begins to be fetched; one that cannot be used is no error.
        Only who brings the same pack, or none, gets the same device of a layer. Returns the device files, in
        the order of `layers`."""
        state_dir = self._settings.state_dir
        given = [(layer.map_digest, layer.map_bytes) for layer in layers]
        if pack is not None:
            given.append((pack.table_digest, pack.table_bytes))
        maps = MapFiles(state_dir / "maps")
        for digest, data in given:
            if data is not None:
                maps.keep(digest, data)
        self._checked_request(
            {
                "op": "attach",
                "owner": owner,
                "origins": origins.to_json(),
                "layers": [encode_spec(layer) for layer in layers],
                "pack": encode_pack(pack) if pack is not None else None,
            }
        )
        directory = statedirectory.device_directory(state_dir)
        if not statedirectory.mounted(directory):
            raise errors.ConfigurationError(
                f"{directory} is not mounted in this mount namespace: the device server of {state_dir} was "
                "started in another one; use another state directory (--state)"
            )
        table_digest = pack.table_digest if pack is not None else None
        return [directory / device_name(layer.map_digest, table_digest) for layer in layers]

    def hold(self, owner: str) -> None:
        """Keep the server from ending as idle, though `owner` has nothing attached, until its `detach`."""
        self._checked_request({"op": "hold", "owner": owner})

    def detach(self, owner: str) -> None:
        """Let go of all of an owner's layers, and of its hold. Reads that still wait for a layer without
        owners fail at once. An unknown owner is no error."""
        self._checked_request({"op": "detach", "owner": owner})

    def started(self, owner: str, backing_devices: Sequence[str]) -> None:
        """Say that an owner's layers were mounted, on these backing devices (kernelreadahead.py): once the
        start is over they read ahead more. Nothing that is wrong with it is an error: it is for speed."""
        with contextlib.suppress(errors.ImagefsError):
            self._checked_request({"op": "started", "owner": owner, "backing_devices": list(backing_devices)})

    def start_recording(self, owner: str) -> None:
        """Have every read that the kernel asks of an owner's layers noted, whoever it is for. Ends with
        `stop_recording`, `detach`, or the server. NotFoundError if none is attached."""
        self._checked_request({"op": "start_recording", "owner": owner})

    def stop_recording(self, owner: str) -> Recorded:
        """End a recording. NotFoundError if there is none: a server that was started again has forgotten."""
        found: dict[str, Any] = self._checked_request({"op": "stop_recording", "owner": owner})
        return Recorded(
            tuple(found["layers"]), [tuple(read) for read in found["reads"]], int(found["left_out"])
        )

    def status(self) -> dict[str, Any]:
        """Devices, cache, fetch counters, processes."""
        status: dict[str, Any] = self._checked_request({"op": "status"})
        return status

    def events(self, after: int = 0) -> list[dict[str, Any]]:
        """The latest fetches with numbers above `after`, oldest first: FetchEvent as JSON objects."""
        events: list[dict[str, Any]] = self._checked_request({"op": "events", "after": after})
        return events

    def fill(self, owner: str, bandwidth_bytes_per_second: int = 0) -> None:
        """Have the rest of an owner's layers fetched in the background, below every read, for as long as
        there is room in the cache; it goes on after a restart of the server, and ends with `detach`. The cap
        (0: none) holds for all owners together, the latest counts. NotFoundError if none is attached."""
        rate = bandwidth_bytes_per_second
        self._checked_request({"op": "fill", "owner": owner, "bandwidth_bytes_per_second": rate})

    def stop_fill(self, owner: str) -> None:
        """No further copy for the owner; what it has may be evicted again. An unknown owner is no error."""
        self._checked_request({"op": "stop_fill", "owner": owner})

    def fills(self) -> dict[str, Any]:
        """The copies that were asked for: {"bandwidth_bytes_per_second": n, "copies": [{"owner", "state",
        "error"}]}; see fuse/fill.py for the states."""
        fills: dict[str, Any] = self._checked_request({"op": "fills"})
        return fills

    def coverage(self, owner: str | None = None) -> dict[str, Coverage]:
        """Map digest -> how much of the layer is in the cache: of all layers, or of an owner's.
        NotFoundError if that has none."""
        request = {"op": "coverage"} if owner is None else {"op": "coverage", "owner": owner}
        found: dict[str, Any] = self._checked_request(request)
        return {map_digest: coverage.decode(value) for map_digest, value in found.items()}

    def layer_files(self, owner: str | None = None) -> dict[str, Path]:
        """Map digest -> file, of those of all layers, or an owner's, that can be mounted from a file of the
        block cache (layerfiles.py), which may be gone when it is opened. Empty, too, when the server
        cannot say: the devices do as well, slower."""
        try:
            request = {"op": "layer_files"} if owner is None else {"op": "layer_files", "owner": owner}
            found: dict[str, str] = self._checked_request(request)
        except errors.ImagefsError:
            return {}
        return {map_digest: Path(path) for map_digest, path in found.items()}

    def pin(self, owner: str) -> None:
        """Keep the blocks of an owner's layers, once they are in the cache, from eviction, also after a
        detach and a reboot: until `unpin` with the same name."""
        self._checked_request({"op": "pin", "owner": owner})

    def unpin(self, owner: str) -> None:
        """Drop a pin. An unknown name is no error."""
        self._checked_request({"op": "unpin", "owner": owner})

    def collect(self) -> dict[str, int]:
        """Bring the cache under its limits now: removed_blocks, removed_bytes, short_bytes (over the limits
        all the same, because of pins or of others' files)."""
        collected: dict[str, int] = self._checked_request({"op": "collect"})
        return collected

    def set_peers(self, settings: PeerSettings | None) -> None:
        """Whom to ask for blocks before the origin. Kept in the server's memory: to be said again after a
        restart of it. ConfigurationError if the secrets that are named cannot be read."""
        self._checked_request({"op": "peers", "settings": settings.to_json() if settings else None})

    def hand_over(self, *, python: str = sys.executable) -> None:
        """Have keeper, device server and workers of this build, run by `python` with this client's settings
        (but for `workers`), take the place of those that run. Readers see a pause. Returns when the new
        server takes requests. NotFoundError if none runs; ConfigurationError if the new build's keeper does
        not come up (the old ones go on), or its server does not (the message says what to do)."""
        for name in _BUILD:
            importlib.import_module(name)  # what cannot even be loaded is found before anything is touched
        settings = json.loads(encode_settings(self._settings))
        try:
            request = {"op": "hand_over", "python": python, "settings": settings}
            self._request(request, until_gone=True)
        except FileNotFoundError as exc:
            raise errors.NotFoundError(f"no device server runs in {self._settings.state_dir}") from exc
        except ConnectionError as exc:
            raise errors.UnavailableError(
                f"the device server of {self._settings.state_dir} died while it handed over: {exc}; its "
                "keeper starts another: look with `glowplug status`, and try again"
            ) from exc
        if not self._answers_within(_START_SECONDS):
            tail = _log_tail(self._settings.state_dir / "server.log").strip()
            raise errors.ConfigurationError(
                f"the new device server of {self._settings.state_dir} does not come up; its keeper goes on "
                f"trying, and readers wait meanwhile. {self._settings.state_dir}/server.log ends: {tail}"
            )

    def stop(self) -> None:
        """Unmount the devices and end all processes; what still uses a device gets errors."""
        self._checked_request({"op": "stop"})
        self._wait_stopped()

    def stop_if_idle(self) -> bool:
        """Stop if no layer is attached and nobody holds the server. Whether it did."""
        stopped = bool(self._checked_request({"op": "stop_if_idle"}))
        if stopped:
            self._wait_stopped()
        return stopped

    # -- requests ----------------------------------------------------------------------------------

    def _request(self, request: Mapping[str, Any], *, until_gone: bool = False) -> Any:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            # Not settimeout: a connect would fail at once when many connect at the same moment.
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                connection.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", _ANSWER_SECONDS, 0))
            try:
                unixsocket.connect(connection, self._settings.state_dir / "control.sock")
                controlmessage.send(connection, request)
                reply = controlmessage.receive(connection, controlmessage.MAX_REPLY_BYTES)
                if until_gone and reply is not None and "error" not in reply:
                    with contextlib.suppress(ConnectionError):
                        connection.recv(1)  # the end of who answered: what answers next is its successor
            except BlockingIOError as exc:
                raise errors.UnavailableError(
                    f"the device server of {self._settings.state_dir} did not answer {request['op']} within "
                    f"{_ANSWER_SECONDS} s: is it stopped, or its disk hanging?"
                ) from exc
        if reply is None:
            raise ConnectionResetError("the device server went away")
        if "error" in reply:
            error = controlmessage.decode_error(reply)
            if isinstance(error, errors.InvalidInputError) and controlmessage.UNKNOWN_OPERATION in str(error):
                raise errors.ConfigurationError(
                    f"the device server of {self._settings.state_dir} is of an earlier version, which does "
                    f"not know {request['op']!r}: `glowplug agent upgrade` replaces it; if that cannot, end "
                    "what uses it, and its processes"
                )
            raise error
        return reply.get("ok")

    def _checked_request(self, request: Mapping[str, Any]) -> Any:
        """Every operation may be repeated: a server that dies under it is waited for."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return self._request(request)
            except (FileNotFoundError, ConnectionError, controlmessage.StoppingError) as exc:
                if attempt == _ATTEMPTS:
                    raise errors.UnavailableError(
                        f"the device server of {self._settings.state_dir} does not answer: {exc}"
                    ) from exc
                if isinstance(exc, controlmessage.StoppingError):
                    self._wait_stopped()
                self._recover(request)
        raise AssertionError("unreachable")

    def _recover(self, request: Mapping[str, Any]) -> None:
        if request["op"] in ("attach", "hold"):
            self._ensure_running()
        elif not self._answers_within(_RESTART_SECONDS):
            raise errors.NotFoundError(f"no device server runs in {self._settings.state_dir}")

    def _answers(self) -> bool:
        try:
            self._request({"op": "ping"})
        except (FileNotFoundError, ConnectionError):
            return False
        return True

    def _answers_within(self, seconds: float) -> bool:
        """Wait for a server that a keeper is starting again; not at all if there is no keeper."""
        deadline = time.monotonic() + seconds
        while not self._answers():
            if not self._keeper_lives() or time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True

    def _keeper_lives(self) -> bool:
        try:
            fd = os.open(self._settings.state_dir / "keeper.lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def _wait_stopped(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while self._keeper_lives():
            if time.monotonic() > deadline:
                raise errors.BusyError(f"the device server of {self._settings.state_dir} does not end")
            time.sleep(0.005)

    # -- starting ----------------------------------------------------------------------------------

    def _ensure_running(self) -> None:
        state_dir = self._settings.state_dir
        privatedirectory.check(state_dir)
        if self._answers():
            return
        _prepare_state_dir(state_dir)
        with open(state_dir / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self._answers() or (self._keeper_lives() and self._answers_within(_RESTART_SECONDS)):
                return
            self._start()

    def _start(self) -> None:
        state_dir = self._settings.state_dir
        _write(state_dir / "settings.json", encode_settings(self._settings))
        ready, ready_writer = os.pipe2(os.O_CLOEXEC)
        command = [sys.executable, "-m", "imagefs.fuse.keeper", "--state", os.path.abspath(state_dir)]
        command += ["--clones", str(self._settings.workers), "--start-server"]
        command += ["--ready-fd", str(ready_writer)]
        try:
            statedirectory.bound_log(state_dir / "server.log")
            started = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[ready_writer],
                start_new_session=True,
                check=False,
            )
        finally:
            os.close(ready_writer)
        with open(ready, "rb") as pipe:
            if started.returncode == 0 and pipe.read():
                return
        reason = started.stderr.decode(errors="replace") or _log_tail(state_dir / "server.log")
        raise errors.ConfigurationError(f"the device server of {state_dir} did not start: {reason.strip()}")


def write_settings(state_dir: Path, document: Mapping[str, Any]) -> None:
    """The settings of the next server, as encode_settings has them: perhaps of another version, hence as
    they came. ConfigurationError."""
    _write(state_dir / "settings.json", json.dumps(document, indent=1).encode())


def _prepare_state_dir(state_dir: Path) -> None:
    if os.geteuid() != 0:
        raise errors.ConfigurationError("block devices need root: use --mode fuse, or run as root")
    if not os.path.exists("/dev/fuse"):
        raise errors.ConfigurationError("/dev/fuse is missing: load the fuse module")
    try:
        privatedirectory.make(state_dir)
        (state_dir / "maps").mkdir(mode=0o700, exist_ok=True)
    except OSError as exc:
        raise errors.ConfigurationError(f"state directory {state_dir}: {exc.strerror}") from exc


def _write(path: Path, data: bytes) -> None:
    try:
        write_atomically(path, data)
    except OSError as exc:
        raise errors.ConfigurationError(f"cannot write {path}: {exc.strerror}") from exc


def _log_tail(path: Path) -> str:
    try:
        return path.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")
    except OSError:
        return "no log was written"
