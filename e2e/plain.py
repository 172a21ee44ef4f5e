"""The same layer images as plain EROFS files on local disk: what a lazy mount's steady state is held against.

The layers are converted into an OCI layout, decompressed by `zstd -d`, and mounted and overlaid by the same
code that mounts them lazily, only without a device server between the kernel and the file.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from e2e import workloads
from glowplug.startup import lazy, machine
from imagefs import artifact, mount


@contextlib.contextmanager
def mounted(workload: workloads.Workload, folder: Path, directory: Path) -> Iterator[None]:
    """The workload's root filesystem at `directory`, from files below `folder`."""
    folder.mkdir(parents=True)
    directory.mkdir(parents=True, exist_ok=True)
    files = _layer_images(workload, folder)
    try:
        _, targets = mount.mount_layers(None, [(file.name, file) for file in files], folder)
        mount.mount_overlay(folder, len(targets), directory, None, writable=False, flags=0)
        yield
    finally:
        machine.unmount_below(directory)
        machine.unmount_below(folder)


def _layer_images(workload: workloads.Workload, folder: Path) -> list[Path]:
    layout = folder / "layout"
    command = [str(lazy.COMMAND), "convert", "--json", workload.source, "--to", f"oci:{layout}:latest"]
    machine.check_call(command)
    files = []
    for number, layer in enumerate(_block_image(layout).layers):
        file = folder / f"layer-{number}.erofs"
        blob = layout / "blobs" / layer.blob.digest.replace(":", "/")
        machine.check_call(["zstd", "-q", "-d", str(blob), "-o", str(file)])
        files.append(file)
    return files


def _block_image(layout: Path) -> artifact.BlockImage:
    """The block image that the layout's index lists."""
    for entry in json.loads((layout / "index.json").read_text())["manifests"]:
        data = (layout / "blobs" / entry["digest"].replace(":", "/")).read_bytes()
        if artifact.is_block_image(json.loads(data)):
            return artifact.decode(data)
    raise machine.CommandError(f"{layout}: glowplug convert left no block image there")
