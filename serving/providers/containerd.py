"""Replicas as containers of block images: the engine runs in containerd, its supervisor beside it.

The fleet's launcher for nodes that have an agent. `glowplug pull` makes the image runnable without fetching
its layers, so that a replica's start is a lazy start; `glowplug engine` runs on the host, as for `process`,
and its child is `ctr run`: limit, probes, drain and restarts are the same for a container as for a process,
and the image needs nothing of ours. The container shares the host's network, because the engine's port is the
supervisor's choice. It is named after its replica; a supervisor that was killed leaves it behind, and whoever
ends the replica, or starts its engine again, removes it by that name.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from serving import detached, endpoint, errors
from serving.endpoint import Endpoint
from serving.engine import container
from serving.providers import enginecommand
from serving.providers.process import (
    ProcessLauncher,
    require_model,
    require_program,
    require_request_log,
)
from serving.providers.record import Record

_PULL_SECONDS = 120.0
_CTR_SECONDS = 20.0
_EXIT_INVALID, _EXIT_NOT_FOUND, _EXIT_DENIED = 3, 4, 5
"""Exit codes of `glowplug pull` that a document must answer for; see docs/cli.md."""


class ContainerdLauncher:
    """See the module; one thread. `name`: the endpoint's."""

    def __init__(self, name: str, place: endpoint.Containerd, processes: ProcessLauncher) -> None:
        self._name = name
        self._place = place
        self._processes = processes
        self._images: dict[str, str] = {}

    def check(self, wanted: Endpoint) -> None:
        """See fleet.Launcher."""
        require_program("provider", "ctr")
        require_model(wanted)
        require_request_log(wanted)
        assert wanted.image is not None  # refused by the document
        self._images[wanted.image] = self._pull(wanted.image)

    def start(self, record: Record, wanted: Endpoint, folder: Path, known: Callable[[str], None]) -> None:
        """See fleet.Launcher."""
        assert wanted.image is not None
        if wanted.image not in self._images:  # applied by a server before this one
            self._images[wanted.image] = self._pull(wanted.image)
        self._processes.start(record, wanted, folder, known, self._images[wanted.image])

    def ended(self, record: Record) -> str | None:
        """See fleet.Launcher."""
        return self._processes.ended(record)

    def stop(self, record: Record) -> None:
        """See fleet.Launcher."""
        self._processes.stop(record)

    def kill(self, record: Record) -> None:
        """See fleet.Launcher."""
        self._processes.kill(record)
        ctr, name = enginecommand.ctr(self._place), enginecommand.container(self._name, record.name)
        for command in container.removal(ctr, name):
            # Of a container that has gone by itself, as most do, ctr says that there is none.
            subprocess.run(command, capture_output=True, timeout=_CTR_SECONDS, check=False)

    def close(self) -> None:
        """See fleet.Launcher."""
        self._processes.close()

    def _pull(self, image: str) -> str:
        """Make it runnable; containerd's name of it. DocumentError, ConfigurationError."""
        command: Sequence[str] = [
            *(*detached.GLOWPLUG, "pull", "--state", self._place.agent_state),
            *("--containerd-address", self._place.address, "--namespace", self._place.namespace, image),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PULL_SECONDS, check=False)
        except subprocess.TimeoutExpired as exc:
            raise errors.UnavailableError(f"image: {image} was not there after {_PULL_SECONDS:g} s") from exc
        if done.returncode == 0:
            return done.stdout.strip()
        said = done.stderr.strip().removeprefix("glowplug: ")
        if done.returncode in (_EXIT_INVALID, _EXIT_NOT_FOUND, _EXIT_DENIED):
            raise errors.DocumentError(
                f"image: {said}; name an image that has a block image (glowplug convert makes one)"
            )
        raise errors.ConfigurationError(
            f"image: {said}; containerd.address and containerd.agent_state say where"
        )
