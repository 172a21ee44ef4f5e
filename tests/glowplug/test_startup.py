"""`glowplug bench startup` for real: a small image, each kind of start once, on a shaped and delayed link."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from glowplug.startup import containerd, machine, measure, result
from imagefs import errors
from tests.fixtures import block_images, dockerd, images, pause, servers, tars
from tests.fixtures import containerd as containerds
from tests.fixtures.block_images import GLOWPLUG

pytestmark = pytest.mark.root

_READ_BYTES, _UNREAD_BYTES = 1_500_000, 9_000_000
_NOISE = random.Random(7)
_COMMAND = "echo hello; cat /data/read >/dev/null; echo ready; cat"


@pytest.fixture(scope="module")
def data() -> bytes:
    """The upper layer of an image of which a part is read."""
    layer = tars.Builder().directory(b"./").directory(b"data/")
    layer.file(b"data/read", _NOISE.randbytes(_READ_BYTES))
    layer.file(b"data/unread", _NOISE.randbytes(_UNREAD_BYTES))
    return bytes(layer)


@pytest.fixture(scope="module")
def ref(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image that reads a part of what it has; it has no block image."""
    made = images.make([pause.root_layer(), data], architecture=pause.ARCHITECTURE)
    return block_images.layout(tmp_path_factory.mktemp("startup"), made)


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever happens, nothing is left: no namespace, no mount, no process, no folder."""
    # Sockets lie below it: pytest's own paths would be too long for them.
    with tempfile.TemporaryDirectory(prefix="gp-bst-") as name:
        monkeypatch.setenv("TMPDIR", name)
        yield
        assert name not in Path("/proc/self/mountinfo").read_text()
        assert os.listdir(name) == []
        assert _using(name) == []


def _using(text: str) -> list[str]:
    """Command lines of the processes that name `text`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if text.encode() in (line := path.read_bytes()):
                found.append(line.decode(errors="replace"))
    return found


def _namespaces(pid: int) -> list[str]:
    names = machine.check_call(["ip", "netns", "list"]).split()
    return [name for name in names if f"-{pid}-" in name]


def _bench(*arguments: object) -> list[str]:
    return [GLOWPLUG, "bench", "startup", *map(str, arguments)]


