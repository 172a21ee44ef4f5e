"""Snapshots come and go: usage, removal, what containers leave behind, crashes, a full disk."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from agent import errors as agent_errors
from agent.snapshots import Kind, Usage
from imagefs import errors, holders, syscalls
from tests.agent.snapshot_node import Node, write
from tests.agent.snapshot_node import node as node

# --- what containers leave -------------------------------------------------------------------------------


def make_deep(top: Path, levels: int) -> None:
    """Folders inside one another, far beyond Python's stack and the kernel's longest path."""
    folder = os.open(top, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("deeper", dir_fd=folder)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=folder))
        inner = os.open("deeper", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(folder)


def test_a_tree_deeper_than_pythons_stack_is_counted_and_deleted(node: Node) -> None:
    """Any container can make one: it must not keep the node's cleanup, or the agent's start, from working."""
    node.snapshotter.prepare("deep", "", {})
    folder = node.snapshotter.folder(node.rows.get("deep").id)
    make_deep(folder / "fs", 3000)
    assert node.snapshotter.usage("deep").inodes > 500
    node.snapshotter.remove("deep")
    node.snapshotter.cleanup()
    assert os.listdir(node.root / "snapshots") == []


def test_deleting_follows_no_link_and_no_mount(node: Node, tmp_path: Path) -> None:
    (tmp_path / "others").mkdir()
    (tmp_path / "others/precious").write_text("still here")
    node.snapshotter.prepare("odd", "", {})
    upper = node.snapshotter.folder(node.rows.get("odd").id) / "fs"
    (upper / "link").symlink_to(tmp_path / "others")
    (upper / "a/b/mounted").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", upper / "a/b/mounted"], check=True)
    try:
        (upper / "a/b/mounted/precious").write_text("too")
        node.snapshotter.remove("odd")
        node.snapshotter.cleanup()
        (left,) = (node.root / "snapshots").iterdir()
        (mounted,) = (point.directory for point in holders.mount_points() if str(left) in point.directory)
        assert (Path(mounted) / "precious").read_text() == "too"
    finally:
        for point in holders.mount_points():
            if point.directory.startswith(str(node.root)):
                subprocess.run(["umount", point.directory], check=True)
    node.snapshotter.cleanup()
    assert os.listdir(node.root / "snapshots") == []
    assert (tmp_path / "others/precious").read_text() == "still here"


# --- usage, removal, crashes -----------------------------------------------------------------------------


def test_usage(node: Node) -> None:
    node.snapshotter.prepare("a", "", {})
    upper = node.snapshotter.folder(node.rows.get("a").id) / "fs"
    empty = node.snapshotter.usage("a")
    assert empty.inodes == 1
    (upper / "dir").mkdir()
    (upper / "dir" / "file").write_bytes(bytes(100_000))
    os.link(upper / "dir" / "file", upper / "hardlink")
    with (upper / "sparse").open("wb") as sparse:
        sparse.truncate(1 << 30)
    os.symlink("/etc/passwd", upper / "symlink")
    used = node.snapshotter.usage("a")
    du = subprocess.run(["du", "-s", "-B1", upper], check=True, capture_output=True, text=True).stdout
    assert used == Usage(5, int(du.split()[0]))
    node.snapshotter.commit("c", "a", {})
    assert node.snapshotter.usage("c") == used
    node.snapshotter.view("v", "c", {})
    assert node.snapshotter.usage("v") == Usage(0, 0)


def test_removal_and_cleanup(node: Node) -> None:
    folders = node.root / "snapshots"
    node.snapshotter.prepare("a", "", {})
    node.snapshotter.commit("c", "a", {})
    node.snapshotter.prepare("b", "c", {})
    with pytest.raises(agent_errors.FailedPreconditionError, match="remove"):
        node.snapshotter.remove("c")
    node.snapshotter.remove("b")
    node.snapshotter.prepare("b", "c", {})
    (folders / "new-orphan" / "fs").mkdir(parents=True)
    (folders / "99" / "fs").mkdir(parents=True)
    node.snapshotter.cleanup()
    assert set(os.listdir(folders)) == {str(row.id) for row in node.rows.walk()}
    node.snapshotter.remove("b")
    node.snapshotter.remove("c")
    node.snapshotter.cleanup()
    assert os.listdir(folders) == []
    assert node.events.kinds == []


@pytest.mark.root
def test_what_cannot_be_deleted_is_said_and_the_rest_goes(node: Node) -> None:
    folders = node.root / "snapshots"
    for name in ("new-a", "new-busy", "new-z"):
        (folders / name / "fs").mkdir(parents=True)
    syscalls.mount("tmpfs", folders / "new-busy" / "fs", "tmpfs", 0)
    try:
        node.snapshotter.cleanup()
        assert os.listdir(folders) == ["new-busy"]
        assert node.events.kinds == ["leftover"]
    finally:
        syscalls.umount(folders / "new-busy" / "fs")
    node.snapshotter.cleanup()
    assert os.listdir(folders) == []


def test_cleanup_beside_prepares(node: Node) -> None:
    """Nobody's folder is taken away while it is being made."""
    stop = threading.Event()

    def clean() -> None:
        while not stop.is_set():
            node.snapshotter.cleanup()

    cleaner = threading.Thread(target=clean)
    cleaner.start()
    try:
        for number in range(60):
            node.snapshotter.prepare(f"a{number}", "", {})
            folder = node.snapshotter.folder(node.rows.get(f"a{number}").id)
            assert sorted(os.listdir(folder)) == ["fs", "work"]
            if number % 3 == 0:
                node.snapshotter.remove(f"a{number}")
    finally:
        stop.set()
        cleaner.join()
    node.snapshotter.cleanup()
    assert set(os.listdir(node.root / "snapshots")) == {str(row.id) for row in node.rows.walk()}


