"""What is routed, of all endpoints together: each one's loop writes its own service, the router gets all.

Called from the endpoints' threads. Invariants: nothing is told before every endpoint that was there at the
start has said what it routes, or that it cannot, or `_PATIENCE_SECONDS` have passed: Envoys, which keep what
they have, would take one that is late for one that is gone. A service that contradicts another's is refused
to the one that says it, and changes nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence

from serving import errors
from serving.service import Service

_PATIENCE_SECONDS = 30.0

_log = logging.getLogger(__name__)


class Board:
    """`update` is the router's; `expected`: the endpoints that were there at the start."""

    def __init__(
        self,
        update: Callable[[Sequence[Service]], None],
        expected: Collection[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._update = update
        self._expected = set(expected)
        self._clock = clock
        self._until = clock() + _PATIENCE_SECONDS
        self._services: dict[str, Service] = {}
        self._lock = threading.Lock()

    def publish(self, service: Service) -> bool:
        """Whether it has been told. DocumentError where it contradicts another one's."""
        with self._lock:
            self._expected.discard(service.name)
            before = self._services.get(service.name)
            taken = [
                each.name
                for each in self._services.values()
                if each.name != service.name and each.listen.port == service.listen.port
            ]
            if taken:
                raise errors.DocumentError(
                    f"routing.port: {service.listen.port} is the endpoint {taken[0]}'s; choose another"
                )
            self._services[service.name] = service
            try:
                return self._tell()
            except errors.DocumentError:
                if before is None:
                    del self._services[service.name]
                else:
                    self._services[service.name] = before
                raise

    def withdraw(self, name: str) -> None:
        """This one routes nothing, now or at all."""
        with self._lock:
            self._services.pop(name, None)
            self._expected.discard(name)
            self._tell()

    def _tell(self) -> bool:
        if self._expected and self._clock() < self._until:
            return False
        if self._expected:
            _log.warning("not waiting for what %s route", ", ".join(sorted(self._expected)))
            self._expected.clear()
        self._update([self._services[name] for name in sorted(self._services)])
        return True
