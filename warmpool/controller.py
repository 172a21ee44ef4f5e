"""The loop of a pool: look, decide, remember, act.

`Controller.step` is one round, called by `shell` every `interval_seconds` from one thread, and once, without
acting, by `glowplug warmpool plan`. It owns nothing that must survive: what is held is the platform's to say,
and what is remembered is written before anything is done. So a controller may be killed at any instruction:
its successor looks, finds the machines, and goes on; nothing is released because somebody died.

What fails is told (`Report`), backed off and tried again; a failure of one class holds up no other. What is
not known is not acted on: no observation, no orders; demand unknown, nothing released. Leadership is asked
for right before each order, because a lease may be lost in the middle of a round.
"""

from __future__ import annotations

import collections
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from warmpool import backoff, decide, errors, journal, lifecycle, orders, warmth
from warmpool.backoff import PROVIDER, Waits
from warmpool.demand_sources import Source
from warmpool.election import Election
from warmpool.lifecycle import Roster
from warmpool.observation import NodeState, Observation, Pool
from warmpool.orders import Admit, Hold, Order, Replace, Serve
from warmpool.provider import Machine, Provider, Stage
from warmpool.report import Event, Report
from warmpool.settings import Settings
from warmpool.warmth import Reading, Task, Verdict, Wanted

_log = logging.getLogger(__name__)

_EVENTS = 200
_SAVE_SECONDS = 60.0
_BEFORE_UP = frozenset({NodeState.REQUESTED, NodeState.BOOTING})
_ASKED = frozenset({Stage.UP, Stage.FREE})
"""Stages in which an agent can be asked."""


class Agents(Protocol):
    """nodeagents.NodeAgents."""

    def read(
        self, nodes: Mapping[str, str | None], images: Mapping[str, Sequence[str]]
    ) -> Mapping[str, Reading]:
        """See NodeAgents."""

    def do(self, nodes: Mapping[str, str | None], tasks: Mapping[str, Sequence[Task]]) -> Mapping[str, str]:
        """See NodeAgents."""


