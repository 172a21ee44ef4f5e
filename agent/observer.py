"""What happens in the agent, said once by the part that knows it: to the log, the metrics, the status page.

Every part is given an `Observer` and calls it; the base class does nothing, which is what tests of other
parts want. `Recorder` is the real one: a log line and a place in a bounded ring for each event, and whoever
else listens (metrics, starts, Kubernetes) by the `Listener` protocol. Any thread; a call never raises and
never waits for anything but a short lock, because it is made in the middle of a Prepare.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

Level = Literal["debug", "info", "warning", "error"]

ORDINARY_PULL = "ordinary_pull"
"""The kind of event that an ordinary pull makes, with its reason."""

_log = logging.getLogger("agent.events")
_LEVELS: Mapping[str, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


class Observer:
    """What the parts call. This one ignores everything."""

    def event(
        self,
        kind: str,
        message: str,
        *,
        level: Level = "info",
        image: str | None = None,
        snapshot: str | None = None,
        **fields: object,
    ) -> None:
        """Something that an operator may want to know. `kind` is one word of a small set ("quarantined",
        "mounted"), a metric's label; `image` is a reference; `fields` are shown as they are, never secrets.
        """

    def pulled(
        self, reference: str, *, lazy: bool, seconds: float, layers: int, reason: str | None = None
    ) -> None:
        """A pull was decided: lazy, or an ordinary one because of `reason`, a short phrase of a small set
        ("no block image", "unavailable", "refused"). Makes the event of an ordinary pull, too."""

    def phase(self, reference: str, phase: str, seconds: float) -> None:
        """A phase of an image's start has just ended ("lookup", "metadata", "mount"), and what it took."""

    def grpc(self, method: str, code: str, seconds: float) -> None:
        """A call of containerd's was answered: the method's bare name, the status code's name."""


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """One event. `number` grows by one, `at_seconds` is wall-clock time."""

    number: int
    at_seconds: float
    kind: str
    level: Level
    message: str
    image: str | None
    snapshot: str | None
    fields: Mapping[str, object]

    def to_json(self) -> dict[str, Any]:
        """As the API gives it; fields that JSON has no form for as text."""
        document = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        document["fields"] = {
            name: value if isinstance(value, str | int | float | bool | None) else str(value)
            for name, value in self.fields.items()
        }
        return document


class Listener(Protocol):
    """Who wants to hear what a Recorder is told. Called on the thread of whoever observed; must not wait."""

    def on_event(self, event: Event) -> None:
        """After the event was logged and kept."""

    def on_pull(self, reference: str, *, lazy: bool, seconds: float, layers: int, reason: str | None) -> None:
        """As Observer.pulled."""

    def on_phase(self, reference: str, phase: str, seconds: float) -> None:
        """As Observer.phase."""

    def on_grpc(self, method: str, code: str, seconds: float) -> None:
        """As Observer.grpc."""


class Recorder(Observer):
    """See the module. `kept_events` bounds the ring; `wall_clock` gives the time of events."""

    def __init__(
        self,
        listeners: Sequence[Listener] = (),
        *,
        kept_events: int = 512,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._listeners = tuple(listeners)
        self._wall_clock = wall_clock
        self._lock = threading.Lock()
        self._numbered = 0
        self._events: collections.deque[Event] = collections.deque(maxlen=kept_events)

    def event(
        self,
        kind: str,
        message: str,
        *,
        level: Level = "info",
        image: str | None = None,
        snapshot: str | None = None,
        **fields: object,
    ) -> None:
        """See Observer."""
        with self._lock:
            self._numbered += 1
            event = Event(self._numbered, self._wall_clock(), kind, level, message, image, snapshot, fields)
            self._events.append(event)
        _log.log(_LEVELS.get(level, logging.INFO), "%s", message, extra={"event": event})
        self._tell(lambda listener: listener.on_event(event))

    def pulled(
        self, reference: str, *, lazy: bool, seconds: float, layers: int, reason: str | None = None
    ) -> None:
        """See Observer."""
        if lazy:
            text = f"{reference}: {layers} layers at hand lazily after {seconds:.3f} s"
            self.event("lazy_pull", text, image=reference, layers=layers, seconds=round(seconds, 3))
        else:
            # An image that was never converted is everyday life; one that was and cannot be used is not.
            level: Level = "info" if reason == "no block image" else "warning"
            self.event(
                ORDINARY_PULL,
                f"{reference}: ordinary pull: {reason or 'reason unknown'}",
                level=level,
                image=reference,
                reason=reason,
                seconds=round(seconds, 3),
            )
        self._tell(
            lambda listener: listener.on_pull(
                reference, lazy=lazy, seconds=seconds, layers=layers, reason=reason
            )
        )

    def phase(self, reference: str, phase: str, seconds: float) -> None:
        """See Observer."""
        self._tell(lambda listener: listener.on_phase(reference, phase, seconds))

    def grpc(self, method: str, code: str, seconds: float) -> None:
        """See Observer."""
        self._tell(lambda listener: listener.on_grpc(method, code, seconds))

    def events(self, after: int = 0) -> list[Event]:
        """The kept events with numbers above `after`, oldest first."""
        with self._lock:
            return [event for event in self._events if event.number > after]

    def _tell(self, call: Callable[[Listener], None]) -> None:
        for listener in self._listeners:
            try:
                call(listener)
            except Exception:
                # Whoever observes is in the middle of something that matters more.
                _log.exception("a listener of the observer failed")
