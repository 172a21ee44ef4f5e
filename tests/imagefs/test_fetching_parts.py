"""The fetcher and blocks in frames: who waits for what, and what stays when something breaks."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import threading
from collections.abc import Iterator

import pytest

from imagefs import arrival, blockmap, cache, errors, fetcher, plan, readahead
from imagefs.fetcher import Priority
from imagefs.lazylayer import LazyLayer
from tests.imagefs import scripted

BLOCK, FRAME = 1 << 20, 64 << 10
DATA = scripted.image(4, seed=17, block_bytes=BLOCK)
POLICY = plan.Policy(
    retry_seconds=0.005,
    retry_max_seconds=0.02,
    read_ahead=readahead.ReadAheadPolicy(initial_blocks=0, max_blocks=0),
)


class Bench:
    """A fetcher with one layer of frames, whose origin sends a blob's bytes up to `stop`."""

    def __init__(self, path: pathlib.Path, policy: plan.Policy) -> None:
        self.origin = scripted.ScriptedOrigin()
        self.layer = scripted.layer(DATA, self.origin, BLOCK, FRAME)
        self.cache = cache.BlockCache(path / "cache", 1 << 30, 0)
        self.fetcher = fetcher.Fetcher(
            self.cache, fetcher.FetchSettings(read_deadline_seconds=20.0, policy=policy)
        )
        self.fetcher.attach(self.layer)
        self.answers = scripted.Answers()
        self.stop = 1 << 60
        self._changed = threading.Condition()
        self.origin.between = self._pace

    def _pace(self, call: scripted.Call, start: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: call.offset + start < self.stop, 30)

    def send_until(self, stop: int) -> None:
        with self._changed:
            self.stop = stop
            self._changed.notify_all()

    def place(self, index: int, frame: int, layer: LazyLayer | None = None) -> int:
        block = (layer or self.layer).block_map.blocks[index]
        return block.offset + sum(each.compressed_bytes for each in block.frames[:frame])

    def ask(self, index: int, frames: int, key: object, layer: LazyLayer | None = None) -> None:
        name = (layer or self.layer).map_digest
        self.fetcher.request_frames(name, index, frames, self.answers.expect(key))

    def whole(self, index: int) -> bool:
        return self.layer.block_map.blocks[index].digest in self.cache

    def close(self) -> None:
        self.send_until(1 << 60)
        self.fetcher.close()
        self.cache.close()
        for result in self.answers.results.values():
            if isinstance(result, int | arrival.Part):
                os.close(result if isinstance(result, int) else result.fd)
        assert not self.answers.repeated


@contextlib.contextmanager
def bench(path: pathlib.Path, policy: plan.Policy = POLICY) -> Iterator[Bench]:
    made = Bench(path, policy)
    try:
        yield made
    finally:
        made.close()


def has(result: object, index: int, frame: int) -> bool:
    """Whether an answer has a frame, and it is the image's."""
    expected = DATA[index * BLOCK + frame * FRAME :][:FRAME]
    if isinstance(result, int):
        return os.pread(result, FRAME, frame * FRAME) == expected
    assert isinstance(result, arrival.Part), result
    return bool(result.frames >> frame & 1) and os.pread(result.fd, FRAME, frame * FRAME) == expected


