"""One layer's tree by itself: what each rule makes of names, whiteouts, links and attributes."""

from __future__ import annotations

import io
import stat

import pytest

from converter import errors, flatten, limits, tarstream, tree
from tests.converter.things import LIMITS, Things, at, build, directory, file, names
from tests.fixtures.tars import Attributes, Builder

# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [b"a/b", b"/a/b", b"./a//b/", b"../../a/b", b"a/./c/../b/.", b"a/b/.."])
def test_names_are_cleaned(name: bytes) -> None:
    wanted = ["/a"] if name == b"a/b/.." else ["/a", "/a/b"]
    assert names(build(Builder().directory(name))) == wanted


@pytest.mark.parametrize("name", [b"./", b"/", b".", b"..", b"a/..", b""])
def test_the_root_itself(name: bytes) -> None:
    built = build(Builder().directory(name, Attributes(mode=0o1700, uid=3)))
    assert not built.root_implied
    assert (built.root.mode, built.root.uid, names(built)) == (stat.S_IFDIR | 0o1700, 3, [])
    with pytest.raises(errors.InvalidLayerError, match="root directory cannot be"):
        build(Builder().file(name))


def test_root_is_implied_without_an_entry() -> None:
    assert build(Builder().file(b"a")).root_implied


def test_links_in_a_path_stay_inside() -> None:
    builder = (
        Builder().symlink(b"out", b"../../..").symlink(b"abs", b"/real").symlink(b"chain", b"abs/sub/../sub")
    )
    builder.file(b"out/a").file(b"abs/b").file(b"chain/c").file(b"chain/../d")
    # The entry's name is cleaned as text: chain/../d is d.
    assert names(build(builder)) == [
        "/a",
        "/abs",
        "/chain",
        "/d",
        "/out",
        "/real",
        "/real/b",
        "/real/sub",
        "/real/sub/c",
    ]


def test_loops_and_files_as_parents() -> None:
    with pytest.raises(errors.InvalidLayerError, match=r"entry 'a/x' at byte 1024 .*too many symbolic links"):
        build(Builder().symlink(b"a", b"b").symlink(b"b", b"a").file(b"a/x"))
    with pytest.raises(errors.InvalidLayerError, match="/f leads through something that is not a directory"):
        build(Builder().file(b"f").file(b"f/x"))


def test_long_names() -> None:
    for builder in (Builder().file(b"n" * 256), Builder().file(b"n" * 256 + b"/x")):
        with pytest.raises(errors.InvalidLayerError, match="name of 256 bytes"):
            build(builder)


# -- replacing -------------------------------------------------------------------------------------


def test_directory_over_directory_merges() -> None:
    built = build(Builder().file(b"d/x").directory(b"d", Attributes(mode=0o700, xattrs={b"user.a": b"1"})))
    node = at(built, "d")
    assert (node.mode & 0o7777, node.implied, node.opaque, node.xattrs) == (
        0o700,
        False,
        False,
        {b"user.a": b"1"},
    )
    assert names(built) == ["/d", "/d/x"]


def test_replacements_and_link_counts() -> None:
    built = build(Builder().file(b"d/x").hard_link(b"y", b"d/x").hard_link(b"z", b"y").file(b"d"))
    assert names(built) == ["/d", "/y", "/z"]
    assert at(built, "y") is at(built, "z")
    assert at(built, "y").links == 2
    built = build(Builder().file(b"d").directory(b"d").file(b"d/x"))
    assert at(built, "d").opaque


def test_a_replaced_parent_is_not_remembered() -> None:
    built = build(Builder().file(b"a/x").symlink(b"a", b"b").file(b"a/y").symlink(b"a", b"c").file(b"a/z"))
    assert names(built) == ["/a", "/b", "/b/y", "/c", "/c/z"]


def test_only_regular_files_want_data() -> None:
    built = tree.LayerTree(LIMITS)
    entries = list(
        tarstream.TarReader(
            io.BytesIO(bytes(Builder().file(b"f", b"1").directory(b"d").symlink(b"s", b"f"))), LIMITS
        )
    )
    assert [built.add(entry) for entry in entries] == [at(built, "f"), None, None]


# -- whiteouts -------------------------------------------------------------------------------------


def test_whiteouts() -> None:
    built = build(
        Builder().whiteout(b"d/gone").file(b"d/kept").whiteout(b"d/kept").whiteout(b"d/back").file(b"d/back")
    )
    assert tree.is_whiteout(at(built, "d/gone"))
    assert stat.S_ISREG(at(built, "d/kept").mode)
    assert stat.S_ISREG(at(built, "d/back").mode)


@pytest.mark.parametrize("first", [True, False])
def test_a_directory_that_is_also_whited_out_is_opaque_and_inherits_nothing(first: bool) -> None:
    builder = Builder().whiteout(b"d").file(b"d/x") if first else Builder().file(b"d/x").whiteout(b"d")
    built = build(builder)
    assert not built.depends_on_lower()
    built.resolve(Things({"/d": directory(0o700)}))
    assert at(built, "d").mode == stat.S_IFDIR | 0o755
    assert at(built, "d").xattrs == {b"trusted.overlay.opaque": b"y"}