def test_cleanup_waits_for_a_folder_to_get_its_row(node: Node) -> None:
    folder = node.root / "snapshots" / "1"
    cleaner = threading.Thread(target=node.snapshotter.cleanup)

    def place(number: int) -> None:
        folder.mkdir()
        cleaner.start()
        cleaner.join(0.3)  # it would be done by now, if it did not wait

    assert node.rows.insert("a", Kind.ACTIVE, "", {}, place=place).id == 1
    cleaner.join()
    assert folder.exists()


def test_a_folder_left_by_one_that_was_killed(tmp_path: Path) -> None:
    """Placed, and killed before the transaction's end: its id is not given to another."""
    (tmp_path / "snapshots" / "7" / "fs" / "old").mkdir(parents=True)
    node = Node(tmp_path)
    node.snapshotter.prepare("a", "", {})
    assert node.rows.get("a").id == 8
    node.snapshotter.cleanup()
    assert os.listdir(tmp_path / "snapshots") == ["8"]
    node.close()


@pytest.mark.root
def test_a_running_container_outlives_a_lost_database(tmp_path: Path) -> None:
    """Its folders and those of the layers below it, nobody's by the rows, stay while it is mounted."""
    before = Node(tmp_path)
    before.local("lower", "", write("lower", "x"))
    before.local("unused", "")
    with before.mounted(before.snapshotter.prepare("running", "lower", {})) as root:
        (root / "upper").write_text("y")
        before.close()
        for file in tmp_path.glob("agent.db*"):
            file.unlink()
        node = Node(tmp_path)
        node.snapshotter.prepare("new", "", {})
        node.snapshotter.cleanup()
        assert sorted(os.listdir(tmp_path / "snapshots")) == ["1", "3", "4"]
        (root / "later").write_text("z")
        assert {path.name for path in root.iterdir()} == {"lower", "upper", "later"}
    node.snapshotter.cleanup()
    assert os.listdir(tmp_path / "snapshots") == ["4"]
    node.close()


@pytest.mark.root
def test_no_row_without_its_folder(node: Node) -> None:
    place = node.root / "snapshots" / "1"
    place.mkdir()
    syscalls.mount("tmpfs", place, "tmpfs", 0)
    try:
        with pytest.raises(errors.UnavailableError, match="busy"):
            node.snapshotter.prepare("a", "", {})
        assert node.rows.walk() == []
        assert os.listdir(place.parent) == ["1"]
    finally:
        syscalls.umount(place)
    node.snapshotter.cleanup()
    node.snapshotter.prepare("a", "", {})


_WORKER = """
import sys
from pathlib import Path
from agent import observer, snapshotter, store
class Nobody:
    def find_layer(self, chain_id, labels): return None
    def may_serve(self, block_digest, labels): return True
    def released(self, block_digest): pass
root = Path(sys.argv[1])
made = snapshotter.Snapshotter(root, store.Store.open(root / "agent.db"), Nobody(), observer.Observer())
turn = sys.argv[2]
print("ready", flush=True)
number = 0
while True:
    key = f"{turn}-{number}"
    made.prepare(key, "", {}); made.commit(key + "-c", key, {})
    made.prepare(key + "-2", key + "-c", {})
    if number % 2:
        made.remove(key + "-2"); made.remove(key + "-c")
    if number % 3 == 0:
        made.cleanup()
    number += 1
"""


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Whatever was under way: each row has its folder, and cleanup leaves nothing else."""
    chance = random.Random(11)
    for turn in range(6):
        with subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(tmp_path), str(turn)], stdout=subprocess.PIPE, text=True
        ) as worker:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(chance.uniform(0.01, 0.15))
            os.kill(worker.pid, signal.SIGKILL)
        node = Node(tmp_path)
        folders = tmp_path / "snapshots"
        for row in node.rows.walk():
            wanted = ["fs"] if row.kind is Kind.VIEW else ["fs", "work"]
            assert sorted(os.listdir(folders / str(row.id))) == wanted
        node.snapshotter.cleanup()
        assert set(os.listdir(folders)) == {str(row.id) for row in node.rows.walk()}
        node.close()


@pytest.mark.root
def test_a_full_disk(tmp_path: Path) -> None:
    """Nothing is made, everything that was there can be used and removed, and then there is room again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    syscalls.mount("tmpfs", disk, "tmpfs", 0, "size=2m,nr_inodes=40")
    try:
        node = Node(disk)
        node.snapshotter.prepare("a", "", {})

        def fill() -> None:
            for number in range(40):
                node.snapshotter.prepare(f"more-{number}", "", {})

        with pytest.raises(errors.UnavailableError, match="space"):
            fill()
        before = [info.name for info in node.snapshotter.walk()]
        assert set(os.listdir(disk / "snapshots")) == {str(row.id) for row in node.rows.walk()}
        assert node.snapshotter.mounts("a")[0].type == "bind"
        node.snapshotter.remove(before[-1])
        node.snapshotter.cleanup()
        node.snapshotter.prepare("again", "", {})
        node.close()
    finally:
        syscalls.umount(disk)


def test_names_are_needed(node: Node) -> None:
    for call in (
        lambda: node.snapshotter.stat(""),
        lambda: node.snapshotter.prepare("", "", {}),
        lambda: node.snapshotter.commit("", "a", {}),
        lambda: node.snapshotter.remove(""),
        lambda: node.snapshotter.mounts(""),
        lambda: node.snapshotter.update("", {}, []),
    ):
        with pytest.raises(errors.InvalidInputError, match="the request has no"):
            call()
