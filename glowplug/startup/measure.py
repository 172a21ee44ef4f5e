"""Starts of one image, of every kind that was asked for, in turns over one link.

Called by `glowplug bench startup` and `e2e/`, on the main thread, since programs are started that die with
it. Needs root. Everything that is made here is gone afterwards, also after an interrupt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from glowplug.startup import containerd, contestants, link, machine, registry, result, scratch, timeline
from glowplug.startup.speed import Speed
from imagefs import errors

_PROGRAMS = ("docker-registry", "ip", "nsenter", "skopeo", "tc", "umount")


@dataclasses.dataclass(frozen=True, slots=True)
class Rival:
    """A containerd to measure against, beside the one in PATH; tuned, if it can be."""

    binaries: containerd.Binaries
    label: str


def rival_label(binaries: containerd.Binaries) -> str:
    """What the table calls a containerd that nobody named."""
    return f"{binaries.name}{', tuned' if binaries.options else ''}"


def check(modes: Sequence[str]) -> None:
    """Raise ConfigurationError, before anything is made, when this machine cannot measure these modes."""
    if os.geteuid() != 0:
        raise errors.ConfigurationError("bench startup needs root, for network namespaces and mounts")
    pulls = {result.CONTAINERD, result.TUNED, result.LOCAL} & set(modes)
    machine.need((*_PROGRAMS, "containerd", "ctr", "runc") if pulls else _PROGRAMS)


def measure(
    workload: scratch.Workload,
    prepared: scratch.Scratch,
    modes: Sequence[str],
    rivals: Sequence[Rival],
    speed: Speed,
    runs: int,
    folder: Path,
    say: Callable[[str], None],
) -> result.Measurement:
    """All modes `runs` times, in turns; who goes first changes from round to round. What is made lies below
    `folder`, of which the path must be short: sockets lie in it."""
    with machine.closing_whole() as stack:
        over = stack.enter_context(link.open_link(speed))
        server = stack.enter_context(registry.serve(over, folder, prepared.storage))
        racing = [
            stack.enter_context(entry)
            for entry in _entries(workload, prepared, modes, rivals, server, folder, say)
        ]
        starts: list[list[result.Start]] = [[] for _ in racing]
        for number in range(runs):
            for turn in range(len(racing)):
                place = (number + turn) % len(racing)
                start = _start(racing[place], server)
                starts[place].append(start)
                label = racing[place].label
                say(f"{speed}, run {number + 1} of {runs}: {label}: {start.ready_seconds:.2f} s")
    return result.Measurement(
        image=workload.name,
        command=workload.command,
        until=str(workload.until),
        speed=speed,
        machine=machine.facts(),
        source_bytes=prepared.source_bytes,
        unpacked_bytes=prepared.unpacked_bytes,
        layers=prepared.layers,
        series=tuple(
            result.Series(each.mode, each.label, tuple(own)) for each, own in zip(racing, starts, strict=True)
        ),
    )


def _start(contestant: contestants.Contestant, server: registry.Registry) -> result.Start:
    machine.drop_page_cache()
    clock = timeline.Clock(server.link.received_bytes, server.requests)
    with clock.sampled():
        return contestant.start(clock)


def _entries(
    workload: scratch.Workload,
    prepared: scratch.Scratch,
    modes: Sequence[str],
    rivals: Sequence[Rival],
    server: registry.Registry,
    folder: Path,
    say: Callable[[str], None],
) -> Iterator[contextlib.AbstractContextManager[contestants.Contestant]]:
    """What takes part, in the order of result.MODES."""
    if result.CONTAINERD in modes:
        binaries = containerd.installed()
        place = folder / "pull"
        yield contestants.pulled(binaries, binaries.name, server, place, prepared, workload, tuned=False)
    if result.TUNED in modes:
        for number, rival in enumerate(rivals):
            place = folder / f"pull-{number}"
            yield contestants.pulled(
                rival.binaries, rival.label, server, place, prepared, workload, tuned=True
            )
    for mode in result.LAZY:
        if mode in modes:
            yield contestants.lazily(mode, server, folder / mode, prepared, workload, say)
    if result.LOCAL in modes:
        yield contestants.unpacked(containerd.installed(), server, folder / "local", prepared, workload)
