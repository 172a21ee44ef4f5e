"""`glowplug trace`: the real command in real mounts; what it says was read is sought in the layer images."""

from __future__ import annotations

import http.server
import json
import random
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from imagefs import image, reference, trace, tracestore
from imagefs.fuse import control
from tests.fixtures import block_images, images
from tests.fixtures.block_images import Command
from tests.glowplug.test_run import shell_layer

pytestmark = pytest.mark.root

_A, _B = (random.Random(name).randbytes(600_000) for name in "ab")


@pytest.fixture(scope="module")
def ref(tmp_path_factory: pytest.TempPathFactory) -> str:
    files = images.tar_of([("data/a", _A), ("data/b", _B)], root=False)
    return block_images.make(tmp_path_factory.mktemp("trace"), [shell_layer(), files])


def _layer_images(ref: str) -> list[bytes]:
    """The layer images, by zstd."""
    opened = image.open_image(reference.parse(ref))
    blobs = [
        opened.origin.read_blob(layer.blob.digest, layer.blob.size) for layer in opened.block_image.layers
    ]
    return [
        subprocess.run(["zstd", "-dc"], input=blob, capture_output=True, check=True).stdout for blob in blobs
    ]


def _pages(path: Path) -> set[tuple[int, int]]:
    records = trace.merge([trace.decode(path.read_bytes())])
    return {(r.layer, page) for r in records for page in range(r.first_page, r.first_page + r.pages)}


def _touched(ref: str, path: Path, content: bytes) -> tuple[int, int]:
    """How many pages of a file of layer 1 are in a trace, and how many it has."""
    start = _layer_images(ref)[1].index(content[:4096])
    first, end = start // 4096, -(-(start + len(content)) // 4096)
    return len({page for layer, page in _pages(path) if layer == 1 and first <= page < end}), end - first


def _left(glowplug: Command) -> list[str]:
    folder = glowplug.state_dir / "traces"
    return glowplug.left() + ([path.name for path in folder.iterdir()] if folder.is_dir() else [])


def test_it_holds_what_was_read_and_no_more(glowplug: Command, ref: str, tmp_path: Path) -> None:
    path = tmp_path / "out.trace"
    said = glowplug("trace", ref, "-o", path, "--", "sh", "-c", "echo hello; cat /data/a > /dev/null")
    assert said.stdout.startswith(f"{path}: ")
    assert said.stderr == "hello\n"
    held, all_pages = _touched(ref, path, _A)
    assert held == all_pages
    assert _touched(ref, path, _B)[0] == 0
    found = trace.decode(path.read_bytes())
    opened = image.open_image(reference.parse(ref))
    assert found.source_digest == opened.source_digest
    assert found.block_image_digest == opened.manifest.digest
    assert found.map_digests == tuple(layer.map_digest for layer in opened.layers)
    assert found.command == ("sh", "-c", "echo hello; cat /data/a > /dev/null")
    sizes = [layer.block_map.image_bytes for layer in opened.layers]
    assert all(read.offset + read.length <= sizes[read.layer] for read in found.reads)
    for number, layer in enumerate(opened.layers):  # a mount reads all metadata: a pack must have it
        first = layer.block_map.metadata_offset // 4096
        last = (layer.block_map.metadata_offset + layer.block_map.metadata_bytes - 1) // 4096
        assert {(number, page) for page in range(first, last + 1)} <= _pages(path)
    assert _left(glowplug) == []


def test_two_processes_of_one_workload_give_one_trace(glowplug: Command, ref: str, tmp_path: Path) -> None:
    """Also where all of it lies in the page cache of other mounts of the same image."""
    command = ["--", "sh", "-c", "ls -R /bin /data > /dev/null; cat /data/b > /dev/null; id"]
    glowplug("trace", ref, "-o", tmp_path / "1", *command)
    where = tmp_path / "mnt"
    where.mkdir()
    glowplug("mount", ref, where)
    assert (where / "data/b").read_bytes() == _B
    glowplug("trace", ref, "-o", tmp_path / "2", *command)
    assert glowplug.left() != []
    glowplug("umount", where)
    assert _pages(tmp_path / "1") == _pages(tmp_path / "2")
    assert _left(glowplug) == []


def test_until_a_line_is_printed(glowplug: Command, ref: str, tmp_path: Path) -> None:
    path = tmp_path / "out.trace"
    script = (
        "printf 'now r'; sleep 0.2; echo 'ather early'; cat /data/a > /dev/null;"
        "printf 'now ready\\r\\n' >&2; sleep 600; cat /data/b > /dev/null"
    )
    said = glowplug("trace", ref, "-o", path, "--until-log", "^now r(eady)?$", "--", "sh", "-c", script)
    assert said.stderr == "now rather early\nnow ready\n"
    held, all_pages = _touched(ref, path, _A)
    assert held == all_pages
    assert _touched(ref, path, _B)[0] == 0
    assert _left(glowplug) == []


