from __future__ import annotations

import dataclasses

import pytest

from e2e import replay
from glowplug.startup.speed import Speed
from imagefs import plan, readahead, trace
from tests.imagefs import scripted

BLOCK, FRAME = 64 << 10, 16 << 10
LAYER = scripted.layer(scripted.image(8, seed=3), scripted.ScriptedOrigin(), BLOCK, FRAME)
POLICY = plan.Policy(read_ahead=readahead.ReadAheadPolicy(initial_blocks=0, max_blocks=0))
RTT = 0.5
SPEED = Speed(8 * 10_000, RTT)


def replayed(*reads: tuple[int, int], think_seconds: float = 0.0) -> replay.Outcome:
    rows = [trace.Read(0, offset, length, at) for at, (offset, length) in enumerate(reads)]
    return replay.Replay([LAYER.block_map], SPEED, POLICY).run(rows, think_seconds)


def sizes(index: int) -> list[int]:
    return [frame.compressed_bytes for frame in LAYER.block_map.blocks[index].frames]


def test_a_miss_takes_a_round_trip_and_its_frame() -> None:
    outcome = replayed((BLOCK + 2 * FRAME + 7, 100))
    assert outcome.seconds == outcome.waited_seconds == pytest.approx(RTT + sizes(1)[2] / 10_000)
    assert (outcome.misses, outcome.requests) == (1, 1)


def test_frames_come_in_order_and_those_before_the_first_by_another_request() -> None:
    outcome = replayed((BLOCK + 2 * FRAME, 1), (BLOCK + 3 * FRAME, 1), (BLOCK, 1), (BLOCK + 2 * FRAME, 9))
    assert outcome.seconds == pytest.approx(2 * RTT + (sum(sizes(1)) - sizes(1)[1]) / 10_000)
    assert (outcome.misses, outcome.requests) == (3, 2)
    assert outcome.moved_bytes == pytest.approx(sum(sizes(1)) - sizes(1)[1])


def test_while_nobody_reads_the_rest_arrives() -> None:
    outcome = replayed((0, 1), (3 * FRAME, 1), think_seconds=1000.0)
    assert outcome.waited_seconds == pytest.approx(RTT + sizes(0)[0] / 10_000)
    assert outcome.seconds == pytest.approx(1000 + outcome.waited_seconds)


def test_blocks_without_frames_are_waited_for_whole() -> None:
    blocks = tuple(dataclasses.replace(block, frames=()) for block in LAYER.block_map.blocks)
    whole = dataclasses.replace(LAYER.block_map, frame_bytes=BLOCK, blocks=blocks)
    outcome = replay.Replay([whole], SPEED, POLICY).run([trace.Read(0, 5, 5, 0)], 0.0)
    assert outcome.seconds == pytest.approx(RTT + sum(sizes(0)) / 10_000)
