"""What came of one round of a pool: made by the controller, shown by `view`. Pure values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from warmpool.backoff import Waits
from warmpool.lifecycle import Roster
from warmpool.observation import Decision, Observation
from warmpool.orders import Order
from warmpool.warmth import Wanted


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, for people. `at` is seconds since the epoch."""

    at: float
    node_class: str
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """One round. `leading`: whether it acted. `given` are its orders, `failed` those of them that failed and
    why; `trouble` is what else went wrong: a place, and what."""

    at: float
    leading: bool
    holder: str
    observation: Observation | None
    decision: Decision | None
    roster: Roster
    waits: Waits
    given: tuple[Order, ...]
    failed: Mapping[Order, str]
    trouble: Mapping[str, str]
    images: Mapping[str, Sequence[Wanted]]
    lacking: Mapping[str, Sequence[str]]
