"""Installing on a host, with real containerds."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from agent import config, containerdprobe, host, hostfiles
from glowplug.cli import cli
from imagefs import errors
from imagefs.fuse.control import DeviceClient
from tests.agent import install_host
from tests.agent.install_host import any_machine as any_machine
from tests.agent.install_host import machine as machine

pytestmark = pytest.mark.root


def test_from_nothing_to_a_snapshotter_that_containerd_uses_and_back(
    any_machine: install_host.Machine,
) -> None:
    machine = any_machine
    before = machine.files()
    assert containerdprobe.knows_us(machine.daemon.socket) is not None
    machine.install()
    assert containerdprobe.knows_us(machine.daemon.socket) is None
    plugins = [line.split() for line in machine.daemon.ctr("plugins", "ls").splitlines()]
    assert [line[-1] for line in plugins if line[1:2] == ["glowplug"]] == ["ok"]
    assert machine.services.enabled == {host.AGENT_UNIT, host.KEEPER_UNIT}
    assert machine.host.settings_file.stat().st_mode & 0o777 == 0o600
    assert config.load(machine.host.settings_file).root == machine.root

    for filesystem in machine.daemon.cri.image_filesystems():
        assert Path(filesystem.fs_id.mountpoint).is_dir(), "kubelet looks up its filesystem"

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
    assert containerdprobe.knows_us(machine.daemon.socket) is not None
    assert machine.daemon.cri.version(5.0)
    assert DeviceClient.connect(machine.state) is None, "\n".join(machine.said)


def test_uninstalling_by_force_leaves_what_containers_need(machine: install_host.Machine) -> None:
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


def test_from_one_mode_to_the_other(machine: install_host.Machine) -> None:
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
    machine: install_host.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = machine.files()
    machine.services.after_containerd = lambda: monkeypatch.setattr(host, "WAIT_SECONDS", 0.5)
    monkeypatch.setattr(containerdprobe, "reaches_us", lambda _: "there is no snapshotter")
    with pytest.raises(
        errors.ConfigurationError,
        match=r"there is no snapshotter\. All files are as they were before$",
    ):
        machine.install()
    assert machine.files() == before
    assert machine.restarts() == 2
    assert machine.services.enabled == set()
    assert machine.daemon.cri.version(5.0)


def test_a_service_that_does_not_start_is_named_and_all_is_put_back(machine: install_host.Machine) -> None:
    before = machine.files()
    machine.services.failing = {("restart", host.AGENT_UNIT)}
    with pytest.raises(errors.ConfigurationError, match=r"systemctl restart glowplug-agent\.service: no"):
        machine.install()
    assert machine.files() == before
    assert machine.restarts() == 0


def test_another_file_that_says_otherwise_is_found_before_containerd_is_touched() -> None:
    with install_host.run("1.6") as machine:
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
    with install_host.run("1.7") as machine:
        machine.install()
        main = machine.host.containerd_config
        without_comments = [line.split(" # glowplug")[0] for line in main.read_text().splitlines()]
        main.write_text("\n".join(line for line in without_comments if not line.startswith("#")))
        before = machine.files()
        with pytest.raises(errors.ConfigurationError, match="take them out by hand"):
            machine.uninstall()
        assert machine.files() == before
        assert containerdprobe.knows_us(machine.daemon.socket) is None


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
