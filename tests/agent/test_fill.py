"""When full copies begin and end: the rules, and that the difference is carried out again and again."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import config, fill, fillpolicy
from agent.fillpolicy import Candidate
from agent.observer import Recorder
from agent.rows import ImageRow, SnapshotRow
from agent.snapshots import Kind
from imagefs import errors
from imagefs.fuse.coverage import Coverage

OFF = config.Fill(start="off")
NOW = config.Fill(start="immediately", bandwidth_bytes_per_second=1000)
SETTLED = config.Fill(start="settled", settle_seconds=30)


@pytest.mark.parametrize(
    ("settings", "candidate", "copying", "begins", "ends"),
    [
        (OFF, Candidate("a", False, True, 99.0), False, False, False),
        (OFF, Candidate("a", False, True, 99.0), True, False, True),
        (OFF, Candidate("a", True, False, None), False, True, False),
        (OFF, Candidate("a", True, False, None), True, False, False),
        (NOW, Candidate("a", False, False, None), False, True, False),
        (NOW, Candidate("a", False, False, None), True, False, False),
        (SETTLED, Candidate("a", False, False, 99.0), False, False, False),
        (SETTLED, Candidate("a", False, True, None), False, False, False),
        (SETTLED, Candidate("a", False, True, 29.9), False, False, False),
        (SETTLED, Candidate("a", False, True, 30.0), False, True, False),
        (SETTLED, Candidate("a", False, True, 0.0), True, False, False),
        (SETTLED, Candidate("a", True, False, 0.0), False, True, False),
    ],
)
def test_rules(settings: config.Fill, candidate: Candidate, copying: bool, begins: bool, ends: bool) -> None:
    decision = fillpolicy.decide(settings, [candidate], {"a"} if copying else set())
    assert decision == fillpolicy.Decision(("a",) * begins, ("a",) * ends)


candidates = st.lists(
    st.builds(
        Candidate, st.text("abcdef", max_size=2), st.booleans(), st.booleans(), st.none() | st.floats(0, 100)
    ),
    unique_by=lambda candidate: candidate.block_digest,
)


@given(st.sampled_from([OFF, NOW, SETTLED]), candidates, st.sets(st.text("abcdef", max_size=2)))
def test_carrying_a_decision_out_leaves_nothing_to_decide(
    settings: config.Fill, listed: list[Candidate], copying: set[str]
) -> None:
    decision = fillpolicy.decide(settings, listed, copying)
    after = (copying | set(decision.begin)) - set(decision.end)
    assert fillpolicy.decide(settings, listed, after) == fillpolicy.Decision((), ())


def snapshot(number: int, kind: Kind, parent: int | None, image: str | None = None) -> SnapshotRow:
    return SnapshotRow(
        number, str(number), kind, parent, "", {}, 0, 0, image=image, layer=0 if image else None
    )


def test_what_has_been_started() -> None:
    rows = [
        snapshot(1, Kind.COMMITTED, None, "pulled only"),
        snapshot(2, Kind.COMMITTED, None, "started"),
        snapshot(3, Kind.COMMITTED, 2, "started"),
        snapshot(4, Kind.COMMITTED, 3),  # an ordinary layer above lazy ones
        snapshot(5, Kind.ACTIVE, 4),
        snapshot(6, Kind.ACTIVE, None),
        snapshot(7, Kind.VIEW, 1),
        snapshot(8, Kind.COMMITTED, None),
        snapshot(9, Kind.ACTIVE, 8),
    ]
    assert fillpolicy.started_images(rows) == {"started"}


class FakeDevices:
    """A device server's word on copies."""

    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self.rates: list[int] = []
        self.quiet = 0.0
        self.attached: set[str] = set()

    def fill(self, owner: str, bandwidth_bytes_per_second: int = 0) -> None:
        if owner not in self.attached:
            raise errors.NotFoundError(owner)
        self.states.setdefault(owner, "filling")
        self.rates.append(bandwidth_bytes_per_second)

    def stop_fill(self, owner: str) -> None:
        self.states.pop(owner, None)

    def fills(self) -> dict[str, Any]:
        copies = [{"owner": owner, "state": state, "error": None} for owner, state in self.states.items()]
        return {"bandwidth_bytes_per_second": 0, "copies": copies}

    def coverage(self, owner: str | None = None) -> dict[str, Coverage]:
        if owner not in self.attached:
            raise errors.NotFoundError(str(owner))
        return {"a": Coverage(1, 0, 1, 0, self.quiet), "b": Coverage(1, 0, 1, 0, self.quiet + 50)}


