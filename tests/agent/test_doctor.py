"""The doctor: what it makes of facts, and which facts it finds on real nodes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from agent import config, doctor, doctorprobes, install
from agent.reconcile import DATABASE
from glowplug.cli import cli
from tests.agent import install_host
from tests.agent.install_host import machine as machine
from tests.fixtures import servers

_SOCKET = doctor.Socket(Path("/run/g/s.sock"), 0o600, 0, answers=True)
_DISK = doctor.Disk(Path("/var/lib/g"), 100 << 30, 50 << 30, 1_000_000, True)
_WELL = doctor.Facts(
    settings=config.Settings(),
    root_user=True,
    kernel=doctor.Kernel("6.18.1", (6, 18), "file", True),
    containerd=doctor.Containerd((2, 1), "default", (), None, True),
    agent=_SOCKET,
    api=_SOCKET,
    not_ready={},
    device_server=True,
    root=dataclasses.replace(_DISK, overlay=""),
    cache=_DISK,
    database=None,
    mounts=doctor.Mounts(3),
    images=(doctor.Image("r.example/a:1", None),),
    clock=doctor.Clock(-5.0, True),
)


def _worse(**changes: Any) -> doctor.Facts:
    return dataclasses.replace(_WELL, **changes)


def _containerd(**changes: Any) -> doctor.Facts:
    assert isinstance(_WELL.containerd, doctor.Containerd)
    return _worse(containerd=dataclasses.replace(_WELL.containerd, **changes))


def test_a_node_that_is_well_has_nothing_to_mend() -> None:
    findings = doctor.examine(_WELL)
    assert {finding.level for finding in findings} == {"ok"}
    assert {finding.mend for finding in findings} == {""}
    assert {"erofs", "fuse", "clock", "containerd-config", "containerd", "agent", "overlay", "mounts"} <= {
        finding.check for finding in findings
    }


@pytest.mark.parametrize(
    ("facts", "check", "level", "says"),
    [
        (_worse(root_user=False), "rights", "problem", "root"),
        (_worse(kernel=doctor.Kernel("6.9", (6, 9), "device", True)), "erofs", "warning", "loop device"),
        (_worse(kernel=doctor.Kernel("6.8", (6, 8), "file", True)), "fuse", "warning", "not survived"),
        (_worse(kernel=doctor.Kernel("6.9", (6, 9), "none", True)), "erofs", "problem", "pulled as ever"),
        (_worse(kernel=doctor.Kernel("6.18", (6, 18), "file", False)), "fuse", "problem", "/dev/fuse"),
        (_worse(clock=doctor.Clock(86400.0, None)), "clock", "problem", "86400 s after now"),
        (_worse(clock=doctor.Clock(0.0, False)), "clock", "warning", "not synchronized"),
        (_worse(containerd="there is no program containerd"), "containerd", "problem", "no program"),
        (_containerd(lacking=("snapshotter is 'x'",)), "containerd-config", "problem", "snapshotter is 'x'"),
        (_containerd(unknown="UNAVAILABLE: refused"), "containerd", "problem", "refused"),
        (_containerd(cri=False), "containerd", "warning", "no CRI"),
        (_worse(agent=doctor.Socket(Path("/s"), None, None, False)), "agent", "problem", "/s is not there"),
        (_worse(agent=doctor.Socket(Path("/s"), 0o600, 0, False)), "agent", "problem", "nobody listens"),
        (_worse(api=doctor.Socket(Path("/s"), 0o666, 0, True)), "api", "problem", "open to others"),
        (_worse(api=doctor.Socket(Path("/s"), 0o600, 1000, True)), "api", "problem", "user 1000"),
        (_worse(not_ready={"database": "disk full"}), "ready", "problem", "database: disk full"),
        (_worse(device_server=False), "device-server", "problem", "cannot be read"),
        (
            _worse(root=dataclasses.replace(_DISK, overlay="Invalid argument")),
            "overlay",
            "problem",
            "Invalid argument",
        ),
        (_worse(cache=dataclasses.replace(_DISK, writable=False)), "disk-cache", "problem", "written"),
        (_worse(cache=dataclasses.replace(_DISK, free_bytes=1 << 30)), "disk-cache", "problem", "1.0 GiB of"),
        (_worse(root=dataclasses.replace(_DISK, free_inodes=7)), "disk-root", "problem", "7 inodes"),
        (
            _worse(settings=config.Settings(cache=config.Cache(free_floor_percent=15))),
            "cache-limits",
            "warning",
            "kubelet begins",
        ),
        (
            _worse(cache=dataclasses.replace(_DISK, free_bytes=_DISK.total_bytes * 16 // 100)),
            "cache-limits",
            "warning",
            "served from memory",
        ),
        (
            _worse(settings=config.Settings(cache=config.Cache(quota_bytes=99 << 30))),
            "cache-limits",
            "warning",
            "99.0 GiB",
        ),
        (_worse(database="agent.db: damaged"), "database", "problem", "damaged"),
        (_worse(mounts=doctor.Mounts(dead=("/l/1",) * 4)), "mounts", "problem", "4 layer mounts"),
        (_worse(mounts=doctor.Mounts(orphaned=("/l/9",))), "orphans", "warning", "/l/9"),
        (_worse(mounts=doctor.Mounts(quarantined=("a (why)",))), "quarantine", "problem", "a (why)"),
        (_worse(images=(doctor.Image("r/a", "401", denied=True),)), "registry", "problem", "401"),
        (_worse(images=(doctor.Image("r/a", "refused"),)), "registry", "problem", "refused"),
    ],
)
def test_what_is_wrong_is_said_with_a_cure(facts: doctor.Facts, check: str, level: str, says: str) -> None:
    (finding,) = [each for each in doctor.examine(facts) if each.level != "ok"]
    assert (finding.check, finding.level) == (check, level)
    assert says in finding.found
    assert finding.mend


@pytest.mark.root
def test_on_a_real_node(
    machine: install_host.Machine, registry: servers.RegistryServer, tmp_path: Path
) -> None:
    arguments = ["agent", "doctor", "--config", str(machine.host.settings_source), "--json"]
    arguments += ["--containerd", str(machine.host.containerd)]
    arguments += ["--containerd-config", str(machine.host.containerd_config)]

    def problems(*more: str) -> dict[str, str]:
        result = CliRunner().invoke(cli, [*arguments, *more])
        findings = json.loads(result.stdout)
        found = {each["check"]: each["found"] for each in findings if each["level"] == "problem"}
        assert result.exit_code == (1 if found else 0)
        return found

    before = problems()
    assert set(before) == {"containerd-config", "containerd", "agent", "api", "device-server"}
    machine.install()
    assert problems() == {}
    assert "registry" in problems(f"{registry.host}/no/such:image")
    assert "registry" in problems("127.0.0.1:1/no:image")

    orphan = machine.root / "layers/77"
    orphan.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", orphan], check=True)
    plain = CliRunner().invoke(cli, [each for each in arguments if each != "--json"])
    assert "warning  orphans: 1 layer mounts are nobody's" in plain.stdout
    subprocess.run(["umount", orphan], check=True)

    machine.services.stop()
    assert set(problems()) == {"agent", "api"}
    (machine.root / DATABASE).write_bytes(b"no database" * 1000)
    assert "database" in problems()


@pytest.mark.root
def test_a_layer_mount_whose_server_is_gone_is_dead(tmp_path: Path) -> None:
    layers = tmp_path / "root/layers"
    (layers / "5").mkdir(parents=True)
    device, size = tmp_path / "image", 1 << 20
    device.write_bytes(bytes(size))
    found = doctorprobes._mounts(layers, {5: "x"}, ())
    assert found == doctor.Mounts()
    subprocess.run(["mount", "-t", "tmpfs", "none", layers / "5"], check=True)
    try:
        assert doctorprobes._mounts(layers, {5: "x"}, ()) == doctor.Mounts(1)
        assert doctorprobes._mounts(layers, {}, ("a (b)",)).orphaned == (str(layers / "5"),)
    finally:
        subprocess.run(["umount", layers / "5"], check=True)


def test_the_platform_is_named_as_images_name_it() -> None:
    assert install.platform() in ("linux/amd64", "linux/arm64")
