"""A tree whose layer depends on the layers below it: links into them, directories that they imply."""

from __future__ import annotations

import stat

import pytest

from converter import errors, rootedpath, tree
from tests.converter.things import Thing, Things, at, build, directory, file, names, symlink
from tests.fixtures.tars import Builder


def test_links_to_lower_files_copy_them_up() -> None:
    lower = Things(
        {
            "/d": directory(0o750, uid=4),
            "/d/f": file(b"lower", 0o4755),
            "/d/s": symlink(b"f"),
            "/l": symlink(b"d"),
        }
    )
    built = build(Builder().hard_link(b"one", b"d/f").hard_link(b"two", b"one").hard_link(b"three", b"l/s"))
    assert built.depends_on_lower()
    [copy] = built.resolve(lower)
    assert copy.node is at(built, "one") is at(built, "two") is at(built, "d/f")
    assert (copy.node.mode, copy.node.links, copy.node.size) == (stat.S_IFREG | 0o4755, 3, 5)
    assert copy.entry.read(0, 10) == b"lower"
    assert at(built, "three") is at(built, "d/s")
    assert at(built, "three").target == b"f"
    assert (at(built, "d").mode, at(built, "d").uid) == (stat.S_IFDIR | 0o750, 4)


@pytest.mark.parametrize(
    ("builder", "problem"),
    [
        (Builder().hard_link(b"l", b"d/absent"), "entry 'l' at byte 0 of the tar: .*in no layer"),
        (Builder().hard_link(b"l", b"d"), "directory /d"),
        (Builder().opaque(b"d").hard_link(b"l", b"d/f"), "in no layer"),
        (Builder().opaque(b"").hard_link(b"l", b"d/f"), "nowhere"),
    ],
)
def test_links_to_nothing(builder: Builder, problem: str) -> None:
    lower = Things({"/": directory(), "/d": directory(), "/d/f": file()})
    with pytest.raises(errors.InvalidLayerError, match=problem):
        build(builder).resolve(lower)
    with pytest.raises(errors.InvalidLayerError):
        build(builder).resolve(None)


def test_a_link_target_removed_later_is_still_linked() -> None:
    built = build(Builder().hard_link(b"l", b"f").whiteout(b"f").hard_link(b"m", b"g").file(b"g", b"new"))
    copies = built.resolve(Things({"/f": file(b"f"), "/g": file(b"old")}))
    assert [copy.entry.read(0, 9) for copy in copies] == [b"f", b"old"]
    assert tree.is_whiteout(at(built, "f"))
    assert (at(built, "g").size, at(built, "m").size, at(built, "l").links, at(built, "m").links) == (
        3,
        3,
        1,
        1,
    )
    assert at(built, "g") is not at(built, "m")


# -- the layers below ------------------------------------------------------------------------------


def test_implied_directories_inherit() -> None:
    built = build(Builder().file(b"a/b/x").file(b"new/x"))
    below = Things(
        {
            "/a": directory(0o1777, uid=1, gid=2, mtime_ns=3),
            "/a/b": Thing(stat.S_IFDIR | 0o700, xattrs={b"user.x": b"1", b"trusted.overlay.opaque": b"y"}),
        }
    )
    assert built.resolve(below) == []
    node = at(built, "a")
    assert (node.mode, node.uid, node.gid, node.mtime_ns) == (stat.S_IFDIR | 0o1777, 1, 2, 3)
    assert at(built, "a/b").xattrs == {b"user.x": b"1"}
    assert at(built, "new").mode == stat.S_IFDIR | 0o755


def test_what_does_not_depend_on_lower() -> None:
    assert not build(Builder().directory(b"a").file(b"a/x").whiteout(b"b").opaque(b"a")).depends_on_lower()
    assert not build(Builder().file(b"d").directory(b"d").file(b"d/implied/x")).depends_on_lower()
    assert build(Builder().file(b"a/x")).depends_on_lower()


def test_lower_links_move_implied_directories() -> None:
    lower = Things(
        {
            "/lib": symlink(b"usr/lib"),
            "/usr": directory(0o711),
            "/usr/lib": directory(0o710),
            "/usr/lib/sub": symlink(b"/opt"),
        }
    )
    built = build(
        Builder()
        .file(b"usr/lib/a", b"1")
        .file(b"lib/a", b"22")
        .file(b"lib/sub/b")
        .whiteout(b"lib/c")
        .hard_link(b"lib/l", b"lib/a")
    )
    assert built.resolve(lower) == []
    assert names(built) == ["/opt", "/opt/b", "/usr", "/usr/lib", "/usr/lib/a", "/usr/lib/c", "/usr/lib/l"]
    assert (
        at(built, "usr/lib/a").size,
        at(built, "usr").mode & 0o777,
        at(built, "usr/lib").mode & 0o777,
    ) == (2, 0o711, 0o710)
    assert at(built, "usr/lib/l") is at(built, "usr/lib/a")


def test_a_link_target_found_through_a_lower_link() -> None:
    lower = Things({"/lib": symlink(b"usr/lib"), "/usr": directory(), "/usr/lib": directory()})
    built = build(Builder().file(b"usr/lib/a", b"1").hard_link(b"b", b"lib/a"))
    assert built.resolve(lower) == []
    assert at(built, "b") is at(built, "usr/lib/a")
    assert at(built, "b").links == 2


def test_lower_links_that_lead_nowhere() -> None:
    with pytest.raises(errors.InvalidLayerError, match="too many symbolic links"):
        build(Builder().file(b"a/x")).resolve(Things({"/a": symlink(b"b"), "/b": symlink(b"a")}))
    with pytest.raises(errors.InvalidLayerError, match="not a directory"):
        build(Builder().file(b"a/x")).resolve(Things({"/a": symlink(b"f"), "/f": file()}))


def test_merged_lower() -> None:
    whiteout = Thing(stat.S_IFCHR)
    opaque = Thing(stat.S_IFDIR | 0o700, xattrs={b"trusted.overlay.opaque": b"y"})
    bottom = Things(
        {
            "/": directory(),
            "/a": directory(),
            "/a/x": file(b"1"),
            "/b": directory(),
            "/b/x": file(),
            "/c": directory(),
            "/c/x": file(),
            "/d": file(),
        }
    )
    middle = Things(
        {
            "/": directory(),
            "/a": directory(0o711),
            "/a/x": whiteout,
            "/a/y": file(b"2"),
            "/b": opaque,
            "/b/y": file(),
            "/c": file(b"f"),
            "/d": whiteout,
        }
    )
    top = Things({"/": directory(0o700), "/c": directory(), "/c/z": file()})
    merged = tree.MergedLower([top, middle, bottom])

    def children(path: str) -> list[bytes]:
        return sorted(merged.children(rootedpath.clean(path.encode())))

    assert [children(path) for path in ("", "a", "b", "c", "d", "nope/x")] == [
        [b"a", b"b", b"c"],
        [b"y"],
        [b"y"],
        [b"z"],
        [],
        [],
    ]
    found = merged.lookup((b"a",))
    assert found is not None
    assert found.mode == stat.S_IFDIR | 0o711
    assert merged.lookup((b"c", b"x")) is None
    assert merged.lookup((b"a", b"x")) is None
    root = merged.lookup(())
    assert root is not None
    assert root.mode == stat.S_IFDIR | 0o700
