"""Namespaces for `glowplug run`: a process inside an assembled root, with a small init above it.

    glowplug run            own mount namespace: layers, overlay; waits, forwards signals, cleans up
      init  (pid 1 inside)  own pid, ipc, uts and mount namespace; pivot_root; reaps, forwards signals
        CMD

It isolates what a container's filesystem and process tree need; it is no security boundary: the network is
the host's and root is root. When `glowplug run` dies, however it dies, the kernel kills init, with it
everything inside, and with the last process go the namespaces and every mount in them.

Signals: both ancestors block them and pick them up one by one. What the terminal sends (^C, a new window
size) reached CMD already, because it is in the same foreground group; only what a process sent is passed on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from glowplug import process
from imagefs import errors, syscalls

NOT_EXECUTABLE = 126
NOT_FOUND = 127
_FORWARDED = frozenset(
    {
        signal.SIGHUP,
        signal.SIGINT,
        signal.SIGQUIT,
        signal.SIGTERM,
        signal.SIGUSR1,
        signal.SIGUSR2,
        signal.SIGALRM,
        signal.SIGWINCH,
    }
)
_WAITED = _FORWARDED | {signal.SIGCHLD}
_SENT_BY_KERNEL = 0x80
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_DEVICE_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
}
_HOST_FILES = ("/etc/resolv.conf", "/etc/hosts")
_QUIET = syscalls.MS_NOSUID | syscalls.MS_NOEXEC | syscalls.MS_NODEV
_MAX_FDS = 1 << 20
_MAX_ACCOUNT_FILE_BYTES = 4 * 1024 * 1024


def enter_private_mounts() -> None:
    """Give this thread a mount namespace whose mounts the host never sees, while unmounts there still reach
    it. Threads that it starts afterwards are in it too."""
    try:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_SLAVE)
    except OSError as exc:
        raise errors.ConfigurationError(f"no mount namespace: {exc.strerror}; `run` needs root") from exc


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Keep the forwarded signals pending, so that neither waiting nor cleaning up is torn apart by one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run(root: Path, spec: process.Process) -> int:
    """Run `spec` with `root` (a mount point in a private namespace) as its root directory. Returns its exit
    code, 128 + n when signal n ended it, 127 when there is no such command, 126 when it cannot be run.
    Call within `signals_held`; afterwards this process cannot start threads any more."""
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        syscalls.unshare(syscalls.CLONE_NEWPID | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS)
    except OSError as exc:
        raise errors.ConfigurationError(f"no pid namespace: {exc.strerror}; `run` needs root") from exc
    init = os.fork()
    if init == 0:
        try:
            os.close(reader)
            _init(root, spec, writer)
        finally:
            # A copy of our parent's stack must never unwind: its clean-up is the parent's.
            os._exit(1)
    os.close(writer)
    with open(reader, "rb") as pipe:
        failure = pipe.read()
    code = _wait_forwarding(init)
    if failure:
        raise errors.ConfigurationError(failure.decode(errors="replace"))
    return code


def _wait_forwarding(child: int) -> int:
    """Wait for `child`, reaping whatever else ends, passing signals on to it. Its exit code."""
    code: int | None = None
    while code is None:
        received = signal.sigwaitinfo(_WAITED)
        if received.si_signo != signal.SIGCHLD:
            if received.si_code != _SENT_BY_KERNEL:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, received.si_signo)
            continue
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == child:
                    code = os.waitstatus_to_exitcode(ended[1])
    return code if code >= 0 else 128 - code


def _init(root: Path, spec: process.Process, failures: int) -> NoReturn:
    """Pid 1: build the inside, start the command, reap. Never returns."""
    try:
        syscalls.set_parent_death_signal(signal.SIGKILL)
        syscalls.unshare(syscalls.CLONE_NEWNS)
        _enter_root(root)
        identity = process.resolve_user(spec.user, _account_file("/etc/passwd"), _account_file("/etc/group"))
        os.makedirs(spec.directory, exist_ok=True)
    except BaseException as exc:
        where = f" ({exc.filename})" if isinstance(exc, OSError) and exc.filename else ""
        text = exc.strerror if isinstance(exc, OSError) else str(exc)
        _say(failures, f"cannot set up the container{where}: {text}")
        os._exit(1)
    os.close(failures)
    command = os.fork()
    if command == 0:
        _exec(spec, identity)
    # What the command leaves open must not be kept open by us.
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os._exit(_wait_forwarding(command))


def _exec(spec: process.Process, identity: process.Identity) -> NoReturn:
    code = NOT_EXECUTABLE
    try:
        for number in _WAITED | {signal.SIGPIPE}:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.closerange(3, _MAX_FDS)
        os.umask(0o022)
        os.setgroups(identity.groups)
        os.setgid(identity.gid)
        os.setuid(identity.uid)
        os.chdir(spec.directory)
        environment = {"HOME": identity.home or "/", **spec.environment}
        os.execvpe(spec.argv[0], spec.argv, environment)  # noqa: S606
    except FileNotFoundError as exc:
        code = NOT_FOUND
        _say(2, f"glowplug: {spec.argv[0]}: {exc.strerror}\n")
    except (OSError, ValueError) as exc:
        _say(2, f"glowplug: {spec.argv[0]}: {getattr(exc, 'strerror', exc)}\n")
    finally:
        os._exit(code)


def _say(fd: int, text: str) -> None:
    """Names come from the image and the command line and need not be text; nobody may be listening."""
    with contextlib.suppress(OSError):
        os.write(fd, text.encode(errors="backslashreplace"))


def _enter_root(root: Path) -> None:
    """pivot_root, and what a container has on top of its image. The host's files come along as mounts that
    are attached nowhere, and the host's root is gone before the first path is looked up: while it is still
    stacked on the new one, ".." leads into it, in the image's symbolic links, too."""
    devices = {name: syscalls.open_tree(f"/dev/{name}") for name in _DEVICES}
    files = {name: syscalls.open_tree(name) for name in _HOST_FILES if os.path.exists(name)}
    os.chdir(root)
    syscalls.pivot_root(".", ".")
    syscalls.umount(".", syscalls.MNT_DETACH)
    os.chdir("/")
    for name in ("/proc", "/sys", "/dev"):
        os.makedirs(name, exist_ok=True)
    syscalls.mount("proc", "/proc", "proc", _QUIET)
    syscalls.mount("sysfs", "/sys", "sysfs", _QUIET | syscalls.MS_RDONLY)
    _fill_dev(devices)
    for name, tree in files.items():
        _attach_file(tree, name)
        syscalls.mount(
            "none", name, None, syscalls.MS_BIND | syscalls.MS_REMOUNT | syscalls.MS_RDONLY | _QUIET
        )
    for tree in (*devices.values(), *files.values()):
        os.close(tree)


def _fill_dev(devices: dict[str, int]) -> None:
    syscalls.mount("tmpfs", "/dev", "tmpfs", syscalls.MS_NOSUID, "mode=755,size=64k")
    for name, tree in devices.items():
        _attach_file(tree, f"/dev/{name}")
    for name, target in _DEVICE_LINKS.items():
        os.symlink(target, f"/dev/{name}")
    for name in ("pts", "shm"):
        os.mkdir(f"/dev/{name}")
    syscalls.mount(
        "devpts",
        "/dev/pts",
        "devpts",
        syscalls.MS_NOSUID | syscalls.MS_NOEXEC,
        "newinstance,ptmxmode=0666,mode=620,gid=5",
    )
    syscalls.mount("shm", "/dev/shm", "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "mode=1777")  # noqa: S108


def _attach_file(tree: int, target: str) -> None:
    """Lay a host file over `target`, which is made if the image has none or a link to nothing."""
    if not os.path.exists(target):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(target)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    syscalls.move_mount(tree, target)


def _account_file(name: str) -> bytes:
    """A file of the image, if it is there and a file: it is the image's, it may be anything."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return b""
    with open(fd, "rb") as file:
        return file.read(_MAX_ACCOUNT_FILE_BYTES) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