def test_opaque_directories_drop_whiteouts_inside() -> None:
    built = build(Builder().whiteout(b"d/a").opaque(b"d").whiteout(b"d/sub/b").file(b"d/sub/c").file(b"e/x"))
    assert built.depends_on_lower()
    built.resolve(Things({"/d": directory(0o711), "/d/sub": directory(0o700), "/e": directory(0o701)}))
    assert names(built) == ["/d", "/d/sub", "/d/sub/c", "/e", "/e/x"]
    assert at(built, "d").mode == stat.S_IFDIR | 0o711
    assert at(built, "d").xattrs == {b"trusted.overlay.opaque": b"y"}
    assert at(built, "d/sub").mode == stat.S_IFDIR | 0o755
    assert at(built, "d/sub").xattrs is None
    assert at(built, "e").mode == stat.S_IFDIR | 0o701


def test_an_opaque_root_becomes_whiteouts() -> None:
    built = build(Builder().opaque(b"").file(b"kept/x"))
    assert built.depends_on_lower()
    built.resolve(Things({"/": directory(), "/a": file(), "/kept": directory(0o700)}))
    assert tree.is_whiteout(at(built, "a"))
    assert at(built, "kept").xattrs == {b"trusted.overlay.opaque": b"y"}
    assert built.root.xattrs is None


@pytest.mark.parametrize("name", [b".wh.", b"d/.wh..", b".wh..."])
def test_whiteouts_of_nothing(name: bytes) -> None:
    with pytest.raises(errors.InvalidLayerError, match="whiteout that names nothing"):
        build(Builder().file(name))


def test_aufs_leftovers() -> None:
    builder = Builder().file(b".wh..wh.aufs").directory(b".wh..wh.orph").file(b".wh..wh.plnk/1.2", b"data")
    built = build(builder.hard_link(b"a", b".wh..wh.plnk/1.2").hard_link(b"b", b".wh..wh.plnk/1.2"))
    assert names(built) == ["/a", "/b"]
    assert (at(built, "a").links, at(built, "a").size) == (2, 4)


# -- hard links ------------------------------------------------------------------------------------


def test_hard_links() -> None:
    built = build(Builder().symlink(b"s", b"t").hard_link(b"l", b"s").file(b"f").hard_link(b"f", b"f"))
    assert at(built, "l") is at(built, "s")
    assert at(built, "f").links == 1


@pytest.mark.parametrize(
    ("builder", "problem"),
    [
        (Builder().directory(b"d").hard_link(b"l", b"d"), "to the directory /d"),
        (Builder().hard_link(b"l", b"/"), "root directory"),
        (Builder().whiteout(b"f").hard_link(b"l", b"f"), "this layer removes"),
        (Builder().whiteout(b"d").hard_link(b"l", b"d/f"), "not a directory"),
    ],
)
def test_bad_hard_links(builder: Builder, problem: str) -> None:
    with pytest.raises(errors.InvalidLayerError, match=problem):
        build(builder)


# -- what is refused -------------------------------------------------------------------------------


def test_overlayfs_own_things_are_refused() -> None:
    with pytest.raises(
        errors.InvalidLayerError, match="entry 'd/c' at byte 512 of the tar: a character device 0/0"
    ):
        build(Builder().directory(b"d").device(b"d/c", b"3", 0, 0))
    with pytest.raises(errors.InvalidLayerError, match=r"trusted\.overlay\.redirect"):
        build(Builder().directory(b"d", Attributes(xattrs={b"trusted.overlay.redirect": b"/"})))
    assert names(build(Builder().device(b"b", b"4", 0, 0))) == ["/b"]


def test_xattrs_that_linux_would_not_store_are_dropped() -> None:
    foreign = {b"com.apple.provenance": b"1", b"system.nfs4_acl": b"2", b"user.kept": b"3"}
    built = build(
        Builder().file(b"f", b"", Attributes(xattrs=foreign)).symlink(b"s", b"f", Attributes(xattrs=foreign))
    )
    assert at(built, "f").xattrs == {b"user.kept": b"3"}
    assert at(built, "s").xattrs is None


def test_symlink_targets() -> None:
    with pytest.raises(errors.InvalidLayerError, match="1 to 4095 bytes"):
        build(Builder().symlink(b"s", b""))


def test_implied_directories_count_as_entries() -> None:
    with pytest.raises(errors.LimitError, match="101 entries, implied directories included"):
        build(Builder().file(b"d/" * 200 + b"x"), limits.Limits(max_entries=100))


@pytest.mark.parametrize(
    "many",
    [
        Builder().symlink(b"a", b"t" * 600).symlink(b"b", b"t" * 600),
        Builder()
        .pax([(b"SCHILY.xattr.user.a", bytes(600))])
        .file(b"a")
        .pax([(b"SCHILY.xattr.user.a", bytes(600))])
        .file(b"b"),
        Builder().directory(b"a").pax([(b"SCHILY.xattr.user.a", bytes(1200))]).directory(b"a"),
        Builder().hard_link(b"a", b"x/" * 30 + b"y"),
    ],
    ids=["targets", "xattrs", "a directory listed twice", "links to elsewhere"],
)
def test_what_a_tree_keeps_is_bounded(many: Builder) -> None:
    build(many, limits.Limits(max_attribute_bytes=4096))
    with pytest.raises(errors.LimitError, match=r"--max-attribute-bytes"):
        build(many, limits.Limits(max_attribute_bytes=1024))


def test_the_reference_keeps_no_more() -> None:
    many = Builder().symlink(b"a", b"t" * 600).symlink(b"b", b"t" * 600)
    with pytest.raises(errors.LimitError, match=r"--max-attribute-bytes"):
        flatten.flatten([io.BytesIO(bytes(many))], limits.Limits(max_attribute_bytes=1024))
