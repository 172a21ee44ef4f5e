"""Layer images, against the kernel's mount, fsck.erofs, dump.erofs, and our own reader."""

from __future__ import annotations

import os
import pathlib
import random
import stat
import struct
import subprocess

import hypothesis
import pytest
from hypothesis import strategies as st

from converter import erofs_writer, errors
from converter.tree import Node
from imagefs import erofs
from imagefs.erofs import ondisk
from tests.fixtures import layer_image
from tests.fixtures.layer_image import directory, file, symlink

ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", *entry)
    for entry in [
        (1, 6, 0xFFFFFFFF),
        (2, 7, 70000),
        (4, 4, 0xFFFFFFFF),
        (16, 7, 0xFFFFFFFF),
        (32, 4, 0xFFFFFFFF),
    ]
)
CAPABILITY = struct.pack("<IIIIII", 0x03000001, 1 << 10, 0, 0, 0, 1000)

SIZES = [0, 1, 255, 256, 257, 4095, 4096, 4097, 4352, 4353, 65535, 65536, 65537, 131072, 200_001]


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed * 1_000_003 + size).randbytes(size)


def torture() -> tuple[Node, dict[Node, bytes]]:
    """Everything that a tar can put into one layer, small enough to compare byte by byte."""
    contents = {file(mtime_ns=number * 10**9 + 1): noise(size) for number, size in enumerate(SIZES)}
    children: dict[bytes, Node] = {b"size-%d" % len(data): node for node, data in contents.items()}
    linked = file(uid=70000, gid=4_000_000_000, mtime_ns=-1, links=3)
    contents[linked] = noise(5000, 1)
    loaded = file(
        xattrs={
            b"user.mime": b"text/plain",
            b"user." + b"n" * 250: b"",
            b"security.capability": CAPABILITY,
            b"system.posix_acl_access": ACL,
            b"trusted.big": noise(65535, 2),
            b"user.bigger": noise(60001, 3),
        }
    )
    contents[loaded] = noise(4096 + 200, 4)
    loaded.mode = stat.S_IFREG | 0o674
    children |= {
        b"linked-1": linked,
        b"a": directory({b"linked-2": linked, b"b": directory({b"linked-3": linked})}),
        b"loaded": loaded,
        b"suid": file_with_mode(0o6755),
        b"-before-dot": file(),
        b"!": directory({b"+": file(), b"...": file()}),
        b"\xff\xfe not utf-8 \n": file(),
        b"n" * 255: file(),
        b"short-link": symlink(b"a/b", mtime_ns=1_234_567_890_123_456_789),
        b"long-link": symlink(b"t" * 4095),
        b"medium-link": symlink(b"m" * 4032),
        b"plain-link": symlink(b"m" * 4033, xattrs={b"trusted.x": b"y"}),
        b"null": Node(stat.S_IFCHR | 0o666, rdev_major=1, rdev_minor=3),
        b"whiteout": Node(stat.S_IFCHR, rdev_major=0, rdev_minor=0),
        b"disk": Node(stat.S_IFBLK | 0o660, rdev_major=0xFFF, rdev_minor=0xFFFFF),
        b"fifo": Node(stat.S_IFIFO | 0o600),
        b"socket": Node(stat.S_IFSOCK | 0o600),
        b"tmp": directory(xattrs={b"trusted.overlay.opaque": b"y", b"system.posix_acl_default": ACL}),
        b"empty": directory(),
    }
    children[b"tmp"].mode = stat.S_IFDIR | 0o3777
    for count in (100, 150, 300, 1000):
        children[b"dir-%d" % count] = directory({noise(20, n).hex().encode(): file() for n in range(count)})
    # Around one block of entries: each is 12 bytes and its name.
    for count in range(80, 96):
        names = {b"%033d" % n: file() for n in range(count)}
        children[b"edge-%d" % count] = directory(names)
    return directory(children, mtime_ns=7), contents


def file_with_mode(mode: int) -> Node:
    return Node(stat.S_IFREG | mode)


def test_the_reader_finds_what_was_written() -> None:
    root, contents = torture()
    image = layer_image.build(root, contents)
    assert layer_image.listing_of_reader(layer_image.reader(image)) == layer_image.listing(root, contents)


