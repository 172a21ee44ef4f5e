"""Layers made by hand, and an origin in memory that does what a test tells it to: hang, fail, corrupt."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import threading
import time
from collections.abc import Callable, Generator, Sequence

import zstandard

from imagefs import blockmap, errors
from imagefs.lazylayer import LazyLayer
from imagefs.origin import Origin

BLOCK_BYTES = 64 * 1024
PIECE_BYTES = 10_000


def image(blocks: int, seed: int, block_bytes: int = BLOCK_BYTES, tail: int = 4096) -> bytes:
    """An image of `blocks` blocks, half random and half text, the last one `tail` bytes long."""
    source = random.Random(seed)
    half = block_bytes // 2
    whole = b"".join(source.randbytes(half) + (b"%08d" % n) * (half // 8) for n in range(blocks))
    return whole[: (blocks - 1) * block_bytes + tail]


def layer(
    data: bytes, origin: ScriptedOrigin, block_bytes: int = BLOCK_BYTES, frame_bytes: int | None = None
) -> LazyLayer:
    """`data` as a layer whose blob `origin` holds."""
    frame_bytes = frame_bytes or block_bytes
    compressor = zstandard.ZstdCompressor(level=1)
    blob = bytearray()
    blocks = []
    for start in range(0, len(data), block_bytes):
        block = data[start : start + block_bytes]
        offset = len(blob)
        frames = []
        for at in range(0, len(block), frame_bytes):
            piece = block[at : at + frame_bytes]
            frame = compressor.compress(piece)
            frames.append(blockmap.Frame(hashlib.sha256(piece).digest(), len(frame)))
            blob += frame
        blocks.append(
            blockmap.Block(
                hashlib.sha256(block).digest(),
                offset,
                len(blob) - offset,
                not any(block),
                tuple(frames) if frame_bytes < block_bytes else (),
            )
        )
    return _publish(data, bytes(blob), tuple(blocks), block_bytes, frame_bytes, origin)


def _publish(
    data: bytes,
    blob: bytes,
    blocks: tuple[blockmap.Block, ...],
    block_bytes: int,
    frame_bytes: int,
    origin: ScriptedOrigin,
) -> LazyLayer:
    digest = hashlib.sha256(blob).digest()
    value = blockmap.BlockMap(
        block_bytes=block_bytes,
        frame_bytes=frame_bytes,
        image_bytes=len(data),
        blob_bytes=len(blob),
        metadata_offset=0,
        metadata_bytes=4096,
        blob_digest=digest,
        source_digest=bytes(32),
        diff_id=bytes(32),
        chain_id=None,
        compression_level=1,
        libzstd_version=10507,
        root_implied=False,
        blocks=blocks,
    )
    encoded = blockmap.encode(value)
    assert blockmap.decode(encoded) == value
    blob_digest = "sha256:" + digest.hex()
    origin.blobs[blob_digest] = blob
    return LazyLayer("sha256:" + hashlib.sha256(encoded).hexdigest(), blob_digest, value, origin)


@dataclasses.dataclass(frozen=True)
class Call:
    """One stream_range as the origin saw it."""

    digest: str
    offset: int
    length: int


class ScriptedOrigin(Origin):
    """`before` runs in every stream_range before the first byte, `between` before each piece, told its place
    in the range; both may raise or wait. `spoil` changes the bytes."""

    def __init__(self, name: str = "oci:/scripted") -> None:
        self._name = name
        self.blobs: dict[str, bytes] = {}
        self.calls: list[Call] = []
        self.before: Callable[[Call], None] = lambda call: None
        self.between: Callable[[Call, int], None] = lambda call, start: None
        self.spoil: Callable[[Call, memoryview], None] = lambda call, buffer: None
        self.running = 0
        self.most_running = 0
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return self._name

    def stream_range(
        self, digest: str, offset: int, length: int, deadline: float | None = None
    ) -> Generator[bytes, None, None]:
        call = Call(digest, offset, length)
        with self._lock:
            self.calls.append(call)
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            self.before(call)
            if digest not in self.blobs:
                raise errors.NotFoundError(f"{self._name}: no blob {digest}")
            buffer = bytearray(self.blobs[digest][offset : offset + length])
            self.spoil(call, memoryview(buffer))
            for start in range(0, length, PIECE_BYTES):
                self.between(call, start)
                yield bytes(buffer[start : start + PIECE_BYTES])
        finally:
            with self._lock:
                self.running -= 1


class Answers:
    """Collects what `request` answers; closes the descriptors at the end."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.results: dict[object, object] = {}
        self.repeated: list[object] = []

    def expect(self, key: object) -> Callable[[object], None]:
        def done(result: object) -> None:
            with self._changed:
                if key in self.results:
                    self.repeated.append(key)
                self.results[key] = result
                self._changed.notify_all()

        return done

    def wait(self, keys: Sequence[object], timeout: float = 30.0) -> list[object]:
        with self._changed:
            arrived = self._changed.wait_for(lambda: all(key in self.results for key in keys), timeout)
            assert arrived, f"no answer for {[key for key in keys if key not in self.results]}"
            return [self.results[key] for key in keys]


def eventually(condition: Callable[[], bool], timeout: float = 30.0) -> None:
    """Wait until `condition` holds; fail the test when it never does."""
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until, "never came true"
        time.sleep(0.005)