def test_the_first_frame_is_answered_before_the_last_byte_was_sent(tmp_path: pathlib.Path) -> None:
    with bench(tmp_path) as made:
        made.send_until(made.place(1, 6))
        made.ask(1, 1 << 5, "first")
        [first] = made.answers.wait(["first"])
        assert isinstance(first, arrival.Part)
        assert has(first, 1, 5)
        assert made.origin.calls[0].offset == made.place(1, 5)
        made.ask(1, 1 << 5 | 1 << 6, "joins")
        made.ask(1, 1 << 3, "earlier")
        made.ask(1, 0, "whole")
        made.send_until(made.place(1, 8))
        [joined] = made.answers.wait(["joins"])
        assert has(joined, 1, 5)
        assert has(joined, 1, 6)
        assert not {"earlier", "whole"} & set(made.answers.results)
        # Who asks for what has come already is answered by nobody's next byte.
        made.ask(1, 1 << 6, "there")
        assert has(made.answers.wait(["there"])[0], 1, 6)
        assert not made.whole(1)
        made.send_until(1 << 60)
        earlier, whole = made.answers.wait(["earlier", "whole"])
        assert has(earlier, 1, 3)
        assert isinstance(whole, int)
        assert os.pread(whole, BLOCK + 1, 0) == DATA[BLOCK : 2 * BLOCK]
        assert [call.offset for call in made.origin.calls] == [made.place(1, 5), made.place(1, 0)]
        assert sum(call.length for call in made.origin.calls) == made.place(1, 16) - made.place(1, 0)
        scripted.eventually(lambda: made.whole(1))
        stats = made.fetcher.stats()
        assert (stats.fetched_blocks, stats.frame_answers, stats.origin_requests) == (1, 4, 2)
        [event] = [each for each in made.fetcher.events() if each.outcome == "origin"]
        assert event.wanted_ns < event.served_ns < event.arrived_ns


def test_reads_are_the_image(tmp_path: pathlib.Path) -> None:
    with bench(tmp_path) as made:
        name = made.layer.map_digest
        for offset, length in ((BLOCK + 5, 10), (3 * FRAME - 1, 2), (BLOCK - 7, BLOCK + 20), (0, len(DATA))):
            assert made.fetcher.read(name, offset, length) == DATA[offset : offset + length]


def test_a_demand_of_what_is_read_ahead_gets_its_frame_as_it_comes(tmp_path: pathlib.Path) -> None:
    with bench(tmp_path) as made:
        made.send_until(made.place(0, 2))
        made.fetcher.request(made.layer.map_digest, 0, Priority.BOOT, made.answers.expect("boot"))
        scripted.eventually(lambda: made.origin.running == 1)
        made.ask(0, 1 << 1, "demand")
        made.ask(0, 1 << 4, "later")
        assert has(made.answers.wait(["demand"])[0], 0, 1)
        assert "later" not in made.answers.results
        made.send_until(1 << 60)
        later, boot = made.answers.wait(["later", "boot"])
        assert has(later, 0, 4)
        assert isinstance(boot, int)
        assert len(made.origin.calls) == 1


def test_what_is_left_of_a_block_gives_way_to_another_demand(tmp_path: pathlib.Path) -> None:
    with bench(tmp_path) as made:
        other = scripted.layer(scripted.image(2, seed=18, block_bytes=BLOCK), made.origin, BLOCK, FRAME)
        made.fetcher.attach(other)
        gate = threading.Event()
        pieces: list[str] = []

        def between(call: scripted.Call, start: int) -> None:
            made_for = "other" if call.digest == other.blob_digest else "rest"
            pieces.append(made_for)
            if made_for == "other":
                assert gate.wait(30)
            elif call.offset + start >= made.place(0, 2):
                assert asked.wait(30)

        asked = threading.Event()
        made.origin.between = between
        made.ask(0, 1, "first")
        made.answers.wait(["first"])
        made.ask(0, 0, "other", other)
        scripted.eventually(lambda: "other" in pieces)
        asked.set()
        # It may have had one piece in hand. A later one comes when the other demand was answered.
        paused = _settled(pieces)
        assert pieces[paused:].count("rest") == 0
        gate.set()
        made.answers.wait(["other"])
        scripted.eventually(lambda: made.whole(0))
        assert pieces[paused:].count("rest") > 0


def _settled(pieces: list[str]) -> int:
    """How many there are when no more of them come."""
    quiet = threading.Event()
    count = -1
    while count != len(pieces):
        count = len(pieces)
        quiet.wait(0.2)
    return count


def test_a_wrong_frame_is_fetched_again_and_what_others_hold_stays(tmp_path: pathlib.Path) -> None:
    with bench(tmp_path) as made:
        wrong = [True]

        def spoil(call: scripted.Call, buffer: memoryview) -> None:
            at = made.place(0, 5) - call.offset + 100
            if wrong and 0 <= at < len(buffer):
                wrong.pop()
                buffer[at] ^= 1

        made.origin.spoil = spoil
        made.ask(0, 1, "sound")
        made.ask(0, 1 << 5, "spoiled")
        sound, spoiled = made.answers.wait(["sound", "spoiled"])
        assert has(sound, 0, 0)
        assert has(spoiled, 0, 5)
        assert made.fetcher.stats().corrupt_blocks == 1
        scripted.eventually(lambda: made.whole(0))


