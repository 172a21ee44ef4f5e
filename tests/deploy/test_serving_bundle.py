"""What is brought into replicas' pods runs where there is nothing else: no Python, no C library."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.fixtures import debian

pytestmark = [pytest.mark.root, pytest.mark.soak]

_ROOT = Path(__file__).parents[2]
_BUILD = _ROOT / "deploy/bundle/build.sh"
_PROGRAM = "/opt/glowplug/current/bin/glowplug"


def test_the_supervisor_and_the_operator_run_in_an_empty_image(tmp_path: Path) -> None:
    packages = re.search(r'PACKAGES="([a-z ]+)"', (_ROOT / "Dockerfile").read_text())
    assert packages is not None
    patchelf = debian.unpacked("patchelf", "bookworm", ["patchelf"]) / "usr/bin"
    built = subprocess.run(
        [_BUILD, tmp_path / "opt/glowplug"],
        env={
            **os.environ,
            "PATH": f"{patchelf}:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHON": "/usr/bin/python3",
            "EXTRAS": "operator,imagefs",
            "PACKAGES": packages[1],
        },
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    for name in ("dev", "proc", "tmp", "run"):
        (tmp_path / name).mkdir()
    settings = {"engine": {"kind": "command", "command": ["/no/such/program"]}, "port": 0}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    for arguments, code, says in (
        (["operator", "crd"], 0, "kind: CustomResourceDefinition"),
        (["operator", "run", "--state", "/tmp/s"], 8, "no way to an API server"),
        (["engine", "--config", "/settings.json"], 8, "/no/such/program"),
    ):
        ran = subprocess.run(
            ["/usr/sbin/chroot", tmp_path, _PROGRAM, *arguments],
            env={"PATH": "/bin", "HOME": "/tmp"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (ran.returncode, says in ran.stdout + ran.stderr) == (code, True), (ran.stdout, ran.stderr)
