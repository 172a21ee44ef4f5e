"""Layer blobs: against `zstd -d`, the block map's own reader, and what may go wrong in a pool of threads."""

from __future__ import annotations

import concurrent.futures
import errno
import hashlib
import os
import pathlib
import struct
import subprocess
import threading
from collections.abc import Iterator

import hypothesis
import pytest
import zstandard
from hypothesis import strategies as st

from converter import blob, erofs_writer, memory, stages, tasks
from converter.erofs_writer import Layout
from imagefs import blockmap, errors, frames, syscalls
from tests.converter.test_erofs_writer import noise, torture
from tests.fixtures import layer_image

BLOCK = 65536
SOURCE, DIFF_ID, CHAIN_ID = ("sha256:" + digit * 64 for digit in "123")


@pytest.fixture
def executor() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield pool


def new_writer(
    path: pathlib.Path,
    executor: concurrent.futures.Executor,
    frame_bytes: int = BLOCK,
    level: int = 1,
    buffers: int = 8,
    kept: bool = False,
) -> blob.LayerBlobWriter:
    pool = memory.BufferPool(tasks.Group(), BLOCK, buffers)
    laps = stages.Meter().laps()
    return blob.LayerBlobWriter(path, BLOCK, frame_bytes, level, executor, pool, laps, kept)


def write(
    path: pathlib.Path,
    blocks: list[bytes],
    executor: concurrent.futures.Executor,
    frame_bytes: int = BLOCK,
    level: int = 1,
    chain_id: str | None = None,
    kept: bool = False,
) -> blob.FinishedBlob:
    """A blob of these blocks; the last may be shorter."""
    writer = new_writer(path, executor, frame_bytes, level, kept=kept)
    for index in [*range(1, len(blocks)), 0]:
        buffer = writer.acquire()
        buffer[: len(blocks[index])] = blocks[index]
        writer.put(index, buffer, len(blocks[index]))
    size = sum(map(len, blocks))
    return writer.finish(Layout(size, size - 4096, 4096, 1), SOURCE, DIFF_ID, chain_id, True)


def blob_bytes(finished: blob.FinishedBlob) -> bytes:
    return finished.path.read_bytes()


