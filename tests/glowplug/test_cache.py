"""`glowplug cache`, on the files alone and with a device server; pins that hold over everything."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from tests.fixtures import block_images, images

BLOCK = block_images.BLOCK_BYTES
NOISE = random.Random(7).randbytes(40 * BLOCK)
OTHER = random.Random(8).randbytes(40 * BLOCK)


@pytest.fixture(scope="module")
def refs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("images")
    return [
        block_images.make(folder / name, [images.tar_of([("lib", None), ("lib/big.so", data)])])
        for name, data in (("one", NOISE), ("two", OTHER))
    ]


@pytest.fixture
def filled(glowplug: block_images.Command, refs: list[str]) -> block_images.Command:
    """A cache with all of the first image's file in it, and no server any more."""
    _read(glowplug, refs[0])
    return glowplug


def _read(glowplug: block_images.Command, ref: str, *options: str) -> None:
    directory = glowplug.cache_dir.parent / "mounted"
    directory.mkdir(exist_ok=True)
    glowplug("mount", ref, directory, *options)
    try:
        assert (directory / "lib/big.so").read_bytes() in (NOISE, OTHER)
    finally:
        glowplug("umount", directory)


def _json(glowplug: block_images.Command, *arguments: object, code: int = 0) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(glowplug("cache", *arguments, "--json", code=code).stdout)
    return document


def test_without_a_cache(glowplug: block_images.Command) -> None:
    assert "--cache" in glowplug("cache", "ls", code=4).stderr
    assert not glowplug.cache_dir.exists()


@pytest.mark.root
def test_ls_counts_what_is_here(filled: block_images.Command) -> None:
    found = _json(filled, "ls")
    assert found["directory"] == str(filled.cache_dir)
    assert found["blocks"] >= 40
    assert found["used_bytes"] >= len(NOISE)
    assert (found["pins"], found["images"], found["quota_bytes"]) == ([], [], None)
    assert "blocks" in filled("cache", "ls").stdout


@pytest.mark.root
def test_a_pin_outlives_a_collection_and_what_another_image_reads(
    filled: block_images.Command, refs: list[str]
) -> None:
    (name,) = filled("cache", "pin", refs[0]).stdout.split()
    (pin,) = _json(filled, "ls")["pins"]
    assert pin["name"] == name
    assert pin["present_blocks"] == pin["blocks"] >= 40
    _read(filled, refs[1], "--cache-quota", str(60 * BLOCK))
    assert _json(filled, "gc", "--cache-quota", "1M", code=1)["short_bytes"] > 0
    (pin,) = _json(filled, "ls")["pins"]
    assert pin["present_blocks"] == pin["blocks"]
    assert "no pin is named" in filled("cache", "unpin", "image:other", code=4).stderr
    filled("cache", "unpin", name)
    assert _json(filled, "gc", "--cache-quota", "1M")["removed_blocks"] > 20
    found = _json(filled, "ls")
    assert found["pins"] == []
    assert found["used_bytes"] <= 1 << 20


@pytest.mark.root
def test_with_a_server_its_cache_is_meant_and_it_collects(
    glowplug: block_images.Command, refs: list[str]
) -> None:
    directory = glowplug.cache_dir.parent / "mounted"
    directory.mkdir()
    _read(glowplug, refs[0])
    glowplug("mount", refs[1], directory, "--cache-quota", str(80 * BLOCK))
    try:
        (directory / "lib/big.so").read_bytes()
        found = json.loads(glowplug("cache", "ls", "--json", "--cache", glowplug.cache_dir).stdout)
        assert found["quota_bytes"] == 80 * BLOCK
        assert _json(glowplug, "gc", "--cache-quota", "0")["short_bytes"] == 0, "the server's quota counts"
        assert _json(glowplug, "ls")["used_bytes"] <= 80 * BLOCK
        assert (directory / "lib/big.so").read_bytes() == OTHER
    finally:
        glowplug("umount", directory)


@pytest.mark.root
def test_verify_removes_damage_and_readers_get_the_right_bytes(
    filled: block_images.Command, refs: list[str]
) -> None:
    assert _json(filled, "verify")["damaged"] == []
    blocks = sorted(path for path in filled.cache_dir.glob("blocks/*/*") if path.stat().st_size == BLOCK)
    for path in blocks[:3]:
        with path.open("r+b") as file:
            file.seek(100)
            file.write(b"damage")
    found = _json(filled, "verify", code=1)
    assert found["damaged"] == [path.name for path in blocks[:3]]
    assert found["stuck"] == []
    assert not any(path.exists() for path in blocks[:3])
    assert "all right" in filled("cache", "verify").stdout
    _read(filled, refs[0])
