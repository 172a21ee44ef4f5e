"""`glowplug convert` and `glowplug copy` as processes: output, exit codes, signals, the Docker daemon."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glowplug import cli
from tests.fixtures import dockerd, images, servers
from tests.fixtures.conversion import origin_of

GLOWPLUG = [sys.executable, "-c", "from glowplug import cli; cli.main()"]
TARS = [images.tar_of([("a", os.urandom(300_000)), ("zero", bytes(1 << 20))]), images.tar_of([("b", b"two")])]


def glowplug(*words: object, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*GLOWPLUG, *map(str, words)], capture_output=True, text=True, **more)  # type: ignore[call-overload,no-any-return]


def layout(directory: Path) -> str:
    return f"oci:{images.make(TARS).write_layout(directory)}:latest"


def test_json_is_all_of_stdout_and_stderr_is_silent(tmp_path: Path) -> None:
    done = glowplug("convert", layout(tmp_path), "--block-size", "64KiB", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    [image] = document["images"]
    assert image["ref"] == f"oci:{tmp_path}@{image['block_image']}"
    assert [line["reused"] for line in image["layers"]] == ["", ""]
    assert image["layers"][0]["tar_bytes"] == len(TARS[0])
    assert image["layers"][0]["holes"] >= 15
    assert image["totals"]["tar_bytes"] == sum(map(len, TARS))
    assert document["mb_per_second"] > 0


def test_the_summary_ends_in_what_to_use_next(tmp_path: Path) -> None:
    source = layout(tmp_path)
    done = glowplug("convert", source)
    block_image = origin_of(f"oci:{tmp_path}").referrers(images.make(TARS).top)[0].digest
    assert f"oci:{tmp_path}@{block_image}" in done.stdout
    assert "2 layers (2 reused)" in glowplug("convert", source).stdout


def test_bars_are_drawn_on_a_terminal_only(tmp_path: Path) -> None:
    source = layout(tmp_path)
    ours, theirs = pty.openpty()
    done = subprocess.run([*GLOWPLUG, "convert", source], stdout=subprocess.PIPE, stderr=theirs, check=True)
    os.close(theirs)
    drawn = b""
    with contextlib.suppress(OSError):
        while piece := os.read(ours, 65536):
            drawn += piece
    os.close(ours)
    assert b"linux/amd64" in drawn
    assert b"\x1b" not in done.stdout


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["nonsense"], 3, "names no transport"),
        (["oci:{}/absent"], 4, "absent"),
        (["oci:{}:latest", "--block-size", "3M"], 3, "power of two"),
        (["oci:{}:latest", "--frame-size", "8M"], 3, "frame size"),
        (["oci:{}:latest", "--platform", "amd64"], 3, "OS/ARCHITECTURE"),
        (["oci:{}:latest", "--platform", "linux/s390x"], 4, "linux/amd64"),
        (["oci:{}:latest", "--max-entries", "1"], 3, "--max-entries"),
        (["oci:{}:latest", "--level", "77"], 2, "--level"),
        ([], 2, "SOURCE"),
    ],
)
def test_errors_are_one_line_with_their_exit_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    message: str,
) -> None:
    layout(tmp_path)
    monkeypatch.setattr(sys, "argv", ["glowplug", "convert", *(word.format(tmp_path) for word in words)])
    terminate = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        cli.main()
    signal.signal(signal.SIGTERM, terminate)
    said = capsys.readouterr()
    assert (left.value.code, said.out) == (code, "")
    assert message in said.err


def test_copy(tmp_path: Path) -> None:
    source = layout(tmp_path / "source")
    glowplug("convert", source)
    done = glowplug("copy", source, f"oci:{tmp_path}/out:v1", "--json")
    document = json.loads(done.stdout)
    assert document["digest"] == images.make(TARS).top
    assert len(document["block_images"]) == 1
    assert "there already" in glowplug("copy", source, f"oci:{tmp_path}/out:v1").stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["reading", "writing"])
def test_a_signal_leaves_nothing_behind(
    tmp_path: Path,
    registry: servers.RegistryServer,
    fault_server: servers.FaultProxy,
    number: signal.Signals,
    where: str,
) -> None:
    """Interrupted while the source, or the destination, hangs in the middle."""
    fault_server.upstream = registry.host
    name = servers.unique_name()
    made = images.make(TARS)
    made.push(origin_of(f"docker://{registry.host}/{name}"), "v1")
    digest = made.document["layers"][0]["digest"]
    hanging = f"blobs/{digest}" if where == "reading" else "blobs/uploads/"
    method = "GET" if where == "reading" else "POST"
    fault_server.add(servers.Fault(path=hanging, method=method, times=None, hang=True))
    work = tmp_path / "work"
    work.mkdir()
    process = subprocess.Popen(
        [*GLOWPLUG, "convert", f"docker://{fault_server.host}/{name}:v1"],
        env={**os.environ, "TMPDIR": str(work)},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not fault_server.seen(method, hanging):
        assert process.poll() is None
        time.sleep(0.01)
    assert list(work.iterdir())
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said.strip()) == (130, "glowplug: interrupted")
    assert list(work.iterdir()) == []
    assert origin_of(f"docker://{registry.host}/{name}").referrers(made.top) == []


@pytest.mark.root
def test_an_image_of_a_docker_daemon(tmp_path: Path) -> None:
    archive = images.write_archive(tmp_path / "a.tar", TARS, tags=["app:v1"])
    with dockerd.run() as address:
        subprocess.run(["docker", "-H", address, "load", "-qi", archive], check=True, capture_output=True)
        work = tmp_path / "work"
        work.mkdir()
        environment = {**os.environ, "DOCKER_HOST": address, "TMPDIR": str(work)}
        to = f"oci:{tmp_path}/out:v1"
        done = glowplug("convert", "docker-daemon:app:v1", "--to", to, "--json", env=environment)
        assert done.returncode == 0, done.stderr
        assert list(work.iterdir()) == []
        absent = glowplug("convert", "docker-daemon:absent", "--to", to, env=environment)
        assert (absent.returncode, "absent" in absent.stderr) == (4, True)
    gone = glowplug("convert", "docker-daemon:app:v1", "--to", to, env=environment)
    assert (gone.returncode, "did not answer" in gone.stderr) == (7, True)
    [image] = json.loads(done.stdout)["images"]
    again = glowplug("convert", f"docker-archive:{archive}", "--to", f"oci:{tmp_path}/again", "--json")
    [expected] = json.loads(again.stdout)["images"]
    assert [line["blob_digest"] for line in image["layers"]] == [
        line["blob_digest"] for line in expected["layers"]
    ]
