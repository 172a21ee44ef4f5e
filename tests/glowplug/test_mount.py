"""`glowplug mount` and `umount`, the real command on the real kernel."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import struct
import subprocess
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from converter import pack
from imagefs import mounts
from imagefs.erofs import ondisk
from imagefs.fuse import control
from tests.fixtures import block_images, boot_packs, images, servers, tars
from tests.fixtures.block_images import Command
from tests.fixtures.conversion import origin_of

pytestmark = pytest.mark.root

BASE = images.tar_of([("etc", None), ("etc/motd", b"base\n"), ("etc/gone", b"x"), ("data", b"d" * 300_000)])
TOP = images.tar_of([("etc", None), ("etc/motd", b"top\n"), ("etc/.wh.gone", b"")])

_LET_GO = 'grep -o "/tmp/[^ ]*" | xargs -r umount -l 2>/dev/null'
"""In a new mount namespace, behind a list of mounts: what other tests have mounted is not kept from them."""


def entry(name: str, content: bytes | None = None, **attributes: object) -> bytes:
    """A tar of one entry with these attributes."""
    out = BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo(name)
        info.type = tarfile.REGTYPE if content is not None else tarfile.DIRTYPE
        info.size = len(content or b"")
        for key, value in attributes.items():
            setattr(info, key, value)
        tar.addfile(info, BytesIO(content or b""))
    return out.getvalue()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "mnt"
    path.mkdir()
    return path


def listing(root: Path) -> dict[str, object]:
    """Everything that stat, readlink and xattrs say, and the content, by path."""
    out: dict[str, object] = {}
    links: dict[tuple[int, int], str] = {}
    for folder, names, files in os.walk(os.fsencode(root)):
        for name in [b".", *names, *files] if folder == os.fsencode(root) else [*names, *files]:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            key = os.path.relpath(path, os.fsencode(root)).decode("utf-8", "surrogateescape")
            regular = stat.S_ISREG(status.st_mode)
            first = links.setdefault((status.st_dev, status.st_ino), key) if regular else key
            out[key] = (
                oct(status.st_mode),
                status.st_uid,
                status.st_gid,
                status.st_mtime_ns,
                status.st_size if regular else 0,
                status.st_nlink if regular else 0,
                os.readlink(path) if stat.S_ISLNK(status.st_mode) else b"",
                status.st_rdev,
                first,
                {
                    n: os.getxattr(path, n, follow_symlinks=False)
                    for n in os.listxattr(path, follow_symlinks=False)
                },
                hash(Path(os.fsdecode(path)).read_bytes()) if regular and status.st_size < 1 << 26 else 0,
            )
    return out


@pytest.mark.parametrize("mode", ["auto", "loop", "fuse"])
def test_an_image_is_mounted_read_and_unmounted(
    glowplug: Command, tmp_path: Path, directory: Path, mode: str
) -> None:
    ref = block_images.make(tmp_path / "image", [BASE, TOP])
    said = glowplug("mount", ref, directory, "--mode", mode)
    assert f"mode {'erofs' if mode == 'auto' else mode}" in said.stderr
    assert said.stdout == ""
    assert (directory / "etc/motd").read_bytes() == b"top\n"
    assert (directory / "data").read_bytes() == b"d" * 300_000
    assert sorted(os.listdir(directory / "etc")) == ["motd"]
    with pytest.raises(OSError, match="Read-only"):
        (directory / "new").write_text("x")
    flags = os.statvfs(directory).f_flag
    assert flags & os.ST_NOSUID
    assert flags & os.ST_NODEV
    glowplug("umount", directory)
    assert os.listdir(directory) == []
    assert glowplug.left() == []


def test_a_file_level_mount_shows_what_the_kernel_shows(
    glowplug: Command, tmp_path: Path, directory: Path
) -> None:
    ref = block_images.make(tmp_path / "image", list(tars.torture_layers()))
    files = tmp_path / "files"
    files.mkdir()
    glowplug("mount", ref, directory)
    glowplug("mount", ref, files, "--mode", "fuse")
    kernel, own = listing(directory), listing(files)
    assert len(kernel) > 50
    assert own.keys() == kernel.keys()
    for path, expected in kernel.items():
        assert own[path] == expected, path


def test_json_names_what_was_mounted(glowplug: Command, tmp_path: Path, directory: Path) -> None:
    ref = block_images.make(tmp_path / "image", [BASE])
    result = json.loads(glowplug("mount", ref, directory, "--json").stdout)
    assert result["directory"] == str(directory)
    assert result["mode"] == "erofs"
    assert result["layers"] == 1


def test_rw_keeps_changes_apart(glowplug: Command, tmp_path: Path, directory: Path) -> None:
    ref = block_images.make(tmp_path / "image", [BASE])
    glowplug("mount", ref, directory, "--rw")
    (directory / "etc/motd").write_text("changed")
    (directory / "data").unlink()
    assert (directory / "etc/motd").read_text() == "changed"
    glowplug("umount", directory)
    glowplug("mount", ref, directory)
    assert (directory / "etc/motd").read_text() == "base\n"
    assert (directory / "data").exists()


@pytest.mark.parametrize("writable", [False, True])
def test_a_root_without_entry_looks_like_the_topmost_that_has_one(
    glowplug: Command, tmp_path: Path, directory: Path, writable: bool
) -> None:
    layers = [
        entry("./", mode=0o700, uid=1),
        entry("./", mode=0o1771, uid=5, gid=6, mtime=1234, pax_headers={"SCHILY.xattr.user.of": "root"}),
        images.tar_of([("file", b"x")], root=False),
        images.tar_of([("file2", b"x")], root=False),
    ]
    ref = block_images.make(tmp_path / "image", layers)
    glowplug("mount", ref, directory, *(["--rw"] if writable else []))
    status = directory.stat()
    assert (oct(status.st_mode), status.st_uid, status.st_gid) == ("0o41771", 5, 6)
    assert status.st_mtime == 1234
    assert os.getxattr(directory, "user.of") == b"root"


def test_no_layer_has_a_root(glowplug: Command, tmp_path: Path, directory: Path) -> None:
    ref = block_images.make(tmp_path / "image", [images.tar_of([("file", b"x")], root=False)])
    for mode in ("auto", "fuse"):
        glowplug("mount", ref, directory, "--mode", mode)
        status = directory.stat()
        assert (oct(status.st_mode), status.st_uid, status.st_mtime) == ("0o40755", 0, 0)
        glowplug("umount", directory)


def test_128_layers(glowplug: Command, tmp_path: Path, directory: Path) -> None:
    layers = [images.tar_of([("last", b"%d" % n), (f"own-{n}", b"%d" % n)]) for n in range(128)]
    ref = block_images.make(tmp_path / "image", layers, encoding="plain")
    glowplug("mount", ref, directory)
    assert (directory / "last").read_bytes() == b"127"
    assert len(os.listdir(directory)) == 129
    assert (directory / "own-0").read_bytes() == b"0"
    glowplug("umount", directory)
    assert glowplug.left() == []


def test_suid_and_dev_are_kept_where_asked(glowplug: Command, tmp_path: Path, directory: Path) -> None:
    ref = block_images.make(tmp_path / "image", [BASE])
    glowplug("mount", ref, directory, "--suid", "--dev")
    flags = os.statvfs(directory).f_flag
    assert not flags & os.ST_NOSUID
    assert not flags & os.ST_NODEV


def test_a_busy_mount_says_who_holds_it(glowplug: Command, tmp_path: Path, directory: Path) -> None:
    ref = block_images.make(tmp_path / "image", [BASE])
    glowplug("mount", ref, directory)
    with (directory / "data").open("rb"):
        said = glowplug("umount", directory, code=9).stderr
    assert f"pid {os.getpid()} (" in said
    assert ", fd " in said
    holder = subprocess.Popen(["sleep", "1000"], cwd=directory)
    try:
        said = glowplug("umount", directory, code=9).stderr
        assert f"pid {holder.pid} (sleep, cwd)" in said
        glowplug("umount", "--force", directory)
        assert not os.path.ismount(directory)
        assert glowplug.left() == []
    finally:
        holder.kill()
        holder.wait()


def test_a_copy_in_another_mount_namespace_is_named(
    glowplug: Command, tmp_path: Path, directory: Path
) -> None:
    ref = block_images.make(tmp_path / "image", [BASE])
    glowplug("mount", ref, directory)
    ready = tmp_path / "ready"
    script = f'grep -Fv "$1" /proc/self/mounts | {_LET_GO}; touch "$2"; exec sleep 1000'
    alone = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", directory, ready]
    other = subprocess.Popen(alone)
    try:
        while not ready.exists():
            assert other.poll() is None
        assert f"pid {other.pid}" in glowplug("umount", directory, code=9).stderr
    finally:
        other.kill()
        other.wait()
    glowplug("umount", directory)
    assert glowplug.left() == []


def test_a_bind_mount_of_it_is_named(glowplug: Command, tmp_path: Path, directory: Path) -> None:
    ref = block_images.make(tmp_path / "image", [BASE])
    glowplug("mount", ref, directory)
    (tmp_path / "bind").mkdir()
    subprocess.run(["mount", "--bind", directory, tmp_path / "bind"], check=True)
    try:
        assert f"a bind mount of it at {tmp_path / 'bind'}" in glowplug("umount", directory, code=9).stderr
        assert (tmp_path / "bind/data").read_bytes() == b"d" * 300_000
    finally:
        subprocess.run(["umount", tmp_path / "bind"], check=True)
    glowplug("umount", directory)
    assert glowplug.left() == []


@pytest.mark.parametrize("first", ["forged", "honest"])
def test_a_forged_pack_changes_no_other_image(glowplug: Command, tmp_path: Path, first: str) -> None:
    """That has the same layer: its device, hence what the kernel caches of it, is another one."""
    refs = {
        name: block_images.make(tmp_path / f"layout-{name}", [BASE, images.tar_of([(name, b"x")])])
        for name in ("forged", "honest")
    }
    opened = {name: boot_packs.open_image(ref) for name, ref in refs.items()}
    layers = {name: image.layers[0].map_digest for name, image in opened.items()}
    assert layers["forged"] == layers["honest"]
    whole = [(number, 0, layer.block_map.image_bytes) for number, layer in enumerate(opened["forged"].layers)]
    pack.pack(opened["forged"], [boot_packs.trace_of(opened["forged"], *whole)], boot_packs.PARAMETERS)
    boot_packs.forge(refs["forged"], boot_packs.replace_text(b"d" * 4096, b"e" * 4096))
    points = {name: tmp_path / name for name in refs}
    for name in ["forged", "honest"] if first == "forged" else ["honest", "forged"]:
        points[name].mkdir()
        glowplug("mount", refs[name], points[name])
    assert b"e" * 4096 in (points["forged"] / "data").read_bytes(), "else this would test nothing"
    assert (points["honest"] / "data").read_bytes() == b"d" * 300_000
    glowplug("umount", points["forged"])
    assert (points["honest"] / "data").read_bytes() == b"d" * 300_000
    glowplug("umount", points["honest"])


def test_a_superblock_that_only_a_pack_has_is_not_mounted(
    glowplug: Command, tmp_path: Path, directory: Path
) -> None:
    """The layer's own is, and the start does without that frame of the pack."""
    ref = block_images.make(tmp_path / "layout", [BASE])
    opened = boot_packs.open_image(ref)
    pack.pack(opened, [boot_packs.trace_of(opened, (0, 0, 8192))], boot_packs.PARAMETERS)

    def change(content: bytearray) -> None:
        content[content.index(struct.pack("<I", ondisk.MAGIC)) + 80] |= 0x10

    boot_packs.forge(ref, change)
    glowplug("mount", ref, directory)
    assert (directory / "data").read_bytes() == b"d" * 300_000
    assert "incompatible features 0x10" in (glowplug.state_dir / "server.log").read_text()
    glowplug("umount", directory)
    assert glowplug.left() == []


