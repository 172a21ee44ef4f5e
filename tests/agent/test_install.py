"""Installing on a host, with real containerds. Only systemd is not real: `Services` does in this process what
the units' files say."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from agent import config, containerdprobe, host, hostfiles, install, uninstall
from glowplug.cli import cli
from imagefs import errors
from imagefs.fuse.control import DeviceClient
from tests.fixtures import block_images, containerd

pytestmark = pytest.mark.root


class Services:
    """Stands in for systemctl: starts what ExecStart= says, restarts the test's containerd."""

    def __init__(self, prefix: Path, daemon: containerd.Containerd) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.failing: set[tuple[str, ...]] = set()
        self.enabled: set[str] = set()
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
                self._agent = subprocess.Popen(self._command(host.AGENT_UNIT), stderr=subprocess.DEVNULL)
            case ("restart", host.CONTAINERD_UNIT):
                self._daemon.stop()
                self._daemon.start()
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
def _machine(line: str) -> Iterator[Machine]:
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
    with _machine(request.param) as machine:
        yield machine


@pytest.fixture
def machine() -> Iterator[Machine]:
    with _machine("2.1") as running:
        yield running


def test_from_nothing_to_a_snapshotter_that_containerd_uses_and_back(any_machine: Machine) -> None:
    machine = any_machine
    before = machine.files()
    assert containerdprobe.sees_us(machine.daemon.socket) is not None
    machine.install()
    assert containerdprobe.sees_us(machine.daemon.socket) is None
    plugins = [line.split() for line in machine.daemon.ctr("plugins", "ls").splitlines()]
    assert [line[-1] for line in plugins if line[1:2] == ["glowplug"]] == ["ok"]
    assert machine.services.enabled == {host.AGENT_UNIT, host.KEEPER_UNIT}
    assert machine.host.settings_file.stat().st_mode & 0o777 == 0o600
    assert config.load(machine.host.settings_file).root == machine.root

    installed = machine.files()
    machine.install()
    assert machine.files() == installed
    assert machine.restarts() == 0

    key = "a-container"
    machine.daemon.ctr("snapshots", "--snapshotter", "glowplug", "prepare", key)
    with pytest.raises(errors.BusyError, match=rf"1 containers use the snapshotter: .*{key}"):
        machine.uninstall()
    assert machine.files() == installed
    machine.daemon.ctr("snapshots", "--snapshotter", "glowplug", "rm", key)
    machine.daemon.ctr("leases", "create", "--id", "collect")
    machine.daemon.ctr("leases", "rm", "--sync", "collect")  # the garbage collector removes it at our side

    machine.uninstall()
    assert machine.restarts() == 1
    assert machine.services.enabled == set()
    left = machine.files()
    assert left.pop(machine.host.settings_file)
    assert left == before
    copy = machine.daemon.folder / f"config.toml{host.COPY_SUFFIX}"
    assert copy.read_bytes() == before[machine.host.containerd_config]
    assert containerdprobe.sees_us(machine.daemon.socket) is not None
    assert machine.daemon.cri.version(5.0)
    assert DeviceClient.connect(machine.state) is None


def test_uninstalling_by_force_leaves_what_containers_need(machine: Machine) -> None:
    machine.install()
    machine.daemon.ctr("snapshots", "--snapshotter", "glowplug", "prepare", "a-container")
    machine.uninstall(force=True)
    assert "the device server goes on" in "\n".join(machine.said)
    assert DeviceClient.connect(machine.state) is not None
    # Without an agent to ask, its database knows who has snapshots.
    machine.install()
    machine.services.stop()
    with pytest.raises(errors.BusyError):
        machine.uninstall()


def test_from_one_mode_to_the_other(machine: Machine) -> None:
    machine.install("runtime-class")
    shown = containerdprobe.effective(machine.host.containerd, machine.host.containerd_config)
    images = shown["plugins"]["io.containerd.cri.v1.images"]
    assert (images["snapshotter"], images["runtime_platforms"]["glowplug"]["snapshotter"]) == (
        "overlayfs",
        "glowplug",
    )
    machine.install("default")
    shown = containerdprobe.effective(machine.host.containerd, machine.host.containerd_config)
    images = shown["plugins"]["io.containerd.cri.v1.images"]
    assert (images["snapshotter"], images.get("runtime_platforms", {})) == ("glowplug", {})


