"""The baseline: Debian's containerd, which downloads and unpacks an image before it starts it.

A daemon of our own: root, state, socket and configuration in a folder of the caller's, on the link's client
side. Called by demo.py and bench.py; needs root. Whatever it mounted is unmounted on the way out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from e2e import timeline
from glowplug.startup import link, machine

_CONFIG = """\
version = 2
root = "{folder}/root"
state = "{folder}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
  address = "{folder}/socket"
[debug]
  level = "warn"
"""

_names = itertools.count()


@dataclasses.dataclass(frozen=True, slots=True)
class Containerd:
    """A running containerd; commands reach it by `ctr`, the network by the link's client side."""

    folder: Path
    link: link.Link

    def _ctr(self, *arguments: str) -> list[str]:
        return self.link.client.command(["ctr", "--address", str(self.folder / "socket"), *arguments])

    def start(self, image: str, command: Sequence[str]) -> timeline.Start:
        """Pull, unpack, and run `command`, as one start; `image` is HOST/REPOSITORY:TAG."""
        clock = timeline.Clock(self.link.received_bytes)
        machine.check_call(self._ctr("images", "pull", "--plain-http", image))
        clock.mark(timeline.MOUNTED)
        name = f"start-{next(_names)}"
        run = self._ctr("run", "--rm", "--net-host", image, name, *command)
        timeline.follow(run, clock)
        return clock.start()

    def forget(self, image: str) -> None:
        """Remove the image and what it unpacked, so that the next start pulls again."""
        machine.check_call(self._ctr("images", "rm", "--sync", image))


@contextlib.contextmanager
def serve(over: link.Link, folder: Path) -> Iterator[Containerd]:
    """A containerd that answers, everything of it below `folder`."""
    folder.mkdir(parents=True)
    config = folder / "config.toml"
    config.write_text(_CONFIG.format(folder=folder))
    command = over.client.command(["containerd", "--config", str(config)])
    daemon = Containerd(folder, over)
    try:
        with machine.daemon(command, folder / "log"):
            machine.check_call(
                ["timeout", "30", "sh", "-c", f"until {' '.join(daemon._ctr('version'))}; do sleep 0.1; done"]
            )
            yield daemon
    finally:
        machine.unmount_below(folder)
        shutil.rmtree(folder, ignore_errors=True)