def test_until_a_url_answers(glowplug: Command, ref: str, tmp_path: Path) -> None:
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200 if len(asked) > 3 else 503)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/health"
        glowplug("trace", ref, "-o", tmp_path / "1", "--until-http", url, "--", "sleep", "600")
        assert asked == ["/health"] * 4
        assert trace.decode((tmp_path / "1").read_bytes()).reads
        arguments = ["-o", tmp_path / "2", "--until-http", url, "--", "sleep", "600"]
        assert "answers already" in glowplug("trace", ref, *arguments, code=9).stderr
        server.shutdown()
    assert _left(glowplug) == []


def test_until_a_port_takes_connections(glowplug: Command, ref: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = glowplug.start(
        "trace", ref, "-o", tmp_path / "1", "--until-http", f":{port}",
        "--", "sh", "-c", "echo up; sleep 600", stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stderr.readline() == "up\n"
    with socket.create_server(("127.0.0.1", port)):
        assert process.wait(30) == 0
    process.stderr.close()
    assert trace.decode((tmp_path / "1").read_bytes()).reads


def test_a_last_line_needs_no_end(glowplug: Command, ref: str, tmp_path: Path) -> None:
    glowplug("trace", ref, "-o", tmp_path / "1", "--until-log", "^ready$", "--", "sh", "-c", "printf ready")
    assert trace.decode((tmp_path / "1").read_bytes()).reads


def test_for_a_time(glowplug: Command, ref: str, tmp_path: Path) -> None:
    glowplug("trace", ref, "-o", tmp_path / "out", "--seconds", "0.3", "--", "sleep", "600")
    assert trace.decode((tmp_path / "out").read_bytes()).reads


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (["--", "sh", "-c", "exit 3"], 1, "sh ended with code 3 before its end"),
        (["--until-log", "never", "--", "sh", "-c", "echo no"], 1, "before it printed 'never'"),
        (["--until-http", "127.0.0.1:1", "--", "id"], 1, "before 127.0.0.1:1 answered"),
        (["--", "nothing-like-it"], 1, "ended with code 127"),
        (["-u", "nobody-here", "--", "id"], 8, "nobody-here"),
        (["--until-log", "(", "--", "id"], 2, "--until-log"),
        (["--until-log", "x", "--seconds", "1", "--", "id"], 2, "only one of"),
        (["--until-http", "ftp://x", "--", "id"], 3, "neither a URL nor"),
    ],
)
def test_no_trace_of_a_start_that_was_none(
    glowplug: Command, ref: str, tmp_path: Path, arguments: list[str], code: int, why: str
) -> None:
    path = tmp_path / "out.trace"
    assert why in glowplug("trace", ref, "-o", path, *arguments, code=code).stderr
    assert not path.exists()
    assert _left(glowplug) == []


