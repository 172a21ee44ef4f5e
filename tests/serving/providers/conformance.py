"""What every Provider does, whatever its machines are: a `Platform` is a provider with replicas that live and
die as the test says. Each provider's tests run `checks`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import pytest
import yaml

from serving import endpoint, errors
from serving.endpoint import Endpoint
from serving.replica import Provider, Replica, State
from tests.serving.served import document


class Platform(Protocol):
    """`provider` is fresh; the rest acts on its replicas by name."""

    provider: Provider
    sections: dict[str, object]
    """What its documents need."""

    def again(self) -> Provider:
        """Another provider over the same replicas, as the next server has."""

    def make_ready(self, names: Collection[str]) -> None: ...

    def fail(self, name: str) -> None:
        """End it before it was ever ready."""

    def hold_exits(self) -> None:
        """Replicas that are told to go stay, until `release_exits`."""

    def release_exits(self) -> None: ...


def wanted(platform: Platform, name: str = "one") -> Endpoint:
    text = yaml.safe_dump(document(name, drain={"notice_seconds": 0, "seconds": 60}, **platform.sections))
    return endpoint.load(text, "e")


def names(provider: Provider, *states: State, version: str | None = None) -> list[str]:
    return [
        each.name for each in provider.observe() if each.state in states and version in (None, each.version)
    ]


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, "it did not come about"
        threading.Event().wait(0.01)


def _up(platform: Platform, count: int) -> tuple[str, list[str]]:
    """That many ready replicas of the first version."""
    provider = platform.provider
    version = provider.apply(wanted(platform))
    provider.scale(count)
    until(lambda: len(names(provider, State.STARTING)) == count)
    made = names(provider, State.STARTING)
    platform.make_ready(made)
    until(lambda: len(names(provider, State.READY)) == count)
    return version, made


def scale_is_level_triggered(platform: Platform) -> None:
    version, made = _up(platform, 3)
    assert platform.provider.apply(wanted(platform)) == version
    for _ in range(5):
        platform.provider.scale(3)
        assert names(platform.provider, State.READY) == made
    replicas: Sequence[Replica] = platform.provider.observe()
    assert {each.version for each in replicas} == {version}
    assert all(each.address is not None and each.ready_at is not None for each in replicas)
    assert len({each.address for each in replicas}) == 3


def the_surplus_goes_but_not_who_is_kept(platform: Platform) -> None:
    _, made = _up(platform, 3)
    platform.hold_exits()
    kept = made[-1]
    until(lambda: platform.provider.scale(1, keep=[kept]) or names(platform.provider, State.READY) == [kept])
    assert set(names(platform.provider, State.DRAINING)) == set(made[:-1])
    platform.release_exits()
    until(lambda: [each.name for each in platform.provider.observe()] == [kept])


def who_is_not_ready_goes_first(platform: Platform) -> None:
    _, made = _up(platform, 2)
    platform.provider.scale(3)
    until(lambda: len(names(platform.provider, State.STARTING)) == 1)
    until(
        lambda: platform.provider.scale(2) or {each.name for each in platform.provider.observe()} == set(made)
    )
    assert names(platform.provider, State.READY) == made


def who_is_drained_by_name_leaves_at_once_and_nobody_comes(platform: Platform) -> None:
    version, made = _up(platform, 3)
    platform.hold_exits()
    for _ in range(3):
        platform.provider.drain([made[1]])
    until(lambda: names(platform.provider, State.DRAINING) == [made[1]])
    platform.release_exits()
    until(lambda: [each.name for each in platform.provider.observe()] == [made[0], made[2]])
    platform.provider.scale(3)
    until(lambda: len(names(platform.provider, State.STARTING, version=version)) == 1)


def the_next_server_finds_what_is_there(platform: Platform) -> None:
    version, made = _up(platform, 2)
    second = platform.again()
    assert second.apply(wanted(platform)) == version
    until(lambda: names(second, State.READY) == made)
    second.scale(2)
    assert names(second, State.READY) == made


def a_version_is_removed_and_the_other_stays(platform: Platform) -> None:
    version, made = _up(platform, 2)
    provider = platform.provider
    other = provider.apply(wanted(platform, "two"))
    assert other != version
    provider.scale(1)
    provider.scale(2, version=version)
    until(lambda: len(names(provider, State.STARTING, version=other)) == 1)
    assert names(provider, State.READY) == made
    until(lambda: provider.remove(version) or {each.version for each in provider.observe()} == {other})
    provider.remove(version)


def a_start_that_fails_says_why(platform: Platform) -> None:
    provider = platform.provider
    version = provider.apply(wanted(platform))
    provider.scale(1)
    until(lambda: len(names(provider, State.STARTING)) == 1)
    platform.fail(names(provider, State.STARTING)[0])
    until(lambda: bool(names(provider, State.FAILED, version=version)))
    (failed,) = (each for each in provider.observe() if each.state is State.FAILED)
    assert "last words" in str(failed.reason)
    assert failed.ready_at is None


def nobody_is_asked_for_who_is_not_there(platform: Platform) -> None:
    _up(platform, 1)
    with pytest.raises(errors.NotFoundError, match="no replica is called nobody"):
        platform.provider.logs("nobody", 10)
    platform.provider.drain(["nobody"])
    platform.provider.remove("nothing")


checks = [
    scale_is_level_triggered,
    the_surplus_goes_but_not_who_is_kept,
    who_is_not_ready_goes_first,
    who_is_drained_by_name_leaves_at_once_and_nobody_comes,
    the_next_server_finds_what_is_there,
    a_version_is_removed_and_the_other_stays,
    a_start_that_fails_says_why,
    nobody_is_asked_for_who_is_not_there,
]