def test_what_is_not_ours_is_left_alone(glowplug: Command, tmp_path: Path, directory: Path) -> None:
    assert "not a mount of glowplug" in glowplug("umount", directory, code=4).stderr
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", directory], check=True)
    try:
        assert "umount(8)" in glowplug("umount", directory, code=4).stderr
        assert os.path.ismount(directory)
    finally:
        subprocess.run(["umount", directory], check=True)


def test_wrong_directories_and_images(glowplug: Command, tmp_path: Path, directory: Path) -> None:
    ref = block_images.make(tmp_path / "image", [BASE])
    assert "does not exist" in glowplug("mount", ref, tmp_path / "nothing", code=3).stderr
    assert "own root" in glowplug("mount", ref, "/", code=3).stderr
    file = tmp_path / "file"
    file.write_text("")
    assert "is not a directory" in glowplug("mount", ref, file, code=3).stderr
    plain = block_images.layout(tmp_path / "plain", images.make([BASE]))
    said = glowplug("mount", plain, directory, code=4).stderr
    assert f"run `glowplug convert {plain}`" in said
    glowplug("mount", ref, directory)
    assert "mounted already" in glowplug("mount", ref, directory, code=9).stderr
    glowplug("umount", directory)
    assert glowplug.left() == []


def test_a_blob_that_is_gone_undoes_the_mount(glowplug: Command, tmp_path: Path, directory: Path) -> None:
    ref = block_images.make(tmp_path / "image", [BASE, TOP])
    for blob in (tmp_path / "image/blobs/sha256").iterdir():
        if blob.read_bytes()[:4] == b"\x28\xb5\x2f\xfd":  # zstd: the layer blobs
            blob.write_bytes(b"")
    said = glowplug("mount", ref, directory, code=7).stderr
    assert "layer" in said
    assert "ends at byte " in said  # the server's own reason, not only the kernel's EIO
    assert not os.path.ismount(directory)
    assert glowplug.left() == []