def test_a_stream_that_breaks_is_begun_anew_for_who_still_waits(tmp_path: pathlib.Path) -> None:
    with bench(tmp_path) as made:
        broken = [True]

        def between(call: scripted.Call, start: int) -> None:
            if broken and call.offset + start > made.place(2, 6):
                broken.pop()
                raise errors.UnavailableError("the link is cut")

        made.origin.between = between
        made.ask(2, 1 << 3, "had")
        made.ask(2, 1 << 9, "waits")
        had, waits = made.answers.wait(["had", "waits"])
        assert has(had, 2, 3)
        assert has(waits, 2, 9)
        scripted.eventually(lambda: made.whole(2))


def forged(made: Bench, **changes: object) -> LazyLayer:
    """The layer, with another row for block 0."""
    block_map = made.layer.block_map
    first = dataclasses.replace(block_map.blocks[0], **changes)  # type: ignore[arg-type]
    value = dataclasses.replace(block_map, blocks=(first, *block_map.blocks[1:]))
    return LazyLayer("sha256:forged", made.layer.blob_digest, value, made.origin)


def test_a_block_that_is_not_its_digest_gets_no_name(tmp_path: pathlib.Path) -> None:
    """Its frames hash to theirs: who reads those reads what the map's author wrote, and the cache, which all
    images share, keeps nothing of it."""
    with bench(tmp_path) as made:
        victim = made.layer.block_map.blocks[1].digest
        layer = forged(made, digest=victim)
        made.fetcher.attach(layer)
        made.ask(0, 1 << 2, "frame", layer)
        made.ask(0, 0, "whole", layer)
        frame, whole = made.answers.wait(["frame", "whole"])
        assert has(frame, 0, 2)
        assert isinstance(whole, errors.IntegrityError)
        assert victim not in made.cache
        assert not made.cache.present(victim)
        made.ask(1, 1, "victim")
        assert has(made.answers.wait(["victim"])[0], 1, 0)


def test_a_frame_that_is_not_its_digest_is_refused_though_the_block_is(tmp_path: pathlib.Path) -> None:
    with bench(tmp_path) as made:
        frames = list(made.layer.block_map.blocks[0].frames)
        frames[2] = blockmap.Frame(bytes(32), frames[2].compressed_bytes)
        layer = forged(made, frames=tuple(frames))
        made.fetcher.attach(layer)
        made.ask(0, 1 << 2, "wrong", layer)
        assert isinstance(made.answers.wait(["wrong"])[0], errors.IntegrityError)
        made.ask(0, 1 << 3, "right", layer)
        assert has(made.answers.wait(["right"])[0], 0, 3)


def test_detaching_answers_who_waits_for_frames_and_what_they_hold_stays(tmp_path: pathlib.Path) -> None:
    with bench(tmp_path) as made:
        made.send_until(made.place(0, 2))
        made.ask(0, 1, "had")
        [had] = made.answers.wait(["had"])
        made.ask(0, 1 << 9, "waits")
        made.fetcher.detach(made.layer.map_digest)
        assert isinstance(made.answers.wait(["waits"])[0], errors.NotFoundError)
        assert has(had, 0, 0)
        made.fetcher.attach(made.layer)
        made.ask(0, 1 << 9, "again")
        made.send_until(1 << 60)
        assert has(made.answers.wait(["again"])[0], 0, 9)


@pytest.mark.parametrize("frames", [1, 1 << 3])
def test_closing_in_the_middle_of_a_block(tmp_path: pathlib.Path, frames: int) -> None:
    with bench(tmp_path) as made:
        made.send_until(made.place(0, 6))
        made.ask(0, frames, "had")
        made.answers.wait(["had"])
        made.ask(0, 1 << 12, "waits")
        made.fetcher.close()
        assert isinstance(made.answers.wait(["waits"])[0], errors.UnavailableError)
