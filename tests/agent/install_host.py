"""A host for the tests of install and doctor, with a real containerd. Only systemd is not real: `Services`
does in this process what the units' files say."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import host, install, uninstall
from imagefs import errors
from imagefs.fuse.control import DeviceClient
from tests.fixtures import block_images, containerd


class Services:
    """Stands in for systemctl: starts what ExecStart= says, restarts the test's containerd."""

    def __init__(self, prefix: Path, daemon: containerd.Containerd) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.failing: set[tuple[str, ...]] = set()
        self.enabled: set[str] = set()
        self.after_containerd = lambda: None
        self.log = prefix.parent / "agent.log"
        self._units = prefix / "etc/systemd/system"
        self._daemon = daemon
        self._agent: subprocess.Popen[bytes] | None = None

    def __call__(self, *arguments: str) -> None:
        self.calls.append(arguments)
        if arguments in self.failing:
            raise errors.ConfigurationError(f"systemctl {' '.join(arguments)}: no")
        match arguments:
            case ("enable", *units):
                self.enabled |= set(units)
            case ("disable", "--now", unit):
                self.enabled -= {unit}
                if unit == host.AGENT_UNIT:
                    self.stop()
            case ("start", host.KEEPER_UNIT):
                subprocess.run(self._command(host.KEEPER_UNIT), check=True)
            case ("restart", host.AGENT_UNIT):
                self.stop()
                with self.log.open("ab") as log:
                    self._agent = subprocess.Popen(self._command(host.AGENT_UNIT), stderr=log)
            case ("restart", host.CONTAINERD_UNIT):
                self._daemon.stop()
                self._daemon.start()
                self.after_containerd()
            case ("daemon-reload",):
                pass
            case _:
                raise AssertionError(arguments)

    def stop(self) -> None:
        if self._agent is not None:
            self._agent.terminate()
            self._agent.wait(20)
            self._agent = None

    def _command(self, unit: str) -> list[str]:
        lines = (self._units / unit).read_text().splitlines()
        (command,) = [line.removeprefix("ExecStart=") for line in lines if line.startswith("ExecStart=")]
        return command.split()


class Machine:
    """A host below a folder, with a containerd that runs."""

    def __init__(self, folder: Path, daemon: containerd.Containerd) -> None:
        self.daemon = daemon
        self.state, self.root = folder / "state", folder / "agent"
        source = folder / "wanted.toml"
        source.write_text(
            f'root = "{self.root}"\nstate = "{self.state}"\nsocket = "{self.state}/snapshotter.sock"\n'
            f'[cache]\ndirectory = "{folder}/cache"\nfree_floor_percent = 0\n[http]\nlisten = "127.0.0.1:0"\n'
        )
        self.host = host.Host(
            program=Path(block_images.GLOWPLUG),
            containerd=daemon.binaries.directory / "containerd",
            containerd_config=daemon.folder / "config.toml",
            settings_source=source,
            prefix=folder / "host",
        )
        self.services = Services(self.host.prefix, daemon)
        self.said: list[str] = []

    def install(self, mode: str = "default") -> None:
        install.install(self._change(), mode)  # type: ignore[arg-type]

    def uninstall(self, *, force: bool = False) -> None:
        uninstall.uninstall(self._change(), force=force)

    def _change(self) -> host.Change:
        self.services.calls.clear()
        return host.Change(self.host, self.services, self.said.append, restart=True)

    def restarts(self) -> int:
        return self.services.calls.count(("restart", host.CONTAINERD_UNIT))

    def files(self) -> dict[Path, bytes]:
        """What lies in the host's /etc, and containerd's configuration."""
        places = [*self.host.prefix.rglob("*"), *self.daemon.folder.glob("*.toml"), self.host.drop_in]
        return {path: path.read_bytes() for path in places if path.is_file()}


@contextlib.contextmanager
def run(line: str) -> Iterator[Machine]:
    folder = Path(tempfile.mkdtemp(prefix="glowplug-inst-"))
    serving = containerd.serve(
        containerd.binaries(line), folder / "c", sandbox_image="pause:1", registries=[]
    )
    try:
        with serving as daemon:
            machine = Machine(folder, daemon)
            try:
                yield machine
            finally:
                machine.services.stop()
                client = DeviceClient.connect(machine.state)
                if client is not None:
                    client.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=containerd.LINES)
def any_machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    with run(request.param) as machine:
        yield machine


@pytest.fixture
def machine() -> Iterator[Machine]:
    with run("2.1") as running:
        yield running
