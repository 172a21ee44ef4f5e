"""The kinds of start that are measured against each other: each is set up once, and started in turns.

Each is a context of its own, with directories, daemon and cache of its own, so that no start finds what
another has left. Called by `measure`; needs root.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from glowplug.startup import containerd, lazy, registry, result, timeline
from glowplug.startup.result import Fetch, Start
from glowplug.startup.scratch import Scratch, Workload

_REASONS = {
    "demand": "a read waited for it",
    "boot": "in the boot pack",
    "read_ahead": "read ahead",
    "fill": "filled in the background",
}


class Contestant(Protocol):
    """One kind of start."""

    @property
    def mode(self) -> str:
        """Which of result.MODES."""

    @property
    def label(self) -> str:
        """What the table calls it."""

    def start(self, clock: timeline.Clock) -> Start:
        """Start once, and undo what would make the next start of this kind another one."""


@dataclasses.dataclass(frozen=True, slots=True)
class Pulled:
    """Pull, unpack, run; then all of it is forgotten."""

    mode: str
    label: str
    daemon: containerd.Containerd
    image: str
    workload: Workload

    def start(self, clock: timeline.Clock) -> Start:
        """Everything that the image was is gone afterwards."""
        self.daemon.pull(self.image)
        clock.mark(result.MOUNTED)
        self.daemon.run(
            self.image, self.workload.command, self.workload.environment, self.workload.until, clock
        )
        self.daemon.forget(self.image)
        return clock.start()


@dataclasses.dataclass(frozen=True, slots=True)
class Unpacked:
    """Run what was pulled and unpacked before."""

    mode: str
    label: str
    daemon: containerd.Containerd
    image: str
    workload: Workload

    def start(self, clock: timeline.Clock) -> Start:
        """The image stays."""
        self.daemon.run(
            self.image, self.workload.command, self.workload.environment, self.workload.until, clock
        )
        return clock.start()


@dataclasses.dataclass(frozen=True, slots=True)
class Lazy:
    """`glowplug run`; the block cache is emptied afterwards, unless the next start is to find it full."""

    mode: str
    label: str
    glowplug: lazy.Glowplug
    image: str
    workload: Workload
    layers: Sequence[result.Layer]

    def start(self, clock: timeline.Clock) -> Start:
        """With what the device server knows of its fetches."""
        work = self.workload
        events = self.glowplug.start(self.image, work.command, work.environment, work.until, clock)
        if self.mode not in (result.WARM, result.WHOLE):
            self.glowplug.forget()
        start = clock.start()
        waits = sum(_waited(event) for event in events) if events else None
        return dataclasses.replace(start, fetches=_fetches(events, start, self.layers), waits=waits)


def _waited(event: dict[str, Any]) -> bool:
    """Whether a read had to wait for a block that was not on its way in a boot pack."""
    missed = event["priority"] == "demand" and event["outcome"] != "cache"
    return bool(missed and event["reason"] != "boot")


def _fetches(
    events: Sequence[dict[str, Any]], start: Start, layers: Sequence[result.Layer]
) -> tuple[Fetch, ...]:
    """What came from the origin, in seconds since the start."""
    numbers = {layer.digest: number for number, layer in enumerate(layers)}

    def since(moment_ns: int) -> float:
        return (moment_ns - start.began_ns) / 1e9

    return tuple(
        Fetch(
            layer=numbers[event["map_digest"]],
            block=event["block"],
            demand=event["reason"] == "demand",
            reason=_REASONS.get(event["reason"], event["reason"]),
            compressed_bytes=event["compressed_bytes"],
            wanted_seconds=since(event["wanted_ns"]),
            started_seconds=since(event["started_ns"]),
            arrived_seconds=since(event["arrived_ns"]),
        )
        for event in events
        if event["outcome"] == "origin" and event["map_digest"] in numbers
    )


@contextlib.contextmanager
def pulled(
    binaries: containerd.Binaries,
    label: str,
    server: registry.Registry,
    folder: Path,
    scratch: Scratch,
    workload: Workload,
    *,
    tuned: bool,
) -> Iterator[Contestant]:
    """A containerd, as it comes or tuned."""
    with containerd.serve(binaries, server.link, folder, tuned=tuned) as daemon:
        mode = result.TUNED if tuned else result.CONTAINERD
        yield Pulled(mode, label, daemon, f"{server.far_host}/{scratch.given}", workload)


@contextlib.contextmanager
def unpacked(
    binaries: containerd.Binaries,
    server: registry.Registry,
    folder: Path,
    scratch: Scratch,
    workload: Workload,
) -> Iterator[Contestant]:
    """A containerd that has the image already."""
    with containerd.serve(binaries, server.link, folder, tuned=False) as daemon:
        image = f"{server.host}/{scratch.given}"
        daemon.pull(image, near=True)
        yield Unpacked(
            result.LOCAL, f"containerd {binaries.version}, unpacked before", daemon, image, workload
        )


@contextlib.contextmanager
def lazily(
    mode: str,
    server: registry.Registry,
    folder: Path,
    scratch: Scratch,
    workload: Workload,
    say: Callable[[str], None],
) -> Iterator[Contestant]:
    """`glowplug run`: by blocks alone, with a boot pack, from a block cache that has what it needs, or from
    layers that are all here, each in a file of its own."""
    label = {
        result.BLOCKS: "glowplug, by blocks",
        result.PACK: "glowplug, boot pack",
        result.WARM: "glowplug, warm block cache",
        result.WHOLE: "glowplug, whole layers",
    }[mode]
    name = scratch.pack if mode == result.PACK else scratch.blocks
    with lazy.use(server.link, folder) as glowplug:
        if mode == result.WARM:
            _fill(glowplug, server, name, workload)
        elif mode == result.WHOLE:
            say("reading all of it, so that its layers get files of their own")
            _make_whole(glowplug, f"{server.host}/{name}")
        image = f"{server.far_host}/{name}"
        yield Lazy(mode, label, glowplug, image, workload, scratch.layers)


def _fill(glowplug: lazy.Glowplug, server: registry.Registry, name: str, workload: Workload) -> None:
    """One start from the registry's own side, so that the cache has what a start reads."""
    clock = timeline.Clock(server.link.received_bytes, server.requests)
    image = f"{server.host}/{name}"
    glowplug.start(image, workload.command, workload.environment, workload.until, clock, near=True)


def _make_whole(glowplug: lazy.Glowplug, image: str) -> None:
    """All of it read from the registry's own side, so that the cache has the image, and its layers' files."""
    facts = glowplug.inspect(image)
    assert facts is not None
    digests = {layer["map_digest"] for layer in facts["layers"]}
    total_bytes = sum(layer["image_bytes"] for layer in facts["layers"])
    root = glowplug.folder / "whole"
    with glowplug.mounted(image, root, near=True):
        lazy.read_all(root)
        lazy.await_layer_files(glowplug.folder / "cache", len(digests), total_bytes)
