from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from imagefs import cache, cachedirectory, errors, fetcher, plan, readahead
from imagefs.fetcher import Priority
from imagefs.lazylayer import LazyLayer
from tests.imagefs import scripted

NO_READ_AHEAD = readahead.ReadAheadPolicy(initial_blocks=0, max_blocks=0)
POLICY = plan.Policy(retry_seconds=0.005, retry_max_seconds=0.02, read_ahead=NO_READ_AHEAD)
SETTINGS = fetcher.FetchSettings(policy=POLICY)
BLOCKS = 12
DATA = scripted.image(BLOCKS, seed=7)


class Bench:
    """A cache, a fetcher and one attached layer."""

    def __init__(self, path: pathlib.Path, settings: fetcher.FetchSettings) -> None:
        self.origin = scripted.ScriptedOrigin()
        self.layer = scripted.layer(DATA, self.origin)
        self.cache = cache.BlockCache(path / "cache", 1 << 30, 0)
        self.fetcher = fetcher.Fetcher(self.cache, settings)
        self.fetcher.attach(self.layer)
        self.answers = scripted.Answers()

    def ask(self, index: int, priority: Priority = Priority.DEMAND, key: object = None) -> None:
        done = self.answers.expect(index if key is None else key)
        self.fetcher.request(self.layer.map_digest, index, priority, done)

    def close(self) -> None:
        self.fetcher.close()
        self.cache.close()
        for result in self.answers.results.values():
            if isinstance(result, int):
                os.close(result)
        assert not self.answers.repeated


@contextlib.contextmanager
def bench(path: pathlib.Path, settings: fetcher.FetchSettings = SETTINGS) -> Iterator[Bench]:
    made = Bench(path, settings)
    try:
        yield made
    finally:
        made.close()


def content(result: object, index: int) -> bool:
    assert isinstance(result, int), result
    expected = DATA[index * scripted.BLOCK_BYTES :][: scripted.BLOCK_BYTES]
    return os.pread(result, scripted.BLOCK_BYTES + 1, 0) == expected


def test_reads_are_the_image_cold_and_cached(tmp_path: pathlib.Path) -> None:
    with bench(tmp_path) as made:
        name = made.layer.map_digest
        assert made.fetcher.read(name, 0, len(DATA)) == DATA
        calls = len(made.origin.calls)
        assert calls == BLOCKS
        assert made.fetcher.read(name, 65535, 70000) == DATA[65535:135535]
        assert made.fetcher.read(name, len(DATA), 0) == b""
        assert len(made.origin.calls) == calls
        with pytest.raises(errors.InvalidInputError):
            made.fetcher.read(name, 1, len(DATA))
    with bench(tmp_path) as again:
        assert again.fetcher.read(name, 0, len(DATA)) == DATA
        assert not again.origin.calls


def test_thousands_who_want_a_block_share_one_fetch(tmp_path: pathlib.Path) -> None:
    gate = threading.Event()
    with bench(tmp_path) as made:
        made.origin.before = lambda call: assert_true(gate.wait(30))
        last: list[object] = []
        counted = threading.Semaphore(0)

        def done(result: object) -> None:
            last.append(result)
            if isinstance(result, int):
                os.close(result)
            counted.release()

        def ask() -> None:
            for _ in range(500):
                made.fetcher.request(made.layer.map_digest, 3, Priority.DEMAND, done)

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        gate.set()
        for _ in range(4000):
            assert counted.acquire(timeout=30)
        assert all(isinstance(result, int) for result in last)
        assert len(made.origin.calls) == 1


def assert_true(value: bool) -> None:
    assert value


def test_zero_blocks_are_never_fetched(tmp_path: pathlib.Path) -> None:
    data = DATA[: scripted.BLOCK_BYTES] + bytes(3 * scripted.BLOCK_BYTES) + DATA[:4096]
    with bench(tmp_path) as made:
        layer = scripted.layer(data, made.origin)
        made.fetcher.attach(layer)
        assert made.fetcher.read(layer.map_digest, 0, len(data)) == data
        assert len(made.origin.calls) == 2
        assert made.fetcher.stats().zero_hits == 3
        made.fetcher.request(layer.map_digest, 1, Priority.DEMAND, made.answers.expect("zero"))
        [fd] = made.answers.wait(["zero"])
        assert isinstance(fd, int)
        with pytest.raises(OSError):
            os.pwrite(fd, b"x", 0)


