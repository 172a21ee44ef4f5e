"""What the time of day has brought before: a floor that is there ahead of demand. Pure.

Used by `serving.autoscaler.decide`, in constant time for each decision. The day (UTC) is cut into bins; each
remembers the mean demand at that time, yesterday's most. What the bins of a start from now expect is a floor
under the size: it raises, and never lowers. A bin that was not watched for most of its time learns nothing,
and expects nothing before its first day.

It is held to account, day for day, in replica-seconds: `extra`, that nobody would have asked for without it,
and `saved`, that were needed, would not have been ready without it, and for which it had asked. A day whose
extras are more than what it saved is worth ends the trust in it; it goes on expecting, unheeded, and a day on
which it would have been worth them brings the trust back.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

DAY_SECONDS = 86_400.0
BIN_SECONDS = 300.0
_BINS = round(DAY_SECONDS / BIN_SECONDS)
_UNKNOWN = -1.0
_WATCHED = 0.8
"""Of a bin, for it to learn."""
_NEWEST = 0.5
"""What the latest day counts in a bin."""
_WORTH = 10.0
"""Idle replica-seconds that one is worth which was needed and there. Not any number: chance alone saves some
seconds on any day on which there is more than without it."""
_RECENT = 16
"""Entries that tell what was asked for a start's time ago."""


@dataclasses.dataclass(frozen=True, slots=True)
class Season:
    """`levels`: requests in flight, by bin; the `bin` of now, with what was seen of it so far. `recent`:
    (stamp, size without the forecast, size with it), stamps in seconds scored."""

    levels: tuple[float, ...] = (_UNKNOWN,) * _BINS
    bin: int = 0
    bin_seconds: float = 0.0
    bin_sum: float = 0.0
    trusted: bool = True
    scored_seconds: float = 0.0
    extra_seconds: float = 0.0
    saved_seconds: float = 0.0
    recent: tuple[tuple[float, float, float], ...] = ()

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Season:
        """What `dataclasses.asdict` gave, also by way of JSON text."""
        levels = tuple(float(each) for each in value["levels"])
        if len(levels) != _BINS:
            raise ValueError(f"a season has {_BINS} bins, not {len(levels)}")
        recent = tuple((float(a), float(b), float(c)) for a, b, c in value["recent"])
        return cls(**{**value, "levels": levels, "recent": recent})


def expected(season: Season, now: float, ahead_seconds: float) -> float | None:
    """The most in flight from now until `ahead_seconds` from now; None where no bin knows."""
    first = math.floor(now / BIN_SECONDS)
    last = math.floor((now + min(ahead_seconds, DAY_SECONDS)) / BIN_SECONDS)
    most = season.levels[first % _BINS]
    for each in range(first + 1, min(last, first + _BINS - 1) + 1):
        most = max(most, season.levels[each % _BINS])
    return most if most != _UNKNOWN else None


def learned(season: Season, level: float, seconds: float, now: float) -> Season:
    """With `seconds` of a demand more."""
    index = math.floor(now / BIN_SECONDS) % _BINS
    if index == season.bin:
        return dataclasses.replace(
            season, bin_seconds=season.bin_seconds + seconds, bin_sum=season.bin_sum + level * seconds
        )
    levels = season.levels
    if season.bin_seconds >= _WATCHED * BIN_SECONDS:
        mean, before = season.bin_sum / season.bin_seconds, levels[season.bin]
        value = mean if before == _UNKNOWN else before + _NEWEST * (mean - before)
        levels = (*levels[: season.bin], value, *levels[season.bin + 1 :])
    return dataclasses.replace(season, levels=levels, bin=index, bin_seconds=seconds, bin_sum=level * seconds)


def scored(
    season: Season, needed: float, without: float, floor: float, seconds: float, start_seconds: float
) -> Season:
    """With `seconds` more in its account: replicas `needed` now, what the size would be `without` the
    forecast, and the `floor` that this asks for (0 for none)."""
    stamp, recent, saved = season.scored_seconds + seconds, season.recent, 0.0
    past = 0  # entries that are a start's time old
    while past < len(recent) and recent[past][0] <= stamp - start_seconds:
        past += 1
    if past:
        _, was_without, was_with = recent[past - 1]
        saved = max(0.0, min(needed, was_with) - was_without) * seconds
        recent = recent[past - 1 :]
    if not recent or stamp - recent[-1][0] >= start_seconds / _RECENT:
        recent = (*recent, (stamp, without, max(without, floor)))
    following = dataclasses.replace(
        season,
        scored_seconds=stamp,
        extra_seconds=season.extra_seconds + max(0.0, floor - without) * seconds,
        saved_seconds=season.saved_seconds + saved,
        recent=recent,
    )
    return _judged(following) if stamp >= DAY_SECONDS else following


def _judged(season: Season) -> Season:
    """The account of a day is closed, and another opened."""
    trusted = season.trusted
    if season.extra_seconds or season.saved_seconds:
        trusted = _WORTH * season.saved_seconds >= season.extra_seconds
    return dataclasses.replace(
        season, trusted=trusted, scored_seconds=0.0, extra_seconds=0.0, saved_seconds=0.0, recent=()
    )
