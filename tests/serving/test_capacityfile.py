"""A machine's capacity between the endpoints that are served on it: the file, the claims, and one served."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving import capacityfile, errors
from serving.capacityfile import Share
from tests.serving import served

_SPAWN = multiprocessing.get_context("spawn")


class Machine:
    """Endpoints by name, on one clock."""

    def __init__(self, directory: Path, text: str) -> None:
        self.now = 1_000.0
        self.directory = directory
        self.write(text)
        self._shares: dict[str, Share] = {}

    def write(self, text: str) -> None:
        (self.directory / capacityfile.FILE).write_text(text)

    def turn(self, name: str, wants: int, holds: int, seconds: float = 1.0) -> int | None:
        self.now += seconds
        (self.directory / name).mkdir(exist_ok=True)
        share = self._shares.setdefault(name, Share(self.directory, name, lambda: self.now))
        return share.turn(wants, holds)

    def leave(self, name: str) -> None:
        self._shares.pop(name).leave()


def test_without_the_file_nothing_is_bounded(tmp_path: Path) -> None:
    assert Share(tmp_path, "chat").turn(7, 0) is None
    assert list(tmp_path.iterdir()) == []


def test_a_guaranteed_endpoint_gets_its_places_back(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "places: 4\nnotice_seconds: 10\nendpoints: {chat: {guaranteed: 3}}\n")
    assert machine.turn("batch", 9, 0) == 4
    assert machine.turn("chat", 3, 0) == 0
    assert machine.turn("batch", 9, 4) == 4  # has notice now
    assert machine.turn("batch", 9, 4, seconds=11) == 3
    assert machine.turn("chat", 3, 0) == 0  # the replica still drains
    assert machine.turn("batch", 9, 3) == 2
    assert machine.turn("chat", 3, 0) == 1
    assert machine.turn("batch", 9, 2) == 1
    assert machine.turn("batch", 9, 1) == 1
    assert machine.turn("chat", 3, 1) == 3
    machine.leave("chat")
    assert machine.turn("batch", 9, 1) == 4


def test_what_was_granted_is_nobody_elses_before_it_is_used(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "places: 4\n")
    assert machine.turn("a", 4, 0) == 4
    assert machine.turn("b", 4, 0) == 0


def test_a_killed_server_keeps_its_claim_and_a_deleted_endpoint_none(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "places: 4\n")
    machine.turn("a", 2, 2)
    assert machine.turn("b", 4, 0, seconds=1_000) == 2
    (tmp_path / "a").rmdir()
    assert machine.turn("b", 4, 2) == 4


@pytest.mark.parametrize("bad", ["places: -1", "places: [", "place: 4", "[]", "endpoints: {}", "\x00"])
def test_a_file_that_is_none_is_said_and_a_good_one_outlives_it(tmp_path: Path, bad: str) -> None:
    with pytest.raises(errors.DocumentError, match="places"):
        Machine(tmp_path, bad).turn("a", 1, 0)
    machine = Machine(tmp_path, "places: 2\n")
    assert machine.turn("a", 9, 0) == 2
    machine.write(bad)
    assert machine.turn("a", 9, 2) == 2


def test_claims_that_were_torn_are_made_anew(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "places: 2\n")
    (tmp_path / "capacity.json").write_text('{"a": {"wants": -1')
    assert machine.turn("a", 9, 0) == 2


def _race(directory: Path, name: str, granted: multiprocessing.Queue[int]) -> None:
    share = Share(directory, name)
    granted.put(share.turn(10, 0) or 0)


def test_servers_that_ask_at_once_are_not_given_the_same_places(tmp_path: Path) -> None:
    Machine(tmp_path, "places: 10\n")
    granted: multiprocessing.Queue[int] = _SPAWN.Queue()
    names = ["a", "b", "c"]
    for name in names:
        (tmp_path / name).mkdir()
    processes = [_SPAWN.Process(target=_race, args=(tmp_path, name, granted)) for name in names]
    for each in processes:
        each.start()
    assert sum(granted.get(timeout=60) for _ in names) == 10
    for each in processes:
        each.join()


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gp") as short:
        yield Path(short)


def test_an_endpoint_has_no_more_than_the_machine_gives(directory: Path) -> None:
    (directory / "s").mkdir()
    (directory / "s" / capacityfile.FILE).write_text("places: 1\n")
    with served.serving(directory, served.document(replicas=2)) as endpoint:
        endpoint.until_ready(1)
        (directory / "s" / capacityfile.FILE).write_text("places: 5\n")
        endpoint.until_ready(2)