def test_umount_after_everything_was_killed(glowplug: Command, tmp_path: Path, directory: Path) -> None:
    ref = block_images.make(tmp_path / "image", [BASE])
    glowplug("mount", ref, directory)
    client = control.DeviceClient.connect(glowplug.state_dir)
    assert client is not None
    client.stop()
    glowplug("umount", directory)
    assert not os.path.ismount(directory)
    assert glowplug.left() == []
    glowplug("mount", ref, directory)
    assert (directory / "etc/motd").read_text() == "base\n"


def kill_server(glowplug: Command) -> None:
    """SIGKILL for the keeper, the server and its workers: nobody is left to start another."""
    client = control.DeviceClient.connect(glowplug.state_dir)
    assert client is not None
    processes = client.status()["processes"]
    server = processes["server"]
    keeper = int(Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()[1])
    for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first: whoever is left would replace the dead
        for pid in (server, keeper, *processes["workers"]):
            os.kill(pid, number)
    while control.DeviceClient.connect(glowplug.state_dir) is not None:
        pass


def kill_files_daemon(glowplug: Command) -> None:
    (record,) = mounts.MountTable(glowplug.state_dir).records()
    assert record.pid is not None
    os.kill(record.pid, signal.SIGKILL)
    while record.owner_lives():
        pass


