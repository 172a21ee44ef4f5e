"""Snapshots and images that are remembered: rules, durability, damage, a full disk, many threads."""

import contextlib
import dataclasses
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent import database as databases
from agent import errors as agent_errors
from agent import schema, store
from agent.rows import BootPackRow, ImageRow, LayerRow
from agent.snapshots import Kind, Usage
from imagefs import errors, syscalls


@pytest.fixture
def rows(tmp_path: Path) -> Iterator[store.Store]:
    clock = iter(range(1, 1_000_000))
    opened = store.Store.open(tmp_path / "agent.db", lambda: next(clock))
    yield opened
    opened.close()


def layer(map_digest: str) -> LayerRow:
    return LayerRow(f"chain-{map_digest}", f"diff-{map_digest}", map_digest, 10, "blob", 20)


def image(digest: str, *maps: str, created_ns: int = 1) -> ImageRow:
    return ImageRow(
        digest, f"source-{digest}", "r.example/i:1", "docker://r", tuple(map(layer, maps)), created_ns
    )


def committed(rows: store.Store, name: str, parent: str = "", labels: dict[str, str] | None = None) -> None:
    rows.insert(f"{name}-active", Kind.ACTIVE, parent, {})
    rows.commit(f"{name}-active", name, labels or {}, Usage(3, 4096))


def test_a_row_that_cannot_be_read_is_damage_at_the_start(tmp_path: Path) -> None:
    """And not an error of each walk after it."""
    rows = store.Store.open(tmp_path / "agent.db")
    committed(rows, "a", labels={"l": "1"})
    rows.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "agent.db")) as database:
        database.execute("UPDATE snapshots SET labels = '{\"l\"'")
        database.commit()
    with pytest.raises(store.CorruptStoreError, match="labels are not JSON"):
        store.Store.open(tmp_path / "agent.db")


def test_a_life(rows: store.Store) -> None:
    active = rows.insert("a", Kind.ACTIVE, "", {"l": "1"})
    assert (active.name, active.kind, active.parent_id, active.parent) == ("a", Kind.ACTIVE, None, "")
    assert active.created_ns == active.updated_ns
    assert active.usage is None
    done = rows.commit("a", "c", {"ü": "ö"}, Usage(3, 4096))
    assert (done.id, done.name, done.kind, done.usage) == (active.id, "c", Kind.COMMITTED, Usage(3, 4096))
    assert done.labels == {"ü": "ö"}, "labels are replaced, not inherited"
    assert done.created_ns == done.updated_ns > active.created_ns
    changed = rows.update("c", lambda labels: {**labels, "n": "2"})
    assert changed.labels == {"ü": "ö", "n": "2"}
    assert changed.created_ns == done.created_ns < changed.updated_ns
    with pytest.raises(errors.NotFoundError):
        rows.get("a")
    assert rows.by_id(active.id) == changed
    assert rows.remove("c") == changed
    assert rows.walk() == []


def test_what_is_refused(rows: store.Store) -> None:
    committed(rows, "c")
    rows.insert("a", Kind.ACTIVE, "c", {})
    rows.insert("v", Kind.VIEW, "c", {})
    with pytest.raises(agent_errors.AlreadyExistsError, match="c exists"):
        rows.insert("c", Kind.ACTIVE, "", {})
    with pytest.raises(errors.NotFoundError, match="parent snapshot nobody"):
        rows.insert("x", Kind.ACTIVE, "nobody", {})
    with pytest.raises(errors.InvalidInputError, match="not committed"):
        rows.insert("x", Kind.ACTIVE, "a", {})
    with pytest.raises(errors.NotFoundError, match="no block image"):
        rows.insert("x", Kind.COMMITTED, "", {}, image="sha256:none", layer=0)
    with pytest.raises(agent_errors.AlreadyExistsError):
        rows.commit("a", "c", {}, Usage(1, 1))
    with pytest.raises(errors.NotFoundError):
        rows.commit("nobody", "x", {}, Usage(1, 1))
    for key in ("v", "c"):
        with pytest.raises(agent_errors.FailedPreconditionError, match="only an active one"):
            rows.commit(key, "x", {}, Usage(1, 1))
    with pytest.raises(
        agent_errors.FailedPreconditionError, match=r"cannot remove snapshot c: .* parent of a"
    ):
        rows.remove("c")
    for missing in (rows.get, rows.chain, rows.remove):
        with pytest.raises(errors.NotFoundError, match="nobody"):
            missing("nobody")
    with pytest.raises(errors.NotFoundError):
        rows.by_id(99)
    assert [row.name for row in rows.walk()] == ["c", "a", "v"]


