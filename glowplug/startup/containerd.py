"""The baseline: containerd, which downloads and unpacks an image before it starts it.

A daemon of our own: root, state, socket and configuration in a folder of the caller's, on the link's client
side. Any binary of containerd 1.6 or later; as it comes, or tuned: what it offers for pulling and unpacking
in parallel is turned on. A program that inflates faster than Go's library (Debian: isal for containerd 2,
pigz) is used by containerd itself where it is installed, tuned or not. Needs root. Whatever it mounted is
unmounted on the way out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import shutil
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from glowplug.startup import link, machine, timeline
from glowplug.until import Until
from imagefs import errors

_TRANSFER = "io.containerd.transfer.v1.local"
_UNUSED = (
    "io.containerd.cri.v1.images",
    "io.containerd.cri.v1.runtime",
    "io.containerd.grpc.v1.cri",
    "io.containerd.internal.v1.opt",
    "io.containerd.nri.v1.nri",
)
_TUNED: Mapping[str, int] = {
    "max_concurrent_downloads": 8,
    "concurrent_layer_fetch_buffer": 8 << 20,  # since 2.1: pieces of a layer, fetched in parallel
    "max_concurrent_unpacks": os.cpu_count() or 1,  # since 2.2, default 1
}
"""Options of the transfer service. Pieces of 8 MiB are what vendors who turn this on have settled on."""

_names = itertools.count()


@dataclasses.dataclass(frozen=True, slots=True)
class Binaries:
    """One containerd: `directory` has containerd, its shim and ctr. `options` are those that tune it."""

    directory: Path
    version: str
    config_version: int
    options: Mapping[str, int]

    @property
    def environment(self) -> dict[str, str]:
        """Its own programs first."""
        return {**os.environ, "PATH": f"{self.directory}:{os.environ.get('PATH', os.defpath)}"}

    @property
    def name(self) -> str:
        """What a table calls it: its version, and what it inflates layers with if not by itself."""
        known = ("igzip", "unpigz") if self.config_version >= 3 else ("unpigz",)
        found = next((f", {name}" for name in known if shutil.which(name)), "")
        return f"containerd {self.version}{found}"

    @property
    def own_transfer(self) -> bool:
        """Whether the daemon does what `ctr images pull` asks, not ctr itself."""
        return self.config_version >= 3


def installed() -> Binaries:
    """The containerd in PATH."""
    found = shutil.which("containerd")
    if found is None:
        raise errors.ConfigurationError("not installed: as root, apt-get install containerd")
    return inspect(Path(found).parent)


def inspect(directory: Path) -> Binaries:
    """The containerd in a directory. Raises ConfigurationError when it is none that runs."""
    program = directory / "containerd"
    for name in ("containerd", "ctr", "containerd-shim-runc-v2"):
        if not os.access(directory / name, os.X_OK):
            raise errors.ConfigurationError(f"{directory / name}: no such program")
    words = machine.check_call([str(program), "--version"]).split()
    try:
        default = tomllib.loads(machine.check_call([str(program), "config", "default"]))
        version = words[2].lstrip("v").partition("~")[0].partition("+")[0]
    except (tomllib.TOMLDecodeError, IndexError) as exc:
        raise errors.ConfigurationError(f"{program} is not the containerd that we know: {exc}") from exc
    found = Binaries(directory, version, int(default["version"]), {})
    # The lines before 2 have the service as well, and a ctr that does not use it.
    offered = default.get("plugins", {}).get(_TRANSFER, {}) if found.own_transfer else {}
    options = {name: value for name, value in _TUNED.items() if name in offered}
    return dataclasses.replace(found, options=options)


@dataclasses.dataclass(frozen=True, slots=True)
class Containerd:
    """A running containerd; commands reach it by `ctr`, the network by the link's client side."""

    binaries: Binaries
    folder: Path
    over: link.Link

    def pull(self, image: str, *, near: bool = False) -> None:
        """Pull and unpack HOST/REPOSITORY:TAG over the link or, `near`, from the registry's side of it."""
        command = ["images", "pull", "--hosts-dir", str(self.folder / "certs.d")]
        if not self.binaries.own_transfer:
            command.append("--plain-http")
        elif near:
            command.append("--local")  # by ctr, which runs on the near side
        self._trust(image.partition("/")[0])
        self._ctr(*command, image, side=self.over.server if near else self.over.client)

    def run(
        self,
        image: str,
        command: Sequence[str],
        environment: Sequence[str],
        until: Until,
        clock: timeline.Clock,
    ) -> None:
        """Run `command` of a pulled image until it is ready, then end it."""
        name = f"start-{next(_names)}"
        variables = [word for each in environment for word in ("--env", each)]
        run = ["run", "--rm", "--net-host", *variables, image, name, *command]
        until = dataclasses.replace(until, network=self.over.client.file)
        watch = timeline.Watch(end=lambda: self._kill(name))
        try:
            timeline.follow(self._words(run, self.over.client), clock, until, watch)
        finally:
            self._remove(name)

    def forget(self, image: str) -> None:
        """Remove the image and what it unpacked, so that the next start pulls again."""
        self._ctr("images", "rm", "--sync", image, side=self.over.client)

    def _trust(self, host: str) -> None:
        """Take a registry over plain HTTP."""
        directory = self.folder / "certs.d" / host
        directory.mkdir(parents=True, exist_ok=True)
        text = f'server = "http://{host}"\n[host."http://{host}"]\n  capabilities = ["pull", "resolve"]\n'
        (directory / "hosts.toml").write_text(text)

    def _kill(self, name: str) -> None:
        """The first process of a pid namespace ignores the signals that it does not handle, but this one."""
        with contextlib.suppress(machine.CommandError):  # it may have ended by itself
            self._ctr("tasks", "kill", "--signal", "SIGKILL", name, side=self.over.client)

    def _remove(self, name: str) -> None:
        """What an interrupted `ctr run` leaves."""
        for command in (["tasks", "rm", "--force", name], ["containers", "rm", name]):
            with contextlib.suppress(machine.CommandError):
                self._ctr(*command, side=self.over.client)

    def _words(self, arguments: Sequence[str], side: link.Namespace) -> list[str]:
        ctr = [str(self.binaries.directory / "ctr"), "--address", str(self.folder / "socket")]
        return side.command([*ctr, *arguments])

    def _ctr(self, *arguments: str, side: link.Namespace) -> None:
        machine.check_call(self._words(arguments, side))


