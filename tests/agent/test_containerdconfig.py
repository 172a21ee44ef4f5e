"""The configuration that each line of containerd needs: planned here, and understood by the real programs."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from agent import containerdconfig, tomledit
from imagefs import errors
from tests.fixtures import containerd

_WANTED = containerdconfig.Wanted(Path("/run/g/s.sock"), Path("/var/lib/g"), "linux/amd64")
_BY_CLASS = containerdconfig.Wanted(Path("/run/g/s.sock"), Path("/var/lib/g"), "linux/amd64", "runtime-class")
_THEIRS_2 = """\
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "their/pause:1"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    discard_unpacked_layers = true
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = true
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "/etc/containerd/certs.d"
[proxy_plugins.theirs]
  type = "snapshot"
  address = "/run/theirs.sock"
"""
_THEIRS_3 = """\
version = 3
[plugins."io.containerd.cri.v1.images"]
  max_concurrent_downloads = 7
  [plugins."io.containerd.cri.v1.images".registry]
    config_path = "/etc/containerd/certs.d"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
    SystemdCgroup = true
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux/amd64"
  snapshotter = "native"
  differ = "walking"
[proxy_plugins.theirs]
  type = "snapshot"
  address = "/run/theirs.sock"
"""


def _dump(line: str, config: Path) -> dict[str, Any]:
    program = containerd.binaries(line).directory / "containerd"
    shown = subprocess.run(
        [program, "--config", config, "config", "dump"], capture_output=True, text=True, check=True
    )
    assert "unknown key" not in shown.stderr
    return tomllib.loads(shown.stdout)


def _line(line: str) -> tuple[int, int]:
    program = containerd.binaries(line).directory / "containerd"
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    return containerdconfig.line_of(version)


def _apply(line: str, text: str, config: Path, wanted: containerdconfig.Wanted) -> dict[str, Any]:
    """The dump of the configuration after our plan was carried out, twice."""
    config.write_text(text)
    effective = _dump(line, config)
    for _ in range(2):
        plan = containerdconfig.plan(_line(line), config.read_text(), config, effective, wanted)
        config.write_text(plan.main)
        if plan.drop_in is not None:
            drop_in = config.parent / containerdconfig.DROP_IN
            drop_in.parent.mkdir(exist_ok=True)
            drop_in.write_text(plan.drop_in)
    reverted = containerdconfig.without(plan.main)
    assert (reverted.main, reverted.drop_in) == (text, None)
    assert containerdconfig.plan(_line(line), plan.main, config, effective, wanted) == plan
    return _dump(line, config)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("1.6", ""),
        ("1.6", _THEIRS_2),
        ("1.7", ""),
        ("1.7", _THEIRS_2),
        ("2.1", ""),
        ("2.1", _THEIRS_2),
        ("2.1", _THEIRS_3),
    ],
)
@pytest.mark.parametrize("wanted", [_WANTED, _BY_CLASS], ids=["default", "runtime-class"])
def test_the_real_programs_take_it(
    line: str, text: str, wanted: containerdconfig.Wanted, tmp_path: Path
) -> None:
    if wanted is _BY_CLASS and (line == "1.6" or (line, text) == ("2.1", _THEIRS_2)):
        with pytest.raises(errors.ConfigurationError, match=r"needs containerd 1\.7"):
            _apply(line, text, tmp_path / "config.toml", wanted)
        return
    shown = _apply(line, text, tmp_path / "config.toml", wanted)
    assert containerdconfig.differences(_line(line), shown, wanted) == []
    before = tmp_path / "before.toml"
    before.write_text(text)
    expected = {"proxy_plugins": {}, **_dump(line, before)}
    changed = set(_paths(shown, expected)) - {"/imports"}  # 1.x lists the main file there, too
    assert changed == _expected_changes(line, text, wanted is _BY_CLASS)


def _paths(shown: Any, expected: Any, path: str = "") -> list[str]:
    """The topmost places where two documents differ."""
    if not (isinstance(shown, dict) and isinstance(expected, dict)):
        return [] if shown == expected else [path]
    # A dump leaves out what is empty where a file has the table, and not where it has not.
    keys = sorted(key for key in {**shown, **expected} if _says(shown.get(key)) or _says(expected.get(key)))
    return [found for key in keys for found in _paths(shown.get(key), expected.get(key), f"{path}/{key}")]


def _says(value: Any) -> bool:
    return any(map(_says, value.values())) if isinstance(value, dict) else bool(value)


def _expected_changes(line: str, text: str, by_class: bool) -> set[str]:
    changes = {"/proxy_plugins/glowplug"}
    cri, images = "/plugins/io.containerd.grpc.v1.cri/containerd", "/plugins/io.containerd.cri.v1.images"
    place = images if line == "2.1" else cri
    changes.add(f"{place}/disable_snapshot_annotations")
    if line == "2.1":
        changes.add("/plugins/io.containerd.transfer.v1.local/unpack_config")
    if not by_class:
        return changes | {f"{place}/snapshotter"}
    if line == "2.1":
        runtimes = "/plugins/io.containerd.cri.v1.runtime/containerd/runtimes"
        return changes | {f"{runtimes}/glowplug", f"{images}/runtime_platforms"}
    discard = {f"{cri}/discard_unpacked_layers"} if "discard_unpacked_layers = true" in text else set()
    return changes | {f"{cri}/runtimes/glowplug"} | discard


def test_a_runtime_class_has_the_default_runtimes_settings(tmp_path: Path) -> None:
    shown = _apply("2.1", _THEIRS_3, tmp_path / "config.toml", _BY_CLASS)
    runtime = shown["plugins"]["io.containerd.cri.v1.runtime"]["containerd"]["runtimes"]["glowplug"]
    assert (runtime["runtime_type"], runtime["snapshotter"]) == ("io.containerd.runc.v2", "glowplug")
    assert runtime["options"]["SystemdCgroup"] is True
    shown = _apply("1.7", _THEIRS_2, tmp_path / "config.toml", _BY_CLASS)
    runtime = shown["plugins"]["io.containerd.grpc.v1.cri"]["containerd"]["runtimes"]["glowplug"]
    assert runtime["options"]["SystemdCgroup"] is True


def test_their_snapshotters_are_still_unpacked_for(tmp_path: Path) -> None:
    shown = _apply("2.1", _THEIRS_3, tmp_path / "config.toml", _WANTED)
    entries = shown["plugins"]["io.containerd.transfer.v1.local"]["unpack_config"]
    assert [each["snapshotter"] for each in entries] == ["native", "glowplug"]
    shown = _apply("2.1", "", tmp_path / "config.toml", _WANTED)
    entries = shown["plugins"]["io.containerd.transfer.v1.local"]["unpack_config"]
    assert [each["snapshotter"] for each in entries] == ["overlayfs", "glowplug"]


def test_a_folder_that_is_imported_already_needs_no_change_of_the_main_file(tmp_path: Path) -> None:
    text = f'version = 3\nimports = ["{tmp_path}/conf.d/*.toml"]\n'
    (tmp_path / "conf.d").mkdir()
    config = tmp_path / "config.toml"
    _apply("2.1", text, config, _WANTED)
    assert config.read_text() == text


def test_docker_hosts_without_cri_get_the_plugin_alone() -> None:
    plan = containerdconfig.plan(
        (1, 6), 'disabled_plugins = ["cri"]\n', Path("/etc/containerd/config.toml"), {}, _WANTED
    )
    document = tomllib.loads(plan.main)
    assert set(document) == {"disabled_plugins", "proxy_plugins"}


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ((1, 7), "[plugins.cri]\n"),
        ((1, 7), "version = 3\n"),
        ((2, 1), "oom_score = 1\n"),
        ((2, 1), "version = 4\n"),
    ],
)
def test_versions_that_cannot_carry_it_are_refused(line: tuple[int, int], text: str) -> None:
    with pytest.raises(errors.ConfigurationError, match=r"/c.toml is of version .*config migrate"):
        containerdconfig.plan(line, text, Path("/c.toml"), {}, _WANTED)


def test_lines() -> None:
    assert containerdconfig.line_of("containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20") == (1, 6)
    assert containerdconfig.line_of("containerd containerd.io v2.1.4 75cb2b7") == (2, 1)
    for text in ("containerd 1.5.9", "containerd"):
        with pytest.raises(errors.ConfigurationError):
            containerdconfig.line_of(text)


def test_what_is_lacking_is_said() -> None:
    lacking = containerdconfig.differences((1, 6), {}, _WANTED)
    assert "proxy_plugins.glowplug.address is None instead of '/run/g/s.sock'" in lacking
    assert any("snapshotter" in line for line in lacking)


def test_a_section_that_another_file_replaces_is_seen(tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text(
        'version = 2\n[plugins."io.containerd.grpc.v1.cri".containerd]\nsnapshotter = "native"\n'
    )
    shown = _apply("1.6", f'version = 2\nimports = ["{other}"]\n', tmp_path / "config.toml", _WANTED)
    assert containerdconfig.differences((1, 6), shown, _WANTED) == [
        "plugins.io.containerd.grpc.v1.cri.containerd.disable_snapshot_annotations is True instead of False",
        "plugins.io.containerd.grpc.v1.cri.containerd.snapshotter is 'native' instead of 'glowplug'",
    ]


def test_the_marks_say_whose_a_line_is() -> None:
    plan = containerdconfig.plan((1, 7), _THEIRS_2, Path("/c.toml"), {}, _WANTED)
    added = set(plan.main.splitlines()) - set(_THEIRS_2.splitlines())
    assert all(tomledit.MARK in line for line in added)
