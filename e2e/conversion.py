"""What a conversion cannot do without, alone, on all processors: the bound in the part `convert` of bench.py.

Verify the source blob, inflate it, verify the tar, hash the blocks, compress them, hash the layer blob: each
on the image's largest layer, by as many threads at once as there are processors, all of them on all of it, so
that what processors share (caches, memory, clock) is shared as it is in a conversion. In a process of its
own, because what it holds would count as memory of the conversion that is started next.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import zstandard
from isal import igzip_lib

from converter import blob
from glowplug.startup import machine
from imagefs import blockmap

_PIECE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Bound:
    """MB (10^6 bytes of tar) a second. `stages`: by one processor while the others do the same; `total`: by
    all processors when each does every stage in turn, which no conversion of this layer can exceed."""

    stages: dict[str, float]
    total: float


def measure(layout: Path) -> Bound:
    """For the image in an OCI layout."""
    said = json.loads(machine.check_call([sys.executable, "-m", "e2e.conversion", str(layout)]))
    return Bound(said["stages"], said["total"])


class _Layer:
    """The largest layer of the image in an OCI layout, in memory. It must be gzip, of one member."""

    def __init__(self, layout: Path) -> None:
        index = json.loads((layout / "index.json").read_text())
        manifest = json.loads(_blob(layout, index["manifests"][0]["digest"]))
        self._compressed = _blob(layout, max(manifest["layers"], key=lambda each: each["size"])["digest"])
        self._blocks = list(_inflated(self._compressed, blockmap.DEFAULT_BLOCK_BYTES))
        compressor = zstandard.ZstdCompressor(level=blob.DEFAULT_LEVEL)
        self._packed = [compressor.compress(block) for block in self._blocks]

    def bound(self) -> Bound:
        """Measured now."""
        stages: dict[str, Callable[[], object]] = {
            "verify the source blob": lambda: _hash([self._compressed]),
            "inflate": lambda: sum(map(len, _inflated(self._compressed, _PIECE_BYTES))),
            "verify the tar": lambda: _hash(self._blocks),
            "hash the blocks": lambda: [hashlib.sha256(block).digest() for block in self._blocks],
            "compress": self._compress,
            "hash the layer blob": lambda: _hash(self._packed),
        }
        processors = os.cpu_count() or 1
        seconds = {}
        with concurrent.futures.ThreadPoolExecutor(processors) as pool:
            for name, work in stages.items():
                began = time.monotonic()
                for done in [pool.submit(work) for _ in range(processors)]:
                    done.result()
                seconds[name] = time.monotonic() - began
        megabytes = sum(map(len, self._blocks)) / 1e6
        return Bound(
            {name: megabytes / value for name, value in seconds.items()},
            processors * megabytes / sum(seconds.values()),
        )

    def _compress(self) -> None:
        compressor = zstandard.ZstdCompressor(level=blob.DEFAULT_LEVEL)
        for block in self._blocks:
            compressor.compress(block)


def _blob(layout: Path, digest: str) -> bytes:
    return (layout / "blobs" / digest.replace(":", "/")).read_bytes()


def _inflated(compressed: bytes, piece_bytes: int) -> Iterator[bytes]:
    decompressor = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
    data = compressed
    while not decompressor.eof:
        yield decompressor.decompress(data, piece_bytes)
        data = b""


def _hash(pieces: Iterable[bytes]) -> None:
    hasher = hashlib.sha256()
    for piece in pieces:
        hasher.update(piece)


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(_Layer(Path(sys.argv[1])).bound())))