@pytest.mark.root
@pytest.mark.parametrize("block_bytes", [65536, 4 << 20])
def test_the_kernel_finds_what_was_written(tmp_path: pathlib.Path, block_bytes: int) -> None:
    root, contents = torture()
    path = tmp_path / "image"
    path.write_bytes(layer_image.build(root, contents, block_bytes))
    with layer_image.mounted(path, tmp_path / "mnt") as top:
        found = layer_image.listing_of_path(top)
        # Lookups by the kernel's binary search, with a cold dentry cache for each absent name.
        assert not os.path.exists(top + b"/dir-1000/absent")
    assert found == layer_image.listing(root, contents)


@pytest.mark.root
def test_fsck_extracts_what_was_written(tmp_path: pathlib.Path) -> None:
    root, contents = torture()
    path = tmp_path / "image"
    path.write_bytes(layer_image.build(root, contents))
    subprocess.run(["fsck.erofs", path], check=True)
    for folder, node in layer_image.walk(root):
        # Debian's fsck.erofs makes no device nodes, and takes hard links for copies.
        if node.children is not None:
            node.children = {
                name: child
                for name, child in node.children.items()
                if stat.S_IFMT(child.mode) in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)
                and len(folder + name) < 255
            }
    path.write_bytes(layer_image.build(root, contents))
    subprocess.run(["fsck.erofs", f"--extract={tmp_path}/out", path], check=True, capture_output=True)
    expected = layer_image.listing(root, contents)
    found = layer_image.listing_of_path(os.fsencode(tmp_path / "out"))
    assert {p: i.content for p, i in found.items()} == {p: i.content for p, i in expected.items()}


def test_dump_erofs_agrees_on_the_superblock(tmp_path: pathlib.Path) -> None:
    root, contents = torture()
    path = tmp_path / "image"
    path.write_bytes(layer_image.build(root, contents))
    out = subprocess.run(["dump.erofs", "-s", path], check=True, capture_output=True, text=True).stdout
    superblock = layer_image.reader(path.read_bytes()).superblock
    fields = dict(line.split(":", 1) for line in out.splitlines() if ":" in line)
    assert int(fields["Filesystem blocks"]) == path.stat().st_size // 4096 == superblock.blocks
    assert int(fields["Filesystem root nid"]) == superblock.root_nid == 1
    assert int(fields["Filesystem inode count"]) == superblock.inodes
    assert fields["Filesystem features"].split() == ["sb_csum", "mtime"]


# -- placement -------------------------------------------------------------------------------------------


def test_large_files_start_on_block_boundaries_and_small_ones_are_kept_inline() -> None:
    contents = {
        file(): noise(size) for size in (100, 65535, 65536, 300_000, 256, 257, 4096 + 256, 8192 + 257)
    }
    root = directory({b"%d" % n: node for n, node in enumerate(contents)})
    layer_image.build(root, contents)
    by_size = {len(data): node for node, data in contents.items()}
    assert [by_size[size].data_start for size in (100, 256)] == [-1, -1]
    assert all(by_size[size].data_start % 65536 == 0 for size in (65536, 300_000))
    assert all(node.data_start % 4096 == 0 for node in contents if node.data_start >= 0)
    assert [len(by_size[size].tail) for size in (100, 256, 257, 4352, 8449)] == [100, 256, 0, 256, 0]


def small_tree(data_bytes: int) -> tuple[Node, dict[Node, bytes]]:
    """A tree whose metadata region has 8192 bytes, with two files of data."""
    half = data_bytes // 8192 * 4096
    contents = {file(): noise(half), file(): noise(data_bytes - half)}
    names = {b"%d" % n: node for n, node in enumerate(contents)}
    return directory({**names, b"link": symlink(b"m" * 3000), b"more": symlink(b"n" * 3000)}), contents


def written(tree: tuple[Node, dict[Node, bytes]], block_bytes: int) -> tuple[bytes, erofs_writer.Layout]:
    sink = layer_image.MemorySink(block_bytes)
    layout = layer_image.write_image(sink, *tree)
    assert layout.image_bytes == len(sink.image())
    assert sink.most_held <= erofs_writer.MOST_BUFFERS
    return sink.image(), layout


