"""From a decision to what is to be done about machines, in order. Pure.

Called by the controller, and by `glowplug warmpool plan`, which shows what it gets. An order is safe to give
twice, and to give late: providers are level-triggered.

First work that waits is let in: machines that are warm are admitted; while more nodes are wanted than are
handed over and ready, machines that run are admitted even if they are not warm, because waiting at the gate
would make a miss worse than it is without a pool. Then what is broken goes, then the pool gets its size. A
class that is left alone after an error is not made larger; it may be made smaller.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from warmpool import backoff, lifecycle
from warmpool.backoff import Waits
from warmpool.lifecycle import Roster
from warmpool.observation import Decision, NodeState, PoolDecision
from warmpool.provider import HELD, Machine, Stage


@dataclasses.dataclass(frozen=True, slots=True)
class Admit:
    """Open a machine's gate; `because` in words."""

    node_class: str
    name: str
    because: str


@dataclasses.dataclass(frozen=True, slots=True)
class Replace:
    """Take a machine away."""

    node_class: str
    name: str
    because: str


@dataclasses.dataclass(frozen=True, slots=True)
class Hold:
    """Have `count` machines held; `before` is how many there are."""

    node_class: str
    count: int
    before: int
    release: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Serve:
    """Have `count` machines handed over."""

    node_class: str
    count: int


Order = Admit | Replace | Hold | Serve


@dataclasses.dataclass(frozen=True, slots=True)
class Rules:
    """What bounds orders beyond the decision. `served`: this controller hands over. `may_release`: False for
    a while after a start without a memory, so that a new controller does not let go of what it finds."""

    served: bool = False
    may_release: bool = True


def plan(
    decision: Decision,
    machines: Sequence[Machine],
    roster: Roster,
    wanted: Mapping[str, int | None],
    waits: Waits,
    rules: Rules,
    now: float,
) -> tuple[Order, ...]:
    """All orders of one look."""
    out: list[Order] = []
    for pool in decision.pools:
        mine = [each for each in machines if each.node_class == pool.node_class]
        out += _admit(pool.node_class, mine, roster, wanted.get(pool.node_class))
        count = wanted.get(pool.node_class)
        if rules.served and count is not None:
            out.append(Serve(pool.node_class, count))
        out += _replace(pool, roster)
        hold = _hold(pool, mine, roster, waits, rules, now)
        if hold is not None:
            out.append(hold)
    return tuple(out)


def _admit(node_class: str, machines: Sequence[Machine], roster: Roster, wanted: int | None) -> list[Order]:
    out: list[Order] = []
    closed: list[Machine] = []
    open_now = 0
    for each in machines:
        record = roster.records.get(each.name)
        warm = record is not None and record.state is NodeState.WARM
        if each.stage is Stage.HANDED and not each.admitted:
            out.append(Admit(node_class, each.name, "work has it already"))
        elif each.stage in (Stage.UP, Stage.FREE) and not each.admitted and warm:
            out.append(Admit(node_class, each.name, "warm"))
            open_now += 1
        elif each.stage in (Stage.UP, Stage.FREE) and not each.admitted:
            closed.append(each)
        elif each.stage in (Stage.UP, Stage.FREE, Stage.STANDBY):
            open_now += 1
    handed = sum(each.stage is Stage.HANDED for each in machines)
    urgent = max(0, (wanted or 0) - handed - open_now)
    for each in sorted(closed, key=lambda machine: (machine.since, machine.name))[:urgent]:
        out.append(Admit(node_class, each.name, "work waits, and nothing warm is left"))
    return out


def _replace(pool: PoolDecision, roster: Roster) -> list[Order]:
    reasons = {each.name: each.reason for each in roster.nodes.get(pool.node_class, ())}
    out: list[Order] = [
        Replace(pool.node_class, name, reasons.get(name) or "broken") for name in pool.replace
    ]
    old = lifecycle.retire(roster, pool.node_class, pool.size)
    if old is not None:
        out.append(Replace(pool.node_class, old, "past its time, and others are warm"))
    return out


def _hold(
    pool: PoolDecision, machines: Sequence[Machine], roster: Roster, waits: Waits, rules: Rules, now: float
) -> Hold | None:
    """None where nothing is to be said. The provider's count of what is held decides, not ours: a machine
    that we call broken, or that is past its time, is held until it is replaced."""
    leaving = set(pool.replace) | {
        old for old in [lifecycle.retire(roster, pool.node_class, pool.size)] if old is not None
    }
    held = {each.name for each in machines if each.stage in HELD} - leaving
    release = tuple(name for name in pool.release if name in held) if rules.may_release else ()
    count = len(held) - len(release) + pool.request
    if count > len(held) and backoff.blocking(waits, pool.node_class, now) is not None:
        return None
    if count == len(held) and not leaving:
        return None
    return Hold(pool.node_class, count, len(held), release)
