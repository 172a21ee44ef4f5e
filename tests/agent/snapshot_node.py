"""A snapshotter with everything that it needs, and lazy layers that are real EROFS images: made by mkfs.erofs
from what overlayfs wrote, so that whiteouts and opaque directories are the kernel's own.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from agent import errors as agent_errors
from agent import observer, snapshots, snapshotter, store
from agent.rows import ImageRow, LayerRow
from agent.snapshots import Mount, Usage
from imagefs import errors, mount, syscalls

Change = Callable[[Path], None]


class ErofsImages:
    """LazyImages over image files: a layer is found once it was offered. One block image a layer."""

    def __init__(self, folder: Path, rows: store.Store) -> None:
        self.folder = folder
        self.rows = rows
        self.files: dict[str, Path] = {}
        self.roots: dict[str, mount.RootAttributes | None] = {}
        self.mounted: dict[str, Path] = {}
        self.calls: list[str] = []
        self.unavailable = False

    def offer(self, chain_id: str, tree: Path, root: mount.RootAttributes | None) -> None:
        file = self.folder / f"{len(self.files)}.erofs"
        subprocess.run(["mkfs.erofs", "-x2", file, tree], check=True, stdout=subprocess.DEVNULL)
        self.files[chain_id] = file
        self.roots[chain_id] = root

    def find_layer(self, chain_id: str, labels: Mapping[str, str]) -> snapshotter.Found | None:
        self.calls.append(f"find {chain_id}")
        if chain_id not in self.files:
            return None
        layer = LayerRow(chain_id, "diff", f"map-{chain_id}", 1, "blob", 1)
        self.rows.put_image(ImageRow(f"image-{chain_id}", "source", "ref", "docker://r", (layer,), 1))
        return snapshotter.Found(f"image-{chain_id}", 0)

    def may_serve(self, block_digest: str, labels: Mapping[str, str]) -> bool:
        return True

    def directory(self, block_digest: str, layer: int) -> Path:
        if self.unavailable:
            raise errors.UnavailableError("the registry is down")
        chain_id = block_digest.removeprefix("image-")
        if chain_id not in self.mounted:
            target = self.folder / "layers" / str(len(self.mounted))
            target.mkdir(parents=True)
            mount.mount_layer(None, chain_id, self.files[chain_id], target)
            self.mounted[chain_id] = target
        return self.mounted[chain_id]

    def root_attributes(self, block_digest: str, layer: int) -> mount.RootAttributes | None:
        return self.roots[block_digest.removeprefix("image-")]

    def usage(self, block_digest: str, layer: int) -> Usage:
        return Usage(7, 4096 * 7)

    def released(self, block_digest: str) -> None:
        self.calls.append(f"released {block_digest}")
        if not self.rows.references(block_digest):
            self.rows.remove_image(block_digest)


class Events(observer.Observer):
    def __init__(self) -> None:
        self.kinds: list[str] = []

    def event(self, kind: str, message: str, **fields: object) -> None:  # type: ignore[override]
        self.kinds.append(kind)


class Node:
    """A snapshotter with everything it needs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rows = store.Store.open(root / "agent.db")
        self.images = ErofsImages(root, self.rows)
        self.events = Events()
        self.snapshotter = snapshotter.Snapshotter(root, self.rows, self.images, self.events)

    def close(self) -> None:
        mount.unmount_all(list(self.images.mounted.values()))
        self.rows.close()

    def lazy(self, chain_id: str, parent: str) -> None:
        with pytest.raises(agent_errors.AlreadyExistsError):
            self.snapshotter.prepare(f"extract-{chain_id}", parent, {snapshots.REF_LABEL: chain_id})

    def local(self, name: str, parent: str, change: Change = lambda root: None) -> None:
        made = self.snapshotter.prepare(f"{name}-active", parent, {})
        with self.mounted(made) as root:
            change(root)
        self.snapshotter.commit(name, f"{name}-active", {})

    @contextlib.contextmanager
    def mounted(self, mounts: list[Mount]) -> Iterator[Path]:
        """As containerd mounts: relative lower directories, when the options would get too long."""
        target = self.root / "mounted"
        target.mkdir(exist_ok=True)
        (made,) = mounts
        if made.type == "bind":
            syscalls.mount(made.source, target, None, syscalls.MS_BIND)
            if "ro" in made.options:
                syscalls.mount(
                    "none", target, None, syscalls.MS_BIND | syscalls.MS_REMOUNT | syscalls.MS_RDONLY
                )
        else:
            options = ",".join(
                option.replace(f"{self.root}/", "") if option.startswith("lowerdir=") else option
                for option in made.options
            )
            subprocess.run(
                ["mount", "-t", "overlay", "overlay", target, "-o", options], check=True, cwd=self.root
            )
        try:
            yield target
        finally:
            syscalls.umount(target)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.close()


# --- changes, a layer each -------------------------------------------------------------------------------


def write(path: str, content: str, mode: int = 0o644) -> Change:
    def change(root: Path) -> None:
        (root / path).write_text(content)
        (root / path).chmod(mode)

    return change


def folder(path: str, mode: int = 0o755) -> Change:
    def change(root: Path) -> None:
        (root / path).mkdir()
        (root / path).chmod(mode)

    return change


def remove(path: str) -> Change:
    def change(root: Path) -> None:
        if (root / path).is_dir():
            shutil.rmtree(root / path)
        else:
            (root / path).unlink()

    return change


def own(path: str, uid: int, gid: int) -> Change:
    return lambda root: os.chown(root / path, uid, gid)


def rename(old: str, new: str) -> Change:
    return lambda root: os.rename(root / old, root / new)


def link(old: str, new: str) -> Change:
    return lambda root: os.link(root / old, root / new)