def check_region(image: bytes, layout: erofs_writer.Layout) -> None:
    """All metadata lies in the region that the layout names, and the root comes first in it."""
    touched: list[tuple[int, int]] = []

    def read(offset: int, length: int) -> bytes:
        touched.append((offset, offset + length))
        return image[offset : offset + length]

    watched = erofs.Reader(read)
    assert watched.superblock.metadata_block * 4096 == layout.metadata_offset
    assert watched.superblock.root_nid == 1
    stack = [watched.root()]
    while stack:
        inode = stack.pop()
        watched.xattrs(inode)
        if stat.S_ISDIR(inode.mode):
            stack += [watched.inode(entry.nid) for entry in watched.readdir(inode)]
        elif stat.S_ISLNK(inode.mode):
            watched.readlink(inode)
    end = layout.metadata_offset + layout.metadata_bytes
    assert all(layout.metadata_offset <= begin <= stop <= end for begin, stop in touched if stop > 4096)


def blocks_of_a_mount(layout: erofs_writer.Layout, block_bytes: int) -> set[int]:
    first, last = layout.metadata_offset, layout.metadata_offset + layout.metadata_bytes - 1
    return {0, *range(first // block_bytes, last // block_bytes + 1)}


@pytest.mark.root
@pytest.mark.parametrize(
    ("data_bytes", "metadata_offset", "image_bytes"),
    [
        # Superblock, region and data in one block, to its last byte.
        (0, 4096, 3 * 4096),
        (1000, 4096, 4 * 4096),
        (65536 - 3 * 4096, 4096, 65536),
        # The region behind the superblock, data from block 1 on.
        (65536 - 2 * 4096, 4096, 65536 + 14 * 4096),
        (65536, 4096, 2 * 65536),
        (150_000, 4096, 3 * 65536 + 19 * 4096),
    ],
)
def test_a_mount_needs_block_0_alone(
    tmp_path: pathlib.Path, data_bytes: int, metadata_offset: int, image_bytes: int
) -> None:
    root, contents = small_tree(data_bytes)
    image, layout = written((root, contents), 65536)
    assert layout == erofs_writer.Layout(image_bytes, metadata_offset, 8192, 5)
    assert blocks_of_a_mount(layout, 65536) == {0}
    check_region(image, layout)
    check_that_it_mounts(tmp_path, (root, contents))
    if image_bytes > 65536:
        assert not any(image[4096 + 8192 : 65536])


def test_metadata_that_does_not_fit_block_0_has_blocks_of_its_own_after_the_data() -> None:
    root, contents = torture()
    image, layout = written((root, contents), 65536)
    assert layout.metadata_bytes > 65536
    assert layout.metadata_offset % 65536 == 0
    assert layout.metadata_offset + layout.metadata_bytes == layout.image_bytes
    assert not any(image[4096:65536])
    assert layout.inodes == len({id(node) for _, node in layer_image.walk(root)})
    check_region(image, layout)


def test_the_region_that_just_fits_block_0() -> None:
    for count, offset in ((15, 4096), (16, 65536)):
        # A symlink with its inode fills 4 KiB; the root has the first, and the last stays empty for fsck.
        links = {b"%d" % number: symlink(b"t" * 4032) for number in range(count - 2)}
        _, layout = written((directory(links), {}), 65536)
        assert (layout.metadata_bytes, layout.metadata_offset) == (count * 4096, offset)


def test_data_addresses_are_the_same_wherever_the_region_is() -> None:
    """A library of a block or more makes the same blocks in every image."""
    library = noise(200_000)
    found = []
    for more in (0, 2000):
        contents = {file(): library}
        names = {b"lib": next(iter(contents)), **{b"%d" % n: symlink(b"t" * 100) for n in range(more)}}
        image, layout = written((directory(names), contents), 65536)
        assert (layout.metadata_offset == 4096) == (more == 0)
        found.append(image[65536 : 4 * 65536])
    assert found[0] == found[1] == library[: 3 * 65536]


@pytest.mark.parametrize("hole", [4096, 65536, 300_000])
def test_data_that_ends_with_a_hole(hole: int) -> None:
    sink = layer_image.MemorySink(65536)
    writer = erofs_writer.ErofsWriter(sink, 65536)
    node = file()
    content = layer_image.Content((0, noise(5000)), (hole, b""))
    writer.add_file(node, content.size, content)
    writer.finish(directory({b"f": node}))
    source = layer_image.reader(sink.image())
    inode = source.lookup(source.root(), b"f")
    assert inode is not None
    assert source.read(inode, 0, inode.size) == noise(5000) + bytes(hole)


@pytest.mark.parametrize("block_bytes", [65536, 1 << 20])
def test_nothing_of_what_a_buffer_held_gets_into_the_image(
    monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    images = []
    for junk in (0, 0xAA):
        monkeypatch.setattr(layer_image, "JUNK", (junk,))
        images.append(written(torture(), block_bytes)[0])
        images.append(written(small_tree(30_000), block_bytes)[0])
    assert images[:2] == images[2:]


def test_the_image_depends_on_the_tree_alone_not_on_the_order_it_was_built_in() -> None:
    root, contents = torture()
    again, contents_again = torture()
    for _, node in list(layer_image.walk(again)):
        if node.children is not None:
            node.children = dict(reversed(node.children.items()))
    assert layer_image.build(root, contents) == layer_image.build(again, contents_again)


def test_images_that_differ_have_different_uuids() -> None:
    one, two = (layer_image.build(directory(mtime_ns=n), {}) for n in (1, 2))
    assert layer_image.reader(one).superblock.uuid != layer_image.reader(two).superblock.uuid


def test_an_empty_layer_is_two_blocks_of_4_kib() -> None:
    image, layout = written((directory(), {}), 65536)
    assert layout == erofs_writer.Layout(8192, 4096, 4096, 1)
    assert list(layer_image.reader(image).readdir(layer_image.reader(image).root())) == []


# -- holes and sizes -------------------------------------------------------------------------------------

hole_runs = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 255, 4096, 65536, 70000, 262144]),
        st.integers(0, 70000).map(lambda size: noise(size, 9)),
    ),
    max_size=5,
)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    files=st.lists(st.tuples(hole_runs, st.sampled_from([1, 100, 4096, 1 << 20])), min_size=1, max_size=4)
)
def test_holes_read_as_zeros(files: list[tuple[list[tuple[int, bytes]], int]]) -> None:
    sink = layer_image.MemorySink(65536)
    writer = erofs_writer.ErofsWriter(sink, 65536)
    expected: dict[bytes, bytes] = {}
    children: dict[bytes, Node] = {}
    for number, (runs, piece_bytes) in enumerate(files):
        # One byte at a time only where that ends.
        runs = [run for run in runs if piece_bytes > 1 or len(run[1]) < 300]
        content = layer_image.Content(*runs, piece_bytes=piece_bytes)
        name = b"%d" % number
        children[name] = file()
        writer.add_file(children[name], content.size, content)
        expected[name] = b"".join(bytes(hole) + data for hole, data in runs)
    writer.finish(directory(children))
    source = layer_image.reader(sink.image())
    for name, data in expected.items():
        inode = source.lookup(source.root(), name)
        assert inode is not None
        assert source.read(inode, 0, inode.size) == data


