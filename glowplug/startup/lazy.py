"""The lazy start: the `glowplug` command, as a user would call it, on the link's client side.

State, cache and mounts lie in a folder of the caller's. What the device server knows about its fetches is
asked of it once the started process is ready; it is held so long, and stopped after each start. Needs root.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from glowplug.startup import link, machine, timeline
from glowplug.until import Until
from imagefs import errors, kernelreadahead, platforms
from imagefs.fuse import control

COMMAND = Path(sys.executable).with_name("glowplug")
_OWNER = "bench"
_TRACES = 2
_LAYER_FILES_SECONDS = 60.0
_LAYER_FILES_BYTES_PER_SECOND = 50e6
_SETTLE_SECONDS = 1.0
_NOT_FOUND = 4
"""The command's exit code for what is not there."""


def read_all(root: Path) -> None:
    """Every file below `root`, from its first byte to its last."""
    pipe = f"find {shlex.quote(str(root))} -xdev -type f -print0 | xargs -0 cat >/dev/null"
    machine.check_call(["bash", "-o", "pipefail", "-c", pipe])


def await_layer_files(cache_dir: Path, count: int, total_bytes: int) -> None:
    """Wait until so many layers, of so many bytes, have files of their own in the cache
    (imagefs/layerfiles.py). CommandError when that takes too long."""
    until = time.monotonic() + _LAYER_FILES_SECONDS + total_bytes / _LAYER_FILES_BYTES_PER_SECOND
    folder = cache_dir / "layers"
    while sum(path.exists() for path in folder.iterdir()) < count:
        if time.monotonic() > until:
            raise machine.CommandError(
                f"{folder}: {count} layers ({total_bytes / 1e6:,.0f} MB) should have files of their own by "
                "now; they get none where those take more than half of what the disk leaves to the cache"
            )
        time.sleep(0.5)


@dataclasses.dataclass(frozen=True, slots=True)
class Glowplug:
    """The command with its directories. `image` is HOST/REPOSITORY:TAG everywhere. `starter` is how it is
    called for what is measured."""

    folder: Path
    link: link.Link
    starter: Sequence[str] = (str(COMMAND),)

    def _storage(self, folder: Path | None = None) -> list[str]:
        folder = folder or self.folder
        return ["--state", str(folder / "state"), "--cache", str(folder / "cache")]

    def _near(self, verb: str, *words: str) -> str:
        """What a verb says that works from the registry's side of the link."""
        return machine.check_call(self.link.server.command([str(COMMAND), verb, "--plain-http", *words]))

    def convert(self, image: str, *options: str) -> None:
        """Convert in place."""
        self._near("convert", "--json", *options, f"docker://{image}")

    def copy(self, source: str, image: str) -> None:
        """Copy from any REF, with what refers to it; of several platforms this machine's."""
        self._near("copy", "--platform", str(platforms.host()), source, f"docker://{image}")

    def inspect(self, image: str) -> dict[str, Any] | None:
        """What `glowplug inspect --json` says, None if there is no block image."""
        words = [str(COMMAND), "inspect", "--plain-http", "--json", f"docker://{image}"]
        said = machine.check_call(self.link.server.command(words), allow=(0, _NOT_FOUND))
        facts: dict[str, Any] | None = json.loads(said) if said else None
        return facts

    def pack(
        self,
        image: str,
        command: Sequence[str],
        environment: Sequence[str],
        until: Until,
        read_ahead_kib: int = kernelreadahead.TRACE_READ_AHEAD_KIB,
    ) -> dict[str, Any]:
        """Trace starts until they are ready, as many as `convert --trace-run` does, and give the block image
        a boot pack; what `glowplug pack --json` says of it."""
        folder = self.folder / "tracing"
        folder.mkdir()
        given = []
        for number in range(_TRACES):
            file = str(folder / f"trace{number}")
            recorded = ["--output", file, "--read-ahead", f"{read_ahead_kib}KiB"]
            recorded += [*_until(until), *_environment(environment)]
            self._near("trace", *self._storage(folder), *recorded, f"docker://{image}", "--", *command)
            given += ["--trace", file]
        packed: dict[str, Any] = json.loads(self._near("pack", "--json", *given, f"docker://{image}"))
        shutil.rmtree(folder)
        return packed

    def start(
        self,
        image: str,
        command: Sequence[str],
        environment: Sequence[str],
        until: Until,
        clock: timeline.Clock,
        *,
        near: bool = False,
    ) -> list[dict[str, Any]]:
        """`glowplug run`, as one start; the device server's fetch events until it was ready. Over the link,
        or, `near`, from the registry's side of it."""
        events: list[dict[str, Any]] = []
        side = self.link.server if near else self.link.client
        options = ["--plain-http", *self._storage(), *_environment(environment), f"docker://{image}"]
        run = side.command([*self.starter, "run", *options, "--", *command])
        until = dataclasses.replace(until, network=side.file)
        watch = timeline.Watch(self._has_overlay, self._hold_server, lambda: events.extend(self._events()))
        try:
            timeline.follow(run, clock, until, watch)
        finally:
            self._stop_server()
        return events

    def _has_overlay(self, pid: int) -> bool:
        """Whether the root filesystem stands in the mount namespace of `glowplug run`."""
        try:
            lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
        except OSError:
            return False
        return any(" - overlay " in line and str(self.folder) in line for line in lines)

    def _hold_server(self) -> None:
        """Have the device server wait until it was asked, also for a program that is ready when it ends."""
        with contextlib.suppress(errors.ImagefsError, OSError):  # it has ended already
            if client := control.DeviceClient.connect(self.folder / "state"):
                client.hold(_OWNER)

    def _events(self) -> list[dict[str, Any]]:
        client = control.DeviceClient.connect(self.folder / "state")
        return [] if client is None else client.events()

    def _stop_server(self) -> None:
        """Let go of the device server, which ends unless a mount of ours still needs it."""
        with contextlib.suppress(errors.ImagefsError, OSError):
            if client := control.DeviceClient.connect(self.folder / "state"):
                client.detach(_OWNER)
                client.stop_if_idle()

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

    @contextlib.contextmanager
    def server_held(self, image: str, directory: Path) -> Iterator[None]:
        """With a device server that runs whether something is mounted or not; mounting starts it."""
        with self.mounted(image, directory, near=True):
            self._hold_server()
        try:
            yield
        finally:
            self._stop_server()

    def forget_blocks(self) -> None:
        """Empty the block cache of a device server that runs."""
        for folder in (self.folder / "cache/blocks").iterdir():
            shutil.rmtree(folder, ignore_errors=True)
        time.sleep(_SETTLE_SECONDS)

    def forget(self) -> None:
        """Empty the block cache."""
        shutil.rmtree(self.folder / "cache", ignore_errors=True)


def _until(until: Until) -> list[str]:
    if until.log is not None:
        return ["--until-log", until.log.pattern.decode()]
    return ["--until-http", until.address] if until.address else []


def _environment(variables: Sequence[str]) -> list[str]:
    return [word for each in variables for word in ("--env", each)]


@contextlib.contextmanager
def use(over: link.Link, folder: Path) -> Iterator[Glowplug]:
    """The command with directories below `folder`, all of it removed on the way out."""
    folder.mkdir(parents=True)
    try:
        yield Glowplug(folder, over)
    finally:
        with contextlib.suppress(errors.ImagefsError, OSError):
            client = control.DeviceClient.connect(folder / "state")
            if client is not None:  # of a start that was cut short
                client.stop()
        machine.unmount_below(folder)
        shutil.rmtree(folder, ignore_errors=True)