@pytest.mark.parametrize("mode", ["erofs", "loop", "fuse"])
def test_a_mount_whose_processes_were_killed_is_known_as_dead(
    glowplug: Command, tmp_path: Path, directory: Path, mode: str
) -> None:
    ref = block_images.make(tmp_path / "image", [BASE])
    glowplug("mount", ref, directory, "--mode", mode)
    assert json.loads(glowplug("status", "--json").stdout)["mounts"][0]["wrong"] is None
    (kill_files_daemon if mode == "fuse" else kill_server)(glowplug)
    remedy = f"run `glowplug umount {directory}`"
    assert f"dead: the processes that served it were killed, its reads fail; {remedy}" in (
        glowplug("status").stdout
    )
    assert f"{remedy}, then mount again" in glowplug("mount", ref, directory, code=9).stderr
    glowplug("umount", directory)
    assert glowplug.left() == []
    glowplug("mount", ref, directory, "--mode", mode)
    assert (directory / "etc/motd").read_bytes() == b"base\n"
    glowplug("umount", directory)
    assert "nothing is mounted" in glowplug("status", code=4).stderr


def test_a_mount_that_umount8_took_away_is_known(glowplug: Command, tmp_path: Path, directory: Path) -> None:
    ref = block_images.make(tmp_path / "image", [BASE])
    glowplug("mount", ref, directory)
    subprocess.run(["umount", directory], check=True)
    said = glowplug("status").stdout
    assert "not mounted here any more" in said
    assert f"run `glowplug umount {directory}`" in said
    glowplug("umount", directory)
    assert glowplug.left() == []


def test_a_cache_that_cannot_be_used_is_not_kept_for_the_next(
    glowplug: Command, tmp_path: Path, directory: Path
) -> None:
    ref = block_images.make(tmp_path / "image", [BASE])
    assert "cache" in glowplug("mount", ref, directory, "--cache", "/proc/none", code=8).stderr
    assert glowplug.left() == []
    assert "keeps" not in glowplug("mount", ref, directory).stderr


def test_settings_that_a_running_server_does_not_take_are_said(
    glowplug: Command, tmp_path: Path, directory: Path
) -> None:
    ref = block_images.make(tmp_path / "image", [BASE])
    (tmp_path / "second").mkdir()
    glowplug("mount", ref, directory)
    said = glowplug("mount", ref, tmp_path / "second", "--cache", tmp_path / "elsewhere").stderr
    assert f"keeps its --cache {glowplug.cache_dir} until the last umount" in said


def test_a_state_directory_behind_a_link(glowplug: Command, tmp_path: Path, directory: Path) -> None:
    ref = block_images.make(tmp_path / "image", [BASE])
    glowplug.state_dir.mkdir()
    (tmp_path / "link").symlink_to(glowplug.state_dir)
    glowplug("mount", ref, directory, "--state", tmp_path / "link")
    assert (directory / "etc/motd").read_bytes() == b"base\n"
    glowplug("umount", directory)
    assert glowplug.left() == []