@pytest.mark.root
def test_a_file_beyond_4_gib_whose_hole_costs_no_buffers(tmp_path: pathlib.Path) -> None:
    sink = layer_image.FileSink(4 << 20, tmp_path / "image")
    writer = erofs_writer.ErofsWriter(sink, 4 << 20)
    node = file()
    content = layer_image.Content((0, b"head"), (5 << 30, b"middle"), (1 << 30, b"tail"))
    writer.add_file(node, content.size, content)
    writer.finish(directory({b"huge": node}))
    assert len(sink.zeros) >= (6 << 30) // (4 << 20) - 3
    with layer_image.mounted(tmp_path / "image", tmp_path / "mnt") as top:
        fd = os.open(top + b"/huge", os.O_RDONLY)
        assert os.fstat(fd).st_size == (6 << 30) + 14
        assert os.pread(fd, 8, 0) == b"head" + bytes(4)
        assert os.pread(fd, 8, (5 << 30) + 3) == b"\0middle\0"
        assert os.pread(fd, 8, (6 << 30) + 8) == b"\0\0tail"
        os.close(fd)


@pytest.mark.root
def test_a_hundred_thousand_files_in_one_directory(tmp_path: pathlib.Path) -> None:
    names = {b"file-%06d.dat" % number: file(mtime_ns=number) for number in range(100_000)}
    sink = layer_image.MemorySink(65536)
    layout = layer_image.write_image(sink, directory({b"d": directory(names), b"after": file()}), {})
    assert sink.most_held <= erofs_writer.MOST_BUFFERS
    # Inode and entry, and less than 2% lost to boundaries.
    assert layout.metadata_bytes < 100_000 * (64 + 12 + 15) * 1.02
    (tmp_path / "image").write_bytes(sink.image())
    with layer_image.mounted(tmp_path / "image", tmp_path / "mnt") as top:
        assert sorted(os.listdir(top + b"/d")) == sorted(names)
        for number in (0, 1, 49_999, 99_999):
            assert os.stat(top + b"/d/file-%06d.dat" % number).st_mtime_ns == number
        assert not os.path.exists(top + b"/d/file-050000.da")