def test_chains_and_children(rows: store.Store) -> None:
    committed(rows, "c1")
    committed(rows, "c2", "c1")
    rows.insert("a", Kind.ACTIVE, "c2", {})
    rows.insert("v", Kind.VIEW, "c2", {})
    assert [row.name for row in rows.chain("a")] == ["a", "c2", "c1"]
    assert [row.name for row in rows.children("c2")] == ["a", "v"]
    assert [row.name for row in rows.children("")] == ["c1"]
    assert rows.children("nobody") == []


def test_a_parent_given_at_commit(rows: store.Store) -> None:
    committed(rows, "c1")
    committed(rows, "c2")
    rows.insert("late", Kind.ACTIVE, "", {})
    assert rows.commit("late", "late-c", {}, Usage(1, 1), "c1").parent == "c1"
    rows.insert("set", Kind.ACTIVE, "c1", {})
    with pytest.raises(errors.InvalidInputError, match="cannot change"):
        rows.commit("set", "set-c", {}, Usage(1, 1), "c2")
    assert rows.commit("set", "set-c", {}, Usage(1, 1), "c1").parent == "c1"


def test_ids_are_never_used_twice(rows: store.Store) -> None:
    first = rows.insert("a", Kind.ACTIVE, "", {}).id
    rows.remove("a")
    assert rows.insert("a", Kind.ACTIVE, "", {}).id > first


def test_a_folder_that_cannot_be_placed_leaves_no_row(rows: store.Store) -> None:
    def place(number: int) -> None:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        rows.insert("a", Kind.ACTIVE, "", {}, place=place)
    assert rows.walk() == []
    rows.insert("a", Kind.ACTIVE, "", {})


def test_images_and_mount_numbers(rows: store.Store) -> None:
    first = rows.put_image(image("i1", "m1", "m2"))
    second = rows.put_image(image("i2", "m2", "m3", "m2", created_ns=2))
    assert [each.mount_number for each in first.layers] == [1, 2]
    assert [each.mount_number for each in second.layers] == [2, 3, 2], "one map, one mount point"
    assert rows.images() == [first, second]
    assert rows.image("i3") is None
    rows.remove_image("i1")
    rows.remove_image("i1")
    third = rows.put_image(image("i3", "m4", "m2", created_ns=3))
    assert [each.mount_number for each in third.layers] == [1, 2], "m1's number is free again"
    rows.set_pinned("i3", True)
    rows.set_prefetched("i3", True)
    kept = rows.image("i3")
    assert kept is not None
    assert (kept.pinned, kept.prefetched) == (True, True)
    with pytest.raises(errors.NotFoundError):
        rows.set_pinned("i1", True)


def test_an_image_in_use_stays(rows: store.Store) -> None:
    rows.put_image(image("i1", "m1", "m2"))
    rows.insert("s1", Kind.COMMITTED, "", {}, image="i1", layer=0)
    rows.insert("s2", Kind.COMMITTED, "s1", {}, image="i1", layer=1)
    assert rows.references("i1") == 2
    with pytest.raises(agent_errors.FailedPreconditionError, match="in use by snapshot s"):
        rows.remove_image("i1")
    assert rows.put_image(image("i1", "m1", "m5")).layers[1].mount_number == 3
    assert rows.references("i1") == 2
    rows.set_broken(rows.get("s1").id, "its map is gone")
    assert rows.get("s1").broken == "its map is gone"
    rows.remove("s2")
    rows.remove("s1")
    rows.remove_image("i1")
    assert rows.images() == []


def test_everything_is_there_after_opening_again(tmp_path: Path) -> None:
    rows = store.Store.open(tmp_path / "agent.db")
    committed(rows, "c", labels={"a": "b"})
    rows.put_image(image("i", "m"))
    before = (rows.walk(), rows.images())
    rows.close()
    rows.close()
    with pytest.raises(errors.UnavailableError):
        rows.walk()
    again = store.Store.open(tmp_path / "agent.db")
    assert (again.walk(), again.images()) == before
    again.close()


