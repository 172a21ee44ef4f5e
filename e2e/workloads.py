"""Real images for the demo and the benchmark, built without Docker and without a hub.

A Debian root by debootstrap with Python, the libraries that a heavy wheel needs, and the wheel itself: three
layers, gzip, as an OCI layout. Everything downloaded or built is kept under the cache directory, keyed by
the recipe, so that a second run costs nothing. Called by demo.py and bench.py; needs root (debootstrap).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import fcntl
import gzip
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from glowplug.startup import machine

SUITE = "bookworm"
PYTHON_VERSION = "3.11"
SITE = f"usr/local/lib/python{PYTHON_VERSION}/dist-packages"
TAG = "latest"
READY = "ready"
"""What a workload's command prints, first word of a line, when it could serve."""

_BUILD = 2
"""Part of the cache key: raise it when images are built in another way from the same recipe."""

_LIBRARIES = ("numpy==2.3.4",)
_TORCH_LIBRARIES = (
    *_LIBRARIES,
    "filelock==3.20.0",
    "fsspec==2025.10.0",
    "jinja2==3.1.6",
    "markupsafe==3.0.3",
    "mpmath==1.3.0",
    "networkx==3.5",
    "sympy==1.14.0",
    "typing_extensions==4.15.0",
    "setuptools==80.9.0",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """What an image holds: `layers` of pinned wheels above the Debian root, and what its command imports."""

    name: str
    layers: tuple[tuple[str, ...], ...]
    script: str
    download_note: str

    @property
    def command(self) -> tuple[str, ...]:
        """Prints one line when Python runs, one when the heavy library is loaded and has computed; then it
        stays, as a server would, until its standard input ends."""
        lines = (
            "print('python runs', flush=True)",
            self.script,
            f"print('{READY}', value, flush=True)",
            "import sys; sys.stdin.read()",
        )
        return ("python3", "-c", "\n".join(lines))


RECIPES = {
    "torch": Recipe(
        "torch",
        (_TORCH_LIBRARIES, ("torch==2.13.0", "transformers==5.0.0")),
        "import torch; value = float(torch.ones(64, 64).matmul(torch.ones(64, 64)).sum())",
        "downloads about 300 MB, then builds for some minutes",
    ),
    "small": Recipe(
        "small",
        (_LIBRARIES, ("scipy==1.16.3",)),
        "import numpy, scipy.linalg; value = float(scipy.linalg.det(numpy.eye(64)))",
        "downloads about 110 MB, then builds for a minute or two",
    ),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """A built image: an OCI layout with one tagged image in it, and the command that starts it."""

    name: str
    layout: Path
    command: tuple[str, ...]
    compressed_bytes: int
    unpacked_bytes: int
    entries: int
    layers: tuple[str, ...]
    """What each layer holds, bottom first, for people."""

    @property
    def source(self) -> str:
        """The image as a REF."""
        return f"oci:{self.layout}:{TAG}"


class BuildError(Exception):
    """The image cannot be built here; the message says what to change."""


def build(name: str, cache: Path, say: Callable[[str], None]) -> Workload:
    """The workload `name`, built under `cache` unless an earlier run left it there."""
    recipe = RECIPES[name]
    key = hashlib.sha256(repr((_BUILD, SUITE, recipe)).encode()).hexdigest()[:12]
    done = cache / f"{name}-{key}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            if os.geteuid() != 0:
                raise BuildError("building the demo's image needs root (debootstrap, chroot)")
            say(f"building the {name} image: the first time only; {recipe.download_note}")
            _build(recipe, cache, done, say)
    facts = json.loads((done / "workload.json").read_text())
    layers = (f"Debian {SUITE}, Python {PYTHON_VERSION}", *(_layer_name(wheels) for wheels in recipe.layers))
    return Workload(name=name, layout=done / "layout", command=recipe.command, layers=layers, **facts)


def _layer_name(requirements: Sequence[str]) -> str:
    names = [requirement.partition("==")[0] for requirement in requirements]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _debian_root(cache: Path, say: Callable[[str], None]) -> Path:
    """A minimal Debian with Python, shared by all workloads."""
    done = cache / f"debian-{SUITE}"
    if not done.exists():
        say(f"debootstrap of Debian {SUITE} with Python: about a minute")
        building = cache / f"debian-{SUITE}.building"
        shutil.rmtree(building, ignore_errors=True)
        command = ["debootstrap", "--variant=minbase", "--include=python3", SUITE, str(building), mirror()]
        with (cache / "debootstrap.log").open("wb") as log:
            if subprocess.run(command, check=False, stdout=log, stderr=log).returncode:
                raise BuildError(f"debootstrap failed; its output is in {log.name}")
        for lists in (building / "var/cache/apt/archives", building / "var/lib/apt/lists"):
            shutil.rmtree(lists, ignore_errors=True)
        building.rename(done)
    return done


def mirror() -> str:
    """The Debian mirror that this machine's apt uses."""
    command = [
        "apt-get",
        "indextargets",
        "--format",
        "$(REPO_URI) $(COMPONENT) $(RELEASE)",
        "Created-By: Packages",
    ]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    for line in lines:
        uri, component, release = line.split()
        if component == "main" and "-" not in release and "debian" in uri:
            return uri
    raise BuildError("apt's sources name no Debian mirror: debootstrap needs one")


def _build(recipe: Recipe, cache: Path, done: Path, say: Callable[[str], None]) -> None:
    """Make `done`, whole or not at all; what older recipes or killed runs left is removed first."""
    for stale in cache.glob(f"{recipe.name}-*"):
        shutil.rmtree(stale)
    base = _debian_root(cache, say)
    work = done.with_suffix(".building")
    (work / "layout").mkdir(parents=True)
    root = work / "root"
    try:
        machine.check_call(["cp", "-a", "--reflink=auto", str(base), str(root)])
        _fill(recipe, root, work, cache / "wheels", say)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    work.rename(done)


def _fill(recipe: Recipe, root: Path, work: Path, wheels: Path, say: Callable[[str], None]) -> None:
    layers = [sorted(_walk(root))]
    for requirements in recipe.layers:
        say(f"installing {', '.join(requirements)}")
        before = set(_walk(root))
        _install(requirements, root, wheels)
        new = set(_walk(root)) - before
        parents = {str(parent) for path in new for parent in Path(path).parents if str(parent) != "."}
        layers.append(sorted(new | parents))
    say("compressing the layers")
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        written = list(pool.map(lambda paths: write_layer(root, paths, work / "layout"), layers))
    write_image(recipe, written, work / "layout")
    facts = {
        "compressed_bytes": sum(layer.size for layer in written),
        "unpacked_bytes": sum(layer.tar_bytes for layer in written),
        "entries": sum(layer.entries for layer in written),
    }
    (work / "workload.json").write_text(json.dumps(facts))


def _install(requirements: Sequence[str], root: Path, wheels: Path) -> None:
    """Install pinned wheels for the image's Python, and compile them with it, as a Dockerfile's pip would."""
    arch = platform.machine()
    platforms = [
        f"--platform={name}_{arch}" for name in ("manylinux_2_28", "manylinux_2_17", "manylinux2014")
    ]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    target = ["--no-deps", "--only-binary=:all:", f"--python-version={PYTHON_VERSION}", *platforms]
    machine.check_call([*pip, "download", *target, "-d", str(wheels), *requirements])
    for cuda in wheels.glob("torch-*.whl"):
        if arch == "x86_64" and "cpu" not in cuda.name:
            cuda.unlink()
            raise BuildError(
                "pip found a CUDA build of PyTorch, which is 10 times larger and cannot be imported without"
                " a driver; point PIP_EXTRA_INDEX_URL at PyTorch's CPU wheels, or use DEMO=small"
            )
    site = root / SITE
    machine.check_call(
        [
            *pip,
            "install",
            *target,
            "--no-index",
            f"--find-links={wheels}",
            "--no-compile",
            "--root-user-action=ignore",
            f"--target={site}",
            *requirements,
        ]
    )
    machine.check_call(["chroot", str(root), "python3", "-m", "compileall", "-q", f"/{SITE}"], allow=(0, 1))


def _walk(root: Path) -> list[str]:
    """Every path below `root`, relative, directories before what they hold."""
    found = []
    for folder, folders, files in os.walk(root):
        prefix = os.path.relpath(folder, root)
        found += [os.path.normpath(os.path.join(prefix, name)) for name in (*folders, *files)]
    return found


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
    temporary = layout / f"layer-{hashlib.sha256(repr(paths).encode()).hexdigest()[:16]}"
    with temporary.open("wb") as raw:
        compressed = _Hashing(raw)
        with gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=compressed, mtime=0) as packed:
            plain = _Hashing(packed)
            with tarfile.open(fileobj=plain, mode="w|", format=tarfile.PAX_FORMAT) as tar:  # type: ignore[call-overload]
                for path in paths:
                    tar.add(root / path, arcname=path, recursive=False, filter=_whole_seconds)
    digest = compressed.sha256.hexdigest()
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    temporary.rename(blobs / digest)
    return Layer(
        f"sha256:{digest}", f"sha256:{plain.sha256.hexdigest()}", compressed.size, plain.size, len(paths)
    )


def _whole_seconds(info: tarfile.TarInfo) -> tarfile.TarInfo:
    # A .pyc names its source's time in whole seconds; a float would cost a PAX header per file.
    info.mtime = int(info.mtime)
    return info


def write_image(recipe: Recipe, layers: Sequence[Layer], layout: Path) -> None:
    """Put config, manifest and index into the layout: one image, tagged."""
    arch = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    config = {
        "architecture": arch,
        "os": "linux",
        "config": {
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"],
            "Cmd": list(recipe.command),
            "WorkingDir": "/",
        },
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
    }
    media = "application/vnd.oci.image"
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{media}.manifest.v1+json",
        "config": _write_blob(layout, config, f"{media}.config.v1+json"),
        "layers": [
            {"mediaType": f"{media}.layer.v1.tar+gzip", "digest": layer.digest, "size": layer.size}
            for layer in layers
        ],
    }
    descriptor = _write_blob(layout, manifest, f"{media}.manifest.v1+json")
    descriptor["annotations"] = {"org.opencontainers.image.ref.name": TAG}
    index = {"schemaVersion": 2, "mediaType": f"{media}.index.v1+json", "manifests": [descriptor]}
    (layout / "index.json").write_text(json.dumps(index))
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')


def _write_blob(layout: Path, document: object, media_type: str) -> dict[str, object]:
    data = json.dumps(document, sort_keys=True).encode()
    digest = hashlib.sha256(data).hexdigest()
    (layout / "blobs" / "sha256" / digest).write_bytes(data)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}
