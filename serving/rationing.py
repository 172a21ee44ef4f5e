"""Gives out the tenants' budgets of one endpoint to its replicas, once a second (`shares` says how much).

Owned by the server. A thread of its own, so that a replica which hangs holds up nobody: `update` says from
the server's loop what is wanted and who is there, the thread tells the replicas and hears what they spent.
When it stops, or the server is killed, replicas go on with their last shares.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from serving import errors, shares
from serving.engine.state import Rations
from serving.replica import Provider, Rationed, Replica, State

INTERVAL_SECONDS = 1.0
_SERVING = (State.READY, State.DRAINING)

_log = logging.getLogger(__name__)


class Rationing:
    """`start` once, `stop` once. Of a provider that is not `Rationed` it asks nothing."""

    def __init__(self, provider: Provider) -> None:
        self._provider = provider if isinstance(provider, Rationed) else None
        self._lock = threading.Lock()
        self._wanted = shares.Budget()
        self._holders: tuple[str, ...] = ()
        self._stopping = threading.Event()
        self._changed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rationing", daemon=True)

    def start(self) -> None:
        """Begin."""
        if self._provider is not None:
            self._thread.start()

    def stop(self) -> None:
        """Leave everybody their last share."""
        self._stopping.set()
        self._changed.set()
        if self._thread.is_alive():
            self._thread.join()

    def update(self, wanted: shares.Budget, replicas: Sequence[Replica]) -> None:
        """What is to be given out, among whom. A change is told at once."""
        holders = tuple(each.name for each in replicas if each.state in _SERVING)
        with self._lock:
            if (wanted, holders) != (self._wanted, self._holders):
                self._wanted, self._holders = wanted, holders
                self._changed.set()

    def _run(self) -> None:
        assert self._provider is not None
        state, told, at = shares.State(), dict[str, Rations](), time.monotonic()
        while not self._stopping.is_set():
            with self._lock:
                wanted, holders = self._wanted, self._holders
                self._changed.clear()
            rations = shares.rations(wanted, state, holders)
            if not wanted.empty or any(told.get(holder) != each for holder, each in rations.items()):
                try:
                    answers = self._provider.ration(rations)
                except errors.ServingError as exc:
                    _log.warning("budgets could not be told to replicas: %s", exc)
                    answers = {}
                now = time.monotonic()
                state, at = shares.heard(state, rations, answers, now - at), now
                told = {holder: rations[holder] for holder in answers}
            self._changed.wait(INTERVAL_SECONDS)
