"""`glowplug run`: the real command, in an image made of this machine's own shell."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from imagefs import mounts
from tests.fixtures import block_images, images
from tests.fixtures.block_images import Command

pytestmark = pytest.mark.root

_PROGRAMS = ("/bin/sh", "/bin/cat", "/bin/ls", "/bin/sleep", "/bin/mount", "/usr/bin/id", "/usr/bin/env")
_ACCOUNTS = [
    ("etc/passwd", b"root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n"),
    ("etc/group", b"root:x:0:\nappg:x:1001:\nextra:x:5000:app\n"),
]


def shell_layer() -> bytes:
    """A tar with a few programs and the libraries that they load."""
    out = io.BytesIO()
    files = {Path(program): f"bin/{Path(program).name}" for program in _PROGRAMS}
    for program in _PROGRAMS:
        for word in subprocess.run(["ldd", program], capture_output=True, text=True).stdout.split():
            if word.startswith("/"):
                files[Path(word)] = word.lstrip("/")
    with tarfile.open(fileobj=out, mode="w") as tar:
        for folder in ("./", "bin", "etc", "tmp"):
            info = tarfile.TarInfo(folder)
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(info)
        for path, name in files.items():
            tar.add(path.resolve(), name)
    return out.getvalue()


@pytest.fixture(scope="module")
def ref(tmp_path_factory: pytest.TempPathFactory) -> str:
    layers = [shell_layer(), images.tar_of([*_ACCOUNTS, ("etc/resolv.conf", b"the image's own")], root=False)]
    return block_images.make(tmp_path_factory.mktemp("run"), layers)


def test_it_runs_inside_and_leaves_nothing(glowplug: Command, ref: str) -> None:
    said = glowplug(
        "run", ref, "--", "sh", "-c", "echo $$; echo new > /etc/new; cat /etc/new; ls /; exit 7", code=7
    )
    pid, new, *names = said.stdout.split()
    assert pid == "2"
    assert new == "new"
    assert set(names) >= {"bin", "dev", "etc", "proc", "sys", "tmp"}
    assert glowplug.left() == []
    assert "new" not in glowplug("run", ref, "--", "ls", "/etc").stdout.split()


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["nothing-like-it"], 127),
        (["/etc/passwd"], 126),
        (["sh", "-c", "exit 3"], 3),
        (["sh", "-c", "kill -9 $$"], 137),
    ],
)
def test_exit_codes(glowplug: Command, ref: str, command: list[str], code: int) -> None:
    glowplug("run", ref, "--", *command, code=code)
    assert glowplug.left() == []


def test_environment_directory_and_user(glowplug: Command, ref: str) -> None:
    said = glowplug(
        "run", "-e", "A=1", "--env", "PATH=/bin", "-w", "/made/here", "-u", "app", ref, "--",
        "sh", "-c", "echo $A $PATH $HOME; pwd; id",
    ).stdout.splitlines()  # fmt: skip
    assert said[0] == "1 /bin /home/app"
    assert said[1] == "/made/here"
    assert said[2] == "uid=1000(app) gid=1001(appg) groups=1001(appg),5000(extra)"
    assert "not in the image's /etc/passwd" in glowplug("run", "-u", "nobody-here", ref, code=8).stderr


def test_the_image_says_what_to_run(glowplug: Command, tmp_path: Path) -> None:
    made = images.make([shell_layer()])
    config = images.config_of(
        [images.digest(shell_layer())],
        config={"Entrypoint": ["/bin/sh", "-c"], "Cmd": ["echo $FROM"], "Env": ["FROM=config"]},
    )
    document = made.document
    document["config"].update(digest=images.digest(config), size=len(config))
    manifest = json.dumps(document).encode()
    top = images.digest(manifest)
    image = images.Image(
        {**made.blobs, images.digest(config): config}, {top: (made.manifests[made.top][0], manifest)}, top
    )
    ref = block_images.layout(tmp_path / "image", image)
    block_images.convert(ref)
    assert glowplug("run", ref).stdout == "config\n"


def test_what_is_mounted_inside(glowplug: Command, ref: str) -> None:
    script = (
        "cat /proc/mounts; echo x > /dev/null; ls -l /proc/self/fd; cat /etc/resolv.conf; "
        "(echo x > /etc/resolv.conf) 2>&1; (echo x > /sys/x) 2>&1; ls /dev"
    )
    said = glowplug("run", ref, "--", "sh", "-c", script, code=0).stdout
    mounted = {
        line.split()[1]: line.split()[3].split(",") for line in said.splitlines() if line.count(" ") == 5
    }
    assert {"rw", "nosuid", "nodev"} <= set(mounted["/"])
    assert "ro" in mounted["/sys"]
    assert "ro" in mounted["/etc/resolv.conf"]
    assert Path("/etc/resolv.conf").read_text().strip() in said
    assert "the image's own" not in said
    assert said.count("Read-only file system") == 2
    assert {"null", "zero", "full", "random", "urandom", "tty", "pts", "shm", "ptmx"} <= set(said.split())
    assert str(glowplug.state_dir) not in said


@pytest.mark.parametrize("link", ["etc", "proc", "dev"])
def test_links_of_the_image_do_not_lead_to_the_host(glowplug: Command, tmp_path: Path, link: str) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo(link)
        info.type, info.linkname = tarfile.SYMTYPE, f"../..{victim}"
        tar.addfile(info)
    # One layer cannot have both the directory and the link: the link comes in a layer above.
    ref = block_images.make(tmp_path / "image", [shell_layer(), out.getvalue()])
    process = glowplug.start("run", ref, "--", "sh", "-c", ":", stderr=subprocess.PIPE)
    process.communicate(timeout=60)
    assert list(victim.iterdir()) == []
    assert glowplug.left() == []


def test_a_command_whose_name_is_not_text(glowplug: Command, ref: str) -> None:
    said = glowplug("run", ref, "--", "\udcff-nothing", code=127).stderr
    assert said.count("No such file or directory") == 1
    assert glowplug.left() == []


def test_suid_and_dev(glowplug: Command, ref: str) -> None:
    said = glowplug("run", "--suid", "--dev", ref, "--", "sh", "-c", "cat /proc/mounts").stdout
    root = said.splitlines()[0].split()[3].split(",")
    assert "nosuid" not in root
    assert "nodev" not in root


def test_standard_input_and_output_pass_through(glowplug: Command, ref: str) -> None:
    assert glowplug("run", ref, "--", "cat", input="through\n").stdout == "through\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_the_command(glowplug: Command, ref: str, number: signal.Signals) -> None:
    script = f"trap 'echo got; exit 5' {number.name[3:]}; echo ready; while :; do sleep 0.02; done"
    process = glowplug.start("run", ref, "--", "sh", "-c", script, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.communicate(timeout=30)[0] == "got\n"
    assert process.returncode == 5
    assert glowplug.left() == []


def test_a_killed_run_takes_everything_inside_along(glowplug: Command, ref: str) -> None:
    process = glowplug.start(
        "run", ref, "--", "sh", "-c", "echo ready; exec sleep 1000", stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    # End of file: nobody inside holds the pipe any more.
    assert process.communicate(timeout=30)[0] == ""
    assert [record.ephemeral for record in mounts.MountTable(glowplug.state_dir).records()] == [True]
    glowplug("run", ref, "--", "sh", "-c", ":")
    assert glowplug.left() == []


def test_orphans_are_reaped_and_end_with_the_command(glowplug: Command, ref: str) -> None:
    script = "(sh -c 'sleep 0.01' &) ; sleep 0.3; for p in /proc/[0-9]*; do cat $p/stat; done; (sleep 1000 &)"
    said = glowplug("run", ref, "--", "sh", "-c", script).stdout
    assert " Z " not in said
    assert glowplug.left() == []


@pytest.mark.parametrize("same_state", [True, False])
@pytest.mark.parametrize("mode", ["erofs", "fuse"])
def test_another_mount_can_be_unmounted_while_it_runs(
    glowplug: Command, ref: str, tmp_path: Path, mode: str, same_state: bool
) -> None:
    directory = tmp_path / "mnt"
    directory.mkdir()
    state = () if same_state else ("--state", tmp_path / "other")
    glowplug("mount", ref, directory, "--mode", mode, *state)
    process = glowplug.start(
        "run", ref, "--", "sh", "-c", "echo ready; cat", stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    glowplug("umount", directory, *state)
    assert process.communicate("still reading", timeout=30)[0] == "still reading"
    assert process.returncode == 0
    assert glowplug.left() == []


def test_a_terminal_works_and_its_interrupt_comes_once(glowplug: Command, ref: str) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(glowplug.environment, TERM="glow")
        script = (
            "trap 'echo int' INT; test -t 0 && echo tty $TERM; n=0; "
            "while [ $n -lt 60 ]; do sleep 0.01; n=$((n+1)); done; echo end"
        )
        os.execv(block_images.GLOWPLUG, [block_images.GLOWPLUG, "run", ref, "--", "sh", "-c", script])
    said = b""
    deadline = time.monotonic() + 30
    sent = False
    while time.monotonic() < deadline:
        try:
            said += os.read(terminal, 4096)
        except OSError:
            break
        if b"tty glow" in said and not sent:
            sent = True
            os.write(terminal, b"\x03")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(terminal)
    assert said.split().count(b"int") + said.split().count(b"^Cint") == 1, said
    assert said.split()[-1] == b"end"
