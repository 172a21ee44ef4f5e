"""`glowplug inspect`: the figures against what the images were made of."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from click.testing import CliRunner

from glowplug import cli
from imagefs import errors
from tests.fixtures import block_images, images

MEBI = 1 << 20
BLOCK = block_images.BLOCK_BYTES
NOISE = random.Random(7).randbytes(10 * BLOCK)
BIG = images.tar_of([("lib", None), ("lib/big.so", NOISE)])
OTHER = images.tar_of([("else", b"x" * 5000), ("opt", None), ("opt/copy.so", NOISE)])
HOLES = images.tar_of([("zeros", bytes(5 * BLOCK))], root=False)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cli.cli, ["inspect", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_layers_and_totals(tmp_path: Path) -> None:
    ref = block_images.make(tmp_path / "image", [BIG, HOLES])
    found = json.loads(run(ref, "--json"))
    big, holes = found["layers"]
    assert big["diff_id"] == images.digest(BIG)
    assert holes["source_digest"] != holes["diff_id"]
    assert (big["holes"], holes["holes"]) == (0, 5)
    assert (big["root_implied"], holes["root_implied"]) == (False, True)
    assert big["blocks"] == -(-big["image_bytes"] // BLOCK)
    assert 10 * BLOCK < big["compressed_bytes"] < big["image_bytes"] + BLOCK
    assert big["block_bytes"] == big["frame_bytes"] == BLOCK
    assert {big["key"], holes["key"]} == {"diff_id"}
    for field in ("blocks", "holes", "compressed_bytes", "image_bytes", "metadata_bytes", "map_bytes"):
        assert found["totals"][field] == big[field] + holes[field]
    assert found["repeated"]["blocks"] == 0


def test_a_layer_that_depends_on_lower_ones_says_so(tmp_path: Path) -> None:
    upper = images.tar_of([("lib/more", b"x")])
    ref = block_images.make(tmp_path / "image", [BIG, upper])
    assert [layer["key"] for layer in json.loads(run(ref, "--json"))["layers"]] == ["diff_id", "chain_id"]


def test_what_is_shared_and_repeated(tmp_path: Path) -> None:
    one = block_images.make(tmp_path / "one", [BIG])
    both = block_images.make(tmp_path / "both", [BIG, OTHER])
    found = json.loads(run(one, "--shared-with", both, "--json"))
    assert found["shared"]["blocks"] == found["totals"]["blocks"]
    assert found["shared"]["compressed_bytes"] <= found["totals"]["compressed_bytes"]
    found = json.loads(run(both, "--json"))
    # A file of a block or more starts on a block boundary: its blocks are the same wherever it lies.
    assert found["repeated"]["blocks"] == 10
    assert found["repeated"]["image_bytes"] == 10 * BLOCK


def test_the_table_is_for_people(tmp_path: Path) -> None:
    ref = block_images.make(tmp_path / "image", [BIG, HOLES])
    text = run(ref, "--shared-with", ref)
    assert images.digest(BIG)[7:19] in text
    assert "total" in text
    assert f"shared with {ref}: " in text


def test_an_image_without_block_image(tmp_path: Path) -> None:
    ref = block_images.layout(tmp_path / "image", images.make([BIG]))
    with pytest.raises(errors.NotFoundError, match="glowplug convert"):
        run(ref)
