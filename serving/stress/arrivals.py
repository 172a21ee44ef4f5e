"""When which request is sent: by a Poisson process, or as in a trace of real traffic. Pure.

Open loop: the schedule does not wait for answers, as clients of a public endpoint wait for nobody.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

from serving import errors

MAX_TRACE_BYTES = 64 << 20
_MAX_TOKENS = 10_000_000
_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclasses.dataclass(frozen=True, slots=True)
class Tokens:
    """The size of one request: tokens in the prompt, tokens to generate."""

    prompt: int
    output: int


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    """One request: seconds since the step began, and its size."""

    at_seconds: float
    tokens: Tokens


@dataclasses.dataclass(frozen=True, slots=True)
class Trace:
    """Traffic as it was: seconds between requests, and their sizes, in order. Its own rate does not matter:
    it is replayed faster or slower, so that the pattern of its bursts stays."""

    gaps_seconds: tuple[float, ...]
    tokens: tuple[Tokens, ...]

    @property
    def per_second(self) -> float:
        """Its mean rate."""
        return len(self.gaps_seconds) / sum(self.gaps_seconds)


def poisson(per_second: float, seconds: float, tokens: Tokens, uniform: Callable[[], float]) -> list[Arrival]:
    """Arrivals of a Poisson process; `uniform` gives numbers from 0 to below 1."""
    found, at = [], 0.0
    while (at := at - math.log(1.0 - uniform()) / per_second) < seconds:
        found.append(Arrival(at, tokens))
    return found


class Replay:
    """A trace, taken up where the last step left it, from the beginning again at its end."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._rest: Iterator[tuple[float, Tokens]] = itertools.cycle(
            zip(trace.gaps_seconds, trace.tokens, strict=True)
        )

    def step(self, per_second: float, seconds: float) -> list[Arrival]:
        """The next `seconds` at a mean rate, the trace's gaps stretched or shrunk."""
        stretch = self._trace.per_second / per_second
        found, at = [], 0.0
        for gap, tokens in self._rest:
            at += gap * stretch
            if at >= seconds:
                break
            found.append(Arrival(at, tokens))
        return found


def parse_trace(data: bytes, where: str) -> Trace:
    """A CSV with the columns TIMESTAMP (ISO 8601), ContextTokens and GeneratedTokens, in order of time.
    DocumentError naming the line."""
    try:
        rows = list(csv.reader(io.StringIO(data.decode()), strict=True))
    except (UnicodeDecodeError, csv.Error) as exc:
        raise errors.DocumentError(f"{where}: not a CSV file: {exc}") from exc
    if not rows or [name for name in _COLUMNS if name not in rows[0]]:
        raise errors.DocumentError(f"{where}: its first line must name the columns {', '.join(_COLUMNS)}")
    places = [rows[0].index(name) for name in _COLUMNS]
    moments, tokens = [], []
    for number, row in enumerate(rows[1:], 2):
        try:
            moment, prompt, output = (row[place] for place in places)
            moments.append(_seconds(moment))
            tokens.append(Tokens(_count(prompt), _count(output)))
        except (ValueError, IndexError, OverflowError) as exc:
            raise errors.DocumentError(f"{where}: line {number}: {exc}") from exc
    return _trace(moments, tokens, where)


def _trace(moments: Sequence[float], tokens: Sequence[Tokens], where: str) -> Trace:
    gaps = [later - earlier for earlier, later in itertools.pairwise(moments)]
    backwards = next((number for number, gap in enumerate(gaps, 3) if gap < 0), None)
    if backwards is not None:
        raise errors.DocumentError(f"{where}: line {backwards}: earlier than the line before; sort by time")
    if not sum(gaps) > 0:
        raise errors.DocumentError(f"{where}: fewer than two moments; a rate needs some time")
    return Trace(tuple(gaps), tuple(tokens[1:]))


def _seconds(text: str) -> float:
    moment = datetime.datetime.fromisoformat(text.strip())
    return moment.replace(tzinfo=moment.tzinfo or datetime.UTC).timestamp()


def _count(text: str) -> int:
    count = int(text)
    if not 0 <= count <= _MAX_TOKENS:
        raise ValueError(f"{count} tokens are not between 0 and {_MAX_TOKENS}")
    return count
