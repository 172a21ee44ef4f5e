"""From what a provider and the agents say of machines to the nodes that `decide` sees. Pure.

Called by the controller at each look. What a provider cannot say is remembered here: when a machine was first
in its state, when it became warm, when its agent was last heard; `Record`s are kept over a restart, so that
nothing looks younger than it is.

* A machine is WARM when its agent says so; one that stands by (stopped with a warm disk) is, since it was
admitted.
* It is FAILED when the provider says so, when its agent has not been heard for too long, or when it does not
become
  warm in time. A controller that was away itself has heard nobody and made nothing warm: both times begin
  anew after a pause, and for a machine that is seen for the first time.
* A node past its time is left out of what `decide` sees, so that a successor is asked for; it goes when its
class
  has as many warm nodes without it as there should be (`retire`), and is to be had until then. One at a time.
* A node that was warm at the last look and is handed over at this one is a hit; one that is handed over
otherwise is
  a miss. Machines that are handed over when a controller first looks are neither.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from warmpool import errors
from warmpool.observation import Node, NodeState
from warmpool.provider import Machine, Stage
from warmpool.settings import Warmth
from warmpool.warmth import Reading, Verdict


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """What is remembered of a machine. Times are seconds since the epoch. `tended_at`: since when somebody
    has been there without a pause to have it made warm."""

    node_class: str
    state: NodeState
    since: float
    up_at: float | None = None
    warm_at: float | None = None
    heard_at: float | None = None
    tended_at: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Tally:
    """Nodes handed over, by class, since this pool began."""

    hits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    misses: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Roster:
    """All machines of one look. `at` is when; `nodes` by class is what `decide` sees, `ageing` by class the
    node past its time that is left out there."""

    at: float = 0.0
    records: Mapping[str, Record] = dataclasses.field(default_factory=dict)
    nodes: Mapping[str, tuple[Node, ...]] = dataclasses.field(default_factory=dict)
    ageing: Mapping[str, Node] = dataclasses.field(default_factory=dict)
    tally: Tally = Tally()


_STATES = {
    Stage.REQUESTED: NodeState.REQUESTED,
    Stage.BOOTING: NodeState.BOOTING,
    Stage.HANDED: NodeState.HANDED,
    Stage.LEAVING: NodeState.LEAVING,
    Stage.FAILED: NodeState.FAILED,
}


def state_of(machine: Machine) -> NodeState | None:
    """What a machine's stage alone says, None where its agent has a say."""
    return _STATES.get(machine.stage)


def advance(
    before: Roster,
    machines: Sequence[Machine],
    readings: Mapping[str, Reading],
    verdicts: Mapping[str, Verdict],
    settings: Warmth,
    now: float,
) -> Roster:
    """The roster after a look. `readings` are of machines that were asked, `verdicts` of those that
    answered."""
    rested = now - before.at > settings.stale_after_seconds
    records: dict[str, Record] = {}
    nodes: dict[str, list[Node]] = {}
    for machine in machines:
        old = before.records.get(machine.name)
        record, reason = _record(
            old, machine, readings.get(machine.name), verdicts.get(machine.name), settings, now, rested
        )
        records[machine.name] = record
        if machine.stage is not Stage.FREE:
            nodes.setdefault(machine.node_class, []).append(_node(machine, record, reason))
    made = {machine.name: machine.made_at for machine in machines}
    ageing = _ageing(nodes, made, settings, now)
    return Roster(
        now,
        records,
        {
            name: tuple(each for each in several if each is not ageing.get(name))
            for name, several in nodes.items()
        },
        ageing,
        _tally(before, records),
    )


def retire(roster: Roster, node_class: str, size: int) -> str | None:
    """The node past its time that may go now, because enough others are warm."""
    old = roster.ageing.get(node_class)
    if old is None:
        return None
    warm = sum(each.state is NodeState.WARM for each in roster.nodes.get(node_class, ()))
    return old.name if warm >= size else None


