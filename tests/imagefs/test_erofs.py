"""The EROFS reader and the superblock check: what mkfs.erofs makes, and what nobody should."""

from __future__ import annotations

import functools
import pathlib
import stat
import struct
import subprocess
from collections.abc import Callable

import hypothesis
import pytest
from hypothesis import strategies as st

from imagefs import erofs, errors
from imagefs.erofs import ondisk
from tests.converter.test_erofs_writer import noise, torture
from tests.fixtures import layer_image
from tests.fixtures.layer_image import directory, file, symlink


@functools.cache
def sample() -> bytes:
    """A small image with one of everything, in few blocks, so that mutations hit what matters."""
    linked = file(links=2)
    contents = {file(xattrs={b"user.a": b"b", b"trusted.c": noise(500)}): noise(200), linked: noise(5000)}
    children = {b"f%d" % number: node for number, node in enumerate(contents)}
    children |= {
        b"again": linked,
        b"link": symlink(b"f0"),
        b"long": symlink(b"t" * 4090),
        b"sub": directory({b"%060d" % number: file() for number in range(60)}),
        b"null": layer_image.Node(stat.S_IFCHR | 0o666, rdev_major=1, rdev_minor=3),
    }
    return layer_image.build(directory(children), contents)


def with_superblock(image: bytes, change: Callable[[bytearray], None]) -> bytes:
    """The image with its superblock changed, and the checksum made right again."""
    data = bytearray(image[1024:4096])
    change(data)
    struct.pack_into("<I", data, 4, 0)
    struct.pack_into("<I", data, 4, ondisk.crc32c(data))
    return image[:1024] + data + image[4096:]


def explore(image: bytes) -> int:
    """Use everything a reader has on every inode that can be reached, each once. Returns how many."""
    source = erofs.Reader(layer_image.read_from(image))
    seen = {source.superblock.root_nid}
    stack = [source.root()]
    while stack:
        inode = stack.pop()
        source.xattrs(inode)
        source.read(inode, max(0, inode.size - 5000), 5000)
        if stat.S_ISLNK(inode.mode):
            source.readlink(inode)
        if stat.S_ISDIR(inode.mode):
            for entry in source.readdir(inode):
                source.lookup(inode, entry.name)
                if entry.nid not in seen:
                    seen.add(entry.nid)
                    stack.append(source.inode(entry.nid))
    return len(seen)


# -- the superblock --------------------------------------------------------------------------------------


def test_every_flipped_bit_of_the_superblock_is_refused() -> None:
    first = sample()[:4096]
    for bit in range(1024 * 8, 1152 * 8):
        changed = bytearray(first)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(errors.InvalidInputError):
            erofs.check_superblock(bytes(changed))


@pytest.mark.parametrize(
    ("offset", "form", "value", "words"),
    [
        (0, "<I", 0xE0F5E1E3, "magic"),
        (8, "<I", 0x7, "features 0x7"),
        (8, "<I", 0x1, "features 0x1"),
        (12, "<B", 9, "2\\^9"),
        (13, "<B", 1, "zero"),
        (14, "<H", 0, "root inode"),
        (14, "<H", 0xFFFF, "root inode"),
        (24, "<Q", 1, "zero"),
        (36, "<I", 1, "root inode"),
        (40, "<I", 0xFFFFFFFF, "root inode"),
        (44, "<I", 1, "zero"),
        (64, "<B", 1, "zero"),
        *((80, "<I", 1 << bit, "incompatible") for bit in range(32)),
        (84, "<H", 1, "zero"),
        (86, "<H", 1, "zero"),
        (88, "<H", 1, "zero"),
        (90, "<B", 1, "zero"),
        (91, "<B", 1, "zero"),
        (96, "<Q", 1, "zero"),
        (104, "<B", 1, "zero"),
        (127, "<B", 1, "zero"),
    ],
)
def test_superblocks_that_our_writer_does_not_make(offset: int, form: str, value: int, words: str) -> None:
    image = with_superblock(sample(), lambda data: struct.pack_into(form, data, offset, value))
    with pytest.raises(errors.InvalidInputError, match=words):
        erofs.check_superblock(image[:4096])