@pytest.mark.parametrize("mode", ["erofs", "fuse"])
def test_a_folder_named_from_here_is_read_by_processes_elsewhere(
    glowplug: Command, tmp_path: Path, directory: Path, mode: str
) -> None:
    place = tmp_path / "a@b"
    place.mkdir()
    block_images.make(place / "image", [BASE])
    glowplug("mount", "oci:image", directory, "--mode", mode, cwd=place)
    assert (directory / "etc/motd").read_bytes() == b"base\n"
    glowplug("umount", directory)


def test_umount_finishes_what_a_killed_mount_began(
    glowplug: Command, tmp_path: Path, directory: Path
) -> None:
    table = mounts.MountTable(glowplug.state_dir)
    record = mounts.Record(mounts.mount_id(directory), str(directory), "oci:x", "", False)
    folder = table.claim(record)
    (folder / "0").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder / "0"], check=True)
    glowplug("umount", directory)
    assert glowplug.left() == []
    assert not folder.exists()


def test_interrupted_while_the_origin_hangs(glowplug: Command, tmp_path: Path, directory: Path) -> None:
    """SIGINT in the middle of a mount leaves nothing behind."""
    ref = block_images.make(tmp_path / "image", [BASE])
    for blob in (tmp_path / "image/blobs/sha256").iterdir():
        if blob.read_bytes()[:4] == b"\x28\xb5\x2f\xfd":
            blob.unlink()
            os.mkfifo(blob)  # opening it waits for a writer that never comes
    process = glowplug.start("mount", ref, directory, stderr=subprocess.PIPE)
    while not any(mounts.MountTable(glowplug.state_dir).records()):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert not os.path.ismount(directory)
    assert glowplug.left() == []


@pytest.mark.parametrize("verb", ["inspect", "mount"])
def test_an_interrupt_does_not_wait_for_an_origin_that_hangs(
    glowplug: Command,
    directory: Path,
    registry: servers.RegistryServer,
    fault_server: servers.FaultProxy,
    verb: str,
) -> None:
    fault_server.upstream = registry.host
    name = servers.unique_name()
    images.make([BASE]).push(origin_of(f"docker://{registry.host}/{name}"), "v1")
    block_images.convert(f"docker://{registry.host}/{name}:v1")
    fault_server.add(servers.Fault(path="blobs/", times=None, hang=True))
    arguments = [f"docker://{fault_server.host}/{name}:v1", *([directory] if verb == "mount" else [])]
    process = glowplug.start(verb, *arguments, stderr=subprocess.PIPE)
    while not fault_server.seen(path="blobs/"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert glowplug.left() == []


def test_a_user_gets_a_file_level_mount(glowplug: Command, tmp_path: Path) -> None:
    """Without root: in a mount namespace where everybody may reach the interpreter and /dev/fuse."""
    ref = block_images.make(tmp_path / "image", [BASE])
    place = Path("/tmp") / f"glowplug-user-{os.getpid()}"
    home = place / "home"
    (home / "mnt").mkdir(parents=True)
    shutil.copytree(tmp_path / "image", place / "image")
    subprocess.run(["chown", "-R", "nobody", place], check=True)
    ref = f"oci:{place}/image:latest"
    prefix = Path(os.path.realpath(os.sys.executable)).parent.parent  # type: ignore[attr-defined]
    script = f"""cat /proc/self/mounts | {_LET_GO}; set -e
        mkdir {place}/python; mount --bind {prefix} {place}/python
        top=/$(echo {prefix} | cut -d/ -f2)
        if [ $top = /root ]; then
            mount -t tmpfs -o mode=755 tmpfs $top; mkdir -p {prefix}; mount --bind {place}/python {prefix}
        fi
        mknod -m 666 {place}/fuse c 10 229; mount --bind {place}/fuse /dev/fuse; cd {home}
        setpriv --reuid nobody --clear-groups sh -ec '
            export HOME={home} GLOWPLUG_STATE={home}/state GLOWPLUG_CACHE={home}/cache GLOWPLUG_FREE_FLOOR=0
            {block_images.GLOWPLUG} mount {ref} mnt
            cat mnt/etc/motd
            {block_images.GLOWPLUG} umount mnt
            ls mnt state/mounts'
        """
    try:
        result = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 0, result.stderr
        assert "only root may mount(2)" in result.stderr
        assert result.stdout.split() == ["base", "mnt:", "state/mounts:"]
    finally:
        shutil.rmtree(place)
