"""What the tests of the block devices stand on: layers with known bytes, an origin that obeys, a server's
life."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.server
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import zstandard

from imagefs import blockmap
from imagefs.cache import BlockCache
from imagefs.erofs import ondisk
from imagefs.fuse import control, statedirectory
from imagefs.layerfiles import GaveUpError, LayerFiles
from imagefs.origin import connect

Client = control.DeviceClient


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """A layer image, whole, with its blob and map."""

    image: bytes
    blob: bytes
    block_map: blockmap.BlockMap
    map_bytes: bytes

    @property
    def map_digest(self) -> str:
        return digest(self.map_bytes)

    def spec(self, origin_ref: str, *, with_map: bool = True) -> control.LayerSpec:
        return control.LayerSpec(
            origin_ref=origin_ref,
            map_digest=self.map_digest,
            map_size=len(self.map_bytes),
            blob_digest=digest(self.blob),
            blob_size=len(self.blob),
            map_bytes=self.map_bytes if with_map else None,
        )


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def random_image(size: int, seed: int, *, zero_blocks: tuple[int, ...] = (), block_bytes: int = 0) -> bytes:
    data = bytearray(random.Random(seed).randbytes(size))
    for index in zero_blocks:
        data[index * block_bytes : (index + 1) * block_bytes] = bytes(block_bytes)
    return bytes(data[:size])


def layer_image(size: int, seed: int) -> bytes:
    """Random bytes behind a superblock: a boot pack shows the kernel no first page without one."""
    superblock = ondisk.encode_superblock(ondisk.Superblock(1, 1, size // ondisk.BLOCK_BYTES, 1, bytes(16)))
    data = bytearray(random_image(size, seed))
    data[ondisk.SUPERBLOCK_OFFSET : ondisk.BLOCK_BYTES] = superblock
    return bytes(data)


def make_layer(image: bytes, block_bytes: int = 65536, frame_bytes: int | None = None) -> Layer:
    """The simplest layer blob: no seek table; each block one frame, unless they are to be smaller."""
    frame_bytes = frame_bytes or block_bytes
    compressor = zstandard.ZstdCompressor(level=1)
    blob = bytearray()
    blocks = []
    for start in range(0, len(image), block_bytes):
        data = image[start : start + block_bytes]
        pieces = [data[at : at + frame_bytes] for at in range(0, len(data), frame_bytes)]
        packed = [compressor.compress(piece) for piece in pieces]
        frames = tuple(
            blockmap.Frame(hashlib.sha256(piece).digest(), len(frame))
            for piece, frame in zip(pieces, packed, strict=True)
            if frame_bytes < block_bytes
        )
        zero = len(data) == block_bytes and not any(data)
        length = sum(map(len, packed))
        blocks.append(blockmap.Block(hashlib.sha256(data).digest(), len(blob), length, zero, frames))
        blob += b"".join(packed)
    block_map = blockmap.BlockMap(
        block_bytes=block_bytes,
        frame_bytes=frame_bytes,
        image_bytes=len(image),
        blob_bytes=len(blob),
        metadata_offset=0,
        metadata_bytes=4096,
        blob_digest=hashlib.sha256(blob).digest(),
        source_digest=bytes(32),
        diff_id=bytes(32),
        chain_id=None,
        compression_level=1,
        libzstd_version=10507,
        root_implied=False,
        blocks=tuple(blocks),
    )
    return Layer(image, bytes(blob), block_map, blockmap.encode(block_map))


def with_blocks(layer: Layer, blocks: tuple[blockmap.Block, ...]) -> Layer:
    """As the layer, with another map."""
    block_map = dataclasses.replace(layer.block_map, blocks=blocks)
    return Layer(layer.image, layer.blob, block_map, blockmap.encode(block_map))


class BlobServer:
    """A registry that only has blobs, and that can be told to hold its answers, or to have died."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.requests = 0
        self.open = threading.Event()
        self.open.set()
        self.arrived = threading.Semaphore(0)
        self.dead = False
        self.cut_after_bytes: int | None = None
        """Where in any blob its answers break off."""
        self.sent_until: Callable[[int], int] = lambda end: end
        """Of bytes up to that place in a blob, where an answer stops for now; asked again and again."""
        self._cuts = 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        class Listener(http.server.ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_: object) -> None:
                pass

        self._server = Listener(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def ref(self, repository: str = "test/layers") -> str:
        return f"docker://127.0.0.1:{self._server.server_address[1]}/{repository}"

    def add(self, layer: Layer) -> control.LayerSpec:
        self.blobs[digest(layer.blob)] = layer.blob
        self.blobs[layer.map_digest] = layer.map_bytes
        return layer.spec(self.ref())

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        self.requests += 1
        self.arrived.release()
        self.open.wait()
        if self.dead:
            handler.close_connection = True
            handler.connection.close()
            return
        data = self.blobs.get(handler.path.rpartition("/")[2], b"")
        start, end = 0, len(data)
        status = 200 if data or handler.path == "/v2/" else 404
        wanted = handler.headers.get("Range")
        if wanted and data:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end, status = int(first), int(last) + 1 if last else end, 206
        handler.send_response(status)
        handler.send_header("Content-Length", str(end - start))
        if status == 206:
            handler.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        handler.end_headers()
        if self.cut_after_bytes is not None and end > self.cut_after_bytes:
            end = max(start, self.cut_after_bytes)
            handler.close_connection = True
        with contextlib.suppress(OSError):
            cuts = self._cuts
            while start < end:
                stop = self.sent_until(end)
                if self._cuts != cuts:
                    handler.close_connection = True
                    return
                if stop <= start:
                    time.sleep(0.01)
                    continue
                handler.wfile.write(data[start:stop])
                start = stop

    def cut_all(self) -> None:
        """End the answers that have not been sent to their end."""
        self._cuts += 1

    def close(self) -> None:
        self.open.set()
        self.cut_all()
        self._server.shutdown()
        self._server.server_close()


def settings(directory: Path, **changes: object) -> control.ServerSettings:
    values = control.ServerSettings(
        state_dir=directory / "state",
        cache_dir=directory / "cache",
        cache_quota_bytes=1 << 30,
        free_floor_bytes=0,
        workers=2,
        read_deadline_seconds=30.0,
    )
    return dataclasses.replace(values, **changes)  # type: ignore[arg-type]


def write_layer_file(cache_dir: Path, map_digest: str, block_map: blockmap.BlockMap) -> None:
    """The file of a layer whose blocks somebody has brought, as a device server writes it: by another process
    that shares the cache, and waits for blocks that have no name yet."""
    cache = BlockCache(cache_dir, 1 << 30, 0)
    files = LayerFiles(cache, cache_dir)
    until = time.monotonic() + 30
    try:
        while True:
            try:
                files.write(map_digest, block_map, lambda: True)
                return
            except GaveUpError:
                assert time.monotonic() < until
                time.sleep(0.05)
    finally:
        files.close()
        cache.close()


OPTIONS = connect.Options(read_timeout_seconds=60.0)


@contextlib.contextmanager
def running(values: control.ServerSettings) -> Iterator[Client]:
    """A device server for the length of a test. Its log is shown when the test fails."""
    client = Client.ensure(values)
    try:
        yield client
    finally:
        with contextlib.suppress(Exception):
            client.stop()
        with contextlib.suppress(FileNotFoundError):
            print((values.state_dir / "server.log").read_text())
        assert not statedirectory.mounted(statedirectory.device_directory(values.state_dir))


class Reader:
    """A process that reads a device to its end, or a part of it; `outcome` is its sha256, or the errno's
    name.

    A process, and not a thread: a reader that waits in the kernel must be able to outlive what it waits for
    without holding up the test.
    """

    _CODE = """
import errno, hashlib, os, sys
path, offset, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
try:
    fd = os.open(path, os.O_RDONLY | int(sys.argv[4]))
    state = hashlib.sha256()
    while length and (data := os.pread(fd, min(length, 131072), offset)):
        state.update(data)
        offset += len(data)
        length -= len(data)
    print("sha256:" + state.hexdigest())
except OSError as exc:
    print(errno.errorcode[exc.errno])
"""

    def __init__(self, path: Path, offset: int = 0, length: int = 1 << 62, *, direct: bool = False) -> None:
        """`direct`: past the page cache, so that no more is read than was asked for."""
        flags = os.O_DIRECT if direct else 0
        command = [sys.executable, "-S", "-c", self._CODE]
        command += [os.fspath(path), str(offset), str(length), str(flags)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def outcome(self, timeout_seconds: float = 60) -> str:
        out, _ = self._process.communicate(timeout=timeout_seconds)
        return out.strip()

    def waits_for_server(self) -> bool:
        """Whether it is in the kernel, which waits for an answer."""
        return "fuse" in Path(f"/proc/{self._process.pid}/stack").read_text()

    def running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that another process does; the limit is for a test that would never end."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.01)


def keeper_pid(state_dir: Path) -> int:
    """Who holds the keeper's lock; 0 if nobody does."""
    inode = (state_dir / "keeper.lock").stat().st_ino
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if fields[1] == "FLOCK" and fields[5].endswith(f":{inode}"):
            return _holder(state_dir / "keeper.lock")
    return 0


def _holder(path: Path) -> int:
    """The lock is taken before the keeper becomes a daemon, so that /proc/locks names its parent."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if any(os.readlink(fd) == os.fspath(path) for fd in (entry / "fd").iterdir()):
                    return int(entry.name)
            except OSError:
                continue
    return 0


def drop_cached_pages(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
