"""One lookup per image, however many ask at once; a deadline for who waits; "no", remembered for a while.

Owned by images.py; any thread. A lookup runs on a daemon thread of its own, because what it waits for may
hang for minutes. At the deadline those who wait are let go with an error, the lookup is `abandoned`, and
whatever it still does, it must undo: `finish` tells it whether its outcome counts.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

from agent import lookup
from agent.lookup import Wanted
from imagefs import errors
from imagefs.image import LazyImage

UNAVAILABLE_SECONDS = 30.0
"""An origin that failed is asked again after this, or after the time for "no" if that is less."""
_MAX_NEGATIVES = 1024
_MAX_LOOKUPS = 256
"""At a time, abandoned ones included: an origin that drips may keep each of those for long."""


@dataclasses.dataclass(slots=True)
class Flight:
    """One lookup under way; who runs it fills it in. `cancel` is what ends its waiting for reads. `settled`
    says that its outcome is decided, `done` that it was told, too."""

    wanted: Wanted
    started: float
    block_digest: str | None = None
    image: LazyImage | None = None
    error: errors.ImagefsError | None = None
    cancel: Callable[[], None] | None = None
    settled: bool = False
    done: threading.Event = dataclasses.field(default_factory=threading.Event)


@dataclasses.dataclass(frozen=True, slots=True)
class _Negative:
    until: float
    error: errors.ImagefsError


class Flights:
    """See the module. `work` carries one lookup out, raising its error; `settled` is told of each outcome."""

    def __init__(
        self,
        deadline_seconds: float,
        negative_seconds: float,
        work: Callable[[Flight], None],
        settled: Callable[[Flight], None],
        clock: Callable[[], float],
    ) -> None:
        self._deadline_seconds = deadline_seconds
        self._negative_seconds = negative_seconds
        self._work = work
        self._settled = settled
        self._clock = clock
        self._lock = threading.Lock()
        self._flights: dict[Wanted, Flight] = {}
        self._negatives: dict[Wanted, _Negative] = {}
        self._running = 0

    def join(self, wanted: Wanted, *, remembered: bool = True) -> Flight:
        """Look up, or wait for whoever does. Raises the lookup's error, also one that is `remembered`."""
        with self._lock:
            negative = self._negatives.get(wanted)
            if remembered and negative is not None and negative.until > self._clock():
                raise negative.error
            flight = self._flights.get(wanted)
            if flight is None:
                flight = self._flights[wanted] = self._started(wanted)
        if not flight.done.wait(self._deadline_seconds):
            late = f"{wanted.name}: no answer within {self._deadline_seconds:g} s"
            if self.finish(flight, errors.UnavailableError(late)) and flight.cancel is not None:
                flight.cancel()
        if flight.error is not None:
            raise flight.error
        return flight

    def _started(self, wanted: Wanted) -> Flight:
        """With the lock held."""
        if self._running >= _MAX_LOOKUPS:
            raise errors.UnavailableError(f"{wanted.name}: {_MAX_LOOKUPS} lookups wait for origins already")
        flight = Flight(wanted, self._clock())
        thread = threading.Thread(target=self._run, args=(flight,), name="lookup", daemon=True)
        try:
            thread.start()
        except RuntimeError as exc:
            raise errors.UnavailableError(f"{wanted.name}: no thread for a lookup: {exc}") from exc
        self._running += 1
        return flight

    def finish(self, flight: Flight, error: errors.ImagefsError | None) -> bool:
        """Settle a lookup, if nobody has. Whether this outcome is the one that counts."""
        with self._lock:
            if flight.settled:
                return False
            flight.settled = True
            flight.error = error
            self._flights.pop(flight.wanted, None)
            if error is None:
                self._negatives.pop(flight.wanted, None)
            else:
                self._remember(flight.wanted, error)
        try:
            self._settled(flight)
        finally:
            flight.done.set()
        return True

    def _run(self, flight: Flight) -> None:
        try:
            self._work(flight)
        except errors.ImagefsError as exc:
            self.finish(flight, exc)
        except Exception as exc:
            # A bug must leave an ordinary pull, not a Prepare that waits.
            self.finish(flight, errors.ImagefsError(f"{flight.wanted.name}: lookup failed: {exc!r}"))
        else:
            self.finish(flight, None)
        finally:
            with self._lock:
                self._running -= 1

    def _remember(self, wanted: Wanted, error: errors.ImagefsError) -> None:
        now, seconds = self._clock(), self._negative_seconds
        if not isinstance(error, errors.NotFoundError | lookup.RefusedError):
            seconds = min(seconds, UNAVAILABLE_SECONDS)
        if len(self._negatives) >= _MAX_NEGATIVES:
            self._negatives = {key: value for key, value in self._negatives.items() if value.until > now}
        if len(self._negatives) < _MAX_NEGATIVES:
            self._negatives[wanted] = _Negative(now + seconds, error)
