"""What workers note and what the server makes of it, without a kernel."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs import errors
from imagefs.fuse import readlog, recordings, wire


class _Workers:
    """Workers as the server sees them: told, they answer at once through the codec, as over the socket."""

    def __init__(self, count: int) -> None:
        self.recordings = recordings.Recordings(self._tell)
        self.logs = [readlog.ReadLog(self._arrived) for _ in range(count)]

    def _arrived(self, reads: wire.Reads) -> None:
        data = wire.encode_question(reads)
        assert len(data) <= wire.MAX_MESSAGE_BYTES
        decoded = wire.decode_question(data)
        assert decoded == reads
        assert isinstance(decoded, wire.Reads)
        self.recordings.arrived(decoded)

    def _tell(self, watch: wire.Watch) -> int:
        message = wire.decode_answer(wire.encode_answer(watch))
        assert isinstance(message, wire.Watch)
        for log in self.logs:
            log.watch(message)
        return len(self.logs)

    def read(self, worker: int, node: int, offset: int, length: int) -> None:
        if node in self.logs[worker].nodes:
            self.logs[worker].note(node, offset, length)


def test_reads_of_all_workers_come_in_order_of_time_and_only_those_recorded() -> None:
    workers = _Workers(2)
    workers.read(0, 2, 0, 4096)  # before: not recorded
    workers.recordings.start("a", {2: "sha256:b", 3: "sha256:a"})
    workers.read(0, 2, 8192, 4096)
    workers.read(1, 3, 0, 10)
    workers.read(0, 9, 0, 4096)  # somebody else's device
    workers.read(0, 2, 12288, 4096)  # goes on: one read
    workers.read(0, 2, 0, 4096)
    found = workers.recordings.stop("a")
    assert found["layers"] == ["sha256:a", "sha256:b"]
    assert [read[:3] for read in found["reads"]] == [[1, 8192, 8192], [0, 0, 10], [1, 0, 4096]]
    times = [read[3] for read in found["reads"]]
    assert times == sorted(times)
    assert found["left_out"] == 0
    assert not any(log.nodes for log in workers.logs)
    with pytest.raises(errors.NotFoundError):
        workers.recordings.stop("a")


def test_two_recordings_of_one_device_end_on_their_own() -> None:
    workers = _Workers(1)
    workers.recordings.start("a", {2: "sha256:x"})
    workers.read(0, 2, 0, 4096)
    workers.recordings.start("b", {2: "sha256:x", 3: "sha256:y"})
    workers.read(0, 2, 8192, 4096)
    assert [read[1] for read in workers.recordings.stop("a")["reads"]] == [0, 8192]
    workers.read(0, 3, 0, 1)
    assert workers.recordings.current() == wire.Watch(0, (2, 3))
    assert [read[:2] for read in workers.recordings.stop("b")["reads"]] == [[0, 8192], [1, 0]]
    assert workers.recordings.current() is None


def test_a_recording_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recordings, "MAX_READS", wire.ACCESSES + 1)
    workers = _Workers(1)
    workers.recordings.start("a", {2: "sha256:x"})
    for number in range(wire.ACCESSES * 2):
        workers.read(0, 2, number * 8192, 4096)
    found = workers.recordings.stop("a")
    assert len(found["reads"]) == wire.ACCESSES + 1
    assert found["left_out"] == wire.ACCESSES - 1
    assert [read[1] for read in found["reads"]] == [n * 8192 for n in range(wire.ACCESSES + 1)]


def test_an_owner_that_goes_takes_its_recording_along() -> None:
    workers = _Workers(1)
    workers.recordings.start("a", {2: "sha256:x"})
    workers.recordings.forget("a")
    workers.recordings.forget("a")
    assert workers.recordings.current() is None


@given(st.lists(st.tuples(*[st.integers(0, (1 << 32) - 1)] * 4), max_size=20), st.integers(0, 9))
def test_reads_come_back(reads: list[tuple[int, int, int, int]], tag: int) -> None:
    message = wire.Reads(tag, tuple(map(wire.Access._make, reads)))
    data = wire.encode_question(message)
    assert wire.decode_question(data) == message
    if reads:
        with pytest.raises(errors.InvalidInputError):
            wire.decode_question(data[:-1])