def test_every_kind_of_start(ref: str, tmp_path: Path) -> None:
    document, page = tmp_path / "out.json", tmp_path / "out.html"
    link = ["--rate", "200mbit", "--rtt", "20ms", "--runs", 1]
    newer = ["--containerd", containerds.binaries("2.1").directory]
    out = ["--json", document, "--report", page, "--until-log", "^ready"]
    modes = [word for mode in result.MODES for word in ("--mode", mode)]
    said = subprocess.run(
        _bench(ref, *link, *newer, *modes, *out, "--", "sh", "-c", _COMMAND),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert said.returncode == 0, said.stderr
    measured = json.loads(document.read_text())
    assert measured["speed"] == {"bits_per_second": 200_000_000, "rtt_seconds": 0.02}
    series: dict[str, dict[str, Any]] = {each["mode"]: each for each in measured["series"]}
    assert list(series) == list(result.MODES)
    for each in series.values():
        (start,) = each["starts"]
        marks = [start["seconds"][mark] for mark in result.MARKS if mark in start["seconds"]]
        assert marks == sorted(marks)
        assert each["label"] in said.stdout
        assert each["label"] in page.read_text()
    moved = {mode: each["median_moved_bytes"] for mode, each in series.items()}
    assert min(moved["containerd"], moved["tuned"]) > _READ_BYTES + _UNREAD_BYTES
    assert _READ_BYTES < moved["pack"] < moved["containerd"] / 2
    assert max(moved["warm"], moved["whole"], moved["local"]) < _READ_BYTES / 4
    # Not by devices: no read was the server's to answer, not even from the cache, so there is none to count.
    assert series["whole"]["starts"][0]["waits"] is None
    assert series["warm"]["starts"][0]["waits"] == 0
    assert series["pack"]["median_requests"] > 0
    assert series["pack"]["limit_seconds"] > series["warm"]["median_seconds"]["ready"]
    assert series["pack"]["starts"][0]["fetches"]


def test_ready_when_an_address_answers_from_a_block_image_that_has_a_pack(
    ref: str, registry: servers.RegistryServer, tmp_path: Path
) -> None:
    given = f"docker://{registry.host}/{servers.unique_name('startup')}:v1"
    machine.check_call([GLOWPLUG, "copy", ref, given])
    served = ["--until-http", "http://127.0.0.1:8080/read"]
    command = ["busybox", "httpd", "-f", "-p", "8080", "-h", "/data"]
    convert = ["convert", given, "--trace-run", "cat /data/unread"]
    storage = ["--state", str(tmp_path / "state"), "--cache", str(tmp_path / "cache")]
    machine.check_call([GLOWPLUG, *convert, *storage])
    document = tmp_path / "out.json"
    modes = [word for mode in ("blocks", "pack") for word in ("--mode", mode)]
    words = _bench(given, "--runs", 1, *modes, *served, "--json", document, "--", *command)
    said = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr
    blocks, pack = json.loads(document.read_text())["series"]
    # Its own pack was taken, useless as it is for this command, and not for the start by blocks.
    assert pack["median_moved_bytes"] > _UNREAD_BYTES / 2
    assert {fetch["layer"] for fetch in pack["starts"][0]["fetches"]} >= {0}
    assert 0 not in {fetch["layer"] for fetch in blocks["starts"][0]["fetches"]}


def test_what_is_ready_when_it_ends_has_its_blocks_told_too(ref: str, tmp_path: Path) -> None:
    document = tmp_path / "out.json"
    words = _bench(ref, "--runs", 1, "--mode", "blocks", "--json", document, "--", "cat", "/data/read")
    said = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert said.returncode == 0, said.stderr
    (start,) = json.loads(document.read_text())["series"][0]["starts"]
    assert {fetch["layer"] for fetch in start["fetches"]} == {0, 1}
    assert start["waits"] > 0


def _brings_and_starts(words: list[str], document: Path, environment: Mapping[str, str]) -> str:
    """Pulled, and by blocks; what it said."""
    modes = ["--mode", "containerd", "--mode", "blocks", "--runs", "1", "--json", str(document)]
    words = _bench(*words, *modes, "--", "cat", "/data/read")
    said = subprocess.run(
        words, capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )
    assert said.returncode == 0, said.stderr
    pulled, blocks = json.loads(document.read_text())["series"]
    assert pulled["median_moved_bytes"] > _READ_BYTES + _UNREAD_BYTES
    assert {fetch["layer"] for fetch in blocks["starts"][0]["fetches"]} == {0, 1}
    return said.stderr


def test_an_image_of_a_docker_daemon(data: bytes, tmp_path: Path) -> None:
    archive = images.write_archive(tmp_path / "a.tar", [pause.root_layer(), data], tags=["app:latest"])
    with dockerd.run() as address:
        subprocess.run(["docker", "-H", address, "load", "-qi", archive], check=True, capture_output=True)
        environment = {"DOCKER_HOST": address}
        _brings_and_starts(["docker-daemon:app"], tmp_path / "out.json", environment)
        words = _bench("docker-daemon:absent", "--mode", "blocks")
        absent = subprocess.run(
            words, capture_output=True, text=True, timeout=60, env={**os.environ, **environment}
        )
    assert (absent.returncode, "has no image 'absent'" in absent.stderr) == (4, True)


def test_an_image_in_a_bucket_with_its_block_image(
    ref: str, s3_server: servers.S3Server, tmp_path: Path
) -> None:
    given = f"s3://{s3_server.bucket}/{servers.unique_name('startup')}:v1"
    place = ["--s3-endpoint-url", s3_server.endpoint_url]
    machine.check_call([GLOWPLUG, "copy", ref, given, *place])
    machine.check_call([GLOWPLUG, "convert", given, *place])
    said = _brings_and_starts([given, *place], tmp_path / "out.json", {})
    assert "converting" not in said


def test_an_interrupt_leaves_nothing(ref: str) -> None:
    words = _bench(ref, "--mode", "containerd", "--mode", "blocks", "--runs", 50, "--", "sleep", "3")
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "run 1 of 50" in line:
                break
        assert _namespaces(process.pid)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(60) == 130
    assert "interrupted" in said
    assert not _namespaces(process.pid)


def test_a_command_that_fails_says_so_and_leaves_nothing(ref: str) -> None:
    words = _bench(ref, "--mode", "containerd", "--", "sh", "-c", "echo broken >&2; exit 3")
    said = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert said.returncode == 8
    assert "broken" in said.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["oci:x", "--rate", "fast"], 3, "not a rate"),
        (["oci:x", "--rtt", "5 parsecs"], 3, "--rtt"),
        (["oci:x", "--seconds", "3"], 2, "No such option"),
        (["oci:x", "--mode", "magic"], 2, "magic"),
        (["oci:x", "--containerd", "/nowhere,mine"], 8, "/nowhere/containerd"),
        (["oci:x", "--mode", "tuned"], 2, "go together"),
        (["oci:x", "--mode", "pack", "--containerd", "/nowhere"], 2, "go together"),
        (["oci:x", "--report", "/nowhere/page.html"], 3, "/nowhere/page.html"),
        (["nonsense"], 3, "nonsense"),
        (["oci:/nowhere", "--mode", "blocks"], 4, "/nowhere"),
    ],
)
def test_wrong_arguments(arguments: list[str], code: int, message: str) -> None:
    said = subprocess.run(_bench(*arguments), capture_output=True, text=True, timeout=60)
    assert (said.returncode, message in said.stderr) == (code, True), said.stderr


def test_a_block_image_without_its_source_is_refused(ref: str, tmp_path: Path) -> None:
    target = f"oci:{tmp_path}/alone:latest"
    machine.check_call([GLOWPLUG, "convert", ref, "--to", target])
    said = subprocess.run(_bench(target, "--mode", "containerd"), capture_output=True, text=True, timeout=60)
    assert said.returncode == 3
    assert "name the source image" in said.stderr


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("1.6", set()),
        ("1.7", set()),
        ("2.1", {"max_concurrent_downloads", "concurrent_layer_fetch_buffer"}),
    ],
)
def test_a_containerd_is_tuned_by_what_it_has(line: str, options: set[str]) -> None:
    found = containerd.inspect(containerds.binaries(line).directory)
    assert found.version.startswith(f"{line}.")
    assert set(found.options) == options


def test_what_is_not_installed_is_named_by_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(errors.ConfigurationError, match="containerd docker-registry iproute2 mount runc"):
        measure.check(result.MODES)
    with pytest.raises(errors.ConfigurationError, match="apt-get install docker-registry iproute2 mount"):
        measure.check([result.PACK])


def test_without_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(errors.ConfigurationError, match="needs root"):
        measure.check(result.MODES)