@contextlib.contextmanager
def serve(binaries: Binaries, over: link.Link, folder: Path, *, tuned: bool) -> Iterator[Containerd]:
    """A containerd that answers, everything of it below `folder`."""
    folder.mkdir(parents=True)
    config = folder / "config.toml"
    config.write_text(_config(binaries, folder, tuned=tuned))
    command = over.client.command([str(binaries.directory / "containerd"), "--config", str(config)])
    try:
        with machine.daemon(command, folder / "log", binaries.environment) as process:
            machine.await_log(process, folder / "log", "containerd successfully booted")
            yield Containerd(binaries, folder, over)
    finally:
        machine.unmount_below(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _config(binaries: Binaries, folder: Path, *, tuned: bool) -> str:
    lines = [
        f"version = {binaries.config_version}",
        f'root = "{folder}/root"',
        f'state = "{folder}/state"',
        f"disabled_plugins = {list(_UNUSED)}",
        f'[grpc]\n  address = "{folder}/socket"',
        f'[ttrpc]\n  address = "{folder}/socket.ttrpc"',
        f'[plugins."{_TRANSFER}"]\n  config_path = "{folder}/certs.d"' if binaries.own_transfer else "",
    ]
    if tuned:
        lines += [f"  {name} = {value}" for name, value in binaries.options.items()]
    return "\n".join(lines) + "\n"
