"""The state of a simulated endpoint: arrays that the compiled functions change in place.

Owned by one `run`. A replica is a row, from when it is created until it is gone; rows are used again. A
request at a replica is a record in the row's heap of those being served, or in its ring of those that wait.

Service is processor sharing with a speed that depends on how many share it: each of n requests being served
gets on by `speed[n]` seconds of work a second. Virtual time of a replica is the work that each of them got so
far; a request is finished when it has passed the virtual time at its start plus its work, so that one number
for each replica moves all its requests. A fixed number of slots is the speed 1 for every n.

Compiled functions take the arrays that they need, not the `Fleet`: taking an array out of a tuple counts
references, which cost more than the event (3.0 us a request against 0.5).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from serving.autoscaler.profiles import Profile

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Records = npt.NDArray[np.void]

ABSENT, STARTING, READY, DRAINING = 0, 1, 2, 3

BUCKETS = 160
BUCKETS_PER_DOUBLING = 8
SHORTEST_SECONDS = 0.001
TABLE_SIZE = 16_381
"""Of maglev's table: a prime, well above a hundred times the replicas that are compared with it."""

_WHOLE = np.dtype(
    [
        # Requests, totals.
        ("arrived", "i8"),
        ("finished", "i8"),
        ("late", "i8"),
        ("rejected", "i8"),
        ("lost", "i8"),
        ("waited", "i8"),
        ("issued", "i8"),
        ("wait_seconds", "f8"),
        # Sizes.
        ("ready", "i8"),
        ("events", "i8"),
        ("held", "i8"),
        ("held_head", "i8"),
        ("load", "f8"),
        # Settings.
        ("limit", "i8"),
        ("queue_limit", "i8"),
        ("hold_limit", "i8"),
        ("hold_seconds", "f8"),
        ("late_factor", "f8"),
        ("late_seconds", "f8"),
        ("routing", "i8"),
        ("by_work", "i8"),
        ("balance", "f8"),
        # What routing remembers.
        ("cursor", "i8"),
        ("table_stale", "i8"),
        ("random", "u8"),
    ]
)
_REPLICA = np.dtype(
    [
        ("state", "i8"),
        ("created_at", "f8"),
        ("ready_at", "f8"),
        ("fails_at", "f8"),
        ("virtual", "f8"),  # seconds of work that each request served there got so far
        ("touched_at", "f8"),  # when `virtual` was brought up to date
        ("load", "f8"),  # what routing compares: requests, or their work
        ("serving", "i8"),
        ("waiting", "i8"),
        ("wait_head", "i8"),
        ("event_place", "i8"),
        ("ready_place", "i8"),
        ("done", "i8"),  # since the last sample
        ("done_seconds", "f8"),  # their times in flight
    ]
)
_EVENT = np.dtype([("due_at", "f8"), ("row", "i8")])  # when something happens at a row next
_SERVED = np.dtype([("ends_at", "f8"), ("came_at", "f8"), ("work", "f8")])
_WAITING = np.dtype([("came_at", "f8"), ("work", "f8")])
_HELD = np.dtype([("came_at", "f8"), ("work", "f8"), ("key", "i8")])


class Fleet(NamedTuple):
    """See the module. Lengths: R rows, S places for requests being served, Q for those that wait, H held."""

    whole: Records  # [1]
    rows: Records  # [R]
    served: Records  # [R, S] heaps by `ends_at`, a virtual time
    waiting: Records  # [R, Q] rings
    held: Records  # [H] ring
    speed: Floats  # [S + 1]
    events: Records  # [R] heap by `due_at`
    ready: Integers  # [R] the rows that get traffic
    histogram: Integers  # [BUCKETS] of times in flight
    table: Integers  # [TABLE_SIZE] maglev's


@dataclasses.dataclass(frozen=True, slots=True)
class Rules:
    """How the endpoint treats requests. `limit` are served at once by each replica, `queue_limit` wait there;
    `hold_limit` are held for at most `hold_seconds` while no replica is ready. Late is who takes longer than
    `late_factor` times its work plus `late_seconds`. `routing` is one of `routing.NAMES`; `balance` bounds
    maglev's load; `by_work` has routing compare work, not requests."""

    limit: int
    queue_limit: int
    hold_limit: int = 10_000
    hold_seconds: float = 30.0
    late_factor: float = 2.0
    late_seconds: float = 1.0
    routing: int = 0
    by_work: bool = False
    balance: float = 1.25


def empty(rows: int, speed: Floats, rules: Rules, seed: int) -> Fleet:
    """Nothing there yet. `speed[n]` as the module says, for n up to the largest limit that will be set."""
    whole = np.zeros(1, _WHOLE)
    for field in dataclasses.fields(rules):
        whole[field.name] = getattr(rules, field.name)
    whole["table_stale"] = 1
    whole["random"] = np.uint64(seed * 2 + 1)  # xorshift must not begin with 0
    return Fleet(
        whole=whole,
        rows=np.zeros(rows, _REPLICA),
        served=np.zeros((rows, len(speed) - 1), _SERVED),
        waiting=np.zeros((rows, max(1, rules.queue_limit)), _WAITING),
        held=np.zeros(max(1, rules.hold_limit), _HELD),
        speed=speed.astype(np.float64),
        events=np.zeros(rows, _EVENT),
        ready=np.zeros(rows, np.int64),
        histogram=np.zeros(BUCKETS, np.int64),
        table=np.zeros(TABLE_SIZE, np.int64),
    )


def speeds(profile: Profile, most: int) -> Floats:
    """A service profile as speeds of 0 to `most` at once: work is the seconds that a request takes alone."""
    alone = profile.latency(1.0)
    return np.array([0.0, *(alone / profile.latency(float(n)) for n in range(1, most + 1))])


def bucket_seconds() -> Floats:
    """The upper edges of the histogram's buckets."""
    edges: Floats = SHORTEST_SECONDS * 2.0 ** (np.arange(1, BUCKETS + 1) / BUCKETS_PER_DOUBLING)
    return edges
