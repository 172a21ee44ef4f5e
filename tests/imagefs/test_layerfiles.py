"""Layer files: the very bytes of the layer image, or nothing; and entries of the cache like any other."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from imagefs import cache, cachedirectory, cachehousekeeping, errors
from imagefs.layerfiles import GaveUpError, LayerFiles
from imagefs.lazylayer import LazyLayer
from tests.imagefs import scripted
from tests.imagefs.fuse import stack

BLOCK = scripted.BLOCK_BYTES


class Bench:
    """A cache with the blocks of layers, and their files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cache = cache.BlockCache(path, 1 << 30, 0)
        assert self.cache.index.ready.wait(30)
        self.files = LayerFiles(self.cache, path)

    def layer(self, image: bytes) -> LazyLayer:
        """A layer whose blocks are in the cache."""
        made = stack.make_layer(image, BLOCK)
        for index, block in enumerate(made.block_map.blocks):
            data = image[index * BLOCK : (index + 1) * BLOCK]
            if not block.zero:
                draft = self.cache.draft(len(data))
                draft.write(memoryview(data), 0)
                os.close(self.cache.put(block.digest, draft, data))
        scripted.eventually(lambda: not self.cache.stats().unsynced_blocks)
        origin = scripted.ScriptedOrigin()
        return LazyLayer(made.map_digest, stack.digest(made.blob), made.block_map, origin)

    def write(self, layer: LazyLayer) -> bytes:
        return self.files.write(layer.map_digest, layer.block_map, lambda: True)

    def forget(self, digest: bytes) -> None:
        """As after a boot, to a process that has just begun."""
        path = cachedirectory.CacheDirectory(self.path).block_path(digest)
        os.removexattr(path, cachedirectory.BOOT_ATTRIBUTE)
        self.close()
        self.cache = cache.BlockCache(self.path, 1 << 30, 0)
        self.files = LayerFiles(self.cache, self.path)

    def leftovers(self) -> list[Path]:
        """Files that are being written, or were left."""
        return [path for path in (self.path / "writers").glob("*/*") if path.name != "lock"]

    def close(self) -> None:
        self.files.close()
        self.cache.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path / "cache")
    yield made
    made.close()


def image(blocks: int, seed: int, zeros: tuple[int, ...] = ()) -> bytes:
    data = bytearray(stack.layer_image(blocks * BLOCK - 2 * 4096, seed))
    for index in zeros:
        data[index * BLOCK : (index + 1) * BLOCK] = bytes(len(data[index * BLOCK : (index + 1) * BLOCK]))
    return bytes(data)


def test_a_file_has_the_images_bytes_and_its_digest_as_name(bench: Bench) -> None:
    data = image(5, 1, zeros=(2,))
    layer = bench.layer(data)
    digest = bench.write(layer)
    path = bench.files.path(layer.map_digest)
    assert path.read_bytes() == data
    assert digest == hashlib.sha256(data).digest() == bytes.fromhex(path.readlink().name)
    assert path.stat().st_blocks * 512 < len(data), "a block of zeros is a hole"
    assert path.stat().st_mode & 0o077 == 0
    assert digest in bench.cache
    assert bench.files.checked(layer.map_digest, len(data)) == digest
    assert not bench.leftovers()


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12)
@given(st.lists(st.booleans(), min_size=0, max_size=6), st.integers(1, 16), st.integers(0, 1 << 30))
def test_whatever_blocks_are_zero_and_wherever_it_ends(
    bench: Bench, are_zero: list[bool], tail_pages: int, seed: int
) -> None:
    size = (1 + len(are_zero)) * BLOCK + tail_pages * 4096
    data = bytearray(stack.layer_image(size, seed))
    for index in [number + 1 for number, zero in enumerate(are_zero) if zero]:
        data[index * BLOCK : (index + 1) * BLOCK] = bytes(BLOCK)
    layer = bench.layer(bytes(data))
    bench.write(layer)
    assert bench.files.path(layer.map_digest).read_bytes() == data
    for index, block in enumerate(layer.block_map.blocks):
        if not block.zero:
            fd = bench.files.block(layer, index)
            assert fd is not None
            with open(fd, "rb") as file:
                assert file.read() == data[index * BLOCK : (index + 1) * BLOCK]


def test_a_layer_that_lacks_a_block_gets_none(bench: Bench) -> None:
    layer = bench.layer(image(4, 2))
    os.unlink(cachedirectory.CacheDirectory(bench.path).block_path(layer.block_map.blocks[3].digest))
    with pytest.raises(GaveUpError, match="was evicted"):
        bench.write(layer)
    assert bench.files.digest(layer.map_digest) is None
    assert not bench.leftovers()


