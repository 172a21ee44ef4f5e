"""What the kernel should read ahead while an image starts: the part `readahead` of bench.py.

Every value in every round, each round beginning with the next one: with boot packs of traces made with less
and more, and by blocks alone. What the constants of imagefs/kernelreadahead.py come from.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from e2e import workloads
from glowplug.startup import lazy, machine, registry, timeline
from glowplug.startup.result import Start
from glowplug.until import Until

PACKS_KIB = (32, 64, 128)
BLOCKS_KIB = (128, 256, 512, 2048)

_STARTER = (
    "import sys; from imagefs import kernelreadahead;"
    "kernelreadahead.START_READ_AHEAD_KIB = int(sys.argv.pop(1));"
    "from glowplug import cli; sys.argv[0] = 'glowplug'; cli.main()"
)
"""The command, with another value of the constant: this is the process that mounts."""


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """One value to try. `image` is the reference in the registry."""

    name: str
    image: str
    glowplug: lazy.Glowplug


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """One round of one variant: until ready, with an empty block cache, then with what that has left.
    `misses` are reads of the cold start that waited for a block which no pack was bringing."""

    variant: str
    cold_seconds: float
    warm_seconds: float
    moved_bytes: int
    misses: int


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """One workload, started again and again."""

    glowplug: lazy.Glowplug
    registry: registry.Registry
    workload: workloads.Workload

    def variants(self) -> dict[Variant, int]:
        """All of them, their images made; with the bytes of their packs, 0 for those without."""
        found = {}
        for kib in PACKS_KIB:
            image = self._push(f"packed-{kib}")
            packed = self.glowplug.pack(image, self.workload.command, (), self._until(), kib)
            found[Variant(f"pack, {kib} KiB", image, self.glowplug)] = int(packed["data_bytes"])
        image = self._push("blocks")
        for kib in BLOCKS_KIB:
            starter = (sys.executable, "-c", _STARTER, str(kib))
            changed = dataclasses.replace(self.glowplug, starter=starter)
            found[Variant(f"blocks, {kib} KiB", image, changed)] = 0
        return found

    def rounds(self, variants: Sequence[Variant], runs: int) -> Iterator[Measured]:
        """Each variant once a round."""
        for number in range(runs):
            at = number % len(variants)
            for variant in [*variants[at:], *variants[:at]]:
                variant.glowplug.forget()
                cold, events = self._start(variant)
                warm, _ = self._start(variant)
                waited = [
                    each for each in events if each["priority"] == "demand" and each["outcome"] != "cache"
                ]
                misses = sum(each["reason"] != "boot" for each in waited)
                seconds = cold.ready_seconds, warm.ready_seconds
                yield Measured(variant.name, *seconds, cold.moved_bytes, misses)

    def _push(self, name: str) -> str:
        image = self.registry.push(self.workload.source, f"{name}/{self.workload.name}:{workloads.TAG}")
        self.glowplug.convert(image)
        return image

    def _start(self, variant: Variant) -> tuple[Start, list[dict[str, Any]]]:
        machine.drop_page_cache()
        clock = timeline.Clock(variant.glowplug.link.received_bytes, self.registry.requests)
        events = variant.glowplug.start(variant.image, self.workload.command, (), self._until(), clock)
        return clock.start(), events

    def _until(self) -> Until:
        if self.workload.url:
            return Until(address=self.workload.url)
        return Until(log=re.compile(rf"^{workloads.READY}\b".encode()))
