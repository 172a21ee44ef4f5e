"""An image's layers become one root filesystem, and go again: the order of things, and its undoing.

Called by the verbs `mount` and `run`, on their thread; the agent uses the parts, because its layers stay
mounted and containerd assembles them. What a mount needs, in this order:

    record in the table -> layers attached to the device server -> superblocks checked, metadata read
    -> layers mounted -> overlay over them -> the layers' own mount points taken away

A failure at any step undoes the earlier ones. `release` undoes a finished mount, a half-made one and one
that a crash left behind alike: it looks at what is there, and may be called again.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from imagefs import bootpack, erofs, errors, futures, kernelreadahead, mount, syscalls
from imagefs.erofs import ondisk
from imagefs.fuse.devices import LayerSpec, PackSpec
from imagefs.image import LazyImage
from imagefs.lazylayer import LazyLayer
from imagefs.mount import Choice, Mode, RootAttributes

_READ_BYTES = 1 << 20
_PARALLEL_READS = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for. `mode` None chooses. `traced_read_ahead_kib`: the start is traced, and the
    kernel reads ahead so much, or nothing is mounted; None: what suits the image's start."""

    mode: Mode | None = None
    writable: bool = False
    suid: bool = False
    dev: bool = False
    traced_read_ahead_kib: int | None = None

    def mount_flags(self) -> int:
        """Flags of the assembled mount."""
        return (0 if self.suid else syscalls.MS_NOSUID) | (0 if self.dev else syscalls.MS_NODEV)


@dataclasses.dataclass(frozen=True, slots=True)
class Assembled:
    """A mounted image: how, and the names of its layers' backing devices (kernelreadahead.py)."""

    choice: Choice
    backing_devices: tuple[str, ...]


def check_directory(directory: Path) -> Path:
    """The mount point as an absolute path. Raises InvalidInputError unless it is a directory."""
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist"
        raise errors.InvalidInputError(f"{directory} {what}; mount needs an existing directory")
    path = Path(os.path.realpath(directory))
    if path == Path("/"):
        raise errors.InvalidInputError("/ is this machine's own root; choose another directory")
    return path


def prepare(image: LazyImage, devices: Sequence[Path]) -> RootAttributes | None:
    """As `prepare_layers`. Returns the root's attributes, None where the topmost layer has the right ones."""
    if not image.layers:
        return RootAttributes()
    roots = prepare_layers(image, devices)
    named = [root for root in roots if root is not None]
    if roots[-1] is not None:
        return None
    return named[-1] if named else RootAttributes()


def prepare_layers(image: LazyImage, devices: Sequence[Path]) -> list[RootAttributes | None]:
    """Check every layer's superblock and bring all metadata in, all layers at once, before the kernel
    parses anything. Returns the attributes of each layer's root, None of a layer that only implies it."""
    if len(image.layers) > mount.MAX_LAYERS:
        raise errors.ConfigurationError(
            f"{image.reference} has {len(image.layers)} layers, overlayfs takes {mount.MAX_LAYERS}"
        )
    if not image.layers:
        return []
    pool = concurrent.futures.ThreadPoolExecutor(min(_PARALLEL_READS, 2 * len(devices)))
    try:
        checks = [pool.submit(_check_layer, image, number, device) for number, device in enumerate(devices)]
        reads = [
            pool.submit(_read_span, image, number, device, offset, length)
            for number, device in enumerate(devices)
            for offset, length in metadata_spans(image.layers[number])
        ]
        roots = list(futures.results(checks))
        for _ in futures.results(reads):
            pass
    finally:
        # Not waited for: what still reads after an error, or Ctrl-C, ends when the layers are detached.
        pool.shutdown(wait=False, cancel_futures=True)
    return roots


def layer_specs(image: LazyImage) -> list[LayerSpec]:
    """What the device server must know of each layer, bottom first."""
    return [
        LayerSpec(
            origin_ref=lazy.origin.name,
            map_digest=lazy.map_digest,
            map_size=len(data),
            blob_digest=lazy.blob_digest,
            blob_size=lazy.block_map.blob_bytes,
            map_bytes=data,
        )
        for lazy, data in zip(image.layers, image.map_bytes, strict=True)
    ]


def pack_spec(image: LazyImage) -> PackSpec | None:
    """What the device server must know of the image's boot pack; None without one that can be used."""
    if image.boot_pack is None or image.block_image.boot_pack is None:
        return None
    table, data = image.block_image.boot_pack.table, image.block_image.boot_pack.data
    return PackSpec(
        origin_ref=image.origin.name,
        table_digest=table.digest,
        table_size=table.size,
        data_digest=data.digest,
        data_size=data.size,
        table_bytes=bootpack.encode(image.boot_pack),
    )