class Controller:
    """See the module. `agents` is None where the settings name none."""

    def __init__(
        self,
        settings: Settings,
        provider: Provider,
        source: Source,
        agents: Agents | None,
        store: journal.Store,
        election: Election,
        *,
        dry_run: bool = False,
        clock: Callable[[], float] = time.time,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._settings = settings
        self._provider = provider
        self._source = source
        self._agents = agents
        self._store = store
        self._election = election
        self._dry_run = dry_run
        self._clock = clock
        self._draw = draw
        self._state = decide.State(settings.policy)
        self._roster = Roster()
        self._waits: Waits = {}
        self._sizes: dict[str, int] = {}
        self._asked: frozenset[str] = frozenset()
        self._led = False
        self._saved_at = 0.0
        self._release_from = 0.0
        self._errors_total: collections.Counter[tuple[str, str]] = collections.Counter()
        self._events: collections.deque[Event] = collections.deque(maxlen=_EVENTS)
        self._told: dict[str, str] = {}

    @property
    def events(self) -> Sequence[Event]:
        """The latest, oldest first."""
        return list(self._events)

    @property
    def errors_total(self) -> Mapping[tuple[str, str], int]:
        """Failures by node class ("" for the provider) and kind."""
        return dict(self._errors_total)

    def step(self) -> Report:
        """One round. No error leaves it but for bugs and ConfigurationError about the policy."""
        now = self._clock()
        leading = self._election.holds()
        if not leading:
            self._led = False
            return self._report(now, {}, leading=False)
        if not self._led:
            away = self._take_over(now)
            if away:
                return self._report(now, {"state": away})
        machines, trouble = self._machines(now)
        if machines is None:
            return self._report(now, trouble)
        wanted = self._source.wanted()
        trouble |= {f"demand {place}": what for place, what in self._source.trouble.items()}
        chosen = self._chosen()
        readings, verdicts = self._read(machines, chosen)
        self._notice(machines, now)
        self._forget(chosen, readings)
        self._roster = lifecycle.advance(
            self._roster, machines, readings, verdicts, self._settings.warmth, now
        )
        observation = self._observation(wanted, now)
        self._state, decision = decide.decide(self._state, observation, now)
        rules = orders.Rules(self._settings.hand_over == "served", now >= self._release_from)
        given = orders.plan(decision, machines, self._roster, wanted, self._waits, rules, now)
        self._save(now, bool(given), chosen, trouble)
        failed: dict[Order, str] = {}
        if not self._dry_run:
            failed = self._carry_out(given, now)
            trouble |= self._tell_agents(machines, verdicts)
        lacking = {name: each.missing for name, each in verdicts.items() if each.missing}
        self._say(trouble, now)
        return Report(
            now,
            not self._dry_run,
            self._election.holder(),
            observation,
            decision,
            self._roster,
            self._waits,
            given,
            failed,
            trouble,
            chosen,
            lacking,
        )

    # -- looking -----------------------------------------------------------------------------------

    def _machines(self, now: float) -> tuple[Sequence[Machine] | None, dict[str, str]]:
        waiting = self._waits.get(PROVIDER)
        if waiting is not None and waiting.until > now:
            return None, {"provider": f"left alone for {waiting.until - now:.0f} s: {waiting.reason}"}
        try:
            machines = self._provider.observe()
        except errors.WarmPoolError as exc:
            self._failed(PROVIDER, exc, now)
            return None, {"provider": str(exc)}
        self._waits = backoff.succeeded(self._waits, PROVIDER)
        return machines, {}

    def _chosen(self) -> dict[str, tuple[Wanted, ...]]:
        """What nodes of each class are to have, best first."""
        if self._agents is None:
            return {}
        chances = self._source.chances() if self._settings.warmth.from_endpoints else {}
        out = {}
        for name in self._settings.policy.classes:
            wanted = [
                Wanted(each.image, each.chance, each.required)
                for each in self._settings.warmth.images
                if not each.node_classes or name in each.node_classes
            ]
            wanted += [Wanted(image, chance, False) for image, chance in chances.get(name, {}).items()]
            out[name] = warmth.choose(wanted, self._sizes, self._settings.warmth.disk_bytes)
        return out

    def _read(
        self, machines: Sequence[Machine], chosen: Mapping[str, tuple[Wanted, ...]]
    ) -> tuple[Mapping[str, Reading], Mapping[str, Verdict]]:
        if self._agents is None:
            return {}, {}
        asked = [each for each in machines if each.stage in _ASKED]
        classes = {each.name: each.node_class for each in asked}
        everything = {name: [each.image for each in several] for name, several in chosen.items()}
        unwanted = {name: self._asked - set(several) for name, several in everything.items()}
        readings = self._agents.read(
            {each.name: each.address for each in asked},
            {
                name: [*everything.get(node_class, ()), *sorted(unwanted.get(node_class, ()))]
                for name, node_class in classes.items()
            },
        )
        for reading in readings.values():
            for image, cached in reading.images.items():
                if cached is not None and cached.total_bytes:
                    self._sizes[image] = cached.total_bytes
        verdicts = {
            name: warmth.judge(
                chosen.get(classes[name], ()), reading, unwanted.get(classes[name], frozenset())
            )
            for name, reading in readings.items()
            if not reading.error
        }
        return readings, verdicts

    def _forget(self, chosen: Mapping[str, Sequence[Wanted]], readings: Mapping[str, Reading]) -> None:
        """Images that nobody wants and no node has are asked about no more."""
        heard = [reading for reading in readings.values() if not reading.error]
        if heard:
            wanted = {each.image for several in chosen.values() for each in several}
            present = {image for each in heard for image, cached in each.images.items() if cached is not None}
            self._asked = self._asked & (wanted | present)

    def _notice(self, machines: Sequence[Machine], now: float) -> None:
        """A request that was refused, or a machine that does not come up, is an error of its class; one that
        came is the end of it."""
        for machine in machines:
            old = self._roster.records.get(machine.name)
            new = old is None or old.state is not lifecycle.state_of(machine)
            if machine.stage is Stage.FAILED and new:
                kind = errors.CapacityError if machine.made_at is None else errors.UnavailableError
                self._failed(machine.node_class, kind(f"{machine.name}: {machine.reason}"), now)
            elif machine.stage in _ASKED and (old is None or old.state in _BEFORE_UP):
                self._waits = backoff.succeeded(self._waits, machine.node_class)

    def _observation(self, wanted: Mapping[str, int | None], now: float) -> Observation:
        pools = []
        for name in self._settings.policy.classes:
            wait = backoff.blocking(self._waits, name, now)
            pools.append(
                Pool(
                    name,
                    wanted.get(name),
                    self._roster.nodes.get(name, ()),
                    blocked_until=None if wait is None else wait.until,
                    blocked="" if wait is None else wait.reason,
                )
            )
        return Observation(now, tuple(pools))

    # -- acting ------------------------------------------------------------------------------------

    def _carry_out(self, given: Sequence[Order], now: float) -> dict[Order, str]:
        failed: dict[Order, str] = {}
        for order in given:
            if not self._election.holds():
                failed[order] = "leadership was lost before it"
                continue
            waiting = self._waits.get(PROVIDER)
            if waiting is not None and waiting.until > now:
                failed[order] = f"the provider is left alone: {waiting.reason}"
                continue
            try:
                self._carry_out_one(order)
            except errors.NotFoundError:
                continue  # it has gone meanwhile, which the next look sees
            except errors.WarmPoolError as exc:
                failed[order] = str(exc)
                key = PROVIDER if isinstance(exc, errors.ThrottledError) else order.node_class
                self._failed(key, exc, now)
        return failed

    def _carry_out_one(self, order: Order) -> None:
        match order:
            case Admit(node_class, name, because):
                self._provider.admit(name)
                self._event(node_class, f"{name} is admitted: {because}")
            case Replace(node_class, name, because):
                self._provider.replace(name)
                self._event(node_class, f"{name} is taken away: {because}")
            case Hold(node_class, count, before, release):
                self._provider.hold(node_class, count, release)
                self._event(node_class, f"{count} are held, {before} were")
            case Serve(node_class, count):
                self._provider.serve(node_class, count)

    def _tell_agents(self, machines: Sequence[Machine], verdicts: Mapping[str, Verdict]) -> dict[str, str]:
        if self._agents is None or not self._election.holds():
            return {}
        tasks = {name: each.tasks for name, each in verdicts.items() if each.tasks}
        addresses = {each.name: each.address for each in machines}
        return {f"agent of {name}": what for name, what in self._agents.do(addresses, tasks).items()}

    # -- remembering -------------------------------------------------------------------------------

    def _take_over(self, now: float) -> str:
        """Go on with what the last leader knew, which may have been this one. Why that cannot be had now, ""
        once it is: whoever began without it would write over it."""
        try:
            data = self._store.read()
            kept = None if data is None else journal.decode(data)
            state = None if kept is None else decide.State.from_json(self._settings.policy, kept.memory)
        except (errors.UnavailableError, errors.ConfigurationError) as exc:
            return str(exc)
        except errors.InvalidInputError as exc:
            self._event("", f"the saved state is not used: {exc}")
            kept = state = None
        self._release_from = now + self._settings.adopt_seconds
        self._led = True
        if kept is None or state is None:
            self._event("", "begins without saved state: what is there is adopted")
            return ""
        self._state, self._roster, self._waits = state, kept.roster, kept.waits
        self._sizes, self._asked = dict(kept.sizes), kept.asked
        if now - kept.saved_at <= self._settings.adopt_seconds:
            self._release_from = 0.0
        return ""

    def _save(
        self,
        now: float,
        acting: bool,
        chosen: Mapping[str, Sequence[Wanted]],
        trouble: dict[str, str],
    ) -> None:
        """Before anything is done, and now and then: what is asked of agents is remembered before it is
        asked."""
        asked = self._asked | {each.image for several in chosen.values() for each in several}
        if self._dry_run or not (acting or asked != self._asked or now - self._saved_at >= _SAVE_SECONDS):
            return
        self._asked = asked
        kept = journal.Kept(now, self._state.to_json(), self._roster, self._waits, self._sizes, self._asked)
        try:
            self._store.write(journal.encode(kept))
            self._saved_at = now
        except errors.WarmPoolError as exc:
            trouble["state"] = str(exc)

    def _failed(self, key: str, exc: errors.WarmPoolError, now: float) -> None:
        least = exc.retry_after_seconds if isinstance(exc, errors.UnavailableError) else None
        self._waits = backoff.failed(
            self._waits, key, self._settings.backoff, now, str(exc), self._draw(), least or 0.0
        )
        self._errors_total[key, type(exc).__name__] += 1
        self._event(key, f"left alone for {self._waits[key].until - now:.0f} s: {exc}")

    def _event(self, node_class: str, text: str) -> None:
        self._events.append(Event(self._clock(), node_class, text))
        _log.info("%s%s", f"{node_class}: " if node_class else "", text)

    def _say(self, trouble: Mapping[str, str], now: float) -> None:
        """Trouble is an event when it begins, and when it ends."""
        for place, what in trouble.items():
            if place not in self._told:
                self._event("", f"{place}: {what}")
        for place in self._told:
            if place not in trouble:
                self._event("", f"{place}: well again")
        self._told = dict(trouble)

    def _report(self, now: float, trouble: Mapping[str, str], leading: bool = True) -> Report:
        """Of a round that came to nothing."""
        self._say(trouble, now)
        return Report(
            now,
            leading and not self._dry_run,
            self._election.holder(),
            None,
            None,
            self._roster,
            self._waits,
            (),
            {},
            trouble,
            {},
            {},
        )
