"""A command run in a child of ours, watched until it is ready: a line that it prints, an address that
answers, a time, or its end.

Called by `tracing` and `startup.timeline`, on the main thread. What the child prints goes to our standard
error, since our standard output is for results, unless the caller wants to hear it; it is read, and the child
given pipes, only where somebody does. The child dies with us.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import selectors
import signal
import socket
import ssl
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import NoReturn

from glowplug.until import Until
from imagefs import errors, syscalls
from imagefs.fuse import controlmessage

_POLL_SECONDS = 0.05
_ANSWER_SECONDS = 2.0
_END_SECONDS = 10.0
_MAX_LINE_BYTES = 64 * 1024
_READ_BYTES = 64 * 1024


class Child:
    """The child process. `wait` once, then `end`. `exit_code` is there when it has ended. `output` is told
    what the child prints, as it comes.

    The thread that asks an address closes its end of a pipe when that answers: one selector sees it all."""

    def __init__(
        self, work: Callable[[], int], until: Until, output: Callable[[bytes], None] | None = None
    ) -> None:
        self.exit_code: int | None = None
        self._until = until
        self._output = output or _to_stderr
        self._tails: dict[int, bytes] = {}
        self._selector = selectors.DefaultSelector()
        self._done = threading.Event()
        pipes = [os.pipe2(os.O_CLOEXEC) for _ in range(2)] if until.log or output else []
        self._failure, failures = os.pipe2(os.O_CLOEXEC)
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            _become(work, [writer for _, writer in pipes], failures)
        os.close(failures)
        for reader, writer in pipes:
            os.close(writer)
            os.set_blocking(reader, False)
            self._selector.register(reader, selectors.EVENT_READ)
        self._pidfd = os.pidfd_open(self._pid)
        self._selector.register(self._pidfd, selectors.EVENT_READ)
        self._answered = -1
        if until.address is not None:
            self._answered, answers = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            self._selector.register(self._answered, selectors.EVENT_READ)
            ask = (until.address, until.network, answers)
            threading.Thread(target=self._ask, args=ask, daemon=True).start()

    @property
    def pid(self) -> int:
        """Its process id, its own until `exit_code` is there."""
        return self._pid

    def wait(self) -> bool:
        """Until it is ready; False when it ended first."""
        seconds = self._until.seconds
        return self._watch(None if seconds is None else time.monotonic() + seconds)

    def end(self) -> None:
        """Have it end, with SIGTERM, and by force if that does not help."""
        self._done.set()
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.exit_code is None:
                os.kill(self._pid, number)
                self._until = Until()
                self._watch(time.monotonic() + _END_SECONDS)

    def raise_failure(self) -> None:
        """Raise what went wrong before there was a command."""
        os.set_blocking(self._failure, False)
        with contextlib.suppress(BlockingIOError):
            if said := os.read(self._failure, _READ_BYTES):
                raise controlmessage.decode_error(json.loads(said))

    def close(self) -> None:
        """Give everything back; the child is killed if it still runs."""
        self._done.set()
        if self.exit_code is None:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        for fd in [*self._open(), self._failure]:
            os.close(fd)
        self._selector.close()

    def _watch(self, deadline: float | None) -> bool:
        """Pass output on. True at what is waited for or the deadline, False at the child's end."""
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return True
            found = False
            for key, _ in self._selector.select(left):
                if key.fd == self._pidfd:
                    self.exit_code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
                    self._forget(key.fd)
                elif key.fd == self._answered:
                    self._forget(key.fd)
                    found = True
                else:
                    found = self._pass_on(key.fd) or found
            if self.exit_code is not None:  # what it printed last may still be on its way
                return any([self._pass_on(fd) for fd in self._open()] + [found])
            if found:
                return True

    def _pass_on(self, fd: int) -> bool:
        """What the child wrote, up to now; whether the line that is waited for ended in it."""
        found = False
        while True:
            try:
                data = os.read(fd, _READ_BYTES)
            except BlockingIOError:
                return found
            if not data:
                self._forget(fd)
                return found or self._matches(self._tails.pop(fd, b""))
            self._output(data)
            *lines, tail = (self._tails.get(fd, b"") + data).split(b"\n")
            self._tails[fd] = tail[-_MAX_LINE_BYTES:]
            found = found or any(map(self._matches, lines))

    def _matches(self, line: bytes) -> bool:
        pattern = self._until.log
        return pattern is not None and pattern.search(line.removesuffix(b"\r")) is not None

    def _open(self) -> list[int]:
        return [key.fd for key in self._selector.get_map().values()]

    def _forget(self, fd: int) -> None:
        self._selector.unregister(fd)
        os.close(fd)

    def _ask(self, address: str, network: str | None, answers: int) -> None:
        if network is not None:
            syscalls.enter_network(network)
        while not self._done.is_set() and not answers_now(address):
            self._done.wait(_POLL_SECONDS)
        os.close(answers)


@contextlib.contextmanager
def child(
    work: Callable[[], int], until: Until, output: Callable[[bytes], None] | None = None
) -> Iterator[Child]:
    """A child that runs `work` and ends with its result, gone when the block is left."""
    started = Child(work, until, output)
    try:
        yield started
    finally:
        started.close()


def answers_now(address: str) -> bool:
    """Whether an address of `until.check_address` answers, asked once."""
    if not address.startswith("http"):
        host, _, port = address.rpartition(":")
        try:
            place = (host.strip("[]") or "127.0.0.1", int(port))
            socket.create_connection(place, _ANSWER_SECONDS).close()
        except OSError:
            return False
        return True
    # Nothing is sent and nothing believed: whose certificate it is says nothing about a start.
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    try:
        with opener.open(address, timeout=_ANSWER_SECONDS) as response:
            return 200 <= int(response.status) < 300
    except (OSError, ValueError, http.client.HTTPException):  # it may say anything at first
        return False


def _become(work: Callable[[], int], output: list[int], failures: int) -> NoReturn:
    """In the child: do the work, and never return."""
    code = 1
    try:
        syscalls.set_parent_death_signal(signal.SIGKILL)
        for target, fd in enumerate(output or [2], start=1):
            os.dup2(fd, target)
        code = work()
    except errors.ImagefsError as exc:
        _say(failures, exc)
    except BaseException as exc:
        _say(failures, errors.ConfigurationError(f"the command could not be run: {exc!r}"))
    finally:
        os._exit(code)


def _to_stderr(data: bytes) -> None:
    with contextlib.suppress(OSError):  # nobody may be listening any more
        view = memoryview(data)
        while view:
            view = view[os.write(2, view) :]


def _say(failures: int, error: errors.ImagefsError) -> None:
    with contextlib.suppress(OSError):
        os.write(failures, json.dumps(controlmessage.encode_error(error)).encode())
