"""The simulator as a platform."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tests.warmpool.providers.platform import CLASSES
from warmpool.provider import Provider, Stage
from warmpool.providers.simulated import Nature, Simulated, World


class SimulatedPlatform:
    def __init__(self) -> None:
        self.now = 1_000_000.0
        self.world = World({name: Nature() for name in CLASSES}, seed=7, clock=lambda: self.now)

    def provider(self) -> Provider:
        return Simulated(self.world)

    def settle(self) -> None:
        self.now += 3_600.0

    def work(self, node_class: str, count: int) -> None:
        handed = sum(
            each.stage is Stage.HANDED and each.node_class == node_class for each in self.world.machines()
        )
        self.world.take(node_class, count - handed)

    def finish(self, name: str) -> None:
        self.world.give_back(name)

    def refuse(self, node_class: str) -> None:
        self.world.refused.add(node_class)

    def accept(self, node_class: str) -> None:
        self.world.refused.discard(node_class)

    @contextlib.contextmanager
    def throttled(self) -> Iterator[None]:
        self.world.throttled = True
        yield
        self.world.throttled = False

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        self.world.away = True
        yield
        self.world.away = False