def test_a_writer_that_is_to_stop_leaves_nothing(bench: Bench) -> None:
    layer = bench.layer(image(4, 3))
    answers = iter([True, True, False])
    with pytest.raises(GaveUpError):
        bench.files.write(layer.map_digest, layer.block_map, lambda: next(answers))
    assert not bench.leftovers()
    assert not list((bench.path / "layers").iterdir())


def test_a_superblock_that_the_kernel_may_not_see_is_in_no_file(bench: Bench) -> None:
    layer = bench.layer(stack.random_image(4 * BLOCK, 4))
    with pytest.raises(errors.IntegrityError, match="not shown to the kernel"):
        bench.write(layer)
    assert not bench.leftovers()


def test_a_layer_whose_first_block_is_of_zeros_gets_none(bench: Bench) -> None:
    layer = bench.layer(image(4, 15, zeros=(0,)))
    with pytest.raises(GaveUpError, match="of zeros"):
        bench.write(layer)
    assert not bench.leftovers()


def test_after_a_boot_a_file_is_hashed_before_it_counts(bench: Bench) -> None:
    data = image(4, 5)
    layer = bench.layer(data)
    digest = bench.write(layer)
    bench.forget(digest)
    assert bench.files.checked(layer.map_digest, len(data)) is None
    assert bench.files.check(layer.map_digest, len(data), lambda: True) == digest
    assert bench.files.checked(layer.map_digest, len(data)) == digest


def test_a_damaged_file_goes(bench: Bench) -> None:
    data = image(4, 6)
    layer = bench.layer(data)
    digest = bench.write(layer)
    with bench.files.path(layer.map_digest).open("r+b") as file:
        file.seek(random.Random(6).randrange(len(data)))
        file.write(b"?!")
    bench.forget(digest)
    assert bench.files.check(layer.map_digest, len(data), lambda: True) is None
    assert bench.files.digest(layer.map_digest) is None
    assert not bench.files.path(layer.map_digest).exists()


def test_a_file_of_another_length_does_not_count(bench: Bench) -> None:
    data = image(4, 7)
    layer = bench.layer(data)
    bench.write(layer)
    assert bench.files.checked(layer.map_digest, len(data) + 4096) is None


def test_wrong_bytes_of_a_file_are_no_block(bench: Bench) -> None:
    layer = bench.layer(image(4, 8))
    bench.write(layer)
    with bench.files.path(layer.map_digest).open("r+b") as file:
        file.seek(2 * BLOCK + 17)
        file.write(bytes(3))
    assert bench.files.block(layer, 2) is None
    os.close(bench.files.block(layer, 1) or -1)


def test_names_without_a_file_are_tidied(bench: Bench) -> None:
    kept, gone, whole = (bench.layer(image(2, seed)) for seed in (10, 11, 12))
    for layer in (kept, gone):
        os.unlink(bench.files.path(layer.map_digest).resolve() if bench.write(layer) else "")
    bench.write(whole)
    bench.files.tidy([kept.map_digest])
    left = {path.name for path in (bench.path / "layers").iterdir()}
    assert left == {layer.map_digest.removeprefix("sha256:") for layer in (kept, whole)}


def test_a_name_that_is_no_link_is_no_file(bench: Bench) -> None:
    layer = bench.layer(image(2, 13))
    bench.files.path(layer.map_digest).write_bytes(b"what")
    assert bench.files.digest(layer.map_digest) is None
    assert bench.files.check(layer.map_digest, 4, lambda: True) is None


def test_the_cache_verifies_and_evicts_it_as_it_does_blocks(bench: Bench) -> None:
    data = image(4, 14)
    layer = bench.layer(data)
    digest = bench.write(layer)
    files = cachedirectory.CacheDirectory(bench.path)
    entries = {entry.digest: entry for entry in files.scan()}
    assert entries[digest].allocated_bytes >= len(data)
    assert not cachehousekeeping.verify(files, entries.values()).damaged
    blocks = {block.digest for block in layer.block_map.blocks}
    collected = cachehousekeeping.collect(files, len(data) * 3 // 2, 0, lambda: {digest}, {})
    assert collected.removed
    assert {entry.digest for entry in collected.removed} <= blocks, "the file is in use, its blocks are not"
    assert bench.files.path(layer.map_digest).read_bytes() == data
