"""What the DaemonSet's container does, below a folder. Only entering the host's namespaces is not real: a
program named nsenter writes down what it is given, and fails when told to."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).parents[2] / "deploy/bundle/on-host"
_SECONDS = 20.0
_NSENTER = """\
#!/bin/sh
echo "$@" >>"$ROOT/calls"
[ ! -e "$ROOT/fail" ] || { rm "$ROOT/fail"; exit 9; }
"""


class Pod:
    """The container's file system below `root`, with the host's folders in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.opt, self.etc = root / "host/opt/glowplug", root / "host/etc/glowplug"
        for name in ("settings", "cluster", "secrets/peers", "tmp", "bin"):
            (root / name).mkdir(parents=True)
        for folder in (self.opt, self.etc):
            folder.mkdir(parents=True)
        (root / "settings/agent.toml").write_text('api_url = "@API_URL@"\na = "@NODE_IP@:1 @NODE_NAME@"\n')
        (root / "cluster/token").write_text("first")
        (root / "secrets/peers/token").write_text("secret")
        (root / "bin/nsenter").write_text(_NSENTER)
        (root / "bin/nsenter").chmod(0o755)
        self.bundle("1")
        self.process: subprocess.Popen[str] | None = None

    def bundle(self, version: str) -> None:
        """The image's bundle is of this version."""
        folder = self.root / f"opt/glowplug/versions/{version}/bin"
        folder.mkdir(parents=True)
        (folder / "glowplug").write_text(version)
        current = self.root / "opt/glowplug/current"
        current.unlink(missing_ok=True)
        current.symlink_to(f"versions/{version}")

    def start(self, action: str = "install") -> None:
        environment = {
            "PATH": f"{self.root}/bin:{os.environ['PATH']}",
            "ROOT": str(self.root),
            "GLOWPLUG_ACTION": action,
            "GLOWPLUG_MODE": "runtime-class",
            "NODE_NAME": "n1",
            "NODE_IP": "fd00::7",
            "KUBERNETES_SERVICE_HOST": "10.96.0.1",
            "RETRY_SECONDS": "0.1",
        }
        (self.root / "tmp/installed").unlink(missing_ok=True)
        self.process = subprocess.Popen(["sh", _SCRIPT], env=environment, stderr=subprocess.PIPE, text=True)

    def run_until(self, path: Path, text: str | None = None) -> None:
        """Until a file is there, with this text."""
        until = time.monotonic() + _SECONDS
        while not path.exists() or (text is not None and path.read_text() != text):
            assert self.process is not None
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < until, path
            time.sleep(0.02)

    def ready(self) -> None:
        self.run_until(self.root / "tmp/installed")

    def stop(self) -> str:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        _, said = self.process.communicate(timeout=_SECONDS)
        assert self.process.returncode == 0
        self.process = None
        return said

    def calls(self) -> list[str]:
        return (self.root / "calls").read_text().splitlines()


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Pod]:
    made = Pod(tmp_path)
    yield made
    if made.process is not None:
        made.process.kill()
        made.process.communicate()


_INSTALL = (
    "--target 1 --mount --uts --ipc --net --pid -- /opt/glowplug/current/bin/glowplug agent install"
    " --config /etc/glowplug/agent.toml.wanted --mode runtime-class"
)


def test_it_brings_all_to_the_host_and_keeps_the_token_fresh(pod: Pod) -> None:
    pod.start()
    pod.ready()
    assert pod.calls() == [_INSTALL]
    assert (pod.opt / "current/bin/glowplug").read_text() == "1"
    assert (pod.etc / "agent.toml.wanted").read_text() == (
        'api_url = "https://10.96.0.1:443"\na = "[fd00::7]:1 n1"\n'
    )
    assert (pod.etc / "peers/token").read_text() == "secret"
    assert {path.stat().st_mode & 0o777 for path in pod.etc.rglob("token")} == {0o600}
    (pod.root / "cluster/token").write_text("second")
    pod.run_until(pod.etc / "cluster/token", "second")
    assert pod.stop() == ""


def test_a_new_version_comes_beside_the_old_one_which_goes_when_nothing_runs_from_it(pod: Pod) -> None:
    pod.start()
    pod.ready()
    pod.stop()
    program = pod.opt / "versions/1/bin/keeper"
    shutil.copy("/bin/sleep", program)
    keeper = subprocess.Popen([program, "1000"])
    try:
        for version in ("2", "3"):
            pod.bundle(version)
            pod.start()
            pod.ready()
            pod.stop()
        assert sorted(path.name for path in (pod.opt / "versions").iterdir()) == ["1", "3"]
    finally:
        keeper.kill()
        keeper.wait()
    assert (pod.opt / "current/bin/glowplug").read_text() == "3"
    pod.start()  # the same again, as after a restart of the node
    pod.ready()
    assert [path.name for path in (pod.opt / "versions").iterdir()] == ["3"]


def test_what_fails_is_tried_again_and_is_not_ready_before(pod: Pod) -> None:
    (pod.root / "fail").touch()
    pod.start()
    pod.ready()
    assert pod.calls() == [_INSTALL] * 2
    assert pod.stop() == "install failed; again in 0.1 s\n"


def test_a_copy_that_fails_is_not_installed(pod: Pod) -> None:
    versions = pod.opt / "versions"
    versions.write_text("no folder")
    pod.start()
    until = time.monotonic() + _SECONDS
    while not (pod.process and pod.process.stderr and "install failed" in pod.process.stderr.readline()):
        assert time.monotonic() < until
    assert not (pod.root / "calls").exists()
    assert not (pod.root / "tmp/installed").exists()
    versions.unlink()
    pod.ready()


def test_uninstalling(pod: Pod) -> None:
    pod.start("uninstall")  # on a node that has nothing
    pod.ready()
    pod.stop()
    assert not (pod.root / "calls").exists()
    pod.start()
    pod.ready()
    pod.stop()
    pod.start("uninstall")
    pod.ready()
    assert pod.calls()[-1].endswith("-- /opt/glowplug/current/bin/glowplug agent uninstall")
