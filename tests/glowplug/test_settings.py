"""Settings: sizes, precedence, defaults."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from glowplug import settings


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("512", 512),
        ("64K", 65536),
        ("64KiB", 65536),
        ("4m", 4 << 20),
        ("20GB", 20 << 30),
        ("1T", 1 << 40),
    ],
)
def test_sizes(text: str, value: int) -> None:
    assert settings.SIZE.convert(text, None, None) == value


@pytest.mark.parametrize("text", ["", "K", "-1", "1.5G", "4X", "4 MiBB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a size"):
        settings.SIZE.convert(text, None, None)


def storage(arguments: list[str], environment: dict[str, str]) -> settings.Storage:
    found: list[settings.Storage] = []

    @click.command()
    @settings.storage_options
    def verb(storage: settings.Storage) -> None:
        found.append(storage)

    result = CliRunner(env=environment).invoke(verb, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return found[0]


def test_option_then_environment_then_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("GLOWPLUG_STATE", "GLOWPLUG_CACHE", "GLOWPLUG_CACHE_QUOTA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    environment = {"GLOWPLUG_STATE": "/from/environment", "GLOWPLUG_CACHE_QUOTA": "1G"}
    assert storage([], environment).state_dir == Path("/from/environment")
    assert storage([], environment).cache_quota_bytes == 1 << 30
    assert storage(["--state", "relative"], environment).state_dir == tmp_path / "relative"
    assert storage([], {}).cache_quota_bytes == settings.CACHE_QUOTA_BYTES
    assert storage([], {}).read_deadline_seconds == settings.READ_DEADLINE_SECONDS


def test_places_of_users_who_are_not_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    monkeypatch.setenv("HOME", "/home/user")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert settings.default_state_dir() == Path("/run/user/1000/glowplug")
    assert settings.default_cache_dir() == Path("/home/user/.cache/glowplug")


def test_the_floor_is_of_the_filesystem_that_will_hold_the_cache(tmp_path: Path) -> None:
    half = storage(["--cache", str(tmp_path / "not" / "yet"), "--free-floor", "50"], {})
    none = storage(["--cache", str(tmp_path), "--free-floor", "0"], {})
    assert settings.free_floor_bytes(half) > 0
    assert settings.free_floor_bytes(none) == 0
