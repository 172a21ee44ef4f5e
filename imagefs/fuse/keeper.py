"""The keeper: owns the FUSE mount of one state directory and every descriptor of it, so that servers may die.

A process of its own, single-threaded, few imports, nothing that could fail once it runs:
`python -m imagefs.fuse.keeper --state DIR --clones N [--start-server] [--ready-fd FD] [--adopt ...]`.
control.py starts it (with --start-server), or systemd does, which then starts the server itself; a server
whose keeper was killed, or leaves to make room for one of another version, starts one with --adopt, handing
it the clones.

It mounts STATE/devices, answers the kernel's INIT, makes the clones (one per worker) and hands them to each
server that registers at STATE/keeper.sock. The kernel aborts a connection only when its last descriptor
closes, and gives up the requests of one descriptor when that one closes: while the keeper lives, neither
happens, whoever else is killed, and requests wait for the next server.

Invariants:
* One keeper per state directory: it holds a lock on STATE/keeper.lock as long as it lives.
* A new server is started only when every process of the old one is gone. A server registers the read end of a
  pipe whose write end it and its workers hold; end of file on it says so. A straggler could otherwise take a
  request with it after the successor had asked the kernel to queue them again.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import errno
import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

from imagefs import syscalls
from imagefs.fuse import protocol, statedirectory

_IOC_CLONE = 0x8004E500
"""FUSE_DEV_IOC_CLONE, _IOR(229, 0, uint32_t)."""
_READ_AHEAD_KIB = 2 * protocol.MAX_READ_BYTES >> 10
"""The kernel's default, 128 KiB, would make eight requests of what can be one; two in flight keep both the
reader and a worker busy."""
_HOUSEKEEPING_SECONDS = 60.0
_INIT_SECONDS = 10.0
_STRAGGLER_SECONDS = 10.0
_LONGEST_BACKOFF_SECONDS = 5.0
_STEADY_SECONDS = 10.0
"""A server that lived this long did not fail at its start: the next one starts without delay."""
_MESSAGE_BYTES = 4096
_ACCEPT_PAUSE_SECONDS = 0.1
_LOCK_TRIES = 50


class Keeper:
    """The loop's state."""

    def __init__(self, state_dir: Path, *, start_server: bool, ready_fd: int | None) -> None:
        self._state_dir = state_dir
        self._mount_point = statedirectory.device_directory(state_dir)
        self._start_server = start_server
        self._ready_fd = ready_fd
        self._token = os.urandom(16).hex()
        self._resend = True
        self._clones: list[int] = []
        self._master = -1
        self._listener = statedirectory.listen(state_dir / "keeper.sock", socket.SOCK_SEQPACKET)
        self._poll = select.poll()
        self._poll.register(self._listener, select.POLLIN)
        self._connections: dict[int, socket.socket] = {}
        self._liveness: int | None = None  # read end of the registered server's pipe
        self._started_at = time.monotonic()
        self._child: subprocess.Popen[bytes] | None = None
        self._child_fd = -1
        self._failures = 0
        self._start_at: float | None = None
        self._straggler_deadline: float | None = None
        self._running = True

    # -- the mount ---------------------------------------------------------------------------------

    def mount(self, clones: int) -> None:
        """Mount, after clearing away what a dead keeper left, and make the clones."""
        for _ in statedirectory.mounted(self._mount_point):
            log("unmounting what a dead keeper left")
            syscalls.umount(self._mount_point, syscalls.MNT_DETACH)
        self._mount_point.mkdir(mode=0o700, exist_ok=True)
        self._master = _open_device()
        syscalls.mount(
            "glowplug",
            self._mount_point,
            "fuse.glowplug",
            syscalls.MS_RDONLY | syscalls.MS_NOSUID | syscalls.MS_NODEV,
            f"fd={self._master},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other,"
            f"max_read={protocol.MAX_READ_BYTES}",
        )
        self._greet()
        for device in statedirectory.mounted(self._mount_point):
            with contextlib.suppress(OSError):  # /sys may be read-only in a container: slower, not wrong
                Path(f"/sys/class/bdi/{device}/read_ahead_kb").write_text(str(_READ_AHEAD_KIB))
        for _ in range(clones):
            clone = _open_device()
            fcntl.ioctl(clone, _IOC_CLONE, struct.pack("=I", self._master))
            self._clones.append(clone)

    def adopt(self, token: str, liveness: int, clones: list[int], *, resend: bool) -> None:
        """Take over the clones, and the mount behind them, of a keeper that was killed, and its server: from
        now on, not from when that comes to say hello, because it may be killed before."""
        for fd in (liveness, *clones):
            os.set_inheritable(fd, False)
        self._token = token
        self._clones = clones
        self._resend = resend
        self._watch(liveness)
        self._say_ready()

    def _greet(self) -> None:
        """Answer INIT: nothing else comes before it."""
        poll = select.poll()
        poll.register(self._master, select.POLLIN)
        if not poll.poll(_INIT_SECONDS * 1000):
            raise TimeoutError(f"the kernel sent no INIT within {_INIT_SECONDS} s of the mount")
        request = protocol.decode(os.read(self._master, protocol.REQUEST_BUFFER_BYTES))
        if not isinstance(request, protocol.Init):
            raise OSError(errno.EPROTO, f"the kernel's first message is not INIT: {request}")
        os.write(self._master, protocol.init_reply(request))
        self._resend = bool(request.flags & protocol.HAS_RESEND)
        if not self._resend:
            log(
                "this kernel cannot queue requests again (Linux 6.9): reads under way when a server dies fail"
            )

    # -- the loop ----------------------------------------------------------------------------------

    def run(self) -> None:
        """Until a clean stop."""
        wake, wake_writer = socket.socketpair()
        wake_writer.setblocking(False)
        signal.set_wakeup_fd(wake_writer.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._poll.register(wake, select.POLLIN)
        while self._running:
            for fd, _ in self._poll.poll(self._timeout_seconds() * 1000):
                if fd == wake.fileno():
                    self.stop()
                elif fd == self._listener.fileno():
                    self._accept()
                elif fd in self._connections:
                    self._serve(self._connections[fd])
                elif fd == self._liveness:
                    self._generation_ended()
                elif self._child is not None and fd == self._child_fd:
                    self._child_ended()
            self._tick(time.monotonic())

    def spawn_server(self) -> None:
        """Start a server; it registers by itself."""
        self._start_at = None
        self._started_at = time.monotonic()
        self._child = subprocess.Popen(
            [sys.executable, "-m", "imagefs.fuse.server", "--state", os.fspath(self._state_dir)],
            stdin=subprocess.DEVNULL,
        )
        self._child_fd = os.pidfd_open(self._child.pid)
        self._poll.register(self._child_fd, select.POLLIN)

    def stop(self) -> None:
        """Unmount and say goodbye. Lazily: a mount that still uses a device gets errors from then on."""
        for _ in statedirectory.mounted(self._mount_point):
            with contextlib.suppress(OSError):
                syscalls.umount(self._mount_point, syscalls.MNT_DETACH)
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.send(json.dumps({"op": "bye"}).encode(), socket.MSG_DONTWAIT)
        for name in ("keeper.sock", "control.sock"):
            (self._state_dir / name).unlink(missing_ok=True)
        self._running = False

    def _timeout_seconds(self) -> float:
        now = time.monotonic()
        ends = [at for at in (self._start_at, self._straggler_deadline) if at is not None]
        return max(0.0, min([at - now for at in ends] + [_HOUSEKEEPING_SECONDS]))

    def _tick(self, now: float) -> None:
        if self._running and self._start_at is not None and now >= self._start_at:
            self.spawn_server()
        if self._straggler_deadline is not None and now >= self._straggler_deadline:
            log("workers of a dead server are still there: starting the next one all the same")
            self._generation_ended()
        statedirectory.bound_log(self._state_dir / "server.log")

    # -- servers -----------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as exc:
            log(f"cannot accept: {exc}")
            time.sleep(_ACCEPT_PAUSE_SECONDS)  # no descriptor left: the loop would come back at once
            return
        if not statedirectory.same_user(connection):
            connection.close()
            return
        self._connections[connection.fileno()] = connection
        self._poll.register(connection, select.POLLIN)

    def _serve(self, connection: socket.socket) -> None:
        fds = array.array("i")
        try:
            data, ancillary, _, _ = connection.recvmsg(_MESSAGE_BYTES, socket.CMSG_SPACE(fds.itemsize))
        except ConnectionError:
            data, ancillary = b"", []
        for _, _, payload in ancillary:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        if not data:
            self._poll.unregister(connection)
            del self._connections[connection.fileno()]
            connection.close()
            return
        try:
            operation = json.loads(data).get("op")
        except (ValueError, AttributeError):
            log(f"a message of {len(data)} bytes that is none of ours")
            operation = None
        if operation == "register" and len(fds) == 1:
            self._register(connection, fds[0])
        elif operation == "rejoin":
            return  # an adopted server; all that it needs is this connection
        elif operation == "ready":
            self._say_ready()
        elif operation == "stop":
            self.stop()
        elif operation == "leave":
            log("leaving: another keeper takes over")
            self._running = False  # the server holds all that we hold, and our sockets are the next one's

    def _register(self, connection: socket.socket, liveness: int) -> None:
        if self._liveness is not None:
            os.close(liveness)
            _send(connection, {"error": "another server is registered with this keeper"}, [])
            return
        self._liveness = liveness
        self._poll.register(liveness, select.POLLIN)
        _send(
            connection,
            {"token": self._token, "resend": self._resend, "restarts": self._start_server},
            self._clones,
        )

    def _watch(self, liveness: int) -> None:
        self._liveness = liveness
        self._poll.register(liveness, select.POLLIN)

    def _say_ready(self) -> None:
        if self._ready_fd is not None:
            with contextlib.suppress(BrokenPipeError):
                os.write(self._ready_fd, b"ready\n")
            os.close(self._ready_fd)
            self._ready_fd = None

    def _child_ended(self) -> None:
        assert self._child is not None
        status = self._child.wait()
        log(f"server {self._child.pid} ended with status {status}")
        self._poll.unregister(self._child_fd)
        os.close(self._child_fd)
        self._child = None
        if self._liveness is None:
            self._next_server()
        else:
            self._straggler_deadline = time.monotonic() + _STRAGGLER_SECONDS

    def _generation_ended(self) -> None:
        """Every process of the registered server is gone (or was waited for long enough)."""
        assert self._liveness is not None
        self._straggler_deadline = None
        self._poll.unregister(self._liveness)
        os.close(self._liveness)
        self._liveness = None
        if self._child is None:
            self._next_server()

    def _next_server(self) -> None:
        if self._ready_fd is not None:
            log("the first server never became ready: giving up")
            self.stop()
        elif self._start_server and self._running:
            steady = time.monotonic() - self._started_at >= _STEADY_SECONDS
            self._failures = 0 if steady else self._failures + 1
            delay = 0.0 if self._failures <= 1 else min(0.05 * 2**self._failures, _LONGEST_BACKOFF_SECONDS)
            self._start_at = time.monotonic() + delay


def log(message: str) -> None:
    """One line to the log."""
    with contextlib.suppress(OSError):  # a full disk must not end whoever speaks
        print(f"glowplug keeper {os.getpid()}: {message}", file=sys.stderr, flush=True)


def _open_device() -> int:
    return os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)