def test_a_short_superblock() -> None:
    with pytest.raises(errors.InvalidInputError, match="4095 bytes"):
        erofs.check_superblock(sample()[:4095])


def test_images_with_features_of_mkfs_are_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_bytes(bytes(100_000))
    for options in (["-zlz4"], ["--chunksize=4096"]):
        command = ["mkfs.erofs", *options, tmp_path / "image", tmp_path / "tree"]
        subprocess.run(command, check=True, capture_output=True)
        with pytest.raises(errors.InvalidInputError, match="incompatible"):
            erofs.check_superblock((tmp_path / "image").read_bytes()[:4096])


# -- reading ---------------------------------------------------------------------------------------------


def test_files_of_mkfs_read_as_they_are(tmp_path: pathlib.Path) -> None:
    """mkfs.erofs makes plain images, too, that meet our conventions in all but a few fields."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for number, size in enumerate((0, 10, 4000, 4096, 5000, 100_000)):
        (tree / f"file-{number}").write_bytes(noise(size))
    for number in range(400):
        (tree / f"many-{number:04}").write_bytes(b"")
    (tree / "link").symlink_to("file-1")
    command = ["mkfs.erofs", "-x-1", "-Eforce-inode-extended", tmp_path / "image", tree]
    subprocess.run(command, check=True, capture_output=True)
    image = (tmp_path / "image").read_bytes()

    def ours(data: bytearray) -> None:
        struct.pack_into("<Q", data, 24, 0)
        struct.pack_into("<I", data, 32, 0)
        struct.pack_into("<I", data, 44, 0)
        struct.pack_into("<H", data, 84, 0)

    source = erofs.Reader(layer_image.read_from(with_superblock(image, ours)))
    names = [entry.name for entry in source.readdir(source.root())]
    assert names == sorted(path.name.encode() for path in tree.iterdir())
    for path in tree.iterdir():
        inode = source.lookup(source.root(), path.name.encode())
        assert inode is not None
        if path.is_symlink():
            assert source.readlink(inode) == b"file-1"
        else:
            assert source.read(inode, 0, 1 << 20) == path.read_bytes()
            assert inode.mtime_ns == path.stat().st_mtime_ns


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(offset=st.integers(0, 10_000), length=st.integers(0, 10_000))
def test_any_range_of_a_file(offset: int, length: int) -> None:
    source = layer_image.reader(sample())
    inode = source.lookup(source.root(), b"f1")
    assert inode is not None
    assert source.read(inode, offset, length) == noise(5000)[offset : offset + length]


def test_lookups_in_a_directory_of_many_blocks() -> None:
    names = [b"%03d" % number + b"x" * (number % 200) for number in range(1000)]
    source = layer_image.reader(layer_image.build(directory({name: file() for name in names}), {}))
    root = source.root()
    for name in names:
        assert source.lookup(root, name) is not None
        assert source.lookup(root, name + b"\0") is None
        assert source.lookup(root, name[:-1]) is None
    assert source.lookup(root, b"") is None
    assert source.lookup(root, b"\xff") is None
    itself = source.lookup(root, b".")
    assert itself is not None
    assert itself.nid == root.nid


def test_operations_on_the_wrong_kind_of_inode() -> None:
    source = layer_image.reader(sample())
    plain = source.lookup(source.root(), b"f0")
    assert plain is not None
    for operation in (source.readlink, lambda i: list(source.readdir(i)), lambda i: source.lookup(i, b"x")):
        with pytest.raises(errors.InvalidInputError, match="is not a"):
            operation(plain)
    for nid in (0, -1, 1 << 63):
        with pytest.raises(errors.InvalidInputError, match="outside"):
            source.inode(nid)


# -- hostile bytes ---------------------------------------------------------------------------------------


def change_inode(name: bytes, offset: int, form: str, value: int) -> bytes:
    image = bytearray(sample())
    source = layer_image.reader(bytes(image))
    inode = source.root() if name == b"/" else source.lookup(source.root(), name)
    assert inode is not None
    start = source.superblock.metadata_block * 4096 + inode.nid * 32
    struct.pack_into(form, image, start + offset, value)
    return bytes(image)


@pytest.mark.parametrize(
    ("name", "offset", "form", "value", "words"),
    [
        (b"f0", 0, "<H", 4, "i_format"),
        (b"f0", 0, "<H", 9, "i_format"),
        (b"f0", 0, "<H", 0x15, "i_format"),
        (b"f0", 2, "<H", 1, "xattr count"),
        (b"f0", 2, "<H", 0xFFFF, "xattrs lie outside"),
        (b"f0", 4, "<H", 0o644, "no file type"),
        (b"f0", 6, "<H", 1, "i_format"),
        (b"f0", 8, "<Q", 1 << 63, "inline tail leaves|outside"),
        (b"f0", 8, "<Q", 8192, "inline tail leaves"),
        (b"f1", 8, "<Q", 1 << 40, "outside|leaves"),
        (b"f1", 16, "<I", 0xFFFFFFFF, "outside"),
        (b"f1", 16, "<I", 0, "outside"),
        (b"f0", 40, "<I", 10**9, "timestamp"),
        (b"link", 8, "<Q", 0, "leaves its block"),
        (b"long", 8, "<Q", 4096, "symlink target"),
        (b"null", 8, "<Q", 1, "special file"),
        (b"/", 4, "<H", 0o100644, "not a directory"),
        (b"sub", 16, "<I", 0xFFFFFF, "outside"),
    ],
)
def test_malformed_inodes(name: bytes, offset: int, form: str, value: int, words: str) -> None:
    with pytest.raises(errors.InvalidInputError, match=words):
        explore(change_inode(name, offset, form, value))


def test_directories_out_of_order_and_names_that_are_none() -> None:
    image = sample()
    for old, new, words in (
        (b"againf0f1", b"agaiff0f1", None),
        (b"againf0f1", b"zgainf0f1", "out of order"),
        (b"againf0f1", b"aga/nf0f1", "not a file name"),
        (b"againf0f1", b"aga\0nf0f1", "not a file name"),
    ):
        assert image.count(old) == 1
        changed = image.replace(old, new)
        if words is None:
            explore(changed)
            continue
        with pytest.raises(errors.InvalidInputError, match=words):
            explore(changed)


mutations = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6
)


def explore_changed(changes: list[tuple[float, bytes]]) -> None:
    image = bytearray(sample())
    start = layer_image.reader(sample()).superblock.metadata_block * 4096
    for place, data in changes:
        at = int(start + place * (len(image) - start - 8))
        image[at : at + len(data)] = data
    try:
        explore(bytes(image))
    except errors.InvalidInputError:
        hypothesis.event("refused")


@hypothesis.settings(deadline=None, max_examples=400)
@hypothesis.given(changes=mutations)
def test_changed_metadata_is_refused_or_read_but_nothing_else(changes: list[tuple[float, bytes]]) -> None:
    explore_changed(changes)


@pytest.mark.soak
@hypothesis.settings(deadline=None, max_examples=20_000)
@hypothesis.given(changes=mutations)
def test_metadata_changed_in_very_many_ways(changes: list[tuple[float, bytes]]) -> None:
    explore_changed(changes)


def test_mutations_of_every_byte_of_inodes_and_entries() -> None:
    """The root, its entries and its first children, byte by byte: all ones, and one more."""
    start = layer_image.reader(sample()).superblock.metadata_block * 4096
    refused = 0
    for at in range(start + 32, start + 800):
        for value in (0xFF, (sample()[at] + 1) & 0xFF):
            image = bytearray(sample())
            image[at] = value
            try:
                explore(bytes(image))
            except errors.InvalidInputError:
                refused += 1
    assert refused > 200


def test_the_torture_tree_is_explored_whole() -> None:
    root, contents = torture()
    image = layer_image.build(root, contents)
    assert explore(image) == len({id(node) for _, node in layer_image.walk(root)})
