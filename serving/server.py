"""`glowplug serve`: one endpoint on this machine. The composition root: provider, router, Envoy, status API.

    document -> controller.decide -> provider (replicas)        a turn of the loop, a few times a second
                                  -> router (xDS) -> Envoy      requests never pass through this process
    Envoy -> load reports (LRS) -> traffic -> controller
                                -> autoscaler: how many replicas, and what each may have in flight

Threads: `run` is the loop, and everything that changes happens on it; what the status API is asked is put
into the loop's queue and answered from there. The router and the API have threads of their own.

Survival: replicas and Envoy are sessions of their own, and what is known of them is on disk. A server that is
killed takes nothing with it; the next one of the same endpoint adopts replicas and Envoy and goes on with the
update where it stood. Asked to end (SIGINT, SIGTERM), it takes all of it down: Envoy stops accepting, what is
in flight is finished, replicas drain, and nothing is left but the journal.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import os
import queue
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from serving import (
    capacityfile,
    changes,
    client,
    controller,
    endpointmetrics,
    errors,
    journal,
    ports,
    providers,
    rationing,
    routes,
    shares,
    statusapi,
    statusdocument,
    traffic,
)
from serving.autoscaler import shell
from serving.autoscaler.policy import Policy
from serving.endpoint import Endpoint
from serving.endpoint import load as load_document
from serving.holding import Holding
from serving.keyfile import KeyFile
from serving.replica import Provider, Replica, State
from serving.router import bootstrap
from serving.router.control import Router
from serving.router.envoy import Envoy

_TURN_SECONDS = 0.1
_KEPT_EVENTS = 200
_HOLDING_SECONDS = 10.0
"""How long a start waits for the activator, so that the first requests are held and not refused."""

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """`state_dir` is shared by all endpoints of the user. `status`: where the page listens, None for
    nowhere."""

    state_dir: Path
    status: tuple[str, int] | None


class Server:
    """See the module. Made and run by one thread; `stop` from any, or from a signal's handler."""

    def __init__(self, document: Endpoint, options: Options) -> None:
        self._name = document.name
        self._journal = journal.Journal(options.state_dir / document.name)
        self._directory = self._journal.directory
        self._fresh = not self._journal.state.revisions
        self._traffic = traffic.Traffic(document.name)
        self._events: collections.deque[statusdocument.Event] = collections.deque(maxlen=_KEPT_EVENTS)
        self._asked: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._deleting = False
        self._started_at = time.time()
        self._replicas: list[Replica] = []
        self._weights: dict[str, int] = {}
        self._keys = KeyFile()
        self._trouble: str | None = None
        self._share = capacityfile.Share(options.state_dir, document.name)
        self._autoscaler = shell.Autoscaler(self._directory, self._event)
        self._size = shell.Size(0, 1)
        self._provider: Provider
        self._router = Router(
            f"unix:{self._directory / 'xds.sock'}",
            on_load=lambda report: self._traffic.report(report, time.time()),
        )
        self._api = statusapi.Api(self._directory / client.SOCKET, options.status, self)
        self._first = document
        try:
            self._build(document)
        except errors.ServingError:
            self._forget_attempt()
            raise

    def _build(self, document: Endpoint) -> None:
        """What may not be had on this machine."""
        (self._directory / "envoy").mkdir(mode=0o700, exist_ok=True)
        self._holding = Holding(self._directory, document.name, f"unix:{self._directory / 'xds.sock'}")
        self._envoy = Envoy(
            self._directory / "envoy",
            bootstrap.Settings(
                node=document.name,
                control=str(self._directory / "xds.sock"),
                admin=str(self._directory / "envoy" / "admin.sock"),
            ),
        )
        self._provider = providers.create(document, self._directory)
        self._rationing = rationing.Rationing(self._provider)

    # -- life --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Returns when requests are taken; until a replica is ready, they are held. What is wrong with
        document or machine is raised, and nothing is left of the attempt."""
        try:
            self._apply(self._first)
            self._choose_port()
            self._router.start()
            self._rationing.start()
            self._api.start()
            self._envoy.start()
            self._envoy.keep_open([self.address])
            self._turn()
            until = time.monotonic() + _HOLDING_SECONDS
            while self._holding.ensure() is None and time.monotonic() < until:
                time.sleep(_TURN_SECONDS)
            self._turn()
            self._envoy.wait_ready()
        except BaseException:
            self._abandon()
            raise

    def run(self) -> None:
        """The loop, until `stop`; then everything is drained and ended."""
        while not self._stopping.is_set():
            with contextlib.suppress(queue.Empty):
                self._asked.get(timeout=_TURN_SECONDS)()
            try:
                self._turn()
            except (errors.ServingError, OSError) as exc:  # a full disk, say: requests go on, so do we
                self._troubled(str(exc))
            else:
                self._trouble = None
        self._end()
        with contextlib.suppress(queue.Empty):
            while True:  # who asked as we stopped must not wait for ever
                self._asked.get_nowait()()

    def stop(self) -> None:
        """Have `run` drain and return."""
        self._stopping.set()

    @property
    def address(self) -> tuple[str, int]:
        """Where requests are taken."""
        assert self._journal.state.port is not None
        return self._wanted.routing.address, self._journal.state.port

    @property
    def status_address(self) -> tuple[str, int] | None:
        """Where the page is, if it is."""
        return self._api.tcp_address

    def _abandon(self) -> None:
        """A start that did not come about. What another server left running stays."""
        self._api.stop()
        self._router.stop()
        self._rationing.stop()
        if self._fresh:
            self._end_replicas()
            self._envoy.stop()
            self._holding.stop()
        self._provider.close()
        self._forget_attempt()

    def _forget_attempt(self) -> None:
        if self._fresh:
            shutil.rmtree(self._directory, ignore_errors=True)
        self._journal.close()

    def _end_replicas(self) -> None:
        """Bounded: the provider kills who does not finish in the drain's time."""
        self._observe()
        while self._replicas:
            self._provider.drain([each.name for each in self._replicas])
            time.sleep(_TURN_SECONDS)
            self._observe()

    def _end(self) -> None:
        settings = self._wanted.drain
        self._event("draining: no new connections are taken")
        self._envoy.stop(settings.seconds)
        self._holding.stop()
        self._end_replicas()
        self._api.stop()
        self._router.stop()
        self._rationing.stop()
        self._provider.close()
        if self._deleting:
            shutil.rmtree(self._directory, ignore_errors=True)
        else:
            # Nothing is left to go on with: the next start begins with the document alone.
            ended = dataclasses.replace(self._journal.state, rollout=controller.Rollout(), port=None)
            self._journal.write(ended)
            self._autoscaler.forget()
        self._share.leave()
        self._journal.close()

    # -- the loop ----------------------------------------------------------------------------------

    @property
    def _wanted(self) -> Endpoint:
        return self._journal.state.wanted.document

    def _turn(self) -> None:
        """Look, decide, act."""
        self._observe()
        state, wanted = self._journal.state, self._wanted
        self._size = self._sized()
        target = controller.Target(changes.version(wanted), self._size.replicas, wanted.update)
        seen = controller.Observation(self._replicas, self._traffic.versions(), self._traffic.reported_at())
        decision = controller.decide(state.rollout, target, seen, time.time())
        if decision.event is not None:
            self._event(decision.event)
        if decision.rolled_back is not None:
            self._rolled_back(decision.rolled_back, decision.rollout)
        self._journal.write(dataclasses.replace(self._journal.state, rollout=decision.rollout))
        self._weights = dict(decision.weights)
        self._route()
        self._provider.set_limit(self._size.limit)
        for version, replicas in decision.scale.items():
            self._provider.scale(replicas, version=version)
        for version in decision.remove:
            self._provider.remove(version)

    def _sized(self) -> shell.Size:
        """How many replicas, and what each may have in flight: by the autoscaler, or else as was said."""
        state, wanted = self._journal.state, self._wanted
        count = wanted.replicas.min if state.scaled is None else state.scaled
        holds = sum(each.state is not State.FAILED for each in self._replicas)
        asked = self._autoscaler.wanted
        quota = self._share.turn(count if asked is None else asked, holds)
        look = shell.Look(
            pressure=lambda: self._router.pressure(self._name),
            replicas=self._replicas,
            version=state.rollout.stable or changes.version(wanted),
            activator=self._holding.ensure(),
            quota=quota,
            reference_units=wanted.reference_units,
        )
        size = self._autoscaler.turn(shell.Mode.of(wanted), Policy.of(wanted), look)
        if size is not None:
            return size
        return shell.Size(count if quota is None else min(count, quota), wanted.replicas.limit)

    def _observe(self) -> None:
        before = {each.name: each for each in self._replicas}
        self._replicas = self._provider.observe()
        self._traffic.settle(self._replicas)
        for each in self._replicas:
            old = before.get(each.name)
            if old is None or old.state is each.state:
                continue
            if each.state is State.FAILED:
                lost = self._traffic.of(each.name).in_flight
                self._event(f"replica {each.name} failed with about {lost} requests in flight: {each.reason}")
            elif each.state is State.READY:
                self._event(
                    f"replica {each.name} is ready after {(each.ready_at or 0) - each.created_at:.1f} s"
                )

    def _route(self) -> None:
        port = self._journal.state.port
        assert port is not None
        keys = self._keys.read(self._wanted.limits.keys_file, units=self._wanted.units is not None)
        # Before the routes: a new replica is told before it is reached.
        self._rationing.update(shares.budget(self._wanted, keys), self._replicas)
        routed = routes.service(
            self._wanted,
            self._replicas,
            self._weights,
            port,
            keys=keys,
            activator=self._holding.ensure(),
        )
        self._router.update([routed])
        most = routes.max_requests(self._wanted)
        if shell.Mode.of(self._wanted) is shell.Mode.ON:
            most = routes.max_requests_at(self._wanted, self._size.replicas, self._size.limit)
        self._router.set_max_requests(self._name, most)

    def _rolled_back(self, why: str, rollout: controller.Rollout) -> None:
        """The document goes back with the traffic, or the next turn would begin the same update again."""
        state = self._journal.state
        for revision in reversed(state.revisions):
            if changes.version(revision.document) == rollout.stable:
                note = f"rolled back from revision {state.wanted.number}: {why}"
                self._provider.apply(revision.document)
                self._journal.write(state.with_document(revision.document, time.time(), note))
                self._event(note)
                return
        raise errors.ServingError(f"the document of version {rollout.stable} is no longer known")

    def _troubled(self, what: str) -> None:
        """A turn that failed, and is tried again in the next: said when it begins."""
        if what != self._trouble:
            self._trouble = what
            self._event(f"the endpoint is not controlled: {what}")

    def _event(self, text: str) -> None:
        self._events.append(statusdocument.Event(time.time(), text))
        _log.info("%s: %s", self._name, text)

    def _apply(self, document: Endpoint) -> list[changes.Change]:
        """Make a document the one in force, if it differs from the one that is."""
        state = self._journal.state
        old = state.wanted.document if state.revisions else None
        found = changes.plan(old, document)
        if document.limits.keys_file is not None:
            self._keys.check(document.limits.keys_file, units=document.units is not None)
        moved = old is None or _place(old) != _place(document)
        if moved:
            ports.require(*_place(document))
        self._provider.apply(document)
        if found:
            state = state.with_document(document, time.time())
            if moved:
                state = dataclasses.replace(state, port=None)
            self._journal.write(state)
            self._choose_port()
            self._envoy.keep_open([self.address])
        return found

    def _choose_port(self) -> None:
        """The port that the document names, or a free one. One that was chosen is our Envoy's until we end
        it, also over a kill of ours."""
        state = self._journal.state
        if state.port is None:
            port = ports.require(self._wanted.routing.address, self._wanted.routing.port)
            self._journal.write(dataclasses.replace(state, port=port))

    def _latency(self) -> dict[str, float]:
        """Quantiles in seconds, as Envoy saw them; asked for on the asker's thread, because Envoy may be
        slow."""
        target = f"/stats?format=json&filter=^cluster\\.{re.escape(self._name)}\\.upstream_rq_time$"
        try:
            return statusdocument.quantiles(self._envoy.administer("GET", target))
        except errors.UnavailableError:
            return {}

    # -- what the API asks (statusapi.Actions), on its threads -------------------------------------

    def status(self) -> dict[str, Any]:
        """See statusapi.Actions."""
        document = self._ask(self._status)
        document["latency"] = self._latency()
        return document

    def metrics(self) -> bytes:
        """See statusapi.Actions."""
        return endpointmetrics.render([self.status()])

    def plan(self, text: str, where: str) -> dict[str, Any]:
        """See statusapi.Actions."""
        document = load_document(text, where)
        return self._ask(lambda: changes.shown(changes.plan(self._wanted, document)))

    def apply(self, text: str, where: str) -> dict[str, Any]:
        """See statusapi.Actions."""
        document = load_document(text, where)

        def act() -> dict[str, Any]:
            found = self._apply(document)
            if found:
                self._event(f"revision {self._journal.state.wanted.number} applied")
            return {"revision": self._journal.state.wanted.number, **changes.shown(found)}

        return self._ask(act)

    def rollback(self) -> dict[str, Any]:
        """See statusapi.Actions."""

        def act() -> dict[str, Any]:
            revisions = self._journal.state.revisions
            current = revisions[-1].document
            for revision in reversed(revisions[:-1]):
                if revision.document != current:
                    found = self._apply(revision.document)
                    self._event(f"back to the document of revision {revision.number}")
                    return {"revision": self._journal.state.wanted.number, **changes.shown(found)}
            raise errors.ConflictError(
                f"endpoint {self._name} has had one document only: nothing to go back to"
            )

        return self._ask(act)

    def scale(self, replicas: int) -> dict[str, Any]:
        """See statusapi.Actions."""

        def act() -> dict[str, Any]:
            most = self._wanted.replicas.most
            if shell.Mode.of(self._wanted) is shell.Mode.ON:
                raise errors.ConflictError(
                    "the autoscaler would undo it: apply a document with another replicas.min, or with "
                    "autoscaling.mode: off"
                )
            if replicas > most:
                raise errors.ConflictError(
                    f"replicas.max is {most}: {replicas} are too many; apply a document with a higher maximum"
                )
            self._journal.write(dataclasses.replace(self._journal.state, scaled=replicas))
            self._event(f"scaled to {replicas}")
            return {"replicas": replicas}

        return self._ask(act)

    def delete(self) -> dict[str, Any]:
        """See statusapi.Actions."""
        self._deleting = True
        self._stopping.set()
        return {"deleted": self._name}

    def logs(self, replica: str, lines: int) -> dict[str, Any]:
        """See statusapi.Actions."""

        def act() -> dict[str, Any]:
            names = [replica] if replica else [each.name for each in self._replicas]
            return {"logs": {name: list(self._provider.logs(name, lines)) for name in names}}

        return self._ask(act)

    def decisions(self) -> dict[str, Any]:
        """See statusapi.Actions."""
        return self._ask(self._autoscaler.explained)

    def document(self) -> dict[str, Any]:
        """See statusapi.Actions."""
        return self._ask(lambda: {"document": json.loads(self._wanted.model_dump_json())})

    def _ask(self, function: Callable[[], T]) -> T:
        """Run on the loop, wait for the result."""
        done: concurrent.futures.Future[T] = concurrent.futures.Future()

        def call() -> None:
            try:
                done.set_result(function())
            except Exception as exc:
                done.set_exception(exc)

        if self._stopping.is_set():
            raise errors.UnavailableError(f"endpoint {self._name} is being shut down")
        self._asked.put(call)
        return done.result()

    def _status(self) -> dict[str, Any]:
        state = self._journal.state
        return statusdocument.make(
            statusdocument.View(
                name=self._name,
                pid=os.getpid(),
                started_at=self._started_at,
                now=time.time(),
                address=self.address,
                history=state,
                weights=self._weights,
                replicas=self._replicas,
                traffic=self._traffic,
                events=tuple(self._events),
                envoys=self._router.nodes(),
                replicas_wanted=self._size.replicas,
                limit=self._size.limit,
                autoscaling=self._autoscaler.shown(),
            )
        )


def _place(document: Endpoint) -> tuple[str, int]:
    return document.routing.address, document.routing.port
