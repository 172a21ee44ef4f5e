"""One of several leads: a Lease that is taken, renewed and let go.

    leader = Leader(api, "glowplug-operator", on_change=...)
    leader.start()
    while ...:
        if leader.holds(): act()

`holds` is what counts, asked right before each act: it is a comparison with a clock that goes on while the
machine sleeps, so a process that was frozen knows on its first instruction that it no longer leads. `term`
grows with each leader, for what must carry it along.

Threads: one renews; one calls `on_change`, in order, also while the renewer waits for an API server that is
away. Errors of the API are logged when they begin; leadership is lost by the clock, never by an error.
"""

from __future__ import annotations

import logging
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable

from cluster import errors, lease, objects
from cluster.api import Api
from cluster.lease import Record, Seen, Timing

_log = logging.getLogger(__name__)


def _elapsed() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Leader:
    """A candidate. `identity` is unique to this process unless it is given."""

    def __init__(
        self,
        api: Api,
        name: str,
        namespace: str | None = None,
        *,
        timing: Timing | None = None,
        identity: str | None = None,
        on_change: Callable[[bool], None] | None = None,
        clock: Callable[[], float] = _elapsed,
    ) -> None:
        self._api = api
        self._name = name
        self._namespace = namespace or api.namespace
        self._timing = timing or Timing()
        self.identity = identity or f"{socket.gethostname()}_{uuid.uuid4()}"
        self._on_change = on_change
        self._clock = clock
        self._changed = threading.Condition()
        self._until = float("-inf")
        self._term = 0
        self._holder = ""
        self._seen: Seen | None = None
        self._trouble: errors.ClusterError | None = None
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._renew, name=f"lease {name}", daemon=True),
            threading.Thread(target=self._announce, name=f"leader {name}", daemon=True),
        ]

    def start(self) -> None:
        for each in self._threads:
            each.start()

    def stop(self) -> None:
        """Stop leading at once, say so, and let the next one have the lease without a wait."""
        self._stopping.set()
        held = self._lead_until(float("-inf"))
        for each in self._threads:
            if each.is_alive() and each is not threading.current_thread():
                each.join()
        if held:
            try:
                self._release()
            except errors.ClusterError as exc:
                _log.warning("lease %s is left to run out: %s", self._name, exc)

    def holds(self) -> bool:
        """Whether this process leads now."""
        with self._changed:
            return self._clock() < self._until

    @property
    def term(self) -> int:
        """Grows with each leader of this lease; of the last time that this one led."""
        with self._changed:
            return self._term

    @property
    def holder(self) -> str:
        """Who held the lease when it was last looked at."""
        with self._changed:
            return self._holder

    def trouble(self) -> errors.ClusterError | None:
        """Why the lease cannot be looked at, None while it can."""
        with self._changed:
            return self._trouble

    # -- the lease ---------------------------------------------------------------------------------

    def _renew(self) -> None:
        while not self._stopping.is_set():
            try:
                self._attempt()
                self._troubled(None)
            except errors.ConflictError:
                pass  # somebody was faster: the next look says who
            except errors.ClusterError as exc:
                self._troubled(exc)
            # Candidates that were started together do not ask together for ever.
            self._stopping.wait(self._timing.retry_seconds * (0.8 + 0.4 * random.random()))  # noqa: S311

    def _attempt(self) -> None:
        began = self._clock()
        record = self._look()
        if record is None:
            found = self._api.create(objects.LEASE, self._body(None), self._namespace)
        else:
            self._seen = lease.looked(record, self._seen, self._clock())
            with self._changed:
                self._holder = record.holder
            if not lease.may_hold(record, self._seen, self.identity, self._clock()):
                self._lead_until(float("-inf"))
                return
            # The whole object's version goes along: a lease that anybody touched since is not taken.
            found = self._api.patch(
                objects.LEASE, self._name, self._body(record), self._namespace, version=record.version
            )
        held = lease.parse(found)
        self._seen = lease.looked(held, self._seen, self._clock())
        with self._changed:
            self._term, self._holder = held.transitions, held.holder
        if not self._stopping.is_set():
            self._lead_until(began + self._timing.deadline_seconds)

    def _look(self) -> Record | None:
        try:
            return lease.parse(self._api.get(objects.LEASE, self._name, self._namespace))
        except errors.NotFoundError:
            return None

    def _body(self, record: Record | None) -> objects.Body:
        spec = lease.claim(record, self.identity, self._timing, time.time())
        return {"metadata": {"name": self._name, "namespace": self._namespace}, "spec": spec}

    def _release(self) -> None:
        record = self._look()
        if record is not None and record.holder == self.identity:
            body = {"spec": {"holderIdentity": "", "leaseDurationSeconds": 1}}
            self._api.patch(objects.LEASE, self._name, body, self._namespace, version=record.version)

    # -- who is told -------------------------------------------------------------------------------

    def _lead_until(self, until: float) -> bool:
        """Whether it led before."""
        with self._changed:
            led = self._clock() < self._until
            self._until = until
            self._changed.notify_all()
            return led

    def _announce(self) -> None:
        told = False
        while True:
            with self._changed:
                while (leads := self._clock() < self._until) == told:
                    if self._stopping.is_set() and not leads:
                        return
                    self._changed.wait(max(0.0, self._until - self._clock()) if leads else None)
                holder = self._holder
            told = leads
            _log.info("lease %s: %s", self._name, "leading" if leads else f"not leading; held by {holder!r}")
            if self._on_change is not None:
                self._on_change(leads)

    def _troubled(self, exc: errors.ClusterError | None) -> None:
        with self._changed:
            began = exc is not None and self._trouble is None
            self._trouble = exc
        if began:
            _log.warning("lease %s: %s", self._name, exc)
