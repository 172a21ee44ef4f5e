"""A controller on the simulated provider, with agents that a test fills, and a clock that a test moves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from warmpool import document
from warmpool.controller import Controller
from warmpool.provider import Machine
from warmpool.providers.simulated import Nature, Simulated, World
from warmpool.report import Report
from warmpool.settings import Settings
from warmpool.warmth import Cached, Reading, Task, Verb

SIZE_BYTES = 1 << 30
TEXT = """
name: test
provider:
  kind: simulated
  classes: {gpu: {}, big: {}}
demand: {kind: file, path: none}
backoff: {first_seconds: 20, most_seconds: 160}
adopt_seconds: 600
policy:
  classes:
    gpu: {floor: 2, cap: 8}
    big: {floor: 0, cap: 8}
"""
WARMTH = """
warmth:
  agents: {token_file: none}
  images: [{image: "base:v1"}]
  stale_after_seconds: 120
  warm_within_seconds: 900
  recycle_after_seconds: 86400
"""


class Demand:
    """What a test says is wanted; None is a gap."""

    def __init__(self) -> None:
        self.now: dict[str, int | None] = {"gpu": 0, "big": 0}
        self.images: dict[str, dict[str, float]] = {}
        self.trouble: Mapping[str, str] = {}

    def wanted(self) -> Mapping[str, int | None]:
        return dict(self.now)

    def chances(self) -> Mapping[str, Mapping[str, float]]:
        return self.images

    def close(self) -> None: ...


class Agents:
    """An agent on every node: what it is asked to fetch is there at once, but where the test says not."""

    def __init__(self) -> None:
        self.cached: dict[str, dict[str, Cached]] = {}
        self.silent: set[str] = set()
        self.slow = False
        self.done: list[tuple[str, Task]] = []

    def read(
        self, nodes: Mapping[str, str | None], images: Mapping[str, Sequence[str]]
    ) -> Mapping[str, Reading]:
        return {
            name: Reading(error="no route to it")
            if name in self.silent
            else Reading({image: self.cached.get(name, {}).get(image) for image in images[name]})
            for name in nodes
        }

    def do(self, nodes: Mapping[str, str | None], tasks: Mapping[str, Sequence[Task]]) -> Mapping[str, str]:
        for name, several in tasks.items():
            for task in several:
                self.done.append((name, task))
                self._do(name, task)
        return {}

    def _do(self, name: str, task: Task) -> None:
        mine = self.cached.setdefault(name, {})
        old = mine.get(task.image, Cached(0, SIZE_BYTES, False, False, False))
        if task.verb is Verb.UNPIN:
            mine.pop(task.image, None)
        elif task.verb is Verb.PIN:
            mine[task.image] = dataclasses.replace(old, pinned=True)
        else:
            present = 0 if self.slow else SIZE_BYTES
            mine[task.image] = dataclasses.replace(
                old, prefetched=True, present_bytes=present, complete=not self.slow
            )


class Memory:
    """A store."""

    def __init__(self) -> None:
        self.data: bytes | None = None
        self.error: Exception | None = None

    def read(self) -> bytes | None:
        if self.error is not None:
            raise self.error
        return self.data

    def write(self, data: bytes) -> None:
        if self.error is not None:
            raise self.error
        self.data = data


class Election:
    """One that a test decides. `after`: how many questions are answered with yes before it is lost."""

    def __init__(self) -> None:
        self.after: int | None = None
        self.held = True

    def start(self) -> None: ...

    def holds(self) -> bool:
        if self.after is not None:
            if self.after == 0:
                return False
            self.after -= 1
        return self.held

    def holder(self) -> str:
        return "test"

    def stop(self) -> None: ...


class Pool:
    """All of it. `restart` gives another controller, with what is stored and nothing else."""

    def __init__(self, text: str = TEXT, *, with_agents: bool = False, **changes: Any) -> None:
        self.now = 1_000_000.0
        self.settings: Settings = document.parse(text, "pool.yaml").model_copy(update=changes)
        nature = Nature(provision_seconds=(20.0, 20.0), boot_seconds=(60.0, 60.0))
        self.world = World({"gpu": nature, "big": nature}, seed=3, clock=lambda: self.now)
        self.provider = Simulated(self.world)
        self.demand = Demand()
        self.agents = Agents() if with_agents else None
        self.store = Memory()
        self.election = Election()
        self.controller = self._made()

    def restart(self) -> None:
        self.controller = self._made()

    def step(self, seconds: float = 15.0) -> Report:
        self.now += seconds
        return self.controller.step()

    def steps(self, count: int, seconds: float = 15.0) -> Report:
        report = self.step(seconds)
        for _ in range(count - 1):
            report = self.step(seconds)
        return report

    def machines(self, node_class: str = "gpu") -> list[Machine]:
        return [each for each in self.world.machines() if each.node_class == node_class]

    def names(self, node_class: str = "gpu") -> set[str]:
        return {each.name for each in self.machines(node_class)}

    def _made(self) -> Controller:
        return Controller(
            self.settings,
            self.provider,
            self.demand,
            self.agents,
            self.store,
            self.election,
            clock=lambda: self.now,
            draw=lambda: 0.5,
        )