def _record(
    old: Record | None,
    machine: Machine,
    reading: Reading | None,
    verdict: Verdict | None,
    settings: Warmth,
    now: float,
    rested: bool,
) -> tuple[Record, str]:
    """What is remembered now, and why its state is what it is."""
    up = machine.stage in (Stage.UP, Stage.STANDBY, Stage.FREE)
    up_at = (
        None if not up else old.up_at if old is not None and old.up_at is not None else _began(machine, now)
    )
    heard_at = now if old is None or old.heard_at is None or rested else old.heard_at
    tended_at = now if old is None or old.tended_at is None or rested else old.tended_at
    if reading is not None and not reading.error:
        heard_at = now
    state, reason = _STATES.get(machine.stage), machine.reason
    if state is None:
        state, reason = _warmth(machine, reading, verdict, tended_at, heard_at, settings, now)
    warm_at = old.warm_at if old is not None else None
    if state is NodeState.WARM and warm_at is None:
        warm_at = now
    since = old.since if old is not None and old.state is state else _began(machine, now)
    record = Record(
        machine.node_class,
        state,
        since,
        up_at,
        warm_at,
        heard_at if up else None,
        tended_at if up else None,
    )
    return record, reason


def _began(machine: Machine, now: float) -> float:
    return min(machine.since, now)


def _warmth(
    machine: Machine,
    reading: Reading | None,
    verdict: Verdict | None,
    tended_at: float,
    heard_at: float,
    settings: Warmth,
    now: float,
) -> tuple[NodeState, str]:
    """Of a machine that runs, or stands by."""
    if machine.stage is Stage.STANDBY or settings.agents is None:
        return NodeState.WARM, ""
    if reading is not None and reading.error and now - heard_at > settings.stale_after_seconds:
        return NodeState.FAILED, f"not heard for {now - heard_at:.0f} s: {reading.error}"
    if verdict is not None and verdict.warm:
        return NodeState.WARM, ""
    lack = reading.error if reading is not None and reading.error else ""
    lack = lack or "; ".join(verdict.missing if verdict is not None else ()) or "not asked yet"
    if now - tended_at > settings.warm_within_seconds:
        return NodeState.FAILED, f"not warm after {now - tended_at:.0f} s: {lack}"
    return NodeState.WARMING, lack


def _node(machine: Machine, record: Record, reason: str) -> Node:
    return Node(
        machine.name,
        record.state,
        record.since,
        machine.requested_at,
        record.up_at,
        record.warm_at,
        reason,
    )


def _ageing(
    nodes: Mapping[str, Sequence[Node]], made: Mapping[str, float | None], settings: Warmth, now: float
) -> dict[str, Node]:
    """The oldest node of each class that is past its time."""
    out: dict[str, Node] = {}
    for name, several in nodes.items():
        old = [
            (made_at, each.name, each)
            for each in several
            if each.state is NodeState.WARM
            and (made_at := made.get(each.name)) is not None
            and now - made_at > settings.recycle_after_seconds
        ]
        if old:
            out[name] = min(old, key=lambda found: found[:2])[2]
    return out


def _tally(before: Roster, records: Mapping[str, Record]) -> Tally:
    hits, misses = dict(before.tally.hits), dict(before.tally.misses)
    if before.at == 0.0:
        return before.tally
    for name, record in records.items():
        old = before.records.get(name)
        if record.state is not NodeState.HANDED or (old is not None and old.state is NodeState.HANDED):
            continue
        counts = hits if old is not None and old.state is NodeState.WARM else misses
        counts[record.node_class] = counts.get(record.node_class, 0) + 1
    return Tally(hits, misses)


_TIMES = ("up_at", "warm_at", "heard_at", "tended_at")

# -- as JSON -------------------------------------------------------------------------------------------


def to_json(roster: Roster) -> dict[str, Any]:
    """What a successor needs of it."""
    return {
        "at": roster.at,
        "records": {
            name: {**dataclasses.asdict(each), "state": each.state.value}
            for name, each in roster.records.items()
        },
        "hits": dict(roster.tally.hits),
        "misses": dict(roster.tally.misses),
    }


def from_json(document: Mapping[str, Any]) -> Roster:
    """Inverse of `to_json`. InvalidInputError."""
    try:
        return Roster(
            at=float(document["at"]),
            records={
                str(name): Record(
                    str(each["node_class"]),
                    NodeState(each["state"]),
                    float(each["since"]),
                    *(None if each[key] is None else float(each[key]) for key in _TIMES),
                )
                for name, each in document["records"].items()
            },
            tally=Tally(
                {str(key): int(value) for key, value in document["hits"].items()},
                {str(key): int(value) for key, value in document["misses"].items()},
            ),
        )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as exc:
        raise errors.InvalidInputError(f"the pool's saved state is not one of this version: {exc!r}") from exc