def test_fsck_accepts_an_inode_at_the_very_end(tmp_path: pathlib.Path) -> None:
    # Of 104 inodes, 40 fit beside the root; 64 fill the second block to its last byte.
    for count in range(95, 110):
        root = directory({b"%c" % (64 + n): Node(stat.S_IFIFO) for n in range(count)})
        (tmp_path / "image").write_bytes(layer_image.build(root, {}))
        subprocess.run(["fsck.erofs", tmp_path / "image"], check=True, capture_output=True)


def test_two_thousand_directories_deep() -> None:
    root = directory()
    deepest = root
    for _ in range(2000):
        assert deepest.children is not None
        deepest.children[b"d"] = deepest = directory()
    source = layer_image.reader(layer_image.build(root, {}))
    inode, parent = source.root(), source.root()
    for _ in range(2000):
        found = source.lookup(inode, b"d")
        assert found is not None
        up = source.lookup(found, b"..")
        assert up is not None
        assert up.nid == inode.nid
        parent, inode = inode, found
    assert parent.links == 3
    assert inode.links == 2


# -- any tree --------------------------------------------------------------------------------------------

names = st.binary(min_size=1, max_size=255).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b"..")
)
# Linux shows user.* on files and directories only, so a mount could not confirm them elsewhere.
xattr_names = st.sampled_from([b"trusted.a", b"trusted." + b"k" * 100, b"security.ima"])
xattr_values = st.binary(max_size=300) | st.integers(1000, 9000).map(lambda size: noise(size, 5))
xattrs = st.none() | st.dictionaries(xattr_names, xattr_values, min_size=1)
attributes = {
    "uid": st.integers(0, 2**32 - 2),
    "gid": st.integers(0, 2**32 - 2),
    "mtime_ns": st.integers(-(2**31) * 10**9, 2**33 * 10**9),
    "xattrs": xattrs,
}
permissions = st.integers(0, 0o7777)


def nodes(kind: int, **more: st.SearchStrategy[object]) -> st.SearchStrategy[Node]:
    return st.builds(Node, permissions.map(lambda mode: kind | mode), **attributes, **more)


leaves = st.one_of(
    nodes(stat.S_IFREG),
    nodes(stat.S_IFLNK, target=st.binary(min_size=1, max_size=4095).map(lambda t: t.replace(b"\0", b"x"))),
    nodes(stat.S_IFCHR, rdev_major=st.integers(0, 0xFFF), rdev_minor=st.integers(0, 0xFFFFF)),
    nodes(stat.S_IFIFO),
)
folders = st.recursive(
    nodes(stat.S_IFDIR, children=st.dictionaries(names, leaves, max_size=8)),
    lambda inner: nodes(stat.S_IFDIR, children=st.dictionaries(names, inner | leaves, max_size=6)),
    max_leaves=12,
)


