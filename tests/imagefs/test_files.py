"""The merged view of the file-level mount, and its errors. That it shows what the kernel's overlayfs shows is
tests/glowplug/test_mount.py's."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path

import mfusepy
import pytest

from converter.tree import Node
from imagefs import errors, image, merged, reference
from imagefs.fuse import files
from tests.fixtures import block_images, images, layer_image

OPAQUE = {b"trusted.overlay.opaque": b"y"}


def whiteout() -> Node:
    return Node(stat.S_IFCHR)


def view(*roots: Node, implied: Sequence[bool] | None = None) -> merged.MergedView:
    """Layers bottom first."""
    readers = [layer_image.reader(layer_image.build(root, {})) for root in roots]
    return merged.MergedView(readers, implied or [False] * len(roots))


def names(found: merged.MergedView, *path: bytes) -> list[bytes]:
    node: merged.Node | None = found.root
    for name in path:
        assert node is not None
        node = found.lookup(node, name)
    assert node is not None
    return sorted(entry.name for entry in found.readdir(node))


def folder(xattrs: dict[bytes, bytes] | None = None, **children: Node) -> Node:
    named = {name.encode(): child for name, child in children.items()}
    return layer_image.directory(named, xattrs=xattrs)


def test_directories_merge_and_the_topmost_shows() -> None:
    found = view(
        folder(d=layer_image.directory({b"low": layer_image.file()}, uid=1)),
        folder(d=layer_image.directory({b"high": layer_image.file()}, uid=2)),
    )
    assert names(found, b"d") == [b"high", b"low"]
    node = found.lookup(found.root, b"d")
    assert node is not None
    assert node.inode.uid == 2


def test_a_whiteout_hides_and_is_hidden() -> None:
    found = view(
        folder(gone=layer_image.file(), kept=layer_image.file()), folder(gone=whiteout(), never=whiteout())
    )
    assert names(found) == [b"kept"]
    assert found.lookup(found.root, b"gone") is None


def test_a_name_comes_back_above_its_whiteout_without_what_was_below() -> None:
    found = view(
        folder(d=folder(old=layer_image.file())),
        folder(d=whiteout()),
        folder(d=folder(new=layer_image.file())),
    )
    assert names(found, b"d") == [b"new"]


def test_an_opaque_directory_ends_the_merge() -> None:
    found = view(
        folder(d=folder(old=layer_image.file())),
        folder(d=folder(OPAQUE, middle=layer_image.file())),
        folder(d=folder(top=layer_image.file())),
    )
    assert names(found, b"d") == [b"middle", b"top"]
    node = found.lookup(found.root, b"d")
    assert node is not None
    assert found.xattrs(node) == {}


def test_an_opaque_root_ends_the_merge() -> None:
    assert names(view(folder(old=layer_image.file()), folder(OPAQUE, new=layer_image.file()))) == [b"new"]


def test_a_file_replaces_a_directory_and_back() -> None:
    found = view(
        folder(x=folder(old=layer_image.file()), y=layer_image.file()),
        folder(x=layer_image.file(), y=folder(new=layer_image.file())),
    )
    node = found.lookup(found.root, b"x")
    assert node is not None
    assert stat.S_ISREG(node.inode.mode)
    assert names(found, b"y") == [b"new"]


def test_a_file_in_the_middle_ends_the_merge() -> None:
    found = view(
        folder(x=folder(old=layer_image.file())),
        folder(x=layer_image.file()),
        folder(x=folder(new=layer_image.file())),
    )
    assert names(found, b"x") == [b"new"]


def test_hard_links_share_a_number_and_layers_do_not() -> None:
    linked = layer_image.file(links=2)
    found = view(folder(a=linked, b=linked), folder(c=layer_image.file()))
    numbers = {entry.name: entry.number for entry in found.readdir(found.root)}
    assert numbers[b"a"] == numbers[b"b"]
    assert numbers[b"a"] != numbers[b"c"]
    node = found.lookup(found.root, b"a")
    assert node is not None
    assert node.number == numbers[b"a"]


def test_the_root_that_has_attributes_shows() -> None:
    roots = [layer_image.directory({}, uid=uid) for uid in (1, 2, 3)]
    assert view(*roots, implied=[False, False, True]).root.inode.uid == 2
    nobody = view(*roots, implied=[True, True, True])
    assert nobody.root_is_implied


@pytest.fixture
def broken(tmp_path: Path) -> files.ImageFiles:
    """Metadata can be read, data not."""
    ref = block_images.make(tmp_path, [images.tar_of([("file", b"x" * 70_000), ("d", None)])])
    opened = image.open_image(reference.parse(ref))
    (layer,) = opened.layers
    data = b"".join(opened.origin.stream_blob(layer.blob_digest, layer.block_map.blob_bytes))
    (tmp_path / "blob").write_bytes(data)
    subprocess.run(["zstd", "-dqf", tmp_path / "blob", "-o", tmp_path / "plain"], check=True)
    plain = (tmp_path / "plain").read_bytes()

    def read(map_digest: str, offset: int, length: int) -> bytes:
        assert map_digest == layer.map_digest
        if offset >= layer.block_map.block_bytes:
            raise errors.UnavailableError("the origin does not answer")
        return plain[offset : offset + length]

    assert layer.block_map.metadata_blocks() == [0]
    return files.ImageFiles(opened.layers, read, lambda: None)


def test_errors_are_errnos(broken: files.ImageFiles) -> None:
    for call, code in (
        (lambda: broken.getattr("/nothing"), errno.ENOENT),
        (lambda: broken.getattr("/file/inside"), errno.ENOENT),
        (lambda: broken.open("/file", os.O_WRONLY), errno.EROFS),
        (lambda: broken.getxattr("/file", "user.none"), errno.ENODATA),
        (lambda: broken.read("/file", 4096, 0, broken.open("/file", os.O_RDONLY)), errno.EIO),
    ):
        with pytest.raises(mfusepy.FuseOSError) as raised:
            call()
        assert raised.value.errno == code


def test_handles_are_let_go(broken: files.ImageFiles) -> None:
    number = broken.open("/file", os.O_RDONLY)
    broken.release("/file", number)
    with pytest.raises(KeyError):
        broken.read("/file", 1, 0, number)


def test_names_come_with_inode_numbers(broken: files.ImageFiles) -> None:
    """A name with number 0 counts as deleted for whoever reads the directory."""
    found = {name: attributes for name, attributes, _ in broken.readdir("/", 0)}
    assert set(found) == {".", "..", "d", "file"}
    assert all(attributes["st_ino"] for attributes in found.values())
    assert found["file"]["st_ino"] == broken.getattr("/file")["st_ino"]