def test_the_same_block_in_another_layer_is_not_fetched_again(tmp_path: pathlib.Path) -> None:
    with bench(tmp_path) as made:
        made.fetcher.read(made.layer.map_digest, 0, len(DATA))
        calls = len(made.origin.calls)
        other = scripted.layer(DATA + DATA[:4096], made.origin)
        made.fetcher.attach(other)
        whole = (BLOCKS - 1) * scripted.BLOCK_BYTES
        assert made.fetcher.read(other.map_digest, 0, whole) == DATA[:whole]
        assert len(made.origin.calls) == calls


def test_fill_takes_neighbours_along_and_a_demand_overtakes_it(tmp_path: pathlib.Path) -> None:
    policy = dataclasses.replace(
        POLICY, connections=1, connections_per_origin=1, connections_per_layer=1, demand_connections=0
    )
    gate = threading.Event()
    with bench(tmp_path, fetcher.FetchSettings(policy=policy)) as made:
        made.origin.before = lambda call: assert_true(gate.wait(30))
        made.ask(0)
        scripted.eventually(lambda: made.origin.running == 1)
        for index in range(1, 10):
            made.ask(index, Priority.FILL)
        made.ask(11)
        gate.set()
        results = made.answers.wait([*range(10), 11])
        assert all(content(result, index) for result, index in zip(results, [*range(10), 11], strict=True))
        offsets = [call.offset for call in made.origin.calls]
        blocks = made.layer.block_map.blocks
        assert offsets == [blocks[0].offset, blocks[11].offset, blocks[1].offset]
        assert made.fetcher.stats().coalesced_blocks == 8
        reasons = {event.block: event.reason for event in made.fetcher.events()}
        assert (reasons[5], reasons[11]) == ("fill", "demand")


ONE_AT_A_TIME = dataclasses.replace(POLICY, connections=1, demand_connections=0)


def test_a_block_is_delivered_before_the_rest_of_its_request_came(tmp_path: pathlib.Path) -> None:
    queued, gate = threading.Event(), threading.Event()
    with bench(tmp_path, fetcher.FetchSettings(policy=ONE_AT_A_TIME)) as made:
        blocks = made.layer.block_map.blocks

        def between(call: scripted.Call, start: int) -> None:
            assert_true(queued.wait(30))
            if call.offset < blocks[2].offset <= call.offset + start:
                assert_true(gate.wait(30))

        made.origin.between = between
        made.ask(11)
        scripted.eventually(lambda: made.origin.running == 1)
        for index in range(9):
            made.ask(index, Priority.FILL)
        queued.set()
        made.answers.wait([11, 0])
        assert 2 not in made.answers.results
        gate.set()
        results = made.answers.wait(range(9))
        assert all(content(result, index) for index, result in enumerate(results))
        assert len(made.origin.calls) == 2


def test_what_breaks_in_the_middle_spares_the_blocks_that_came(tmp_path: pathlib.Path) -> None:
    gate = threading.Event()
    with bench(tmp_path, fetcher.FetchSettings(policy=ONE_AT_A_TIME)) as made:
        blocks = made.layer.block_map.blocks

        def between(call: scripted.Call, start: int) -> None:
            assert_true(gate.wait(30))
            if call.offset < blocks[3].offset + 100 <= call.offset + start:
                raise errors.UnavailableError("the link is cut")

        made.origin.between = between
        made.ask(11)
        scripted.eventually(lambda: made.origin.running == 1)
        for index in range(6):
            made.ask(index, Priority.FILL)
        gate.set()
        results = made.answers.wait(range(6))
        assert all(content(result, index) for index, result in enumerate(results[:3]))
        assert all(isinstance(result, errors.UnavailableError) for result in results[3:])
        assert made.fetcher.stats().corrupt_blocks == 0


def test_read_ahead_brings_what_follows_without_being_asked(tmp_path: pathlib.Path) -> None:
    windows = readahead.ReadAheadPolicy(initial_blocks=2, max_blocks=8, proof_blocks=2)
    ahead = dataclasses.replace(POLICY, read_ahead=windows)
    with bench(tmp_path, fetcher.FetchSettings(policy=ahead)) as made:
        made.ask(1)
        made.answers.wait([1])
        scripted.eventually(lambda: made.fetcher.stats().fetched_blocks == 3)
        for index in (2, 3, 4):
            made.ask(index)
        made.answers.wait([2, 3, 4])
        scripted.eventually(lambda: made.fetcher.stats().fetched_blocks == BLOCKS - 1)
        demanded = [e.block for e in made.fetcher.events() if e.reason == "demand" and e.outcome == "origin"]
        assert set(demanded) <= {1, 4}


# -- faults ------------------------------------------------------------------------------------------


