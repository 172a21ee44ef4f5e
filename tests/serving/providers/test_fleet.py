"""The fleet: replicas by their records, with a launcher whose replicas live and die as the test says."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from serving import endpoint, errors
from serving.endpoint import Endpoint
from serving.providers import backoff, fleet
from serving.providers.record import Record, Shelf
from serving.replica import State
from tests.serving.served import document
from tests.serving.shortpaths import short_directory


class Launcher:
    """Starts nothing. `dead` says who has ended, and why."""

    def __init__(self) -> None:
        self.said: dict[str, list[str]] = collections.defaultdict(list)
        self.dead: dict[str, str] = {}
        self.refusal: str | None = None

    def check(self, wanted: Endpoint) -> None:
        pass

    def start(self, record: Record, wanted: Endpoint, folder: Path, known: Callable[[str], None]) -> None:
        if self.refusal is not None:
            raise errors.ConfigurationError(self.refusal)
        self.said[record.name].append("start")
        (folder / "log").write_text('{"time": 1, "event": "x"}\nlast words\x1b[31m\n')
        known("handle")

    def ended(self, record: Record) -> str | None:
        return self.dead.get(record.name)

    def stop(self, record: Record) -> None:
        self.said[record.name].append("stop")

    def kill(self, record: Record) -> None:
        self.said[record.name].append("kill")
        self.dead.setdefault(record.name, "killed")

    def close(self) -> None:
        pass


class World:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.launcher = Launcher()
        self.now = 1_000.0
        self.fleet = self.again()
        wanted = document(drain={"notice_seconds": 1, "seconds": 10})
        self.version = self.fleet.apply(endpoint.load(yaml.safe_dump(wanted), "e"))

    def again(self) -> fleet.Fleet:
        """A fleet as another server process finds it."""
        return fleet.Fleet(self.directory, self.launcher, clock=lambda: self.now)

    def names(self, state: State) -> list[str]:
        return [each.name for each in self.fleet.observe() if each.state is state]


@pytest.fixture
def world() -> Iterator[World]:
    with short_directory() as directory:
        made = World(directory)
        yield made
        made.fleet.close()


def test_scale_is_said_again_without_harm(world: World) -> None:
    for _ in range(3):
        world.fleet.scale(3)
    assert len(world.names(State.STARTING)) == 3


def test_the_surplus_drains_and_those_to_keep_stay(world: World) -> None:
    world.fleet.scale(3)
    kept = world.names(State.STARTING)[-1]
    world.fleet.scale(1, keep=[kept])
    assert world.names(State.STARTING) == [kept]
    assert len(world.names(State.DRAINING)) == 2


def test_a_replica_is_told_after_the_notice_and_killed_after_the_drain(world: World) -> None:
    world.fleet.scale(1)
    (name,) = world.names(State.STARTING)
    world.fleet.drain([name])
    world.now += 0.9
    assert world.names(State.DRAINING) == [name]
    assert world.launcher.said[name] == ["start"]
    world.now += 0.2
    world.fleet.observe()
    world.fleet.observe()
    assert world.launcher.said[name] == ["start", "stop"]
    world.now += 10
    world.fleet.observe()
    assert world.launcher.said[name] == ["start", "stop", "kill"]
    world.fleet.observe()
    assert world.fleet.observe() == []


def test_another_server_goes_on_where_this_one_was_killed(world: World) -> None:
    world.fleet.scale(2)
    drained = world.names(State.STARTING)[0]
    world.fleet.drain([drained])
    world.fleet = world.again()
    world.fleet.apply(endpoint.load(yaml.safe_dump(document()), "e"))
    assert world.names(State.DRAINING) == [drained]
    world.fleet.scale(1, version=world.version)
    assert len(world.fleet.observe()) == 2


def test_a_failed_replica_says_its_last_words_and_is_replaced_later(world: World) -> None:
    world.fleet.scale(1)
    (name,) = world.names(State.STARTING)
    world.launcher.dead[name] = "ended with code 7"
    (failed,) = world.fleet.observe()
    assert failed.state is State.FAILED
    assert failed.reason == "ended with code 7\n  last words[31m", (
        "nothing that a terminal would obey, no events"
    )
    world.fleet.scale(1)
    assert world.names(State.STARTING) == []
    world.now += 1.1
    world.fleet.scale(1)
    assert len(world.names(State.STARTING)) == 1
    world.now += 1_000
    assert name not in [each.name for each in world.fleet.observe()], "failures are not shown for ever"


def test_a_start_that_is_refused_is_a_failed_replica(world: World) -> None:
    world.launcher.refusal = "no room"
    world.fleet.scale(1)
    (failed,) = world.fleet.observe()
    assert (failed.state, failed.reason) == (State.FAILED, "no room")


def test_a_replica_that_is_not_ready_in_time_has_failed(world: World) -> None:
    world.fleet.scale(1)
    (name,) = world.names(State.STARTING)
    world.now += 301
    (failed,) = world.fleet.observe()
    assert failed.state is State.FAILED
    assert "engine.start_timeout_seconds" in str(failed.reason)
    assert "kill" in world.launcher.said[name]


def test_remove_forgets_a_version(world: World) -> None:
    world.fleet.scale(1)
    (name,) = world.names(State.STARTING)
    world.fleet.remove(world.version)
    world.launcher.dead[name] = "ended"
    world.fleet.observe()
    world.fleet.remove(world.version)
    assert world.fleet.observe() == []
    assert list((world.directory / "versions").iterdir()) == []


def test_logs_of_nobody(world: World) -> None:
    with pytest.raises(errors.NotFoundError, match="no replica is called x"):
        world.fleet.logs("x", 10)


_TIMES = st.none() | st.floats(0, 1_000)
_RECORDS = st.lists(
    st.builds(
        Record,
        name=st.just("r"),
        version=st.just("v"),
        address=st.just(("127.0.0.1", 1)),
        created_at=st.floats(0, 1_000),
        ready_at=_TIMES,
        failed_at=_TIMES,
    ),
    max_size=12,
)


@given(_RECORDS)
def test_the_pause_is_bounded_and_begins_with_a_failure(records: list[Record]) -> None:
    due = backoff.next_start(records)
    failures = [each.failed_at for each in records if each.failed_at is not None]
    assert due == 0.0 or due <= max(failures) + backoff.MOST_SECONDS
    alive = [each for each in records if each.failed_at is None and each.ready_at is not None]
    if alive and all(
        each.ready_at >= max(failures, default=0.0) for each in alive if each.ready_at is not None
    ):
        assert due == 0.0, "who is ready since the last failure ends the pause"


def test_pauses_double() -> None:
    def failed(at: float) -> Record:
        return Record("r", "v", ("127.0.0.1", 1), 0.0, failed_at=at)

    waits = [backoff.next_start([failed(100.0)] * count) - 100.0 for count in range(1, 9)]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]


@given(
    st.binary(max_size=200)
    | st.builds(lambda value: json.dumps(value).encode(), st.dictionaries(st.text(), st.integers()))
)
def test_a_record_that_is_none_is_removed(data: bytes) -> None:
    with short_directory() as directory:
        shelf = Shelf(directory / "replicas")
        good = Record("good", "v", ("127.0.0.1", 1), 0.0)
        shelf.write(good)
        (directory / "replicas" / "bad").mkdir()
        (directory / "replicas" / "bad" / "record.json").write_bytes(data)
        assert shelf.read() == {"good": good}
        assert not (directory / "replicas" / "bad").exists()
