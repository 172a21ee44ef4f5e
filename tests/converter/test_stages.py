"""What a conversion says of its stages: bytes by stage, and a stopwatch that is in one stage at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from converter import stages
from converter.stages import Stage
from tests.fixtures import images
from tests.fixtures.conversion import convert


class Clocks:
    """Seconds that pass when a test says so; the processor's at half the speed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(stages.time, "monotonic", lambda: self.now)  # type: ignore[attr-defined]
        monkeypatch.setattr(stages.time, "thread_time", lambda: self.now / 2)  # type: ignore[attr-defined]


def test_a_stage_is_not_charged_for_the_stages_it_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = Clocks(monkeypatch)
    meter = stages.Meter()

    def reading() -> Iterator[bytes]:
        for _ in range(3):
            clocks.now += 1
            yield b"12"

    with meter.laps() as laps:

        def inflating() -> Iterator[bytes]:
            for piece in laps.through(Stage.READ, reading()):
                clocks.now += 10
                yield piece * 4

        for _ in laps.through(Stage.INFLATE, inflating()):
            clocks.now += 100  # in no stage
    assert meter.times() == (
        stages.Times("read", 6, 3.0, 1.5, 6 / 1e6 / 1.5),
        stages.Times("inflate", 24, 30.0, 15.0, 24 / 1e6 / 15.0),
    )


def test_an_error_leaves_the_sums_of_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = Clocks(monkeypatch)
    meter = stages.Meter()

    def fail() -> None:
        with meter.laps() as laps:
            laps.enter(Stage.TREE)
            clocks.now += 2
            laps.enter(Stage.COMPRESS, 7)
            raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        fail()
    [tree] = meter.times()
    assert (tree.stage, tree.bytes, tree.busy_seconds) == ("tree", 7, 2.0)


@pytest.mark.parametrize("encoding", ["gzip", "zstd", "plain"])
def test_every_byte_of_a_conversion_is_counted_once_in_each_stage(tmp_path: Path, encoding: str) -> None:
    tar = images.tar_of([("d", None), ("d/file", bytes(range(256)) * 4000)])
    made = images.make([tar], encoding=encoding)
    result = convert(f"oci:{made.write_layout(tmp_path)}:latest")
    [image] = result.images
    counted = {each.stage: each.bytes for each in image.stages}
    source_bytes = made.document["layers"][0]["size"]
    assert counted["read"] == counted["source_digest"] == source_bytes
    assert counted.get("inflate") == (None if encoding == "plain" else len(tar))
    assert counted["tar_digest"] == len(tar)
    assert counted["tree"] == counted["compress"] == counted["block_digest"] == image.totals.image_bytes
    assert counted["blob_digest"] == counted["upload"] == image.totals.blob_bytes
    # The seek table and block 0 are written when all else is done.
    assert 0 < counted["write"] <= image.totals.blob_bytes
    again = convert(f"oci:{tmp_path}:latest")
    assert again.images[0].totals.reused == 1
    assert again.images[0].stages == ()