def test_an_outage_is_a_pause_logged_once(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    down = threading.Event()
    down.set()

    def before(call: scripted.Call) -> None:
        if down.is_set():
            raise errors.UnavailableError("connection refused")

    with bench(tmp_path) as made:
        made.origin.before = before
        for index in range(4):
            made.ask(index)
        scripted.eventually(lambda: len(made.origin.calls) > 12)
        down.clear()
        results = made.answers.wait(range(4))
        assert all(content(result, index) for index, result in enumerate(results))
    messages = [record.message for record in caplog.records]
    assert len([text for text in messages if "reads wait and retry" in text]) == 1
    assert len([text for text in messages if "answers again" in text]) == 1


@pytest.mark.parametrize(
    "error", [errors.UnavailableError("refused"), errors.DeniedError("401"), OSError("odd")]
)
def test_past_the_deadline_a_read_fails_and_a_later_one_tries_again(
    tmp_path: pathlib.Path, error: Exception
) -> None:
    broken = True

    def before(call: scripted.Call) -> None:
        if broken:
            raise error

    settings = fetcher.FetchSettings(read_deadline_seconds=0.3, policy=POLICY)
    with bench(tmp_path, settings) as made:
        made.origin.before = before
        made.ask(0)
        [result] = made.answers.wait([0])
        assert isinstance(result, errors.UnavailableError)
        assert "within 0.3 s" in str(result)
        assert str(error) in str(result)
        assert made.fetcher.stats().expired_reads == 1
        broken = False
        made.ask(0, key="later")
        assert content(made.answers.wait(["later"])[0], 0)


def test_a_hanging_origin_answers_by_the_deadline_and_does_not_delay_others(tmp_path: pathlib.Path) -> None:
    release = threading.Event()
    other_origin = scripted.ScriptedOrigin("oci:/other")
    other = scripted.layer(scripted.image(6, seed=8), other_origin)
    with bench(tmp_path, fetcher.FetchSettings(read_deadline_seconds=1.0, policy=POLICY)) as made:
        made.origin.before = lambda call: assert_true(release.wait(60))
        made.fetcher.attach(other)
        try:
            for index in range(BLOCKS):
                made.ask(index)
            scripted.eventually(lambda: made.origin.running == POLICY.connections_per_layer)
            assert len(made.fetcher.read(other.map_digest, 0, 5 * scripted.BLOCK_BYTES)) == 5 * 65536
            results = made.answers.wait(range(BLOCKS))
            assert all(isinstance(result, errors.UnavailableError) for result in results)
            assert made.origin.most_running == POLICY.connections_per_layer
        finally:
            release.set()


def test_wrong_bytes_are_fetched_again_and_never_served(tmp_path: pathlib.Path) -> None:
    wrong = [True, True]

    def spoil(call: scripted.Call, buffer: memoryview) -> None:
        if wrong:
            wrong.pop()
            buffer[len(buffer) // 2] ^= 1

    with bench(tmp_path) as made:
        made.origin.spoil = spoil
        made.ask(0)
        assert content(made.answers.wait([0])[0], 0)
        assert made.fetcher.stats().corrupt_blocks == 2


def test_an_origin_is_told_that_its_bytes_were_wrong(tmp_path: pathlib.Path) -> None:
    """It may have another copy: a mirror that keeps sending them is no reason for EIO."""
    doubted: list[str] = []

    def spoil(call: scripted.Call, buffer: memoryview) -> None:
        if not doubted:
            buffer[len(buffer) // 2] ^= 1

    with bench(tmp_path) as made:
        made.origin.spoil = spoil
        made.origin.doubt = lambda digest, why: doubted.append(digest)  # type: ignore[method-assign]
        made.ask(0)
        assert content(made.answers.wait([0])[0], 0)
        assert doubted == [made.layer.blob_digest]


def test_bytes_that_stay_wrong_are_an_error_for_that_block_alone(tmp_path: pathlib.Path) -> None:
    with bench(tmp_path) as made:
        bad = made.layer.block_map.blocks[4].offset

        def spoil(call: scripted.Call, buffer: memoryview) -> None:
            if call.offset <= bad < call.offset + call.length:
                buffer[bad - call.offset + 100] ^= 1

        made.origin.spoil = spoil
        for index in range(3, 7):
            made.ask(index, Priority.FILL)
        made.ask(4, key="demanded")
        results = made.answers.wait([3, 5, 6])
        assert all(content(result, index) for result, index in zip(results, [3, 5, 6], strict=True))
        error, filled = made.answers.wait(["demanded", 4])
        assert isinstance(error, errors.IntegrityError)
        assert isinstance(filled, errors.IntegrityError)
        assert "block 4" in str(error)


def test_a_second_origin_of_the_same_layer_stands_in(tmp_path: pathlib.Path) -> None:
    mirror = scripted.ScriptedOrigin("oci:/mirror")
    with bench(tmp_path) as made:
        mirror.blobs = dict(made.origin.blobs)
        made.origin.blobs.clear()
        made.fetcher.attach(dataclasses.replace(made.layer, origin=mirror))
        made.ask(0)
        assert content(made.answers.wait([0])[0], 0)
        made.fetcher.detach(made.layer.map_digest)
        made.ask(1)
        assert content(made.answers.wait([1])[0], 1)


def test_a_blob_that_is_gone_is_said_at_once(tmp_path: pathlib.Path) -> None:
    with bench(tmp_path) as made:
        made.origin.blobs.clear()
        made.ask(0)
        [result] = made.answers.wait([0])
        assert isinstance(result, errors.NotFoundError)


def test_prefetches_end_with_the_first_failure(tmp_path: pathlib.Path) -> None:
    def before(call: scripted.Call) -> None:
        raise errors.UnavailableError("down")

    with bench(tmp_path) as made:
        made.origin.before = before
        made.ask(0, Priority.BOOT)
        made.ask(5, Priority.FILL)
        results = made.answers.wait([0, 5])
        assert all(isinstance(result, errors.UnavailableError) for result in results)


def test_detach_fails_pending_reads_at_once(tmp_path: pathlib.Path) -> None:
    release = threading.Event()
    with bench(tmp_path) as made:
        made.origin.before = lambda call: assert_true(release.wait(60))
        for index in range(BLOCKS):
            made.ask(index)
        made.fetcher.attach(made.layer)
        made.fetcher.detach(made.layer.map_digest)
        assert not made.answers.results
        made.fetcher.detach(made.layer.map_digest)
        results = made.answers.wait(range(BLOCKS))
        assert all(isinstance(result, errors.NotFoundError) for result in results)
        made.ask(0, key="after")
        assert isinstance(made.answers.wait(["after"])[0], errors.NotFoundError)
        release.set()


def test_close_fails_what_is_pending(tmp_path: pathlib.Path) -> None:
    release = threading.Event()
    with bench(tmp_path) as made:
        made.origin.before = lambda call: assert_true(release.wait(60))
        made.ask(0)
        scripted.eventually(lambda: made.origin.running == 1)
        made.fetcher.close()
        assert isinstance(made.answers.wait([0])[0], errors.UnavailableError)
        release.set()


def test_a_damaged_cache_file_is_fetched_again(tmp_path: pathlib.Path) -> None:
    with bench(tmp_path) as made:
        made.fetcher.read(made.layer.map_digest, 0, len(DATA))
    files = list((tmp_path / "cache" / "blocks").glob("*/*"))
    assert len(files) == BLOCKS
    for file in files[:5]:
        with file.open("r+b") as opened:
            opened.write(b"?")
    for file in files:
        os.setxattr(file, cachedirectory.BOOT_ATTRIBUTE, b"an earlier boot")
    with bench(tmp_path) as made:
        assert made.fetcher.read(made.layer.map_digest, 0, len(DATA)) == DATA
        assert len(made.origin.calls) == 5


def test_a_dead_origin_does_not_stand_between_a_reader_and_an_unchecked_cache_file(
    tmp_path: pathlib.Path,
) -> None:
    with bench(tmp_path) as made:
        made.fetcher.read(made.layer.map_digest, 0, scripted.BLOCK_BYTES)
    for file in (tmp_path / "cache" / "blocks").glob("*/*"):
        os.setxattr(file, cachedirectory.BOOT_ATTRIBUTE, b"an earlier boot")
    release = threading.Event()
    with bench(tmp_path) as made:
        made.origin.before = lambda call: assert_true(release.wait(60))
        try:
            for index in range(1, BLOCKS):
                made.ask(index)
            scripted.eventually(lambda: made.origin.running > 0)
            made.ask(0)
            assert content(made.answers.wait([0])[0], 0)
        finally:
            release.set()


def test_a_map_with_impossible_sizes_is_not_attached(tmp_path: pathlib.Path) -> None:
    with bench(tmp_path) as made:
        block_map = made.layer.block_map
        greedy = dataclasses.replace(block_map.blocks[0], compressed_bytes=1 << 31)
        bad = dataclasses.replace(block_map, blocks=(greedy, *block_map.blocks[1:]))
        layer = LazyLayer("sha256:" + hashlib.sha256(b"bad").hexdigest(), "sha256:0", bad, made.origin)
        with pytest.raises(errors.InvalidInputError):
            made.fetcher.attach(layer)


def test_many_readers_of_many_layers_get_every_byte(tmp_path: pathlib.Path) -> None:
    policy = dataclasses.replace(POLICY, read_ahead=readahead.ReadAheadPolicy())
    with bench(tmp_path, fetcher.FetchSettings(policy=policy)) as made:
        images = [scripted.image(10, seed=number) for number in range(6)]
        layers = []
        for number, data in enumerate(images):
            layer = scripted.layer(data, scripted.ScriptedOrigin(f"oci:/{number % 3}"))
            made.fetcher.attach(layer)
            layers.append(layer)
        wrong: list[int] = []

        def read(seed: int) -> None:
            for step in range(12):
                number = (seed + step) % 6
                offset = (seed * 7919 + step * 104729) % (len(images[number]) - 70000)
                got = made.fetcher.read(layers[number].map_digest, offset, 70000)
                if got != images[number][offset : offset + 70000]:
                    wrong.append(number)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert not wrong
        calls = [(layer.blob_digest, call.offset) for layer in layers for call in layer.origin.calls]
        assert len(calls) == len(set(calls))


def test_a_fill_that_is_arriving_gives_way_to_a_demand(tmp_path: pathlib.Path) -> None:
    """No byte of a fill is taken while a demand is under way at its origin, unless it is demanded, too."""
    filling, demanded, answer = threading.Event(), threading.Event(), threading.Event()
    moved_on: list[int] = []
    with bench(tmp_path) as made:
        blocks = made.layer.block_map.blocks

        def between(call: scripted.Call, start: int) -> None:
            if call.offset == blocks[9].offset:
                demanded.set()
                assert_true(answer.wait(30))
            elif not demanded.is_set():
                filling.set()
                assert_true(demanded.wait(30))
            else:
                moved_on.append(start)

        made.origin.between = between
        made.ask(1, Priority.FILL)
        assert filling.wait(30)
        made.ask(9)
        assert demanded.wait(30)
        time.sleep(0.2)  # it could go on now, if it did not give way
        assert moved_on == []
        made.ask(1, key="1 demanded")
        for result in made.answers.wait([1, "1 demanded"]):
            assert content(result, 1)
        assert moved_on
        answer.set()
        assert content(made.answers.wait([9])[0], 9)


def test_a_fill_that_gave_way_goes_on_afterwards(tmp_path: pathlib.Path) -> None:
    filling, demanded, answer = threading.Event(), threading.Event(), threading.Event()
    with bench(tmp_path) as made:

        def between(call: scripted.Call, start: int) -> None:
            if call.offset == made.layer.block_map.blocks[9].offset:
                demanded.set()
                assert_true(answer.wait(30))
            filling.set()

        made.origin.between = between
        made.ask(1, Priority.FILL)
        assert filling.wait(30)
        made.ask(9)
        assert demanded.wait(30)
        answer.set()
        for index, result in zip((9, 1), made.answers.wait([9, 1]), strict=True):
            assert content(result, index)


def test_quiet_is_counted_from_the_last_miss(tmp_path: pathlib.Path) -> None:
    with bench(tmp_path) as made:
        name = made.layer.map_digest
        asked_at = time.monotonic()
        made.ask(2)
        made.answers.wait([2])
        assert 0 <= made.fetcher.quiet_seconds(name) <= time.monotonic() - asked_at
        missed_at = time.monotonic()
        made.ask(2, key="a hit")
        made.answers.wait(["a hit"])
        hit_seconds = time.monotonic() - missed_at
        assert made.fetcher.quiet_seconds(name) >= hit_seconds
        assert made.fetcher.quiet_seconds("sha256:unknown") == 0.0


def test_what_is_wanted_during_a_pause_is_fetched_when_it_ends(tmp_path: pathlib.Path) -> None:
    """A fill failed and left nothing queued; what comes next must not wait for a chance to be seen."""
    with bench(tmp_path) as made:
        made.origin.before = raises(errors.UnavailableError("down"))
        for attempt in range(4):
            made.ask(1, Priority.FILL, f"attempt {attempt}")
            (refused,) = made.answers.wait([f"attempt {attempt}"], timeout=10)
            assert isinstance(refused, errors.UnavailableError)
        made.origin.before = lambda call: None
        made.ask(1, Priority.FILL)
        assert content(made.answers.wait([1], timeout=10)[0], 1)


def raises(error: Exception) -> Callable[[object], None]:
    def call(_: object) -> None:
        raise error

    return call
