"""Which blocks and frames an image that nobody traced should have: the part `blocks` of bench.py.

The same image in every shape, started cold by blocks alone; every shape in every round, each round beginning
with the next one. What `blockmap.DEFAULT_FRAME_BYTES` comes from.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence

from e2e import workloads
from glowplug.startup import lazy, machine, registry, timeline
from glowplug.until import Until

_KIB, _MIB = 1 << 10, 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """How an image is cut."""

    block_bytes: int
    frame_bytes: int

    def __str__(self) -> str:
        if self.frame_bytes == self.block_bytes:
            return f"blocks of {self.block_bytes // _KIB} KiB"
        return f"blocks of {self.block_bytes // _KIB} KiB in frames of {self.frame_bytes // _KIB} KiB"


SHAPES = (
    *(Shape(size, size) for size in (256 * _KIB, _MIB, 4 * _MIB)),
    *(Shape(4 * _MIB, size) for size in (128 * _KIB, 256 * _KIB, 512 * _KIB, _MIB)),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """One cold start of one shape. `misses` are blocks that a reader waited for; `waited_seconds` is how long
    that took for all of them together, `filled_seconds` until they were there, whole."""

    shape: Shape
    ready_seconds: float
    moved_bytes: int
    requests: int
    misses: int
    waited_seconds: float
    filled_seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """One workload, started again and again."""

    glowplug: lazy.Glowplug
    registry: registry.Registry
    workload: workloads.Workload

    def convert(self, shape: Shape) -> int:
        """Make the image in that shape; the bytes of its blobs."""
        image = self.registry.push(self.workload.source, self._name(shape))
        sizes = ["--block-size", str(shape.block_bytes), "--frame-size", str(shape.frame_bytes)]
        self.glowplug.convert(image, *sizes)
        facts = self.glowplug.inspect(image)
        assert facts is not None
        return sum(int(layer["compressed_bytes"]) for layer in facts["layers"])

    def rounds(self, shapes: Sequence[Shape], runs: int) -> Iterator[Measured]:
        """Each shape once a round."""
        for number in range(runs):
            at = number % len(shapes)
            for shape in [*shapes[at:], *shapes[:at]]:
                self.glowplug.forget()
                yield self._start(shape)

    def _name(self, shape: Shape) -> str:
        return f"shape-{shape.block_bytes}-{shape.frame_bytes}/{self.workload.name}:{workloads.TAG}"

    def _start(self, shape: Shape) -> Measured:
        machine.drop_page_cache()
        image = f"{self.registry.far_host}/{self._name(shape)}"
        clock = timeline.Clock(self.glowplug.link.received_bytes, self.registry.requests)
        events = self.glowplug.start(image, self.workload.command, (), self._until(), clock)
        start = clock.start()
        waited = [each for each in events if each["priority"] == "demand" and each["outcome"] == "origin"]
        return Measured(
            shape,
            start.ready_seconds,
            start.moved_bytes,
            start.requests,
            len(waited),
            sum(each["served_ns"] - each["wanted_ns"] for each in waited) / 1e9,
            sum(each["arrived_ns"] - each["wanted_ns"] for each in waited) / 1e9,
        )

    def _until(self) -> Until:
        if self.workload.url:
            return Until(address=self.workload.url)
        return Until(log=re.compile(rf"^{workloads.READY}\b".encode()))