def sample_blocks(count: int, last_bytes: int = 8192) -> list[bytes]:
    out = [noise(BLOCK // 2, n) + bytes(BLOCK // 2) for n in range(count - 1)]
    if count > 4:
        out[2] = bytes(BLOCK)
    return [*out, noise(last_bytes, count)]


@pytest.mark.parametrize("frame_bytes", [4096, 16384, BLOCK])
@pytest.mark.parametrize("count", [1, 2, 40])
def test_zstd_gives_the_whole_image_and_the_map_each_block(
    tmp_path: pathlib.Path, executor: concurrent.futures.Executor, count: int, frame_bytes: int
) -> None:
    blocks = sample_blocks(count)
    finished = write(tmp_path / "spool", blocks, executor, frame_bytes, chain_id=CHAIN_ID)
    data = blob_bytes(finished)
    (tmp_path / "blob").write_bytes(data)
    out = subprocess.run(["zstd", "-d", "-c", tmp_path / "blob"], check=True, capture_output=True).stdout
    assert out == b"".join(blocks)
    assert finished.digest == "sha256:" + hashlib.sha256(data).hexdigest()
    assert finished.size == len(data)
    assert finished.map_digest == "sha256:" + hashlib.sha256(finished.map_bytes).hexdigest()
    block_map = blockmap.decode(finished.map_bytes)
    assert block_map == finished.block_map
    assert block_map.blob_digest.hex() == finished.digest.removeprefix("sha256:")
    assert (block_map.source_digest.hex(), block_map.diff_id.hex()) == ("1" * 64, "2" * 64)
    assert block_map.chain_id == bytes.fromhex("3" * 64)
    assert block_map.root_implied
    frames.check_sizes(block_map, "test")
    for index, block in enumerate(block_map.blocks):
        part = data[block.offset : block.offset + block.compressed_bytes]
        buffer = memoryview(bytearray(block_map.block_bytes))
        assert frames.decode_block(block_map, index, frames.Pieces([part]), "test", buffer) == blocks[index]
        assert block.zero == (not any(blocks[index]))
        start = 0
        for number, frame in enumerate(block.frames):
            piece = zstandard.ZstdDecompressor().decompress(part[start : start + frame.compressed_bytes])
            assert hashlib.sha256(piece).digest() == frame.digest
            assert piece == blocks[index][number * frame_bytes :][: len(piece)]
            start += frame.compressed_bytes


def test_the_seek_table_is_zstds(tmp_path: pathlib.Path, executor: concurrent.futures.Executor) -> None:
    blocks = sample_blocks(6)
    data = blob_bytes(write(tmp_path / "spool", blocks, executor, 16384))
    frame_count, flags, magic = struct.unpack("<IBI", data[-9:])
    assert (flags, magic) == (0, 0x8F92EAB1)
    table_start = len(data) - 9 - 8 * frame_count
    assert struct.unpack("<II", data[table_start - 8 : table_start]) == (0x184D2A5E, 8 * frame_count + 9)
    position, out = 0, b""
    for compressed, length in struct.iter_unpack("<II", data[table_start:-9]):
        piece = zstandard.ZstdDecompressor().decompress(data[position : position + compressed])
        assert len(piece) == length
        out += piece
        position += compressed
    assert position == table_start - 8
    assert out == b"".join(blocks)


def test_the_blob_does_not_depend_on_the_threads(tmp_path: pathlib.Path) -> None:
    blocks = sample_blocks(60)
    found = []
    for threads in (1, 4):
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            found.append(write(tmp_path / f"spool-{threads}", blocks, pool))
    assert found[0].digest == found[1].digest
    assert found[0].map_bytes == found[1].map_bytes


@hypothesis.settings(
    deadline=None, max_examples=25, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(
    kinds=st.lists(st.sampled_from(["zero", "put-zeros", "noise", "text"]), max_size=30),
    frame_bytes=st.sampled_from([8192, BLOCK]),
    last_pages=st.integers(1, 16),
)
def test_any_sequence_of_blocks(
    tmp_path: pathlib.Path,
    executor: concurrent.futures.Executor,
    kinds: list[str],
    frame_bytes: int,
    last_pages: int,
) -> None:
    (tmp_path / "spool").unlink(missing_ok=True)
    content = {
        "zero": bytes(BLOCK),
        "put-zeros": bytes(BLOCK),
        "noise": noise(BLOCK),
        "text": b"text" * (BLOCK // 4),
    }
    blocks = [noise(BLOCK, 7), *(content[kind] for kind in kinds), noise(4096 * last_pages, 8)]
    writer = new_writer(tmp_path / "spool", executor, frame_bytes)
    for index in [*range(1, len(blocks)), 0]:
        if 0 < index <= len(kinds) and kinds[index - 1] == "put-zeros":
            writer.put_zeros(index)
            continue
        buffer = writer.acquire()
        buffer[: len(blocks[index])] = blocks[index]
        writer.put(index, buffer, len(blocks[index]))
    size = sum(map(len, blocks))
    finished = writer.finish(Layout(size, size - 4096, 4096, 1), SOURCE, DIFF_ID, None, False)
    data = blob_bytes(finished)
    restored = zstandard.ZstdDecompressor().decompressobj(read_across_frames=True).decompress(data)
    assert restored == b"".join(blocks)
    zero = [block.zero for block in finished.block_map.blocks]
    assert zero == [not any(block) for block in blocks]


def test_a_layer_image_goes_through(tmp_path: pathlib.Path, executor: concurrent.futures.Executor) -> None:
    root, contents = torture()
    sink = layer_image.MemorySink(BLOCK)
    layer_image.write_image(sink, root, contents)
    root, contents = torture()
    writer = new_writer(tmp_path / "spool", executor)
    image_writer = erofs_writer.ErofsWriter(writer, BLOCK)
    for node, content in contents.items():
        image_writer.add_file(node, len(content), layer_image.Content((0, content)))
    layout = image_writer.finish(root)
    finished = writer.finish(layout, SOURCE, DIFF_ID, None, False)
    (tmp_path / "blob").write_bytes(blob_bytes(finished))
    out = subprocess.run(["zstd", "-d", "-c", tmp_path / "blob"], check=True, capture_output=True).stdout
    assert out == sink.image()
    assert finished.block_map.metadata_blocks()[-1] == len(finished.block_map.blocks) - 1 > 1


# -- bounds and faults -----------------------------------------------------------------------------------


def put_noise(writer: blob.LayerBlobWriter, count: int) -> None:
    for index in range(1, count + 1):
        buffer = writer.acquire()
        buffer[:] = noise(BLOCK, index)
        writer.put(index, buffer, BLOCK)


class Gate(concurrent.futures.ThreadPoolExecutor):
    """Work waits until `open` is set."""

    def __init__(self) -> None:
        super().__init__(2)
        self.open = threading.Event()

    def submit(self, fn, /, *args, **kwargs):  # type: ignore[no-untyped-def]
        def gated() -> object:
            self.open.wait()
            return fn(*args, **kwargs)

        return super().submit(gated)


def test_memory_is_bounded_by_waiting(tmp_path: pathlib.Path) -> None:
    with Gate() as pool:
        writer = new_writer(tmp_path / "spool", pool, buffers=5)
        held = 0

        def fill() -> None:
            nonlocal held
            for index in range(1, 8):
                buffer = writer.acquire()
                held += 1
                buffer[0] = 1
                writer.put(index, buffer, BLOCK)

        thread = threading.Thread(target=fill)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert held == 5
        pool.open.set()
        thread.join()
        assert held == 7
        writer.abort()
    assert not (tmp_path / "spool").exists()


def test_who_waits_for_a_buffer_hears_of_an_error(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(data: object) -> object:
        raise MemoryError("no room to hash")

    with Gate() as pool:
        writer = new_writer(tmp_path / "spool", pool, buffers=2)
        put_noise(writer, 2)
        monkeypatch.setattr(blob.hashlib, "sha256", broken)
        threading.Timer(0.05, pool.open.set).start()
        # Both buffers are gone for good.
        with pytest.raises(MemoryError, match="no room"):
            writer.acquire()
        writer.abort()


def test_an_error_in_a_thread_reaches_the_caller_and_leaves_no_file(
    tmp_path: pathlib.Path, executor: concurrent.futures.Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(data: object) -> object:
        raise MemoryError("no room to hash")

    writer = new_writer(tmp_path / "spool", executor)
    monkeypatch.setattr(blob.hashlib, "sha256", broken)
    with pytest.raises(MemoryError, match="no room"):
        put_noise(writer, 100)
    writer.abort()
    writer.abort()
    assert not (tmp_path / "spool").exists()


def test_a_cancelled_pool_is_an_error_not_a_wait(tmp_path: pathlib.Path) -> None:
    pool = Gate()
    writer = new_writer(tmp_path / "spool", pool)
    put_noise(writer, 7)
    pool.shutdown(wait=False, cancel_futures=True)
    pool.open.set()
    with pytest.raises(errors.ImagefsError, match="shut down"):
        writer.finish(Layout(BLOCK, 4096, 4096, 1), SOURCE, DIFF_ID, None, False)
    writer.abort()
    assert os.listdir(tmp_path) == []


@pytest.mark.root
def test_a_full_disk_is_said_and_leaves_no_file(
    tmp_path: pathlib.Path, executor: concurrent.futures.Executor
) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], check=True)
    try:
        writer = new_writer(tmp_path / "spool", executor)
        with pytest.raises(errors.ConfigurationError, match="No space left"):
            put_noise(writer, 100)
        writer.abort()
        assert os.listdir(tmp_path) == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_spool_file_is_never_overwritten(
    tmp_path: pathlib.Path, executor: concurrent.futures.Executor
) -> None:
    (tmp_path / "spool").write_bytes(b"mine")
    with pytest.raises(errors.ConfigurationError, match="File exists"):
        new_writer(tmp_path / "spool", executor)
    assert (tmp_path / "spool").read_bytes() == b"mine"


def test_incompressible_blocks_fit_the_room_before_block_1(
    tmp_path: pathlib.Path, executor: concurrent.futures.Executor
) -> None:
    for frame_bytes in (4096, BLOCK):
        finished = write(
            tmp_path / f"{frame_bytes}", [noise(BLOCK, 1), noise(BLOCK, 2)], executor, frame_bytes
        )
        assert zstandard.ZstdDecompressor().decompressobj(read_across_frames=True).decompress(
            blob_bytes(finished)
        ) == noise(BLOCK, 1) + noise(BLOCK, 2)


@pytest.mark.parametrize("works", [True, False])
def test_a_file_that_stays_is_on_its_way_to_the_disk(
    tmp_path: pathlib.Path,
    executor: concurrent.futures.Executor,
    monkeypatch: pytest.MonkeyPatch,
    works: bool,
) -> None:
    asked: list[tuple[int, int]] = []
    start_writing = syscalls.start_writing

    def ask(fd: int, offset: int, length: int) -> None:
        asked.append((offset, length))
        if not works:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        start_writing(fd, offset, length)

    monkeypatch.setattr(syscalls, "start_writing", ask)
    blocks = [noise(BLOCK, n) for n in range(600)]  # 39 MB
    plain = write(tmp_path / "plain", blocks, executor)
    assert asked == []
    kept = write(tmp_path / "kept", blocks, executor, kept=True)
    assert kept.digest == plain.digest == "sha256:" + hashlib.sha256(blob_bytes(kept)).hexdigest()
    step = 16 << 20
    assert asked == [(0, step), (step, step)], "each range once; the rest is for whoever syncs the file"
