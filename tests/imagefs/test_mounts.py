"""The table of mounts."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from imagefs import errors, mounts
from imagefs.mounts import MountTable, Record


@pytest.fixture
def table(tmp_path: Path) -> MountTable:
    return MountTable(tmp_path / "state")


def record(directory: Path, **more: object) -> Record:
    return Record(mounts.mount_id(directory), str(directory), "oci:x", "erofs", False, **more)  # type: ignore[arg-type]


def test_a_record_lives_from_claim_to_forget(table: MountTable, tmp_path: Path) -> None:
    own = record(tmp_path)
    assert table.find(tmp_path) is None
    folder = table.claim(own)
    (folder / "rw" / "upper").mkdir(parents=True)
    (folder / "rw" / "upper" / "file").write_text("x")
    assert table.find(tmp_path) == own
    assert list(table.records()) == [own]
    table.forget(own)
    assert not folder.exists()
    assert list(table.records()) == []


def test_a_directory_has_one_record_whatever_it_is_called(table: MountTable, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    table.claim(record(tmp_path / "real"))
    with pytest.raises(errors.BusyError, match="mounted already"):
        table.claim(record(tmp_path / "link"))
    assert table.find(tmp_path / "link") is not None


def test_a_claim_cut_short_can_be_found_and_forgotten(table: MountTable, tmp_path: Path) -> None:
    folder = table.folder(mounts.mount_id(tmp_path))
    folder.mkdir(parents=True)
    found = table.find(tmp_path)
    assert found is not None
    table.forget(found)
    assert not folder.exists()


def test_a_damaged_record_is_named(table: MountTable, tmp_path: Path) -> None:
    folder = table.claim(record(tmp_path))
    (folder / "record.json").write_text("{")
    with pytest.raises(errors.ConfigurationError, match=r"record\.json is damaged"):
        table.find(tmp_path)


def test_owners_live_and_die(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "1000"])
    own = record(tmp_path, pid=process.pid, pid_start=mounts.process_start(process.pid))
    assert own.owner_lives()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not own.owner_lives()  # a zombie does not count
    process.wait()
    assert not own.owner_lives()
    assert not record(tmp_path, pid=os.getpid(), pid_start=1).owner_lives()  # the number was used again


@pytest.mark.root
def test_nothing_is_removed_through_a_mount(table: MountTable, tmp_path: Path) -> None:
    own = record(tmp_path)
    inside = table.claim(own) / "0"
    inside.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", inside], check=True)
    (inside / "file").write_text("kept")
    try:
        with pytest.raises(errors.BusyError, match="still mounted"):
            table.forget(own)
        assert (inside / "file").exists()
    finally:
        subprocess.run(["umount", inside], check=True)
