"""A provider without machines: nodes that take drawn times to come, fail at drawn moments, and are refused.

For trying a configuration (`provider: simulated`), for tests of the controller, and as the plainest
implementation of the contract. `World` is the platform: it lives on when a provider is closed, as a cloud
does, and has what a cloud has and `Provider` has not: takers, outages, capacity. Everything drawn comes from
one seed, and time from the clock that was given, so the same calls at the same times give the same machines.
Any thread may hold a World, one at a time.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Collection, Mapping, Sequence

from warmpool import errors, provider
from warmpool.provider import HELD, Machine, Stage


@dataclasses.dataclass(frozen=True, slots=True)
class Nature:
    """How machines of a class come. `provision_seconds` and `boot_seconds` are the least and the most of an
    even draw; `failure_share` is how many never come up."""

    provision_seconds: tuple[float, float] = (15.0, 50.0)
    boot_seconds: tuple[float, float] = (60.0, 180.0)
    failure_share: float = 0.0
    capacity: int | None = None


@dataclasses.dataclass(slots=True)
class _Made:
    """A machine: when it will be what. `taken_at`: handed over."""

    name: str
    node_class: str
    created_at: float
    booting_at: float
    up_at: float
    fails: bool
    admitted: bool = False
    taken_at: float | None = None


class World:
    """See the module. `clock` gives seconds since the epoch. `refused` classes have no capacity; while
    `throttled` or `away` is set every call of a provider fails by it."""

    def __init__(self, natures: Mapping[str, Nature], seed: int, clock: Callable[[], float]) -> None:
        self.refused: set[str] = set()
        self.throttled = False
        self.away = False
        self.clock = clock
        self._natures = dict(natures)
        self._random = random.Random(seed)  # noqa: S311
        self._made: dict[str, _Made] = {}
        self._count = 0

    def machines(self) -> list[Machine]:
        """Everything there is, by name."""
        return [self._seen(each) for _, each in sorted(self._made.items())]

    def make(self, node_class: str) -> None:
        """One machine more. CapacityError."""
        nature = self.nature(node_class)
        present = sum(each.node_class == node_class for each in self._made.values())
        if node_class in self.refused or (nature.capacity is not None and present >= nature.capacity):
            raise errors.CapacityError(f"{node_class}: there is no machine of this class to be had")
        now = self.clock()
        booting_at = now + self._random.uniform(*nature.provision_seconds)
        self._count += 1
        name = f"{node_class}-{self._count}"
        self._made[name] = _Made(
            name,
            node_class,
            now,
            booting_at,
            booting_at + self._random.uniform(*nature.boot_seconds),
            self._random.random() < nature.failure_share,
        )

    def take(self, node_class: str, count: int) -> list[str]:
        """Real work takes machines that are admitted; the names of those it got."""
        ready = [
            each
            for each in self.machines()
            if each.node_class == node_class and each.stage is Stage.UP and each.admitted
        ][:count]
        for each in ready:
            self._made[each.name].taken_at = self.clock()
        return [each.name for each in ready]

    def give_back(self, name: str) -> None:
        """Real work is done with a machine: it is held again."""
        self._made[name].taken_at = None

    def remove(self, name: str) -> None:
        """A machine ends."""
        self._made.pop(name, None)

    def admit(self, name: str) -> None:
        """No gate is before it any longer."""
        self._made[name].admitted = True

    def nature(self, node_class: str) -> Nature:
        """ConfigurationError if there is no such class."""
        if node_class not in self._natures:
            raise errors.ConfigurationError(
                f"classes.{node_class}: the simulated provider was not told of this class"
            )
        return self._natures[node_class]

    def check(self) -> None:
        """Raise what every call is to fail by."""
        if self.away:
            raise errors.UnavailableError("the simulated provider is away")
        if self.throttled:
            raise errors.ThrottledError("the simulated provider was asked too often", 1.0)

    def _seen(self, made: _Made) -> Machine:
        now = self.clock()
        reason = ""
        if made.taken_at is not None:
            stage, since = Stage.HANDED, made.taken_at
        elif now < made.booting_at:
            stage, since = Stage.REQUESTED, made.created_at
        elif made.fails:
            stage, since, reason = Stage.FAILED, made.booting_at, "the machine does not boot"
        elif now < made.up_at:
            stage, since = Stage.BOOTING, made.booting_at
        else:
            stage, since = Stage.UP, made.up_at
        address = made.name if stage in (Stage.UP, Stage.HANDED) else None
        made_at = None if stage is Stage.REQUESTED else made.booting_at
        return Machine(
            made.name, made.node_class, stage, since, made.created_at, made_at, address, made.admitted, reason
        )


class Simulated:
    """`provider.Provider` on a World."""

    def __init__(self, world: World) -> None:
        self._world = world

    def observe(self) -> Sequence[Machine]:
        """See Provider."""
        self._world.check()
        return self._world.machines()

    def hold(self, node_class: str, count: int, release: Collection[str] = ()) -> None:
        """See Provider."""
        self._world.check()
        self._world.nature(node_class)
        held = [
            each for each in self._world.machines() if each.node_class == node_class and each.stage in HELD
        ]
        for each in provider.surplus(held, count, release):
            self._world.remove(each.name)
        for _ in range(count - len(held)):
            self._world.make(node_class)

    def serve(self, node_class: str, count: int) -> None:
        """See Provider."""
        self._world.check()
        self._world.nature(node_class)
        handed = sum(
            each.node_class == node_class and each.stage is Stage.HANDED for each in self._world.machines()
        )
        self._world.take(node_class, max(0, count - handed))

    def admit(self, name: str) -> None:
        """See Provider."""
        self._world.check()
        if name not in {each.name for each in self._world.machines()}:
            raise errors.NotFoundError(f"there is no machine {name}")
        self._world.admit(name)

    def replace(self, name: str) -> None:
        """See Provider."""
        self._world.check()
        for each in self._world.machines():
            if each.name == name and each.stage is not Stage.HANDED:
                self._world.remove(name)

    def close(self) -> None:
        """See Provider."""
