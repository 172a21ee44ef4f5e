"""Traces: what starts read, recorded as ranges of layer images, and the order that several of them agree on.

Pure: bytes in, values out. `glowplug trace` and the agent write traces, converter/pack.py reads them. The
form is docs/format.md ("Trace"). A trace says where was read and when, nothing of what was there.

The order of `merge` is that of first reads. For one trace: exactly the order in which its pages were first
read. For several: pages go by the median of their places in those traces that read them (a place is the
number of distinct pages read before, as a share of all pages of that trace; of two middle ones the lower),
then by the first trace that has them. Pages that lie together and that every trace reads in one go stay
together.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

from imagefs import artifact, blockmap, bootpack, errors, reference
from imagefs.bootpack import PAGE_BYTES, Record

VERSION = 2
_FIRST_VERSION = 1
MAX_TRACE_BYTES = 64 * 1024 * 1024
MAX_READS = 1 << 20
_PLACE_UNITS = 1 << 32
"""Places are whole numbers of 1/2^32, so that the order is the same on every machine."""


@dataclasses.dataclass(frozen=True, slots=True)
class Read:
    """One read of a layer image, `microseconds` after the trace began."""

    layer: int
    offset: int
    length: int
    microseconds: int


@dataclasses.dataclass(frozen=True, slots=True)
class Trace:
    """A recorded start. `map_digests` are the layers of the block image, bottom first, as `layer` of the
    reads counts them; `command` is what was run, empty where that is unknown."""

    source_digest: str
    block_image_digest: str
    map_digests: tuple[str, ...]
    command: tuple[str, ...]
    reads: tuple[Read, ...]
    read_ahead_kib: int


def encode(trace: Trace) -> bytes:
    """A trace as JSON lines: the header, then a line for each read."""
    header = {
        "version": VERSION,
        "source": trace.source_digest,
        "block_image": trace.block_image_digest,
        "layers": list(trace.map_digests),
        "command": list(trace.command),
        "read_ahead_kib": trace.read_ahead_kib,
    }
    lines = [artifact.canonical_json(header)]
    lines += (f"[{r.layer},{r.offset},{r.length},{r.microseconds}]".encode() for r in trace.reads)
    return b"\n".join(lines) + b"\n"


def decode(data: bytes) -> Trace:
    """Parse a trace. Raises InvalidInputError naming the line and the field."""
    if len(data) > MAX_TRACE_BYTES:
        raise errors.InvalidInputError(f"trace: {len(data)} bytes, limit {MAX_TRACE_BYTES}")
    lines = data.split(b"\n", MAX_READS + 2)
    if lines[-1]:
        raise errors.InvalidInputError(f"trace: its end is cut off, or it has more than {MAX_READS} reads")
    header = artifact.parse_json_object(lines[0], "trace: line 1")
    read_ahead_kib = _read_ahead(header)
    map_digests = tuple(_digest(each, "layers") for each in _list(header, "layers"))
    if not 0 < len(map_digests) <= artifact.MAX_LAYERS:
        raise errors.InvalidInputError(
            f"trace: {len(map_digests)} layers, expected 1 to {artifact.MAX_LAYERS}"
        )
    command = _list(header, "command")
    if not all(isinstance(word, str) for word in command):
        raise errors.InvalidInputError("trace: command is not a list of strings")
    return Trace(
        source_digest=_digest(header.get("source"), "source"),
        block_image_digest=_digest(header.get("block_image"), "block_image"),
        map_digests=map_digests,
        command=tuple(command),
        reads=tuple(
            _read(line, number, len(map_digests)) for number, line in enumerate(lines[1:-1], start=2)
        ),
        read_ahead_kib=read_ahead_kib,
    )


def _read_ahead(header: dict[str, Any]) -> int:
    version = header.get("version")
    if version == _FIRST_VERSION:
        return bootpack.FIRST_READ_AHEAD_KIB
    if version != VERSION:
        raise errors.InvalidInputError(
            f"trace: version {version!r}, this build reads versions {_FIRST_VERSION} and {VERSION}"
        )
    value = header.get("read_ahead_kib")
    if type(value) is not int or not bootpack.is_read_ahead(value):
        raise errors.InvalidInputError(f"trace: read_ahead_kib: {value!r} is no read-ahead")
    return value


def _list(header: dict[str, Any], name: str) -> list[Any]:
    value = header.get(name)
    if not isinstance(value, list):
        raise errors.InvalidInputError(f"trace: {name} is not a list")
    return value


def _digest(value: object, name: str) -> str:
    if not isinstance(value, str) or not reference.DIGEST.match(value):
        raise errors.InvalidInputError(f"trace: {name}: {value!r} is not a sha256 digest")
    return value


def _read(line: bytes, number: int, layers: int) -> Read:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise errors.InvalidInputError(f"trace: line {number}: not JSON: {exc}") from exc
    if not isinstance(values, list) or len(values) != 4 or not all(type(each) is int for each in values):
        raise errors.InvalidInputError(f"trace: line {number}: not [layer, offset, length, microseconds]")
    layer, offset, length, microseconds = values
    if not 0 <= layer < layers:
        raise errors.InvalidInputError(f"trace: line {number}: layer {layer} of {layers}")
    if offset < 0 or length <= 0 or offset + length > blockmap.MAX_IMAGE_BYTES:
        raise errors.InvalidInputError(f"trace: line {number}: bytes {offset}+{length} are no range")
    if not 0 <= microseconds < 1 << 63:
        raise errors.InvalidInputError(f"trace: line {number}: {microseconds} microseconds")
    return Read(layer, offset, length, microseconds)


def read_ahead(traces: Sequence[Trace]) -> int:
    """The read-ahead, in KiB, that all of these traces were made with: what a pack of them is for. Raises
    InvalidInputError where they differ: pages that the kernel read ahead in one start would be missed, or
    carried for nothing, in the next."""
    counts = collections.Counter(trace.read_ahead_kib for trace in traces)
    if len(counts) != 1:
        found = ", ".join(f"{count} with {kib} KiB" for kib, count in sorted(counts.items()))
        raise errors.InvalidInputError(
            f"traces made with different read-ahead do not merge ({found}): pack those of one (--read-ahead)"
        )
    return next(iter(counts))


def merge(traces: Sequence[Trace]) -> list[Record]:
    """What these traces read: their pages, each once, in the order that the module states.

    A record's `layer` counts in `bootpack.distinct(map_digests)`. Raises InvalidInputError for traces of
    different layers or read-ahead, and for no reads at all.
    """
    layers = {bootpack.distinct(trace.map_digests) for trace in traces}
    if len(layers) != 1:
        raise errors.InvalidInputError(
            f"{len(traces)} traces of {len(layers)} different images: only traces of the same layers merge"
        )
    read_ahead(traces)
    starts = [_first_reads(trace) for trace in traces]
    if not any(starts):
        raise errors.InvalidInputError("the traces hold no reads: there is nothing to pack")
    places: dict[Record, list[tuple[int, int, int]]] = {}
    cuts = _cuts(starts)
    for number, start in enumerate(starts):
        total = sum(record.pages for record in start)
        position = 0
        for record in start:
            for piece in _split(record, cuts[record.layer]):
                share = position * _PLACE_UNITS // total
                places.setdefault(piece, []).append((share, number, position))
                position += piece.pages
    return _joined(sorted(places, key=lambda piece: _rank(places[piece])))


def _rank(places: list[tuple[int, int, int]]) -> tuple[int, int, int]:
    shares = sorted(share for share, _, _ in places)
    _, trace, position = places[0]
    return shares[(len(shares) - 1) // 2], trace, position


def _first_reads(trace: Trace) -> list[Record]:
    """The pages of a trace in the order of their first reads, each once."""
    numbers = {digest: number for number, digest in enumerate(bootpack.distinct(trace.map_digests))}
    seen = [_Seen() for _ in numbers]
    out = []
    for read in sorted(trace.reads, key=lambda read: read.microseconds):
        layer = numbers[trace.map_digests[read.layer]]
        end = -(-(read.offset + read.length) // PAGE_BYTES)
        for first, stop in seen[layer].add(read.offset // PAGE_BYTES, end):
            out.append(Record(layer, first, stop - first))
    return out


class _Seen:
    """Pages seen so far, as disjoint ranges in order, none touching the next."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> list[tuple[int, int]]:
        """Add a range; returns the parts of it that are new."""
        low = bisect.bisect_left(self._ends, start)
        high = bisect.bisect_right(self._starts, end)
        edges = [
            start,
            *itertools.chain(*zip(self._starts[low:high], self._ends[low:high], strict=True)),
            end,
        ]
        gaps = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]
        self._starts[low:high] = [min([start, *self._starts[low:high]])]
        self._ends[low:high] = [max([end, *self._ends[low:high]])]
        return gaps


def _cuts(starts: Sequence[Sequence[Record]]) -> dict[int, list[int]]:
    """For each layer the pages, ascending, at which any of the records begins or ends."""
    found: dict[int, set[int]] = {}
    for record in itertools.chain(*starts):
        found.setdefault(record.layer, set()).update((record.first_page, record.first_page + record.pages))
    return {layer: sorted(pages) for layer, pages in found.items()}


def _split(record: Record, cuts: list[int]) -> Iterator[Record]:
    low = bisect.bisect_left(cuts, record.first_page)
    high = bisect.bisect_left(cuts, record.first_page + record.pages)
    for start, end in itertools.pairwise(cuts[low : high + 1]):
        yield Record(record.layer, start, end - start)


def _joined(records: Sequence[Record]) -> list[Record]:
    """The same pages in the same order, with neighbours in both made one record."""
    out: list[Record] = []
    for record in records:
        last = out[-1] if out else None
        if last and last.layer == record.layer and last.first_page + last.pages == record.first_page:
            out[-1] = Record(last.layer, last.first_page, last.pages + record.pages)
        else:
            out.append(record)
    return out