def assemble(
    image: LazyImage,
    devices: Sequence[Path],
    folder: Path,
    directory: Path,
    options: Options,
    files: Mapping[str, Path],
) -> Assembled | None:
    """Mount the image at `directory`, with `folder` for what lies behind it (`directory` is not inside). A
    layer whose map digest `files` has is mounted from there, unless its start is traced.
    None when the kernel cannot mount EROFS here and the mode was left to us: nothing is mounted then, and a
    file-level mount may do."""
    traced_kib = options.traced_read_ahead_kib
    in_files = 0
    if traced_kib is None:
        digests = [layer.map_digest for layer in image.layers]
        in_files = sum(digest in files for digest in digests)
        devices = [files.get(digest, device) for digest, device in zip(digests, devices, strict=True)]
    root = prepare(image, devices)
    names = [
        (f"{image.reference}: layer {number} ({layer.map_digest})", device)
        for number, (layer, device) in enumerate(zip(image.layers, devices, strict=True))
    ]
    try:
        mount.gather(folder)
    except PermissionError as exc:
        if options.mode is None:
            return None
        raise errors.ConfigurationError(
            f"--mode {options.mode} needs the right to mount: {exc.strerror}"
        ) from exc
    try:
        read_ahead_kib = traced_kib or _start_read_ahead_kib(image.boot_pack, lazy=in_files < len(devices))
        choice, mounted = mount.mount_layers(options.mode, names, folder, read_ahead_kib)
        if choice is None:
            return None
        backing = _backing_devices(mounted, traced_kib)
        if options.writable and root is None:
            root = root_attributes(devices[-1])
        mount.mount_overlay(
            folder,
            len(mounted),
            directory,
            root,
            writable=options.writable,
            flags=options.mount_flags(),
        )
    finally:
        mount.unmount_all([folder])
    if in_files:
        why = f"{choice.why}; {in_files} of {len(devices)} layers are whole, in files of the block cache"
        choice = dataclasses.replace(choice, why=why)
    return Assembled(choice, backing)


def _start_read_ahead_kib(boot_pack: bootpack.Table | None, *, lazy: bool) -> int:
    """What the kernel reads ahead, in KiB, until the start of an image with this boot pack is over."""
    if not lazy:
        return kernelreadahead.READ_AHEAD_KIB
    return kernelreadahead.START_READ_AHEAD_KIB if boot_pack is None else boot_pack.read_ahead_kib


def _backing_devices(mounted: Sequence[Path], traced_kib: int | None) -> tuple[str, ...]:
    """Of layer mounts. ConfigurationError when they read ahead something else than a trace will say."""
    names = tuple(kernelreadahead.backing_device(target) for target in mounted)
    if traced_kib is not None:
        found = {kernelreadahead.get(name) for name in names} - {traced_kib}
        if found:
            raise errors.ConfigurationError(
                f"this kernel reads ahead {max(found)} KiB in mounts of layers, whatever is asked of it: is "
                f"/sys read-only? A trace with a read-ahead of {traced_kib} KiB cannot be made here"
            )
    return names


def root_attributes(device: Path) -> RootAttributes:
    """The attributes of a layer's root directory, read through its device file."""
    fd = _open(device, str(device))
    try:
        reader = erofs.Reader(lambda offset, length: _read_exactly(fd, offset, length, str(device)))
        inode = reader.root()
        return RootAttributes(inode.mode, inode.uid, inode.gid, inode.mtime_ns, reader.xattrs(inode))
    finally:
        os.close(fd)


def metadata_spans(layer: LazyLayer) -> list[tuple[int, int]]:
    """(offset, length) pieces, within blocks, that cover the metadata region."""
    value = layer.block_map
    out = []
    offset, end = value.metadata_offset, value.metadata_offset + value.metadata_bytes
    while offset < end:
        stop = min(end, (offset // value.block_bytes + 1) * value.block_bytes)
        out.append((offset, stop - offset))
        offset = stop
    return out


def _check_layer(image: LazyImage, number: int, device: Path) -> RootAttributes | None:
    """Check one superblock; the root's attributes unless the layer only implies them. It is read as the
    kernel will read it, and says what is wrong; that the kernel is shown no worse one later, because a boot
    pack's frame came or went, is the device server's business (fuse/superblocks.py)."""
    layer = image.layers[number]
    what = f"{image.reference}: layer {number} ({layer.map_digest})"
    fd = _open(device, what)
    try:
        page = _read_exactly(fd, 0, ondisk.BLOCK_BYTES, what)
        erofs.check_superblock_of(page, layer.block_map.image_bytes)
    except errors.InvalidInputError as exc:
        raise errors.InvalidInputError(f"{what}: refused before mounting: {exc}") from exc
    finally:
        os.close(fd)
    return None if layer.block_map.root_implied else root_attributes(device)


def _read_span(image: LazyImage, number: int, device: Path, offset: int, length: int) -> None:
    what = f"{image.reference}: layer {number} ({image.layers[number].map_digest})"
    fd = _open(device, what)
    try:
        for start in range(offset, offset + length, _READ_BYTES):
            _read_exactly(fd, start, min(_READ_BYTES, offset + length - start), what)
    finally:
        os.close(fd)


def _open(device: Path, what: str) -> int:
    """For reads of what is asked for and no more: what the kernel reads ahead here is in no boot pack."""
    try:
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise errors.UnavailableError(f"{what}: {device} cannot be opened: {exc.strerror}") from exc
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    return fd


def _read_exactly(fd: int, offset: int, length: int, what: str) -> bytes:
    try:
        data = os.pread(fd, length, offset)
    except OSError as exc:
        raise errors.UnavailableError(
            f"{what}: {length} bytes at {offset} could not be read: {exc.strerror}"
        ) from exc
    if len(data) != length:
        raise errors.IntegrityError(f"{what}: device gave {len(data)} bytes instead of {length} at {offset}")
    return data
