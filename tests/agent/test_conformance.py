"""containerd's own snapshotter suite (Go, from Debian's package of containerd's source) on our socket.

The binary is built once and kept in .cache; building takes some 20 seconds on two cores, running five.
"""

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from agent import observer, service, snapshotter, store
from agent.snapshots import Usage
from imagefs import mount

SOURCE = Path(__file__).parent / "conformance" / "snapshotter_test.go"
GOPATH = Path("/usr/share/gocode")
SUITE = GOPATH / "src/github.com/containerd/containerd/snapshots/testsuite/testsuite.go"
CACHE = Path(__file__).parents[2] / ".cache" / "conformance"

CASES = 21
"""How many the suite of containerd 1.6 has, so that one that did not run is noticed."""
SKIPPED = {"Rename"}
"""What containerd itself skips on overlayfs."""


class NoImages:
    def find_layer(self, chain_id: str, labels: Mapping[str, str]) -> snapshotter.Found | None:
        return None

    def may_serve(self, block_digest: str, labels: Mapping[str, str]) -> bool:
        return True

    def directory(self, block_digest: str, layer: int) -> Path:
        raise AssertionError

    def root_attributes(self, block_digest: str, layer: int) -> mount.RootAttributes | None:
        raise AssertionError

    def usage(self, block_digest: str, layer: int) -> Usage:
        raise AssertionError

    def released(self, block_digest: str) -> None:
        raise AssertionError


@pytest.fixture(scope="module")
def suite() -> Path:
    if shutil.which("go") is None or not SUITE.exists():
        pytest.skip("needs Debian's golang-go and golang-github-containerd-containerd-dev (make setup)")
    binary = CACHE / hashlib.sha256(SOURCE.read_bytes() + SUITE.read_bytes()).hexdigest()[:16]
    if not binary.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        new = binary.with_suffix(f".{os.getpid()}")
        subprocess.run(
            ["go", "test", "-c", "-o", new, "."],
            check=True,
            cwd=SOURCE.parent,
            env={
                **os.environ,
                "GO111MODULE": "off",
                "CGO_ENABLED": "0",
                "GOPATH": str(GOPATH),
                "GOFLAGS": "-buildvcs=false",
                "GOCACHE": str(CACHE / "go-build"),
            },
        )
        shutil.rmtree(CACHE / "go-build")  # 200 MB that only another build would use
        new.rename(binary)
    return binary


@pytest.fixture
def socket(tmp_path: Path) -> Iterator[Path]:
    rows = store.Store.open(tmp_path / "agent.db")
    served = snapshotter.Snapshotter(tmp_path, rows, NoImages(), observer.Observer())
    server = service.serve(served, tmp_path / "s.sock", observer.Observer())
    yield tmp_path / "s.sock"
    server.stop(5)
    rows.close()


@pytest.mark.root
def test_containerds_suite_passes_whole(suite: Path, socket: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        [suite, "-test.root", "-test.v"],
        env={**os.environ, "GLOWPLUG_SOCKET": str(socket), "TMPDIR": str(work)},
        capture_output=True,
        text=True,
    )
    outcomes = {
        name: outcome for outcome, name in re.findall(r"--- (\w+): TestSnapshotter/suite/(\w+)", done.stdout)
    }
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(outcomes) == CASES
    assert {name for name, outcome in outcomes.items() if outcome != "PASS"} == SKIPPED
