"""Folders to gzip layers to an OCI layout, as `docker build` would have left them. Called by `builder.py`."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import platform
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from e2e.workloads.recipe import TAG

_MEDIA = "application/vnd.oci.image"


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """A layer that was written: digests, sizes in bytes, number of entries."""

    digest: str
    diff_id: str
    size: int
    tar_bytes: int
    entries: int


class _Hashing:
    """A write-only file that counts and hashes what passes through it."""

    def __init__(self, inner: object) -> None:
        self._write = inner.write  # type: ignore[attr-defined]
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        self._write(data)
        return len(data)

    def flush(self) -> None:
        """GzipFile asks for it; the file below is flushed when it is closed."""


def write_layer(root: Path, paths: Sequence[str], layout: Path) -> Layer:
    """Put `paths` below `root` into the layout as a gzip layer."""
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=layout, prefix="layer-", delete=False) as raw:
        compressed = _Hashing(raw)
        with gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=compressed, mtime=0) as packed:
            plain = _Hashing(packed)
            with tarfile.open(fileobj=plain, mode="w|", format=tarfile.PAX_FORMAT) as tar:  # type: ignore[call-overload]
                for path in paths:
                    tar.add(root / path, arcname=path, recursive=False, filter=_whole_seconds)
    digest = compressed.sha256.hexdigest()
    Path(raw.name).rename(blobs / digest)
    return Layer(
        f"sha256:{digest}", f"sha256:{plain.sha256.hexdigest()}", compressed.size, plain.size, len(paths)
    )


def _whole_seconds(info: tarfile.TarInfo) -> tarfile.TarInfo:
    # A .pyc names its source's time in whole seconds; a float would cost a PAX header per file.
    info.mtime = int(info.mtime)
    return info


def write_image(command: Sequence[str], layers: Sequence[Layer], layout: Path) -> None:
    """Put config, manifest and index into the layout: one image, tagged, that starts `command`."""
    arch = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    config = {
        "architecture": arch,
        "os": "linux",
        "config": {
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"],
            "Cmd": list(command),
            "WorkingDir": "/",
        },
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{_MEDIA}.manifest.v1+json",
        "config": _write_blob(layout, config, f"{_MEDIA}.config.v1+json"),
        "layers": [
            {"mediaType": f"{_MEDIA}.layer.v1.tar+gzip", "digest": layer.digest, "size": layer.size}
            for layer in layers
        ],
    }
    descriptor = _write_blob(layout, manifest, f"{_MEDIA}.manifest.v1+json")
    descriptor["annotations"] = {"org.opencontainers.image.ref.name": TAG}
    index = {"schemaVersion": 2, "mediaType": f"{_MEDIA}.index.v1+json", "manifests": [descriptor]}
    (layout / "index.json").write_text(json.dumps(index))
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')


def _write_blob(layout: Path, document: object, media_type: str) -> dict[str, object]:
    data = json.dumps(document, sort_keys=True).encode()
    digest = hashlib.sha256(data).hexdigest()
    (layout / "blobs" / "sha256" / digest).write_bytes(data)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}