def _send(connection: socket.socket, message: dict[str, object], fds: list[int]) -> None:
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    with contextlib.suppress(OSError):  # it died meanwhile; its pipe says so
        connection.sendmsg([json.dumps(message).encode()], ancillary)


def _detach_from_starter(state_dir: Path) -> None:
    """Become a daemon: the starter waits for our parent only, and our output goes to the log."""
    if os.fork():
        os._exit(0)
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDONLY)
    out = os.open(state_dir / "server.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(null, 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(null)
    os.close(out)


def _lock(path: Path) -> bool:
    """Take the keeper's lock for the life of this process. Clients that look whether a keeper lives hold a
    shared lock for a moment: hence more than one try."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    for _ in range(_LOCK_TRIES):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.01)
    return False


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="glowplug-keeper", description="Holds the FUSE mount of STATE.")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--clones", type=int, default=2, help="workers that a server may have")
    parser.add_argument("--start-server", action="store_true", help="start the server, again when it dies")
    parser.add_argument("--ready-fd", type=int, help="become a daemon; write a line here when serving")
    parser.add_argument("--adopt", help="JSON: what a keeper that was killed had")
    arguments = parser.parse_args()
    if not _lock(arguments.state / "keeper.lock"):
        sys.exit("glowplug keeper: this state directory has one already")
    if arguments.ready_fd is not None:
        os.set_inheritable(arguments.ready_fd, False)
        _detach_from_starter(arguments.state)
    keeper = Keeper(arguments.state, start_server=arguments.start_server, ready_fd=arguments.ready_fd)
    if arguments.adopt:
        left = json.loads(arguments.adopt)
        keeper.adopt(left["token"], left["liveness"], left["clones"], resend=left["resend"])
    else:
        if arguments.start_server:
            keeper.spawn_server()  # it starts while we mount
        try:
            keeper.mount(arguments.clones)
        except OSError as exc:
            log(f"cannot mount {statedirectory.device_directory(arguments.state)}: {exc}")
            keeper.stop()
            sys.exit(1)
    keeper.run()


if __name__ == "__main__":
    main()