def test_what_a_killed_trace_left_the_next_one_takes_away(
    glowplug: Command, ref: str, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        script = "cat /data/a > /dev/null; echo up; sleep 600"
        process = glowplug.start(
            "trace", ref, "-o", tmp_path / "1", "--until-http", f"http://127.0.0.1:{silent.getsockname()[1]}/",
            "--", "sh", "-c", script, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert process.stderr is not None
        assert process.stderr.readline() == "up\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stderr.read() == ""  # the command died with it
    assert len(list((glowplug.state_dir / "traces").iterdir())) == 1
    glowplug("trace", ref, "-o", tmp_path / "2", "--", "id")
    assert _left(glowplug) == []


def test_interrupted_it_leaves_nothing(glowplug: Command, ref: str, tmp_path: Path) -> None:
    process = glowplug.start(
        "trace", ref, "-o", tmp_path / "1", "--", "sh", "-c", "echo up; sleep 600", stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    process.stderr.close()
    assert _left(glowplug) == []
    assert not (tmp_path / "1").exists()


def test_a_worker_that_dies_does_not_end_the_recording(glowplug: Command, ref: str, tmp_path: Path) -> None:
    """The next one on its clone is told what to note."""
    path = tmp_path / "out.trace"
    process = glowplug.start(
        "trace", ref, "-o", path, "--", "sh", "-c", "echo up; sleep 1; cat /data/b > /dev/null",
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stderr.readline() == "up\n"
    (own,) = (glowplug.state_dir / "traces").iterdir()
    client = control.DeviceClient.connect(own)
    assert client is not None
    workers = client.status()["processes"]["workers"]
    for worker in workers:
        subprocess.run(["kill", "-9", str(worker)], check=True)
    assert process.wait(30) == 0, process.stderr.read()
    process.stderr.close()
    held, all_pages = _touched(ref, path, _B)
    assert held == all_pages


def test_convert_trace_and_pack_in_one_step(glowplug: Command, tmp_path: Path) -> None:
    files = images.tar_of([("data/a", _A), ("data/b", _B)], root=False)
    ref = block_images.layout(tmp_path / "image", images.make([shell_layer(), files]))
    run = ["--trace-run", "sh -c 'cat /data/a > /dev/null; echo up; sleep 600'", "--until-log", "^up"]
    said = glowplug("convert", ref, "--to", f"oci:{tmp_path}/there:v1", *run, "--json")
    assert said.stderr == "up\nup\n", "traced twice"
    document = json.loads(said.stdout)
    for found in (
        f"oci:{tmp_path}/there:v1",
        f"oci:{tmp_path}/there@{document['boot_pack']['block_image_digest']}",
    ):
        opened = image.open_image(reference.parse(found))
        assert opened.manifest.digest == document["boot_pack"]["block_image_digest"]
        assert opened.block_image.boot_pack is not None
        assert opened.block_image.boot_pack.data.digest == document["boot_pack"]["data_digest"]
    assert len(_A) < document["boot_pack"]["page_bytes"] < len(_A) + len(_B) + len(shell_layer())
    again = glowplug("convert", ref, "--trace-run", "ls /data/b", "--trace-runs", "1").stdout.splitlines()
    opened = image.open_image(reference.parse(ref))
    assert opened.block_image.boot_pack is not None
    assert again[-1].strip() == f"oci:{tmp_path}/image@{opened.manifest.digest}"
    assert _left(glowplug) == []


def test_pack_takes_published_traces(glowplug: Command, tmp_path: Path) -> None:
    files = images.tar_of([("data/a", _A), ("data/b", _B)], root=False)
    ref = block_images.make(tmp_path / "image", [shell_layer(), files])
    assert "no trace of sha256:" in glowplug("pack", ref, "--trace-from-registry", code=4).stderr
    for name in ("a", "b"):
        glowplug("trace", ref, "-o", tmp_path / name, "--", "ls", "-l", f"/data/{name}")
        found = trace.decode((tmp_path / name).read_bytes())
        tracestore.publish(image.open_image(reference.parse(ref)).origin, found)
    packed = json.loads(glowplug("pack", ref, "--trace-from-registry", "--json").stdout)
    assert packed["page_bytes"] // 4096 == len(_pages(tmp_path / "a") | _pages(tmp_path / "b"))
    # What the pack brings was read from it, and is in a trace all the same.
    glowplug("trace", ref, "-o", tmp_path / "packed", "--", "ls", "-l", "/data/a")
    assert _pages(tmp_path / "packed") == _pages(tmp_path / "a")
    # What was traced on the block image without a pack holds for the one with it.
    again = json.loads(glowplug("pack", ref, "--trace-from-registry", "--json").stdout)
    assert not again["changed"]


def test_a_start_reads_ahead_what_its_trace_did(glowplug: Command, tmp_path: Path) -> None:
    files = images.tar_of([("data/a", _A), ("data/b", _B)], root=False)
    ref = block_images.make(tmp_path / "image", [shell_layer(), files])
    for name, size in (("small", "32KiB"), ("large", "64KiB")):
        arguments = ["-o", tmp_path / name, "--read-ahead", size, "--json"]
        said = glowplug("trace", ref, *arguments, "--", "ls", "/data")
        assert json.loads(said.stdout)["read_ahead_kib"] == int(size[:2])
    both = ["--trace", tmp_path / "small", "--trace", tmp_path / "large"]
    assert "1 with 32 KiB, 1 with 64 KiB" in glowplug("pack", ref, *both, code=3).stderr
    assert "none of the 2 traces" in glowplug("pack", ref, *both, "--read-ahead", "4KiB", code=3).stderr
    assert "--read-ahead" in glowplug("pack", ref, *both, "--read-ahead", "5KiB", code=2).stderr
    packed = json.loads(glowplug("pack", ref, *both, "--read-ahead", "32KiB", "--json").stdout)
    assert packed["read_ahead_kib"] == 32
    before = set(Path("/sys/class/bdi").iterdir())
    where = tmp_path / "mnt"
    where.mkdir()
    glowplug("mount", ref, where)
    client = control.DeviceClient.connect(glowplug.state_dir)
    assert client is not None
    assert len(client.status()["starting"]) == 1
    found = [path / "read_ahead_kb" for path in set(Path("/sys/class/bdi").iterdir()) - before]
    assert [int(path.read_text()) for path in found].count(32) >= 2
    glowplug("umount", where)
    assert _left(glowplug) == []


@pytest.mark.parametrize(
    ("command", "code", "why"),
    [
        ("sh -c 'exit 3'", 1, "gets no boot pack"),
        ("sh 'open", 2, "No closing quotation"),
        (" ", 2, "no command"),
    ],
)
def test_convert_without_a_start_to_trace(
    glowplug: Command, tmp_path: Path, command: str, code: int, why: str
) -> None:
    ref = block_images.layout(tmp_path / "image", images.make([shell_layer()]))
    assert why in glowplug("convert", ref, "--trace-run", command, code=code).stderr
    assert _left(glowplug) == []
