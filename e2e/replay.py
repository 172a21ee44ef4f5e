"""A start replayed on a model of the link, driven by the real fetch plan: what order and size of requests
cost, whatever else the machine does.

    python -m e2e.replay --trace FILE --rate 1gbit --rtt-seconds 0.0005 REF...

The reads of a trace (`glowplug trace`, with as little read-ahead as there is) follow one another, each after
the pause that it had in the trace, shortened or stretched to `--think-seconds` in all; each REF is the same
image in one shape. Bytes on their way share the rate equally; a request's first byte comes one round trip
after it. What the model leaves out: processor time, TCP, a registry's own time, readers beside one another.
So it says which of two ways is the better one, and not how long a start takes. No I/O but reading the inputs.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from glowplug.startup.speed import Speed, parse_rate
from imagefs import blockmap, framemask, image, plan, platforms, reference, trace
from imagefs.origin import connect
from imagefs.plan import Priority

_NEVER = float("inf")
_LEAST_BYTES = 1e-6


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """Of one replay."""

    seconds: float
    moved_bytes: float
    requests: int
    misses: int
    waited_seconds: float

    def __str__(self) -> str:
        return (
            f"{self.seconds:7.2f} s, of which {self.waited_seconds:6.2f} s waited for {self.misses} misses; "
            f"{self.moved_bytes / 1e6:6.1f} MB in {self.requests} requests"
        )


Key = tuple[str, int]
Frame = tuple[int, int, int]
"""Block, frame, compressed bytes."""


@dataclasses.dataclass(slots=True, eq=False)
class _Flow:
    """One fetch: the requests that it is still to make, and the one that it waits for."""

    fetch: plan.Fetch
    requests: list[list[Frame]]
    coming: list[Frame] = dataclasses.field(default_factory=list)
    begins_at: float = 0.0
    left_bytes: float = 0.0
    came: dict[int, int] = dataclasses.field(default_factory=dict)


class Replay:
    """One start of one shape."""

    def __init__(self, maps: Sequence[blockmap.BlockMap], speed: Speed, policy: plan.Policy) -> None:
        self._maps = maps
        self._rate = speed.bits_per_second / 8
        self._rtt_seconds = speed.rtt_seconds
        self._plan: plan.Plan[Key] = plan.Plan(policy)
        for number, block_map in enumerate(maps):
            self._plan.add_layer(str(number), "origin", block_map)
        self._here: dict[Key, int] = {}
        self._flows: list[_Flow] = []
        self._waiting: set[Key] = set()
        self._now = 0.0
        self._moved_bytes = 0.0
        self._requests = 0

    def run(self, reads: Sequence[trace.Read], think_seconds: float) -> Outcome:
        """All of the reads, one after another."""
        stretch = think_seconds / max(1, reads[-1].microseconds - reads[0].microseconds)
        before, waited, misses = reads[0].microseconds, 0.0, 0
        for read in reads:
            self._advance(self._now + (read.microseconds - before) * stretch, lambda: False)
            before = read.microseconds
            self._demand(read)
            if self._waiting:
                began, misses = self._now, misses + 1
                self._advance(_NEVER, lambda: not self._waiting)
                waited += self._now - began
        return Outcome(self._now, self._moved_bytes, self._requests, misses, waited)

    def _demand(self, read: trace.Read) -> None:
        block_map, layer = self._maps[read.layer], str(read.layer)
        offset, end = read.offset, read.offset + read.length
        while offset < end:
            index, start = divmod(offset, block_map.block_bytes)
            count = min(block_map.block_bytes - start, end - offset)
            offset += count
            block = block_map.blocks[index]
            if block.zero:
                continue
            needed = framemask.WHOLE
            if block.frames:
                needed = framemask.touched(start, count, block_map.frame_bytes)
            here = self._here.get((layer, index))
            if here is None or not framemask.covers(here, needed):
                # As the fetcher does: the block first, then what is worth reading ahead.
                self._plan.want(
                    layer, index, Priority.DEMAND, self._now, (layer, index), self._now + 1e6, needed
                )
                self._waiting.add((layer, index))
            for ahead in self._plan.demanded(layer, index, needed):
                if (layer, ahead) not in self._here and not block_map.blocks[ahead].zero:
                    self._plan.want(layer, ahead, Priority.READ_AHEAD, self._now)

    # -- the link ----------------------------------------------------------------------------------

    def _advance(self, until: float, done: Callable[[], bool]) -> None:
        while True:
            self._start_requests()
            if done() or self._now >= until:
                return
            moving = [flow for flow in self._flows if flow.coming and flow.begins_at <= self._now]
            moments = [until, *(f.begins_at for f in self._flows if f.coming and f.begins_at > self._now)]
            share = self._rate / max(1, len(moving))
            moments += [self._now + flow.left_bytes / share for flow in moving]
            then = min(moments)
            assert then < _NEVER, "somebody waits, and nothing is on its way"
            for flow in moving:
                flow.left_bytes -= (then - self._now) * share
                self._moved_bytes += (then - self._now) * share
            self._now = then
            for flow in moving:
                if flow.left_bytes <= _LEAST_BYTES:
                    self._frame_came(flow)

    def _start_requests(self) -> None:
        while (fetch := self._plan.next_fetch(self._now)) is not None:
            self._flows.append(_Flow(fetch, self._requests_of(fetch)))
        for flow in self._flows:
            if not flow.coming and not self._plan.gives_way(flow.fetch):
                flow.coming = flow.requests.pop(0)
                flow.begins_at = self._now + self._rtt_seconds
                flow.left_bytes = flow.coming[0][2]
                self._requests += 1

    def _requests_of(self, fetch: plan.Fetch) -> list[list[Frame]]:
        """As carrier.py makes them."""
        rows = []
        for index in fetch.indices:
            block = self._maps[int(fetch.layer)].blocks[index]
            sizes = [frame.compressed_bytes for frame in block.frames] or [block.compressed_bytes]
            rows += [(index, number, size) for number, size in enumerate(sizes)]
        first = fetch.first_frame
        return [part for part in (rows[first:], rows[:first]) if part]

    def _frame_came(self, flow: _Flow) -> None:
        index, number, _ = flow.coming.pop(0)
        layer = flow.fetch.layer
        came = flow.came[index] = flow.came.get(index, 0) | 1 << number
        if came.bit_count() == max(1, len(self._maps[int(layer)].blocks[index].frames)):
            self._here[layer, index] = framemask.WHOLE
            answer, _ = self._plan.arrived(layer, index)
            self._waiting.difference_update(answer.waiters)
        else:
            self._here[layer, index] = came
            self._waiting.difference_update(self._plan.frames_arrived(layer, index, came, self._now))
        if flow.coming:
            flow.left_bytes = flow.coming[0][2]
        elif not flow.requests:
            self._plan.finished(flow.fetch)
            self._flows.remove(flow)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--rate", type=parse_rate, default=10**9)
    parser.add_argument("--rtt-seconds", type=float, default=0.0005)
    parser.add_argument("--think-seconds", type=float, default=1.4)
    parser.add_argument("images", nargs="+", metavar="REF")
    options = parser.parse_args()
    recorded = trace.decode(options.trace.read_bytes())
    diff_ids: tuple[bytes, ...] | None = None
    for text in options.images:
        ref = reference.parse(text)
        opened = image.open_image(ref, platform=platforms.host(), options=connect.Options(plain_http=True))
        maps = [layer.block_map for layer in opened.layers]
        found = tuple(block_map.diff_id for block_map in maps)
        diff_ids = diff_ids or found
        assert found == diff_ids, f"{text} is not the image of the others"
        replay = Replay(maps, Speed(options.rate, options.rtt_seconds), plan.Policy())
        print(f"{text}: {replay.run(recorded.reads, options.think_seconds)}", flush=True)


if __name__ == "__main__":
    main()
