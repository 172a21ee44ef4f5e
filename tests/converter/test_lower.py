"""Finished layers read back as what lies below another: from a spool file, and from an origin."""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import stat
from collections.abc import Generator

import pytest

from converter import blob, erofs_writer, lower, memory, stages, tasks
from converter.tree import Node
from imagefs import errors
from imagefs.lazylayer import LazyLayer
from tests.converter.test_erofs_writer import noise
from tests.fixtures import layer_image
from tests.fixtures.layer_image import directory, file, symlink

BLOCK = 65536
DIGEST = "sha256:" + "1" * 64


def convert(path: pathlib.Path, root: Node, contents: layer_image.Contents) -> blob.FinishedBlob:
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        pool = memory.BufferPool(tasks.Group(), BLOCK, 4)
        sink = blob.LayerBlobWriter(path, BLOCK, BLOCK, 1, executor, pool, stages.Meter().laps())
        writer = erofs_writer.ErofsWriter(sink, BLOCK)
        for node, data in contents.items():
            writer.add_file(node, len(data), layer_image.Content((0, data)))
        return sink.finish(writer.finish(root), DIGEST, DIGEST, None, False)


class RangeOrigin:
    """The one method of an origin that reading back uses."""

    def __init__(self, finished: blob.FinishedBlob) -> None:
        self._data = finished.path.read_bytes()

    def stream_range(
        self, digest: str, offset: int, length: int, deadline: float | None = None
    ) -> Generator[bytes, None, None]:
        yield self._data[offset : offset + length]


def remote(finished: blob.FinishedBlob) -> LazyLayer:
    origin = RangeOrigin(finished)
    return LazyLayer(finished.map_digest, finished.digest, finished.block_map, origin)  # type: ignore[arg-type]


@pytest.mark.parametrize("from_origin", [False, True])
def test_a_stack_is_the_merged_view(tmp_path: pathlib.Path, from_origin: bool) -> None:
    big, small = file(uid=5, xattrs={b"user.a": b"b"}), file()
    contents = {big: noise(300_000) + bytes(3 * BLOCK) + b"end", small: b"small"}
    bottom = directory({b"etc": directory({b"big": big, b"gone": small}), b"link": symlink(b"etc/big")})
    whiteout = Node(stat.S_IFCHR)
    top = directory({b"etc": directory({b"gone": whiteout}, gid=9)}, uid=3)
    layers: list[lower.LayerFile | LazyLayer] = [
        convert(tmp_path / "bottom", bottom, contents),
        convert(tmp_path / "top", top, {}),
    ]
    if from_origin:
        layers = [remote(layer) for layer in layers if isinstance(layer, blob.FinishedBlob)]
    stack = lower.Stack(layers)
    root, etc, found = stack.lookup(()), stack.lookup((b"etc",)), stack.lookup((b"etc", b"big"))
    assert root is not None
    assert root.uid == 3
    assert etc is not None
    assert etc.gid == 9
    assert found is not None
    assert (found.uid, found.size, found.xattrs) == (5, len(contents[big]), {b"user.a": b"b"})
    assert found.read(0, found.size) == contents[big]
    assert found.read(299_999, 2) == contents[big][299_999:300_001]
    link = stack.lookup((b"link",))
    assert link is not None
    assert link.target == b"etc/big"
    assert stack.lookup((b"etc", b"gone")) is None
    assert stack.lookup((b"etc", b"big", b"beyond")) is None
    assert stack.lookup((b"absent", b"beyond")) is None
    assert list(stack.children((b"etc",))) == [b"big"]


@pytest.mark.parametrize("from_origin", [False, True])
def test_damaged_blocks_are_never_used(tmp_path: pathlib.Path, from_origin: bool) -> None:
    node = file()
    finished = convert(tmp_path / "spool", directory({b"f": node}), {node: noise(300_000)})
    data = bytearray(finished.path.read_bytes())
    data[finished.block_map.blocks[2].offset + 100] ^= 1
    finished.path.write_bytes(data)
    stack = lower.Stack([remote(finished) if from_origin else finished])
    entry = stack.lookup((b"f",))
    assert entry is not None
    with pytest.raises(errors.IntegrityError, match="block 2"):
        entry.read(0, entry.size)


def test_a_spool_file_cut_short(tmp_path: pathlib.Path) -> None:
    finished = convert(tmp_path / "spool", directory(), {})
    os.truncate(finished.path, 10)
    with pytest.raises(errors.IntegrityError):
        lower.Stack([finished])