@dataclasses.dataclass
class FakeNode:
    """Images and snapshots."""

    devices: FakeDevices
    images: list[ImageRow]
    snapshots: list[SnapshotRow]

    def rows(self) -> list[ImageRow]:
        return self.images

    def walk(self) -> list[SnapshotRow]:
        return self.snapshots

    def attach(self, block_digest: str) -> None:
        self.devices.attached.add(f"image:{block_digest}")


def node(**marks: bool) -> FakeNode:
    row = ImageRow("digest", "source", "host/app:1", "docker://host/app", (), 0, **marks)
    lazy = snapshot(1, Kind.COMMITTED, None, "digest")
    return FakeNode(FakeDevices(), [row], [lazy, snapshot(2, Kind.ACTIVE, 1)])


def fills(settings: config.Fill, where: FakeNode, recorder: Recorder | None = None) -> fill.Fills:
    return fill.Fills(settings, where, where, where.devices, recorder or Recorder())


def test_a_settled_image_is_copied_once_and_told_when_complete() -> None:
    where, recorder = node(), Recorder()
    where.attach("digest")
    copying = fills(SETTLED, where, recorder)
    where.devices.quiet = 10
    copying.tick()
    assert where.devices.states == {}
    where.devices.quiet = 31
    copying.tick()
    copying.tick()
    assert where.devices.states == {"image:digest": "filling"}
    assert len(where.devices.rates) == 1
    for _ in range(2):
        where.devices.states["image:digest"] = "complete"
        copying.tick()
    assert [event.kind for event in recorder.events()] == ["copy_complete"]


def test_a_device_server_that_lost_its_state_is_told_again() -> None:
    where = node(prefetched=True)
    copying = fills(OFF, where)
    copying.tick()
    assert where.devices.states
    where.devices.states.clear()
    where.devices.attached.clear()
    copying.tick()
    assert where.devices.states == {"image:digest": "filling"}


def test_copies_end_when_they_are_switched_off_and_others_owners_are_let_be() -> None:
    where = node()
    where.devices.states = {"image:digest": "complete", "a mount": "filling"}
    fills(OFF, where).tick()
    assert where.devices.states == {"a mount": "filling"}


def test_the_cap_is_handed_on_and_a_vanishing_image_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    where = node()
    fills(NOW, where).tick()
    assert where.devices.rates == [1000]
    gone = node()
    monkeypatch.setattr(gone, "attach", lambda digest: None)
    fills(NOW, gone).tick()
    assert gone.devices.states == {}


def test_an_image_that_cannot_be_attached_keeps_no_other_from_being_copied(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its origin may be dead for as long as the node lives."""
    where = node()
    where.images.append(dataclasses.replace(where.images[0], block_digest="other"))
    attach = where.attach

    def fail(block_digest: str) -> None:
        if block_digest == "digest":
            raise errors.UnavailableError("its registry is gone")
        attach(block_digest)

    monkeypatch.setattr(where, "attach", fail)
    copying = fills(NOW, where)
    for _ in range(3):
        copying.tick()
    assert where.devices.states == {"image:other": "filling"}
    assert caplog.text.count("its registry is gone") == 1, "said once, not in each round"
    monkeypatch.setattr(where, "attach", attach)
    copying.tick()
    assert where.devices.states == {"image:other": "filling", "image:digest": "filling"}