@pytest.mark.parametrize("damage", ["text", "header", "page", "truncated", "foreign"])
def test_damage_is_seen_when_opening(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "agent.db"
    if damage == "text":
        path.write_text("this is no database" * 100)
    elif damage == "foreign":
        with sqlite3.connect(path) as database:
            database.execute("PRAGMA user_version = 1")
    else:
        rows = store.Store.open(path)
        for number in range(200):
            rows.insert(f"snapshot-{number}", Kind.ACTIVE, "", {"label": "x" * 100})
        rows.close()
        content = bytearray(path.read_bytes())
        assert len(content) > 8 * 4096
        if damage == "header":
            content[:100] = bytes(100)
        elif damage == "page":
            for page in range(2, len(content) // 4096):
                content[page * 4096 : page * 4096 + 512] = b"\xff" * 512
        else:
            del content[3 * 4096 :]
        path.write_bytes(content)
    with pytest.raises(store.CorruptStoreError, match="damaged"):
        store.Store.open(path)


def test_a_database_of_the_first_version_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "agent.db"
    old = databases.Database.open(path, schema.SCHEMAS[:1])
    with old.writing() as connection:
        row = (7, "old", Kind.COMMITTED, None, "{}", 1, 1, 0, 0, None, None, None)
        connection.execute(f"INSERT INTO snapshots VALUES ({', '.join('?' * len(row))})", row)
    old.close()
    rows = store.Store.open(path)
    assert rows.get("old").id == 7
    assert rows.put_image(image("i1", "m1")) == rows.image("i1")
    rows.close()
    store.Store.open(path).close()


def test_numbers_of_the_second_version_stay_with_one_device_of_each_layer(tmp_path: Path) -> None:
    """Whatever packs showed the layer: the others get numbers of their own."""
    path = tmp_path / "agent.db"
    old = databases.Database.open(path, schema.SCHEMAS[:2])
    with old.writing() as connection:
        for number, name in ((4, "m1"), (1, "m2"), (3, "m3")):
            connection.execute("INSERT INTO mount_numbers VALUES (?, ?)", (name, number))
        for digest, *maps in (("plain", "m1", "m2"), ("packed", "m1", "m3"), ("other", "m1", "m1")):
            connection.execute("INSERT INTO images VALUES (?, 's', 'r', 'docker://r', 1, 0, 0)", (digest,))
            for index, name in enumerate(maps):
                values = (digest, index, f"chain-{name}", f"diff-{name}", name, 10, "blob", 20)
                connection.execute("INSERT INTO layers VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
        for digest in ("packed", "other"):
            connection.execute("INSERT INTO boot_packs VALUES (?, ?, 1, 'd', 1)", (digest, f"t-{digest}"))
        row = (7, "s", Kind.COMMITTED, None, "{}", 1, 1, 0, 0, "packed", 1, None)
        connection.execute(f"INSERT INTO snapshots VALUES ({', '.join('?' * len(row))})", row)
    old.close()
    rows = store.Store.open(path)
    found = {row.block_digest: [each.mount_number for each in row.layers] for row in rows.images()}
    assert found["plain"] == [4, 1]
    assert found["packed"][1] == 3
    assert found["other"][0] == found["other"][1]
    assert len({4, 1, 3, found["packed"][0], found["other"][0]}) == 5
    assert [row.layers[0] for row in rows.images()] == [
        LayerRow("chain-m1", "diff-m1", "m1", 10, "blob", 20, found[row.block_digest][0])
        for row in rows.images()
    ]
    with pytest.raises(agent_errors.FailedPreconditionError):
        rows.remove_image("packed")
    rows.remove_image("plain")
    assert rows.put_image(image("i", "m2")).layers[0].mount_number == 1
    rows.close()


def test_a_layer_has_a_mount_number_for_each_pack_that_shows_it(rows: store.Store) -> None:
    packs = {name: BootPackRow(f"sha256:{name}", 1, "data", 2) for name in ("t1", "t2")}
    plain = rows.put_image(image("plain", "m1"))
    first = rows.put_image(dataclasses.replace(image("first", "m1", "m2"), boot_pack=packs["t1"]))
    other = rows.put_image(dataclasses.replace(image("other", "m1"), boot_pack=packs["t2"]))
    same = rows.put_image(dataclasses.replace(image("same", "m1"), boot_pack=packs["t1"]))
    assert [row.layers[0].mount_number for row in (plain, first, other, same)] == [1, 2, 4, 2]
    assert len({row.device(row.layers[0]) for row in (plain, first, other, same)}) == 3
    rows.remove_image("first")
    assert rows.image("same") == same
    assert rows.put_image(image("again", "m9")).layers[0].mount_number == 3


def test_a_newer_schema_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "agent.db"
    with sqlite3.connect(path) as database:
        database.execute(f"PRAGMA user_version = {len(schema.SCHEMAS) + 1}")
    with pytest.raises(errors.ConfigurationError, match="newer version"):
        store.Store.open(path)


def test_readers_beside_writers(rows: store.Store) -> None:
    """Threads build and take down chains of their own; whoever reads meanwhile sees whole chains only."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def write(thread: int) -> None:
        for turn in range(25):
            committed(rows, f"{thread}-{turn}-base")
            committed(rows, f"{thread}-{turn}-top", f"{thread}-{turn}-base")
            rows.remove(f"{thread}-{turn}-top")
            rows.remove(f"{thread}-{turn}-base")

    def read() -> None:
        while not stop.is_set():
            seen = rows.walk()
            names = {row.id: row.name for row in seen}
            for row in seen:
                assert row.parent == ("" if row.parent_id is None else names[row.parent_id])

    def run(call: Callable[..., None], *arguments: object) -> None:
        try:
            call(*arguments)
        except BaseException as exc:
            failures.append(exc)

    readers = [threading.Thread(target=run, args=(read,)) for _ in range(2)]
    writers = [threading.Thread(target=run, args=(write, number)) for number in range(4)]
    for thread in readers + writers:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert failures == []
    assert rows.walk() == []


def test_nobody_waits_for_a_writer_to_read(rows: store.Store) -> None:
    committed(rows, "c")
    seen: list[str] = []

    def place(number: int) -> None:
        reader = threading.Thread(target=lambda: seen.extend(row.name for row in rows.walk()))
        reader.start()
        reader.join(30)

    rows.insert("a", Kind.ACTIVE, "c", {}, place=place)
    assert seen == ["c"], "the last finished transaction, while one is under way"


_WRITER = """
import sys
from pathlib import Path
from agent import store
from agent.snapshots import Kind, Usage
rows = store.Store.open(Path(sys.argv[1]))
number = 0
while True:
    rows.insert(f"{sys.argv[2]}-{number}", Kind.ACTIVE, "", {})
    rows.commit(f"{sys.argv[2]}-{number}", f"{sys.argv[2]}-{number}-c", {}, Usage(1, 1))
    print(number, flush=True)
    number += 1
"""


def test_what_was_answered_is_there_after_a_kill(tmp_path: Path) -> None:
    chance = random.Random(3)
    path = tmp_path / "agent.db"
    for turn in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(path), str(turn)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            for _ in range(chance.randrange(1, 40)):
                last = int(writer.stdout.readline())
            os.kill(writer.pid, signal.SIGKILL)
            rest = writer.stdout.read().split()
        last = int(rest[-1]) if rest else last
        rows = store.Store.open(path)
        names = {row.name for row in rows.walk()}
        rows.close()
        assert {f"{turn}-{number}-c" for number in range(last + 1)} <= names


@pytest.mark.root
def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    syscalls.mount("tmpfs", disk, "tmpfs", 0, "size=1m")
    try:
        rows = store.Store.open(disk / "agent.db")
        committed(rows, "c")
        with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as ballast:
            while True:
                ballast.write(bytes(4096))

        def fill() -> None:
            for number in range(1000):
                rows.insert(f"a{number}", Kind.ACTIVE, "c", {"l": "x" * 1000})

        with pytest.raises(errors.UnavailableError, match="full"):
            fill()
        count = len(rows.walk())
        (disk / "ballast").unlink()
        rows.insert("room again", Kind.ACTIVE, "c", {})
        assert len(rows.walk()) == count + 1
        rows.close()
    finally:
        syscalls.umount(disk)
