"""A host as `install` and `uninstall` see it: where its files are, its services, and a change that is undone.

Called by both, on the command's thread. `Change` is what makes either of them all or nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from agent import config, containerdconfig, containerdprobe, hostfiles
from imagefs import errors

KEEPER_UNIT = "glowplug-keeper.service"
AGENT_UNIT = "glowplug-agent.service"
CONTAINERD_UNIT = "containerd.service"
UNIT_DIRECTORY = Path("/etc/systemd/system")
CONTAINERD_CONFIG = Path("/etc/containerd/config.toml")
COPY_SUFFIX = ".before-glowplug"
UNIT_PROGRAM = "/opt/glowplug/current/bin/glowplug"
"""The program that the units name, where the bundle is; replaced by the one that installs."""

_NO_SYSTEMD = "without systemd, start the units' programs yourself and use --no-restart"
WAIT_SECONDS = 60.0
_POLL_SECONDS = 0.2


class Services(Protocol):
    """The host's service manager. ConfigurationError, with its words, when it cannot do it."""

    def __call__(self, *arguments: str) -> None:
        """Carry out a systemctl command."""


@dataclasses.dataclass(frozen=True, slots=True)
class Host:
    """Where things are. `prefix` stands before the paths of units and settings (for an image of a host, or
    a test); `settings_source` is the file to install as settings, None to keep those of the host, or its
    defaults. `program` is the glowplug command as the units shall name it."""

    program: Path
    containerd: Path
    containerd_config: Path = CONTAINERD_CONFIG
    settings_source: Path | None = None
    prefix: Path = Path("/")

    def place(self, path: Path) -> Path:
        return self.prefix / path.relative_to("/")

    @property
    def settings_file(self) -> Path:
        return self.place(config.DEFAULT_FILE)

    @property
    def drop_in(self) -> Path:
        return self.containerd_config.parent / containerdconfig.DROP_IN


class Systemctl:
    """The real service manager, or a `program` that takes the same words."""

    def __init__(self, program: str = "systemctl") -> None:
        self._program = program

    def __call__(self, *arguments: str) -> None:
        try:
            result = subprocess.run(
                [self._program, *arguments],
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                check=False,
            )
        except OSError as exc:
            raise errors.ConfigurationError(f"{self._program}: {exc.strerror}; {_NO_SYSTEMD}") from exc
        if result.returncode:
            said = (result.stderr or result.stdout).strip()[-1000:]
            if "not been booted with systemd" in said:
                raise errors.ConfigurationError(f"systemd does not run here; {_NO_SYSTEMD}")
            raise errors.ConfigurationError(f"{self._program} {' '.join(arguments)}: {said}")


class Change:
    """Files and services that are changed together, or not at all. `restart` false: files only. `say` gets a
    line for each thing done."""

    def __init__(self, host: Host, services: Services, say: Callable[[str], None], *, restart: bool) -> None:
        self.host, self.services, self.say, self.restart = host, services, say, restart
        self.files = hostfiles.Changes()
        self._new_units: list[str] = []
        self._restarted_containerd = False

    @contextlib.contextmanager
    def undone_on_failure(self) -> Iterator[None]:
        """Inside, a failure puts files and services back: ConfigurationError says why, and what is left."""
        if self.restart:
            self.services("daemon-reload")  # a host that cannot be told anything is not changed
        try:
            yield
        except (errors.ImagefsError, OSError, KeyboardInterrupt) as exc:
            left = self._stop_started()
            self.files.undo()
            if self.restart:
                left += self._attempt("daemon-reload")
            if self._restarted_containerd:
                left += self._attempt("restart", CONTAINERD_UNIT)
            if isinstance(exc, KeyboardInterrupt):
                raise
            more = f"; but also: {'; '.join(left)}" if left else ""
            raise errors.ConfigurationError(f"{exc}. All files are as they were before{more}") from exc

    def stop_if_undone(self, *units: str) -> None:
        """These units were not there before."""
        self._new_units += units

    def _stop_started(self) -> list[str]:
        return [said for unit in self._new_units for said in self._attempt("disable", "--now", unit)]

    def _attempt(self, *command: str) -> list[str]:
        try:
            self.services(*command)
        except errors.ImagefsError as exc:
            return [str(exc)]
        return []

    def restart_containerd(self, why_not: Callable[[Path], str | None]) -> None:
        """Restart it, and wait until `why_not` has nothing against its socket, and kubelet can use it if it
        could before."""
        effective = containerdprobe.effective(self.host.containerd, self.host.containerd_config)
        socket = containerdprobe.socket_of(effective)
        served_cri = containerdprobe.serves_cri(socket)
        self._restarted_containerd = True
        self.services("restart", CONTAINERD_UNIT)
        wait("containerd does not serve as it should", lambda: why_not(socket))
        if served_cri:
            wait("kubelet cannot use containerd any more", lambda: _no_cri(socket))


def wait(what: str, why_not: Callable[[], str | None]) -> None:
    """Until `why_not` has no reason any more. ConfigurationError with the last one."""
    until = time.monotonic() + WAIT_SECONDS
    while (reason := why_not()) is not None:
        if time.monotonic() > until:
            raise errors.ConfigurationError(f"{what} within {WAIT_SECONDS:g} s: {reason}")
        time.sleep(_POLL_SECONDS)


def _no_cri(socket: Path) -> str | None:
    if not containerdprobe.serves_cri(socket):
        return f"CRI does not answer on {socket}; `journalctl -u {CONTAINERD_UNIT}` says why"
    return None