@st.composite
def trees(draw: st.DrawFn) -> tuple[Node, dict[Node, bytes]]:
    root = draw(folders)
    every = [node for _, node in layer_image.walk(root)]
    files = [node for node in every if stat.S_ISREG(node.mode)]
    homes = [node for node in every if node.children is not None]
    if files:
        for number in range(draw(st.integers(0, 4))):
            node = draw(st.sampled_from(files))
            home = draw(st.sampled_from(homes))
            assert home.children is not None
            home.children[b"link %d" % number] = node
            node.links += 1
    sizes = st.sampled_from(SIZES) | st.integers(0, 20_000)
    contents = {node: noise(draw(sizes), number) for number, node in enumerate(files)}
    return root, contents


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(tree=trees())
def test_any_tree_reads_back(tree: tuple[Node, dict[Node, bytes]]) -> None:
    root, contents = tree
    source = layer_image.reader(layer_image.build(root, contents))
    assert layer_image.listing_of_reader(source) == layer_image.listing(root, contents)
    for path, node in layer_image.walk(root):
        inode = source.root()
        for name in path.split(b"/")[1:]:
            found = source.lookup(inode, name)
            assert found is not None
            assert source.lookup(inode, name + b"\1") is None
            inode = found
        assert inode.mode == node.mode


def check_that_it_mounts(folder: pathlib.Path, tree: tuple[Node, dict[Node, bytes]]) -> None:
    root, contents = tree
    (folder / "image").write_bytes(layer_image.build(root, contents))
    fsck = subprocess.run(["fsck.erofs", folder / "image"], capture_output=True, text=True)
    assert fsck.returncode == 0, fsck.stdout + fsck.stderr
    with layer_image.mounted(folder / "image", folder / "mnt") as top:
        assert layer_image.listing_of_path(top) == layer_image.listing(root, contents)


shared_folder = [hypothesis.HealthCheck.function_scoped_fixture]


@pytest.mark.root
@hypothesis.settings(deadline=None, max_examples=20, suppress_health_check=shared_folder)
@hypothesis.given(tree=trees())
def test_any_tree_mounts(tmp_path: pathlib.Path, tree: tuple[Node, dict[Node, bytes]]) -> None:
    check_that_it_mounts(tmp_path, tree)


@pytest.mark.root
@pytest.mark.soak
@hypothesis.settings(deadline=None, max_examples=2000, suppress_health_check=shared_folder)
@hypothesis.given(tree=trees())
def test_very_many_trees_mount(tmp_path: pathlib.Path, tree: tuple[Node, dict[Node, bytes]]) -> None:
    check_that_it_mounts(tmp_path, tree)


# -- what cannot be written ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("xattrs", "words"),
    [
        ({b"btrfs.compression": b"lzo"}, "btrfs.compression"),
        ({b"user.": b""}, "user."),
        ({b"system.posix_acl_accessx": b""}, "posix_acl_accessx"),
        ({b"user." + b"n" * 256: b""}, "no place"),
        ({b"user.big": bytes(65536)}, "65535"),
        ({b"user.%d" % n: bytes(65535) for n in range(5)}, "one inode"),
    ],
)
def test_attributes_that_erofs_cannot_hold(xattrs: dict[bytes, bytes], words: str) -> None:
    with pytest.raises(errors.InvalidLayerError, match=words):
        layer_image.build(directory({b"f": file(xattrs=xattrs)}), {})


def test_device_numbers_out_of_range() -> None:
    node = Node(stat.S_IFCHR | 0o600, rdev_major=1 << 12)
    with pytest.raises(errors.InvalidLayerError, match="4096:0"):
        layer_image.build(directory({b"d": node}), {})


@pytest.mark.parametrize(("size", "given_bytes"), [(5000, 4999), (100, 99), (70000, 0)])
def test_data_that_ends_early(size: int, given_bytes: int) -> None:
    writer = erofs_writer.ErofsWriter(layer_image.MemorySink(65536), 65536)
    with pytest.raises(errors.InvalidLayerError, match="early"):
        writer.add_file(file(), size, layer_image.Content((0, bytes(given_bytes))))


def test_crc32c_of_the_check_vector() -> None:
    assert ondisk.crc32c(b"123456789") ^ 0xFFFFFFFF == 0xE3069283
