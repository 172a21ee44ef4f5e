"""What an engine's processes tell one another: plain values, kept in the ledger.

Pure, and with nothing but Python's library: the engine's own interpreter imports it.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

from serving.autoscaler import units


class State(enum.IntEnum):
    """What the engine is doing, as its probes say it."""

    STARTING = 0
    READY = 1
    DRAINING = 2
    FAILED = 3
    """Waits for its next start."""
    HUNG = 4
    """Being killed, because it made no progress."""


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """How many requests run at once, how many may wait for that, and how long."""

    in_flight: int
    queue_requests: int
    queue_seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class Counters:
    """Sums since the engine's first start. `rejected` are answered 429, `failed` are answers from 500 on;
    `unit_micros` are millionths of model units, of requests that ended."""

    admitted: int = 0
    rejected: int = 0
    finished: int = 0
    failed: int = 0
    busy_nanoseconds: int = 0
    unit_micros: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """What one server process says of itself. `progress` grows whenever it, or the engine for it, gets on;
    `cache_micros` are the millionths of the engine's KV cache that are in use, as far as it knows."""

    number: int
    pid: int
    in_flight: int
    waiting: int
    heartbeat_ns: int
    progress: int
    cache_micros: int = 0


class Measure(enum.IntEnum):
    """What a tenant's rate counts."""

    TOKENS = 0
    UNITS = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Ration:
    """What a tenant may have of this engine. `per_second` None: as much as there is."""

    per_second: float | None = None
    measure: Measure = Measure.TOKENS
    priority: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Rations:
    """What an engine is told. `coefficients` None: units are not counted."""

    tenants: Mapping[str, Ration] = dataclasses.field(default_factory=dict)
    output_tokens: int | None = None
    coefficients: units.Coefficients | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Spent:
    """A tenant's sums since the engine's first start, in what its rate counts."""

    admitted: int
    charged: float
    refused: int
    refused_cost: float
