"""The engine as a child process: started in a session of its own, its output read line by line, ended whole.

Owned by the supervisor, on its event loop. The group is what is killed: engines have children, and one that
hangs must not leave them behind with the port and the accelerator. The supervisor is their subreaper, so that
it can wait until the last of them is gone, before the next start wants their memory. When the supervisor
itself is killed the kernel kills the child (PR_SET_PDEATHSIG), and a guard what the child has started: vLLM's
engine core notices nothing, keeps its memory, and has written its title over the environment by which
`detached` would find it.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

from serving import errors

_TAIL_LINES = 40
_LINE_BYTES = 1 << 16
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_AFTER_KILL_SECONDS = 20.0
_LAST_LINES_SECONDS = 1.0
_REAP_SECONDS = 0.02

_GUARD = (sys.executable, "-I", "-S", "-c", "import os, sys; os.read(0, 1); os.killpg(int(sys.argv[1]), 9)")
"""Reads from a pipe of the supervisor's, which ends when that does. By Python, because an image need not have
a shell."""

_libc = ctypes.CDLL(None, use_errno=True)


class Child:
    """One run of the engine."""

    def __init__(self, process: asyncio.subprocess.Process, on_line: Callable[[str], None]) -> None:
        self._process = process
        self._guard = subprocess.Popen(
            [*_GUARD, str(process.pid)],
            env={},  # nor is it found by ours, and ended before it has done its work
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._tail: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
        self._ended = False
        self._reading = asyncio.create_task(self._read(on_line))

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        environment: Mapping[str, str],
        on_line: Callable[[str], None],
    ) -> Child:
        """ConfigurationError where the program cannot be started."""
        parent = os.getpid()
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)

        def die_with_parent() -> None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
                limit=_LINE_BYTES,
            )
        except OSError as exc:
            raise errors.ConfigurationError(f"engine: {command[0]}: {exc.strerror or exc}") from exc
        return cls(process, on_line)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    async def wait(self) -> int:
        """Its exit status, negative for a signal."""
        return await self._process.wait()

    async def why(self) -> str:
        """How it ended, with the last lines that it wrote."""
        if not self.running:
            # They may be in the pipe still. A grandchild may hold that open: it is not waited for.
            await asyncio.wait({self._reading}, timeout=_LAST_LINES_SECONDS)
        status = self._process.returncode
        if status is None:
            how = "the engine was killed"
        elif status < 0:
            how = f"the engine was ended by {signal.Signals(-status).name}"
        else:
            how = f"the engine exited with status {status}"
        return "\n".join([how, *list(self._tail)[-10:]])

    async def end(self, grace_seconds: float) -> None:
        """SIGTERM, and SIGKILL for whatever is left of the group after that time. Again is no harm."""
        if self._ended:
            return
        self._ended = True
        if self.running and grace_seconds > 0:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), grace_seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):  # stuck in the kernel: the next start says what is missing
            async with asyncio.timeout(_AFTER_KILL_SECONDS):
                await self._process.wait()
                await self._all_gone()
        self._guard.kill()
        self._guard.communicate()
        # A grandchild that left the group may hold the pipe: what it says is not waited for.
        self._reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reading

    async def _all_gone(self) -> None:
        """The group's other processes are ours to reap, once their parent is gone."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, _ = os.waitpid(-self._process.pid, os.WNOHANG)
                if pid == 0:
                    await asyncio.sleep(_REAP_SECONDS)

    async def _read(self, on_line: Callable[[str], None]) -> None:
        assert self._process.stdout is not None
        while True:
            try:
                raw = await self._process.stdout.readuntil(b"\n")
            except asyncio.IncompleteReadError as exc:
                raw = exc.partial
                if not raw:
                    return
            except asyncio.LimitOverrunError as exc:  # a progress bar without an end
                raw = await self._process.stdout.read(max(1, exc.consumed))
            sys.stderr.buffer.write(raw)
            sys.stderr.buffer.flush()
            line = raw.decode("utf-8", "replace").rstrip()
            if line:
                self._tail.append(line)
                on_line(line)
