"""The contract of `warmpool.provider`, on every implementation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from tests.fixtures.kubernetes_api import KubernetesApi
from tests.warmpool.providers import nodemaker, simulation
from tests.warmpool.providers.platform import Platform
from warmpool import errors
from warmpool.provider import HELD, Machine, Provider, Stage

# moto knows the errors of any AWS service that its model of Auto Scaling does not list
pytestmark = pytest.mark.filterwarnings("ignore:Exception.*does not match an error shape")


@pytest.fixture(params=["simulated", "kubernetes", "ec2"])
def platform(request: pytest.FixtureRequest) -> Iterator[Platform]:
    if request.param == "simulated":
        yield simulation.SimulatedPlatform()
    elif request.param == "kubernetes":
        with KubernetesApi() as server:
            cluster = nodemaker.Cluster(server)
            yield cluster
            cluster.close()
    else:
        yield request.getfixturevalue("cloud")


def held(provider: Provider, node_class: str = "gpu") -> list[Machine]:
    return [each for each in provider.observe() if each.node_class == node_class and each.stage in HELD]


def stages(provider: Provider, node_class: str = "gpu") -> Counter[Stage]:
    return Counter(each.stage for each in provider.observe() if each.node_class == node_class)


def ready(platform: Platform, provider: Provider, count: int) -> list[Machine]:
    """So many machines, admitted."""
    provider.hold("gpu", count)
    platform.settle()
    for each in held(provider):
        provider.admit(each.name)
    platform.settle()
    return held(provider)


def test_nothing_is_there_until_it_is_asked_for(platform: Platform) -> None:
    assert list(platform.provider().observe()) == []


def test_what_is_asked_for_comes_and_waits_at_the_gate(platform: Platform) -> None:
    provider = platform.provider()
    provider.hold("gpu", 2)
    platform.settle()
    machines = held(provider)
    assert [each.stage for each in machines] == [Stage.UP] * 2
    assert not any(each.admitted for each in machines)
    assert all(each.address and each.made_at is not None for each in machines)
    assert len({each.name for each in machines}) == 2
    assert stages(provider, "big") == {}


def test_hold_may_be_said_again(platform: Platform) -> None:
    provider = platform.provider()
    for _ in range(3):
        provider.hold("gpu", 2)
    platform.settle()
    provider.hold("gpu", 2)
    assert len(held(provider)) == 2


def test_what_was_asked_for_and_has_not_come_is_counted(platform: Platform) -> None:
    provider = platform.provider()
    provider.hold("gpu", 1)
    provider.hold("gpu", 3)
    platform.settle()
    assert len(held(provider)) == 3


def test_surplus_is_released(platform: Platform) -> None:
    provider = platform.provider()
    machines = ready(platform, provider, 3)
    provider.hold("gpu", 1, release=[machines[0].name])
    platform.settle()
    assert len(held(provider)) == 1
    provider.hold("gpu", 0)
    platform.settle()
    assert held(provider) == []


def test_a_successor_finds_everything(platform: Platform) -> None:
    first = platform.provider()
    before = ready(platform, first, 2)
    first.close()
    after = platform.provider()
    assert {each.name for each in held(after)} == {each.name for each in before}
    after.hold("gpu", 2)
    platform.settle()
    assert {each.name for each in held(after)} == {each.name for each in before}


def test_work_gets_only_what_is_admitted(platform: Platform) -> None:
    provider = platform.provider()
    provider.hold("gpu", 2)
    platform.settle()
    first = held(provider)[0]
    provider.admit(first.name)
    provider.admit(first.name)  # said twice
    platform.settle()
    platform.work("gpu", 1)
    handed = [each for each in provider.observe() if each.stage is Stage.HANDED]
    assert [each.name for each in handed] == [first.name]
    assert len(held(provider)) == 1


def test_serve_hands_over_and_never_takes_back(platform: Platform) -> None:
    provider = platform.provider()
    ready(platform, provider, 2)
    provider.serve("gpu", 1)
    platform.work("gpu", 1)  # where takers take by themselves
    assert stages(provider)[Stage.HANDED] == 1
    provider.serve("gpu", 0)
    provider.hold("gpu", 0)
    platform.settle()
    assert stages(provider)[Stage.HANDED] == 1
    assert held(provider) == []


def test_what_was_handed_over_is_asked_for_again(platform: Platform) -> None:
    provider = platform.provider()
    ready(platform, provider, 2)
    platform.work("gpu", 2)
    provider.hold("gpu", 1)
    platform.settle()
    assert stages(provider)[Stage.HANDED] == 2
    assert len(held(provider)) == 1


def test_work_that_is_done_gives_its_machine_back(platform: Platform) -> None:
    provider = platform.provider()
    ready(platform, provider, 1)
    platform.work("gpu", 1)
    (machine,) = provider.observe()
    platform.finish(machine.name)
    provider.hold("gpu", 1)
    platform.finish(machine.name)  # nothing is left of it; the platform catches up
    assert [each.name for each in held(provider)] == [machine.name]


def test_replaced_is_gone_and_asked_for_again(platform: Platform) -> None:
    provider = platform.provider()
    gone, kept = ready(platform, provider, 2)
    provider.replace(gone.name)
    provider.replace(gone.name)
    platform.settle()
    provider.hold("gpu", 2)
    platform.settle()
    names = {each.name for each in held(provider)}
    assert kept.name in names
    assert gone.name not in names
    assert len(names) == 2


def test_what_works_is_not_replaced(platform: Platform) -> None:
    provider = platform.provider()
    ready(platform, provider, 1)
    platform.work("gpu", 1)
    (machine,) = [each for each in provider.observe() if each.stage is Stage.HANDED]
    provider.replace(machine.name)
    platform.settle()
    assert machine.name in [each.name for each in provider.observe() if each.stage is Stage.HANDED]


def test_no_capacity_is_told_and_passes(platform: Platform) -> None:
    provider = platform.provider()
    platform.refuse("gpu")

    def told() -> bool:
        try:
            provider.hold("gpu", 1)
        except errors.CapacityError:
            return True
        platform.settle()
        return any(each.stage is Stage.FAILED and each.reason for each in provider.observe())

    assert any(told() for _ in range(3))
    provider.hold("big", 1)  # another class is not touched by it
    platform.accept("gpu")
    for each in provider.observe():
        if each.stage is Stage.FAILED:
            provider.replace(each.name)
    platform.settle()
    provider.hold("gpu", 1)
    platform.settle()
    assert [each.stage for each in held(provider)] == [Stage.UP]
    assert [each.stage for each in held(provider, "big")] == [Stage.UP]


def test_throttling_is_told_apart_and_nothing_is_lost(platform: Platform) -> None:
    provider = platform.provider()
    ready(platform, provider, 1)
    with platform.throttled(), pytest.raises(errors.ThrottledError):
        provider.observe()
    with platform.throttled(), pytest.raises(errors.ThrottledError):
        provider.hold("gpu", 2)
    provider.hold("gpu", 2)
    platform.settle()
    assert len(held(provider)) == 2


def test_a_platform_that_is_away_is_unavailable(platform: Platform) -> None:
    provider = platform.provider()
    ready(platform, provider, 1)
    with platform.away():
        with pytest.raises(errors.UnavailableError):
            provider.observe()
        with pytest.raises(errors.UnavailableError):
            provider.hold("gpu", 0)
    assert len(held(provider)) == 1


def test_an_unknown_class_is_the_settings_fault(platform: Platform) -> None:
    provider = platform.provider()
    with pytest.raises(errors.ConfigurationError, match="nosuch"):
        provider.hold("nosuch", 1)
    with pytest.raises(errors.ConfigurationError, match="nosuch"):
        provider.serve("nosuch", 1)


def test_a_machine_that_is_not_there_cannot_be_admitted(platform: Platform) -> None:
    with pytest.raises(errors.NotFoundError):
        platform.provider().admit("nosuch")
