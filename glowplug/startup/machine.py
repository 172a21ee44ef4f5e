"""This machine as the measurements see it: its facts, its page cache, the programs that we start on it.

Called by everything that measures starts, here and in e2e/. Every process that is started here is ended
here, by its process id.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import signal
import subprocess
import tempfile
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from glowplug import interrupts
from imagefs import errors

_START_SECONDS = 30.0
_PACKAGES = {
    "containerd": "containerd",
    "ctr": "containerd",
    "docker-registry": "docker-registry",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "runc": "runc",
    "skopeo": "skopeo",
    "tc": "iproute2",
    "umount": "mount",
}
"""Which Debian package has a program that measurements start."""


class CommandError(errors.ConfigurationError):
    """A program that we started failed; the message holds its last output."""


def facts() -> dict[str, str | int]:
    """What a reader of a result must know about where it was measured."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    models = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ]
    return {
        "kernel": platform.release(),
        "cpu": models[0].partition(":")[2].strip() if models else platform.machine(),
        "cores": os.cpu_count() or 1,
        "memory_gib": round(memory_bytes / 2**30),
        "python": platform.python_version(),
    }


def need(programs: Sequence[str]) -> None:
    """Raise ConfigurationError naming the Debian packages of those that are not installed."""
    missing = sorted({_PACKAGES[name] for name in programs if shutil.which(name) is None})
    if missing:
        raise errors.ConfigurationError(f"not installed: as root, apt-get install {' '.join(missing)}")


def drop_page_cache() -> None:
    """Forget cached file data, names and inodes, so that the next read is a cold one."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def check_call(command: Sequence[str], *, allow: tuple[int, ...] = (0,)) -> str:
    """Run to the end and return stdout. Raises CommandError with the tail of what it said."""
    result = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
    if result.returncode not in allow:
        said = (result.stderr + result.stdout)[-2000:].strip()
        raise CommandError(f"{' '.join(command)[:300]}: exit status {result.returncode}\n{said}")
    return result.stdout


@contextlib.contextmanager
def daemon(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A program in the background, its output in `log`; ended on the way out, gently, then not."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=environment,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        end(process)


def await_log(process: subprocess.Popen[bytes], log: Path, pattern: str) -> re.Match[str]:
    """Where what a `daemon` has said first matches. Raises CommandError when it ends, or takes too long."""
    until = time.monotonic() + _START_SECONDS
    while True:
        ended = process.poll() is not None
        said = log.read_text(errors="replace")
        if match := re.search(pattern, said):
            return match
        if ended or time.monotonic() > until:
            raise CommandError(f"{log.stem} did not start\n{said[-2000:].strip()}")
        time.sleep(0.01)


def end(process: subprocess.Popen[bytes], patience_seconds: float = 10) -> None:
    """SIGTERM, and SIGKILL when that was not heard in time."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(patience_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM is an interrupt, as SIGINT is: what was opened with `with` is closed."""

    def interrupt(signum: int, frame: types.FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def closing_whole() -> Iterator[contextlib.ExitStack]:
    """A stack that is closed to the end, whatever signals come meanwhile. Main thread only."""
    stack = contextlib.ExitStack()
    try:
        yield stack
    finally:
        with interrupts.deferred():
            stack.close()


def unmount_below(folder: Path) -> None:
    """Unmount everything that is mounted at or below `folder`, the last mounted first."""
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        target = line.split()[4]
        if Path(target).is_relative_to(folder):
            check_call(["umount", "--lazy", target])


def timed(command: Sequence[str]) -> tuple[float, int]:
    """Run to the end: seconds, and the most resident bytes that it had at once."""
    with tempfile.TemporaryFile() as out:
        began = time.monotonic()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        try:
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.monotonic() - began
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            end(process)
        if process.returncode:
            out.seek(0)
            said = out.read()[-2000:].decode(errors="replace").strip()
            raise CommandError(f"{' '.join(command)}: exit status {process.returncode}\n{said}")
    return seconds, usage.ru_maxrss * 1024
