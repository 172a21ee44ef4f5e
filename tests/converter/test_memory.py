"""The promise of 256 MB and 1 KB per entry: its division, its pool, and what a real conversion uses."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from converter import erofs_writer, memory, tasks
from tests.fixtures import servers

PROMISE_BYTES = 256_000_000
BYTES_PER_ENTRY = 1000
CONVERT = """
import re, sys
from converter import layer, limits, memory, pipeline
from converter.observer import Silent
from imagefs import reference
from imagefs.origin import connect
source, place, block_bytes, jobs, endpoint = sys.argv[1:]
memory.return_what_is_freed()
pipeline.convert(
    pipeline.Request(
        source=reference.parse(source),
        destination=reference.parse(place),
        wanted="all",
        parameters=layer.Parameters(int(block_bytes), int(block_bytes), 1, limits.Limits()),
        options=connect.Options(s3_endpoint_url=endpoint or None),
        jobs=int(jobs),
    ),
    Silent(),
)
# Not ru_maxrss: it starts from what the process was forked from.
print(int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024)
"""


@pytest.mark.parametrize("block_bytes", [65536, 1 << 20, 4 << 20, 16 << 20])
@pytest.mark.parametrize("level", [1, 2, 9, 15, 19])
def test_shares_fit_the_budget_and_nobody_waits_for_ever(block_bytes: int, level: int) -> None:
    for jobs in (1, 2, 8, 100):
        for processors in (1, 2, 64):
            found = memory.shares(block_bytes, block_bytes, level, jobs, processors)
            context = zstandard.ZstdCompressionParameters.from_level(level, source_size=block_bytes)
            used = found.threads * context.estimated_compression_context_size()
            used += found.buffers * 2 * block_bytes + found.layers * 8_000_000
            assert used <= memory.BUDGET_BYTES
            assert 1 <= found.layers <= jobs
            assert 1 <= found.threads <= processors
            # Each layer may hold all but one of what it needs, and one of them still gets the last.
            assert found.buffers > found.layers * (erofs_writer.MOST_BUFFERS - 1)


def test_shares_of_the_defaults() -> None:
    assert memory.shares(4 << 20, 4 << 20, 2, 2, 2) == memory.Shares(2, 19, 2)
    assert memory.shares(16 << 20, 16 << 20, 2, 8, 8) == memory.Shares(4, 4, 2)


def test_a_cancelled_group_wakes_who_waits_for_a_buffer() -> None:
    group = tasks.Group()
    pool = memory.BufferPool(group, 10, 1)
    first = pool.acquire(lambda: None)
    threading.Timer(0.05, group.cancel).start()
    with pytest.raises(tasks.Cancelled):
        pool.acquire(lambda: None)
    pool.release(first)


def test_buffers_are_used_again() -> None:
    pool = memory.BufferPool(tasks.Group(), 10, 2)
    first = pool.acquire(lambda: None)
    assert len(first) == 10
    pool.release(first)
    assert pool.acquire(lambda: None) is first


# -- a conversion in a process of its own ----------------------------------------------------------------


class Writer:
    """A file that hashes and counts what it is given."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._hasher = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self._hasher.update(data)
        self.size += len(data)
        return self._file.write(data)

    def close(self) -> str:
        self._file.close()
        return self._hasher.hexdigest()


class Noise(io.RawIOBase):
    """Bytes that cannot be compressed."""

    def read(self, size: int = -1) -> bytes:
        return os.urandom(size)


def write_layout(folder: Path, layers: int, fill: Callable[[tarfile.TarFile, int], None]) -> str:
    """A source image of uncompressed layers, written without holding one; its REF."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(value: object, media_type: str) -> dict[str, object]:
        data = json.dumps(value).encode()
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    descriptors = []
    for number in range(layers):
        out: Any = Writer(folder / "layer")
        with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar:
            fill(tar, number)
        digest = out.close()
        (folder / "layer").rename(blobs / digest)
        kind = "application/vnd.oci.image.layer.v1.tar"
        descriptors.append({"mediaType": kind, "digest": f"sha256:{digest}", "size": out.size})
    diff_ids = [each["digest"] for each in descriptors]
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    manifest_type = "application/vnd.oci.image.manifest.v1+json"
    manifest = {
        "schemaVersion": 2,
        "mediaType": manifest_type,
        "config": put(config, "application/vnd.oci.image.config.v1+json"),
        "layers": descriptors,
    }
    index = {"schemaVersion": 2, "manifests": [put(manifest, manifest_type)]}
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return f"oci:{folder}"


def peak_bytes(source: str, place: str, block_bytes: int, jobs: int, endpoint: str = "") -> int:
    arguments = [source, place, str(block_bytes), str(jobs), endpoint]
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, *arguments], check=True, capture_output=True, text=True
    )
    return int(done.stdout)


def noise_layers(folder: Path, layers: int) -> str:
    def fill(tar: tarfile.TarFile, number: int) -> None:
        info = tarfile.TarInfo(f"noise-{number}")
        info.size = 240_000_000 // layers
        tar.addfile(info, Noise())

    return write_layout(folder, layers, fill)


@pytest.mark.parametrize(("layers", "jobs", "block_bytes"), [(6, 8, 4 << 20), (3, 2, 16 << 20)])
def test_incompressible_layers_in_parallel(tmp_path: Path, layers: int, jobs: int, block_bytes: int) -> None:
    source = noise_layers(tmp_path / "source", layers)
    assert peak_bytes(source, f"oci:{tmp_path}/out", block_bytes, jobs) < PROMISE_BYTES


@pytest.mark.soak
@pytest.mark.parametrize("block_bytes", [4 << 20, 16 << 20])
def test_uploads_in_parts_at_the_same_time(
    tmp_path: Path, s3_server: servers.S3Server, block_bytes: int
) -> None:
    source = noise_layers(tmp_path / "source", 8)
    place = f"s3://{s3_server.bucket}/{servers.unique_name()}"
    assert peak_bytes(source, place, block_bytes, 8, s3_server.endpoint_url) < PROMISE_BYTES


def check_entries(tmp_path: Path, entries: int, most_bytes: int) -> None:
    content = os.urandom(100)

    def fill(tar: tarfile.TarFile, number: int) -> None:
        for entry in range(entries - entries // 1000):
            info = tarfile.TarInfo(f"{entry // 1000}/a-file-of-usual-name-length-{entry}.py")
            info.size, info.mtime = len(content), entry
            tar.addfile(info, io.BytesIO(content))

    source = write_layout(tmp_path / "source", 1, fill)
    assert peak_bytes(source, f"oci:{tmp_path}/out", 4 << 20, 2) < most_bytes


def test_entries(tmp_path: Path) -> None:
    check_entries(tmp_path, 30_000, PROMISE_BYTES + 30_000 * BYTES_PER_ENTRY)


@pytest.mark.soak
def test_a_million_entries(tmp_path: Path) -> None:
    check_entries(tmp_path, 999_000, PROMISE_BYTES + 999_000 * BYTES_PER_ENTRY)