def test_a_containerd_that_does_not_come_back_gets_its_old_configuration(
    any_machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = any_machine
    before = machine.files()
    monkeypatch.setattr(host, "WAIT_SECONDS", 1.0)
    monkeypatch.setattr(containerdprobe, "sees_us", lambda _: "there is no snapshotter")
    with pytest.raises(
        errors.ConfigurationError,
        match=r"there is no snapshotter\. All files are as they were before$",
    ):
        machine.install()
    assert machine.files() == before
    assert machine.restarts() == 2
    assert machine.services.enabled == set()
    assert machine.daemon.cri.version(5.0)


def test_a_service_that_does_not_start_is_named_and_all_is_put_back(machine: Machine) -> None:
    before = machine.files()
    machine.services.failing = {("restart", host.AGENT_UNIT)}
    with pytest.raises(errors.ConfigurationError, match=r"systemctl restart glowplug-agent\.service: no"):
        machine.install()
    assert machine.files() == before
    assert machine.restarts() == 0


def test_another_file_that_says_otherwise_is_found_before_containerd_is_touched() -> None:
    with _machine("1.6") as machine:
        other = machine.daemon.folder / "other.toml"
        other.write_text(
            'version = 2\n[plugins."io.containerd.grpc.v1.cri".containerd]\nsnapshotter = "native"\n'
        )
        main = machine.host.containerd_config
        main.write_text(main.read_text().replace("version = 2\n", f'version = 2\nimports = ["{other}"]\n'))
        before = machine.files()
        with pytest.raises(errors.ConfigurationError, match="another one that it imports may say otherwise"):
            machine.install()
        assert machine.files() == before
        assert machine.restarts() == 0


def test_a_file_that_a_program_wrote_anew_is_not_taken_for_ours() -> None:
    with _machine("1.7") as machine:
        machine.install()
        main = machine.host.containerd_config
        without_comments = [line.split(" # glowplug")[0] for line in main.read_text().splitlines()]
        main.write_text("\n".join(line for line in without_comments if not line.startswith("#")))
        before = machine.files()
        with pytest.raises(errors.ConfigurationError, match="take them out by hand"):
            machine.uninstall()
        assert machine.files() == before
        assert containerdprobe.sees_us(machine.daemon.socket) is None


def test_the_command_shows_and_writes_without_restarting(tmp_path: Path) -> None:
    containerd_config = tmp_path / "containerd/config.toml"
    arguments = [
        "--containerd-config",
        str(containerd_config),
        "--root-prefix",
        str(tmp_path / "host"),
        "--no-restart",
        "--systemctl",
        "/nonexistent",
    ]
    shown = CliRunner().invoke(cli, ["agent", "install", "--dry-run", *arguments])
    assert shown.exit_code == 0, shown.output
    assert '+  snapshotter = "glowplug" # glowplug' in shown.stdout.splitlines()
    assert not list(tmp_path.iterdir())
    for _ in range(2):
        done = CliRunner().invoke(cli, ["agent", "install", *arguments])
        assert done.exit_code == 0, done.output
    assert 'snapshotter = "glowplug"' in containerd_config.read_text()
    again = CliRunner().invoke(cli, ["agent", "install", "--dry-run", *arguments])
    assert again.stdout == ""
    gone = CliRunner().invoke(cli, ["agent", "uninstall", *arguments])
    assert gone.exit_code == 0, gone.output
    assert not containerd_config.exists()
    assert not list((tmp_path / "host/etc/systemd/system").iterdir())


def test_files_keep_mode_and_owner_and_links_stay_links(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("before")
    real.chmod(0o640)
    link.symlink_to(real)
    changes = hostfiles.Changes()
    assert changes.write(link, "after")
    assert not changes.write(link, "after")
    assert changes.write(tmp_path / "new/file", "x", 0o600)
    assert changes.remove(real)
    assert not changes.remove(real)
    assert not real.exists()
    changes.undo()
    assert (link.is_symlink(), real.read_text()) == (True, "before")
    assert not (tmp_path / "new/file").exists()


def test_a_disk_that_takes_no_more_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "file.glowplug-new").mkdir()
    file = tmp_path / "file"
    file.write_text("before")
    with pytest.raises(errors.ConfigurationError, match=r"cannot write .*file"):
        hostfiles.Changes().write(file, "after")
    assert file.read_text() == "before"
