"""The host units, as systemd itself reads them."""

from __future__ import annotations

import configparser
import re
import subprocess
from pathlib import Path

import pytest

from agent import host

_UNITS = Path(__file__).parents[2] / "deploy/systemd"
_NAMES = (host.KEEPER_UNIT, host.AGENT_UNIT)

# Each of these gives a unit a mount namespace of its own, in which our mounts would stay (systemd.exec(5)).
_NAMESPACED = (
    r"(?m)^(Private(Tmp|Devices|Mounts|Users)|Protect\w+|ReadOnlyPaths|ReadWritePaths|InaccessiblePaths"
    r"|TemporaryFileSystem|BindPaths|BindReadOnlyPaths|RootDirectory|RootImage|MountFlags|DynamicUser"
    r"|RuntimeDirectory|StateDirectory|LogsDirectory)="
)


@pytest.mark.parametrize("name", _NAMES)
def test_systemd_understands_every_line(name: str, tmp_path: Path) -> None:
    for each in _NAMES:
        text = (_UNITS / each).read_text().replace(host.UNIT_PROGRAM, "/bin/true")
        (tmp_path / each).write_text(text)
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / name], capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")
    with (tmp_path / name).open("a") as unit:
        unit.write("[Service]\nKillMod=process\n")
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / name], capture_output=True, text=True
    )
    assert "KillMod" in result.stderr


@pytest.mark.parametrize("name", _NAMES)
def test_mounts_reach_the_host_and_no_stop_ends_what_containers_need(name: str) -> None:
    text = (_UNITS / name).read_text()
    assert not re.search(_NAMESPACED, text)
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(text)
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"
    assert (unit["Service"]["KillMode"], unit["Service"]["OOMPolicy"]) == ("process", "continue")
    assert "containerd.service" in unit["Unit"]["Before"]


def test_the_device_server_is_there_before_the_agent() -> None:
    assert f"Wants={host.KEEPER_UNIT}" in (_UNITS / host.AGENT_UNIT).read_text()
    assert re.search(rf"(?m)^After=.*{host.KEEPER_UNIT}", (_UNITS / host.AGENT_UNIT).read_text())
