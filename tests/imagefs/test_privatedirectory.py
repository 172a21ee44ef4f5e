"""Directories that somebody else prepared for us."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from imagefs import cachedirectory, errors, mounts, privatedirectory
from imagefs.fuse import control

SOMEBODY = 12345


def test_a_new_one_is_private(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    privatedirectory.make(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    privatedirectory.make(path)


def test_permissions_of_others_are_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "open"
    path.mkdir()
    path.chmod(0o1777)
    privatedirectory.check(path)
    assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0


def test_a_missing_one_is_no_error(tmp_path: Path) -> None:
    privatedirectory.check(tmp_path / "none")


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    path = tmp_path / "theirs"
    path.mkdir(mode=0o777)
    os.chown(path, SOMEBODY, SOMEBODY)
    return path


@pytest.mark.root
def test_somebody_elses_is_refused_wherever_it_would_be_believed(theirs: Path) -> None:
    for use in (
        lambda: privatedirectory.make(theirs),
        lambda: cachedirectory.CacheDirectory(theirs),
        lambda: mounts.MountTable(theirs),
        lambda: control.DeviceClient.connect(theirs),
        lambda: control.DeviceClient.ensure(control.ServerSettings(theirs, theirs, 0, 0)),
    ):
        with pytest.raises(errors.ConfigurationError, match=f"belongs to user {SOMEBODY}"):
            use()


@pytest.mark.root
def test_a_folder_that_was_prepared_inside_our_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache" / "blocks").mkdir(parents=True)
    os.chown(tmp_path / "cache" / "blocks", SOMEBODY, SOMEBODY)
    with pytest.raises(errors.ConfigurationError, match="blocks belongs to user"):
        cachedirectory.CacheDirectory(tmp_path / "cache")


@pytest.mark.root
def test_somebody_elses_link_to_ours_is_refused(tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    ours.mkdir()
    link = tmp_path / "link"
    link.symlink_to(ours)
    privatedirectory.check(link)
    os.chown(link, SOMEBODY, SOMEBODY, follow_symlinks=False)
    with pytest.raises(errors.ConfigurationError, match="symbolic link"):
        privatedirectory.check(link)


def test_a_record_speaks_of_its_own_folder_only(tmp_path: Path) -> None:
    table = mounts.MountTable(tmp_path)
    record = mounts.Record("abc", "", "ref", "", False)
    folder = table.claim(record)
    text = (folder / "record.json").read_text()
    (folder / "record.json").write_text(text.replace('"abc"', '"../../elsewhere"'))
    with pytest.raises(errors.ConfigurationError, match="damaged"):
        list(table.records())
