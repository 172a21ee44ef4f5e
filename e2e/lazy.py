"""The lazy start: the `glowplug` command, as a user would call it, on the link's client side.

State, cache and mounts lie in a folder of the caller's. What the device server knows about its fetches is
asked of it while the started process still runs. Called by demo.py and bench.py; needs root.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from e2e import timeline, workloads
from glowplug.startup import link, machine
from imagefs.fuse import control

COMMAND = Path(sys.executable).with_name("glowplug")


@dataclasses.dataclass(frozen=True, slots=True)
class Glowplug:
    """The command with its directories. `image` is HOST/REPOSITORY:TAG everywhere."""

    folder: Path
    link: link.Link

    def _storage(self) -> list[str]:
        return ["--state", str(self.folder / "state"), "--cache", str(self.folder / "cache")]

    def convert(self, image: str) -> dict[str, Any]:
        """Convert in place, from the registry's side of the link; what `--json` says of the image."""
        command = [str(COMMAND), "convert", "--plain-http", "--json", f"docker://{image}"]
        (converted,) = json.loads(machine.check_call(self.link.server.command(command)))["images"]
        out: dict[str, Any] = converted
        return out

    def pack(self, image: str, command: Sequence[str]) -> dict[str, Any]:
        """Trace a start until it is ready, and give the block image a boot pack, from the registry's side of
        the link; what `glowplug pack --json` says."""
        folder = self.folder / "tracing"
        folder.mkdir()
        storage = ["--state", str(folder / "state"), "--cache", str(folder / "cache")]
        what = ["--plain-http", f"docker://{image}"]
        recorded = ["--output", str(folder / "trace"), "--until-log", f"^{workloads.READY}"]
        trace = [str(COMMAND), "trace", *storage, *recorded, *what, "--", *command]
        machine.check_call(self.link.server.command(trace))
        pack = [str(COMMAND), "pack", "--json", "--trace", str(folder / "trace"), *what]
        packed: dict[str, Any] = json.loads(machine.check_call(self.link.server.command(pack)))
        shutil.rmtree(folder)
        return packed

    def start(self, image: str, command: Sequence[str]) -> tuple[timeline.Start, list[dict[str, Any]]]:
        """`glowplug run`, as one start, and the device server's fetch events until it was ready."""
        clock = timeline.Clock(self.link.received_bytes)
        events: list[dict[str, Any]] = []
        options = ["--plain-http", *self._storage(), f"docker://{image}"]
        run = self.link.client.command([str(COMMAND), "run", *options, "--", *command])
        timeline.follow(
            run, clock, mounted=self._has_overlay, when_ready=lambda: events.extend(self._events())
        )
        return clock.start(), events

    def _has_overlay(self, pid: int) -> bool:
        """Whether the root filesystem stands in the mount namespace of `glowplug run`."""
        try:
            lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
        except OSError:
            return False
        return any(" - overlay " in line and str(self.folder) in line for line in lines)

    def _events(self) -> list[dict[str, Any]]:
        client = control.DeviceClient.connect(self.folder / "state")
        return [] if client is None else client.events()

    @contextlib.contextmanager
    def mounted(self, image: str, directory: Path, *, near: bool = False) -> Iterator[None]:
        """The image at `directory`; fetched over the link, or, `near`, from the registry's own side of it."""
        directory.mkdir(parents=True, exist_ok=True)
        side = self.link.server if near else self.link.client
        options = ["--plain-http", *self._storage(), f"docker://{image}", str(directory)]
        machine.check_call(side.command([str(COMMAND), "mount", *options]))
        try:
            yield
        finally:
            umount = [str(COMMAND), "umount", "--state", str(self.folder / "state"), str(directory)]
            machine.check_call(umount)

    def forget(self) -> None:
        """Empty the block cache."""
        shutil.rmtree(self.folder / "cache", ignore_errors=True)


@contextlib.contextmanager
def use(over: link.Link, folder: Path) -> Iterator[Glowplug]:
    """The command with directories below `folder`, all of it removed on the way out."""
    folder.mkdir(parents=True)
    try:
        yield Glowplug(folder, over)
    finally:
        machine.unmount_below(folder)
        shutil.rmtree(folder, ignore_errors=True)
