"""The bundle on a host that has nothing, not even a C library: a folder as root of a file system."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from agent import containerdprobe
from glowplug.startup import machine
from tests.fixtures import debian

pytestmark = pytest.mark.root

_BUILD = Path(__file__).parents[2] / "deploy/bundle/build.sh"
_PROGRAM = "/opt/glowplug/current/bin/glowplug"
_START_SECONDS = 60.0


@pytest.fixture(scope="module")
def bare_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The root of a file system with a bundle and nothing else."""
    root = tmp_path_factory.mktemp("host")
    patchelf = debian.unpacked("patchelf", "bookworm", ["patchelf"]) / "usr/bin"
    path = f"{patchelf}:/usr/sbin:/usr/bin:/sbin:/bin"
    built = subprocess.run(
        [_BUILD, root / "opt/glowplug"],
        env={**os.environ, "PATH": path, "PYTHON": "/usr/bin/python3"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    for name in ("dev", "etc/glowplug", "proc", "run", "sys", "tmp", "var/lib"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in ("dev", "proc", "sys"):
        machine.check_call(["mount", "--rbind", f"/{name}", str(root / name)])
        machine.check_call(["mount", "--make-rslave", str(root / name)])
    yield root
    for name in ("dev", "proc", "sys"):
        subprocess.run(["umount", "-l", "-R", root / name], check=False)
    machine.unmount_below(root)


def _inside(root: Path, command: Sequence[str], **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/usr/sbin/chroot", root, *command],
        env={"PATH": "/bin"},
        capture_output=True,
        text=True,
        **more,  # type: ignore[call-overload,no-any-return]
    )


def test_it_brings_everything(bare_host: Path) -> None:
    shown = _inside(bare_host, [_PROGRAM, "--version"])
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "glowplug" in shown.stdout
    script = (
        "import ssl, sqlite3, ctypes, lzma, grpc, aiohttp, cryptography, yaml, zstandard, encodings.idna\n"
    )
    script += "import sys, os; maps = open('/proc/self/maps').read().split()\n"
    script += "print({m for m in maps if m.startswith('/') and not m.startswith('/opt/glowplug/versions/')})"
    python = f"{os.path.realpath(bare_host / 'opt/glowplug/current')}/bin/python3".removeprefix(
        str(bare_host)
    )
    loaded = _inside(bare_host, [python, "-I", "-c", script])
    assert loaded.stderr == ""
    assert loaded.stdout == "set()\n"
    # What `agent install` writes to the host travels with the package.
    assert list((bare_host / "opt/glowplug").rglob("agent/units/glowplug-agent.service"))
    assert {"libc6", "libssl3"} <= {
        path.name for path in (bare_host / "opt/glowplug/current/licences").iterdir()
    }


def test_the_agent_runs_there(bare_host: Path) -> None:
    (bare_host / "etc/glowplug/agent.toml").write_text(
        'root = "/var/lib/glowplug/agent"\n[cache]\nfree_floor_percent = 0\n[http]\nlisten = "127.0.0.1:0"\n'
    )
    config = ["--config", "/etc/glowplug/agent.toml"]
    kept = _inside(bare_host, [_PROGRAM, "agent", "keeper", *config])
    assert (kept.returncode, kept.stderr) == (0, "")
    socket = bare_host / "run/glowplug/snapshotter.sock"
    with (bare_host / "agent.log").open("w") as log:
        agent = subprocess.Popen(
            ["/usr/sbin/chroot", bare_host, _PROGRAM, "agent", "run", *config],
            env={"PATH": "/bin"},
            stderr=log,
        )
    try:
        until = time.monotonic() + _START_SECONDS
        while containerdprobe.unfinished_snapshots(socket) is None:
            said = (bare_host / "agent.log").read_text()
            assert agent.poll() is None, said
            assert time.monotonic() < until, said
            time.sleep(0.1)
        status = _inside(bare_host, [_PROGRAM, "status"])
        assert "cache" in status.stdout, status.stderr
    finally:
        agent.terminate()
        agent.wait(20)
        stop = "import pathlib; from imagefs.fuse.control import DeviceClient as D\n"
        stop += "D.connect(pathlib.Path('/run/glowplug')).stop()"
        python = os.path.realpath(bare_host / "opt/glowplug/current/bin/python3").removeprefix(str(bare_host))
        stopped = _inside(bare_host, [python, "-I", "-c", stop])
    assert stopped.stderr == ""
