"""The device server's registration with the keeper. Holds what the keeper holds, so that it can be replaced.

Made by server.py as it starts; `watch` runs on its main thread until the server is to end, the rest may be
called from any thread.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imagefs import errors, unixsocket
from imagefs.fuse import controlmessage

_KEEPER_RETRY_SECONDS = 1.0
_KEEPER_START_SECONDS = 20.0


class KeeperLink:
    """See the module. `log` takes a line."""

    def __init__(self, state_dir: Path, log: Callable[[str], None]) -> None:
        self._state_dir = state_dir
        self._log = log
        # The keeper waits for the end of this pipe: every worker holds the write end as well.
        self._liveness, self.lifeline = os.pipe2(os.O_CLOEXEC)
        self.clones: list[int] = []
        self.token = ""
        self.resend = False
        self.keepers_replaced = 0
        self._restarts = False
        self._stopping = False
        self._successor: str | None = None
        self._succeeded: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._socket = self._register()

    def say_ready(self) -> None:
        """The control socket takes requests."""
        self._send({"op": "ready"})

    def stop(self) -> None:
        """Have the keeper unmount and end; `watch` returns. May be called again."""
        with self._lock:
            if not self._stopping:
                self._stopping = True
                self._send({"op": "stop"})

    def replace_keeper(self, python: str) -> None:
        """Have a keeper that this interpreter runs take the place of ours. ConfigurationError if it does not
        come up; then one like ours is there again. `watch` does the work."""
        with self._lock:
            if self._stopping:
                raise controlmessage.StoppingError("the device server is stopping")
            self._successor = python
            self._send({"op": "leave"})
            try:
                error = self._succeeded.get(timeout=2 * _KEEPER_START_SECONDS)
            except queue.Empty:
                self._successor = None
                error = TimeoutError("the keeper that runs was being replaced just then")
        if error is not None:
            raise errors.ConfigurationError(f"no keeper of {python} comes up, nothing was changed: {error}")

    def watch(self) -> None:
        """Until the keeper says goodbye. One that was killed, or left, is replaced."""
        while True:
            try:
                data = self._socket.recv(4096)
            except OSError:  # broken; or closed, when the last attempt to replace a keeper failed
                data = b""
            if self._stopping or (data and json.loads(data).get("op") == "bye"):
                return
            if not data:
                self._keeper_gone()

    def _keeper_gone(self) -> None:
        """Start another: the one that is to succeed it, or one like ours."""
        successor, self._successor = self._successor, None
        self._log("the keeper is gone: starting another")
        error = self._start_keeper(successor) if successor is not None else None
        if successor is None or error is not None:
            while self._start_keeper(sys.executable) is not None and not self._stopping:
                time.sleep(_KEEPER_RETRY_SECONDS)
        if successor is not None:
            self._succeeded.put(error)

    def _send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self._socket.send(json.dumps(message).encode())

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        unixsocket.connect(connection, self._state_dir / "keeper.sock")
        return connection

    def _register(self) -> socket.socket:
        connection = self._connect()
        rights = array.array("i", [self._liveness])
        connection.sendmsg(
            [json.dumps({"op": "register"}).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
        )
        fds = array.array("i")
        data, ancillary, _, _ = connection.recvmsg(4096, socket.CMSG_SPACE(253 * fds.itemsize))
        for _, _, payload in ancillary:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        answer = json.loads(data) if data else {"error": "the keeper went away"}
        if "error" in answer:
            raise errors.ConfigurationError(f"{self._state_dir}: {answer['error']}")
        self.token = str(answer["token"])
        self.resend = bool(answer["resend"])
        self._restarts = bool(answer["restarts"])
        self.clones = list(fds)
        return connection

    def _start_keeper(self, python: str) -> Exception | None:
        """Returns why it could not. Until it can, we go on without: the mount is served, and our own death
        would end it."""
        try:
            self._adopt(python)
        except (OSError, subprocess.SubprocessError) as exc:
            self._log(f"cannot, and go on without: {exc}")
            return exc
        self.keepers_replaced += 1
        return None

    def _adopt(self, python: str) -> None:
        left = {
            "token": self.token,
            "resend": self.resend,
            "liveness": self._liveness,
            "clones": self.clones,
        }
        ready, ready_writer = os.pipe2(os.O_CLOEXEC)
        command = [python, "-m", "imagefs.fuse.keeper", "--state", os.fspath(self._state_dir)]
        command += ["--adopt", json.dumps(left), "--ready-fd", str(ready_writer)]
        if self._restarts:
            command.append("--start-server")
        with open(ready, "rb") as pipe:
            try:
                subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    pass_fds=[self._liveness, *self.clones, ready_writer],
                    timeout=_KEEPER_START_SECONDS,
                    check=True,
                )
            finally:
                os.close(ready_writer)
            pipe.read(1)  # it listens
        gone, self._socket = self._socket, self._connect()
        gone.close()
        self._send({"op": "rejoin"})
