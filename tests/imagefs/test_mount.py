"""Mounting layer images: which way, what is refused, what is undone."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
from pathlib import Path

import pytest

from imagefs import assembly, erofs, errors, image, mount, reference, syscalls
from imagefs.erofs import ondisk
from imagefs.image import LazyImage
from imagefs.mount import Mode
from tests.fixtures import block_images, images

TREE = images.tar_of([("etc", None), ("etc/motd", b"base\n"), ("data", b"d" * 100_000)])


@pytest.fixture
def opened(tmp_path: Path) -> LazyImage:
    ref = block_images.make(tmp_path / "image", [TREE, images.tar_of([("more", b"m")])])
    return image.open_image(reference.parse(ref))


@pytest.fixture
def devices(opened: LazyImage, tmp_path: Path) -> list[Path]:
    """The layer images as plain files, by `zstd -d`: they stand for the device files."""
    out = []
    for number, layer in enumerate(opened.layers):
        blob = tmp_path / "image/blobs/sha256" / layer.blob_digest[7:]
        path = tmp_path / f"layer-{number}"
        subprocess.run(["zstd", "-dqf", blob, "-o", path], check=True)
        out.append(path)
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    path.mkdir()
    return path


def refuse(monkeypatch: pytest.MonkeyPatch, code: int, times: int = 1) -> list[str]:
    """Make the first mount(2) calls fail; collects the sources of all."""
    seen: list[str] = []
    real = syscalls.mount

    def fake(source: object, target: object, filesystem: str | None, flags: int, options: str = "") -> None:
        seen.append(str(source))
        if len(seen) <= times:
            raise OSError(code, os.strerror(code), str(target))
        real(str(source), str(target), filesystem, flags, options)

    monkeypatch.setattr(syscalls, "mount", fake)
    return seen


def named(devices: list[Path]) -> list[tuple[str, Path]]:
    return [(device.name, device) for device in devices]


@pytest.mark.root
def test_a_kernel_that_wants_block_devices_gets_loop(
    monkeypatch: pytest.MonkeyPatch, devices: list[Path], folder: Path
) -> None:
    seen = refuse(monkeypatch, errno.ENOTBLK)
    choice, done = mount.mount_layers(None, named(devices), folder)
    try:
        assert choice is not None
        assert choice.mode is Mode.LOOP
        assert "6.12" in choice.why
        assert all(source.startswith("/dev/loop") for source in seen[1:])
        assert (done[0] / "etc/motd").read_text() == "base\n"
    finally:
        mount.unmount_all(done)


@pytest.mark.root
def test_file_backed_layers_are_cached_once_and_read_ahead(devices: list[Path], folder: Path) -> None:
    _, done = mount.mount_layers(None, named(devices), folder)
    try:
        lines = [
            line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(folder) in line
        ]
        assert len(lines) == 2
        assert all("directio" in line for line in lines)
        found = [path.read_text().strip() for path in Path("/sys/class/bdi").glob("erofs-*/read_ahead_kb")]
        assert found.count("2048") >= 2
    finally:
        mount.unmount_all(done)


@pytest.mark.root
@pytest.mark.parametrize("mode", [Mode.EROFS, Mode.LOOP])
def test_read_ahead_of_a_start(devices: list[Path], folder: Path, mode: Mode) -> None:
    before = {path.name for path in Path("/sys/class/bdi").glob("erofs-*")}
    _, done = mount.mount_layers(mode, named(devices), folder, 12)
    try:
        names = {path.name for path in Path("/sys/class/bdi").glob("erofs-*")} - before
        if mode is Mode.LOOP:
            points = [os.stat(path).st_dev for path in done]
            names = {f"{os.major(device)}:{os.minor(device)}" for device in points}
        found = [Path(f"/sys/class/bdi/{name}/read_ahead_kb").read_text().strip() for name in names]
        assert found.count("12") >= len(done)
    finally:
        mount.unmount_all(done)


@pytest.mark.root
def test_a_kernel_without_directio(
    monkeypatch: pytest.MonkeyPatch, devices: list[Path], folder: Path
) -> None:
    seen = refuse(monkeypatch, errno.EINVAL)
    choice, done = mount.mount_layers(None, named(devices), folder)
    mount.unmount_all(done)
    assert choice is not None
    assert choice.mode is Mode.EROFS
    assert len(seen) == 3


@pytest.mark.parametrize("code", [errno.ENODEV, errno.EPERM])
def test_without_erofs_nothing_is_mounted(
    monkeypatch: pytest.MonkeyPatch, devices: list[Path], folder: Path, code: int
) -> None:
    refuse(monkeypatch, code, times=9)
    assert mount.mount_layers(None, named(devices), folder) == (None, [])
    with pytest.raises(errors.ConfigurationError, match="--mode erofs failed"):
        mount.mount_layers(Mode.EROFS, named(devices), folder)


@pytest.mark.root
def test_a_layer_that_does_not_mount_undoes_the_ones_before(devices: list[Path], folder: Path) -> None:
    broken = folder / "broken"
    broken.write_bytes(bytes(8192))
    with pytest.raises(errors.ConfigurationError, match="broken: mounting with --mode erofs failed"):
        mount.mount_layers(None, [*named(devices), ("broken", broken)], folder)
    assert str(folder) not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.root
def test_a_mount_that_fails_halfway_is_undone(opened: LazyImage, devices: list[Path], folder: Path) -> None:
    with pytest.raises(errors.ConfigurationError, match="overlayfs over 2 layers"):
        assembly.assemble(opened, devices, folder, folder / "missing", assembly.Options(), {})
    assert str(folder) not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.root
def test_only_the_assembled_mount_is_left(
    opened: LazyImage, devices: list[Path], folder: Path, tmp_path: Path
) -> None:
    where = tmp_path / "root"
    where.mkdir()
    before = os.getcwd()
    assembly.assemble(opened, devices, folder, where, assembly.Options(), {})
    try:
        text = Path("/proc/self/mountinfo").read_text()
        assert text.count(str(tmp_path)) == 1
        assert sorted(os.listdir(where)) == ["data", "etc", "more"]
        assert os.getcwd() == before
    finally:
        mount.unmount_all([where])


def damage(device: Path, offset: int, value: bytes) -> None:
    """Change the superblock and make its checksum right again, as an attacker would."""
    data = bytearray(device.read_bytes()[: ondisk.BLOCK_BYTES])
    data[offset : offset + len(value)] = value
    body = bytearray(data[ondisk.SUPERBLOCK_OFFSET :])
    struct.pack_into("<I", body, 4, 0)
    struct.pack_into("<I", data, ondisk.SUPERBLOCK_OFFSET + 4, ondisk.crc32c(body))
    with device.open("r+b") as file:
        file.write(data)


def test_features_that_our_writer_does_not_set_are_refused_before_mounting(
    monkeypatch: pytest.MonkeyPatch, opened: LazyImage, devices: list[Path], folder: Path
) -> None:
    seen = refuse(monkeypatch, errno.EPERM, times=99)
    incompatible = ondisk.SUPERBLOCK_OFFSET + 80
    damage(devices[1], incompatible, struct.pack("<I", 1))
    with pytest.raises(errors.InvalidInputError, match=r"layer 1 .*refused before mounting: .*incompatible"):
        assembly.assemble(opened, devices, folder, folder, assembly.Options(), {})
    assert seen == []


def test_a_superblock_of_another_size_is_refused(
    opened: LazyImage, devices: list[Path], folder: Path
) -> None:
    superblock = erofs.check_superblock(devices[0].read_bytes()[: ondisk.BLOCK_BYTES])
    damage(devices[0], ondisk.SUPERBLOCK_OFFSET + 36, struct.pack("<I", superblock.blocks + 1))
    with pytest.raises(errors.InvalidInputError, match="refused before mounting: EROFS superblock: of"):
        assembly.prepare(opened, devices)


def test_a_device_that_ends_early(opened: LazyImage, devices: list[Path]) -> None:
    os.truncate(devices[1], 100)
    with pytest.raises(errors.IntegrityError, match="layer 1"):
        assembly.prepare(opened, devices)


def test_metadata_spans_cover_the_region_and_keep_to_blocks(opened: LazyImage) -> None:
    for layer in opened.layers:
        value = layer.block_map
        spans = assembly.metadata_spans(layer)
        assert spans[0][0] == value.metadata_offset
        assert sum(length for _, length in spans) == value.metadata_bytes
        for offset, length in spans:
            assert offset // value.block_bytes == (offset + length - 1) // value.block_bytes
