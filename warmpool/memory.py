"""The memory of the pools as JSON, and back: what a restarted controller goes on with. Pure.

Written and read by `warmpool.decide.State`. Nothing that comes from a file is believed: every field is
checked for its type, numbers for being finite, and a document of another version is refused, since a
controller can begin anew at any time at the price of forecasting nothing for a day.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

import pydantic

from warmpool import arrivals, demand, errors, leadtime, outlook

VERSION = 1

_Number = pydantic.FiniteFloat
_Sums = tuple[_Number, ...]


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")


class _Rhythm(_Part):
    at: _Number
    rises: _Sums = pydantic.Field(
        min_length=len(arrivals.FADES_SECONDS), max_length=len(arrivals.FADES_SECONDS)
    )
    falls: _Sums = pydantic.Field(
        min_length=len(arrivals.FADES_SECONDS), max_length=len(arrivals.FADES_SECONDS)
    )


class _Learned(_Part):
    seconds: tuple[_Number, ...]
    until: _Number | None


class _Outline(_Part):
    begin: _Number
    step_seconds: _Number = pydantic.Field(gt=0)
    levels: tuple[_Number, ...]


class _Fit(_Part):
    lead_seconds: _Number = pydantic.Field(gt=0)
    window_seconds: _Number = pydantic.Field(gt=0)
    weights: tuple[_Number, ...] = pydantic.Field(min_length=arrivals.FEATURES, max_length=arrivals.FEATURES)
    dispersion: _Number = pydantic.Field(gt=0)
    most: _Number = pydantic.Field(gt=0)


class _Fitted(_Part):
    at: _Number
    model: str
    outline: _Outline
    fit: _Fit | None
    losses: dict[str, _Number]


class _Trust(_Part):
    came: _Number
    expected: _Number
    open_until: _Number
    reason: str


class _Memory(_Part):
    at: tuple[_Number, ...]
    wanted: tuple[int | None, ...]
    rhythm: _Rhythm | None
    learned: _Learned
    fitted: _Fitted | None
    trust: _Trust
    rate: _Number
    surplus_since: _Number | None

    @pydantic.model_validator(mode="after")
    def _path(self) -> _Memory:
        if len(self.at) != len(self.wanted) or any(
            later <= earlier for earlier, later in zip(self.at, self.at[1:], strict=False)
        ):
            raise ValueError("at and wanted are no path: as many of both, times rising")
        if any(each is not None and each < 0 for each in self.wanted):
            raise ValueError("wanted: fewer than no nodes")
        return self


class _Document(_Part):
    version: int
    pools: dict[str, _Memory]


def write(memories: Mapping[str, outlook.Memory]) -> str:
    """All memories as one JSON text."""
    pools = {name: _plain(memory) for name, memory in memories.items()}
    return json.dumps({"version": VERSION, "pools": pools}, separators=(",", ":"))


def _plain(memory: outlook.Memory) -> dict[str, object]:
    plain = dataclasses.asdict(memory)
    record = plain.pop("record")
    if not memory.learned.seconds:
        plain["learned"]["until"] = None
    return {"at": record["at"], "wanted": record["wanted"], **plain}


def read(text: str) -> dict[str, outlook.Memory]:
    """What `write` wrote. InvalidInputError."""
    try:
        document = _Document.model_validate_json(text)
    except pydantic.ValidationError as exc:
        first = exc.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the document"
        raise errors.InvalidInputError(
            f"the kept state of the warm pool is damaged: {place}: {first['msg']}; remove it to begin anew"
        ) from exc
    if document.version != VERSION:
        raise errors.InvalidInputError(
            f"the kept state of the warm pool is of version {document.version}, this program reads "
            f"{VERSION}; remove it to begin anew"
        )
    return {name: _memory(each) for name, each in document.pools.items()}


def _memory(kept: _Memory) -> outlook.Memory:
    rhythm, fitted, until = kept.rhythm, kept.fitted, kept.learned.until
    return outlook.Memory(
        record=demand.Record(kept.at, kept.wanted),
        rhythm=None if rhythm is None else arrivals.Rhythm(rhythm.at, rhythm.rises, rhythm.falls),
        learned=leadtime.Learned() if until is None else leadtime.Learned(kept.learned.seconds, until),
        fitted=None if fitted is None else _fitted(fitted),
        trust=outlook.Trust(**kept.trust.model_dump()),
        rate=kept.rate,
        surplus_since=kept.surplus_since,
    )


def _fitted(kept: _Fitted) -> outlook.Fitted:
    outline, fit = kept.outline, kept.fit
    return outlook.Fitted(
        kept.at,
        kept.model,
        arrivals.Outline(outline.begin, outline.step_seconds, outline.levels),
        None
        if fit is None
        else arrivals.Fit(fit.lead_seconds, fit.window_seconds, fit.weights, fit.dispersion, fit.most),
        kept.losses,
    )
