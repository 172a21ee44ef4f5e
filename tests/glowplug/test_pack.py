"""`glowplug pack`, `inspect` and `check` of what it made: the real commands, and each kind of damage."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from converter import pack
from imagefs import bootpack, trace
from tests.fixtures import block_images, boot_packs, images
from tests.fixtures.block_images import Command
from tests.fixtures.boot_packs import PARAMETERS, open_image, some_trace, trace_of

LAYERS = [
    images.tar_of([("etc", None), ("etc/motd", b"base\n"), ("data", bytes(range(256)) * 2000)]),
    images.tar_of([("etc", None), ("words", b"some words " * 20_000)]),
]


def blob_path(folder: Path, digest: str) -> Path:
    return folder / "blobs" / "sha256" / digest.removeprefix("sha256:")


def test_pack_inspect_check(glowplug: Command, tmp_path: Path) -> None:
    ref = block_images.make(tmp_path / "layout", LAYERS)
    assert "boot pack: none" in glowplug("inspect", ref).stdout
    assert json.loads(glowplug("inspect", ref, "--json").stdout)["boot_pack"] is None
    opened = open_image(ref)
    for number in (1, 2):
        (tmp_path / f"trace-{number}").write_bytes(trace.encode(some_trace(opened, seed=number)))
    files = ["--trace", tmp_path / "trace-1", "--trace", tmp_path / "trace-2"]
    packed = json.loads(glowplug("pack", ref, *files, "--frame-size", "128K", "--json").stdout)
    assert packed["frames"] == -(-packed["page_bytes"] // (128 * 1024))
    assert "it had this boot pack already" in glowplug("pack", ref, *files, "--frame-size", "128K").stdout
    shown = json.loads(glowplug("inspect", ref, "--json").stdout)["boot_pack"]
    assert shown["usable"]
    assert {name: packed[name] for name in shown.keys() & packed.keys()} == {
        name: value for name, value in shown.items() if name in packed
    }
    assert f"in {packed['records']} records" in glowplug("inspect", ref).stdout
    assert "boot pack:" in glowplug("check", ref).stdout
    pages = json.loads(glowplug("check", ref, "--json").stdout)["boot_pack_pages"]
    assert pages * bootpack.PAGE_BYTES == packed["page_bytes"]


def test_wrong_input(glowplug: Command, tmp_path: Path) -> None:
    ref = block_images.make(tmp_path / "layout", LAYERS)
    glowplug("pack", ref, code=2)
    bad = tmp_path / "bad"
    bad.write_bytes(b"{}\n")
    assert f"{bad}: trace: version" in glowplug("pack", ref, "--trace", bad, code=3).stderr
    good = tmp_path / "good"
    good.write_bytes(trace.encode(some_trace(open_image(ref))))
    assert "frame size" in glowplug("pack", ref, "--trace", good, "--frame-size", "10K", code=3).stderr
    assert (
        "glowplug convert"
        in glowplug(
            "pack", block_images.layout(tmp_path / "other", images.make(LAYERS)), "--trace", good, code=4
        ).stderr
    )
    new = block_images.make(tmp_path / "new", LAYERS[:1])
    assert "trace it again" in glowplug("pack", new, "--trace", good, code=3).stderr


def test_a_disk_that_is_full(glowplug: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = block_images.make(tmp_path / "layout", LAYERS)
    opened = open_image(ref)
    (tmp_path / "trace").write_bytes(trace.encode(some_trace(opened)))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    message = glowplug("pack", ref, "--trace", tmp_path / "trace", code=8, preexec_fn=limit).stderr
    assert "File too large; free some space or choose another (TMPDIR)" in message
    assert list((tmp_path / "tmp").iterdir()) == []
    assert len(opened.origin.referrers(opened.source_digest)) == 1


def test_a_pack_whose_pages_are_not_the_images(glowplug: Command, tmp_path: Path) -> None:
    """Every digest is right, table and data belong together, and one page is another."""
    folder = tmp_path / "layout"
    ref = block_images.make(folder, LAYERS)
    opened = open_image(ref)
    pack.pack(opened, [trace_of(opened, (0, 4096, 8192), (1, 65536, 8192), (0, 0, 4096))], PARAMETERS)

    def change(content: bytearray) -> None:
        content[3 * 4096 + 5] ^= 1

    table_digest = boot_packs.forge(ref, change)
    message = glowplug("check", ref, code=6).stderr
    assert f"boot pack {table_digest}: its page 17 of layer {opened.layers[1].map_digest}" in message


@pytest.mark.parametrize(
    ("part", "damage", "code"),
    [("table", "missing", 4), ("table", "changed", 6), ("data", "missing", 4), ("data", "changed", 6),
     ("data", "cut", 6)],
)  # fmt: skip
def test_a_damaged_pack(glowplug: Command, tmp_path: Path, part: str, damage: str, code: int) -> None:
    folder = tmp_path / "layout"
    ref = block_images.make(folder, LAYERS)
    opened = open_image(ref)
    packed = pack.pack(opened, [some_trace(opened)], PARAMETERS)
    digest = packed.table_digest if part == "table" else packed.data_digest
    path = blob_path(folder, digest)
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-1] + (bytes([data[-1] ^ 1]) if damage == "changed" else b""))
    message = glowplug("check", ref, code=code).stderr
    assert digest in message or packed.table_digest in message
    shown = glowplug("inspect", ref)
    assert ("cannot be used" in shown.stdout) == (part == "table")
