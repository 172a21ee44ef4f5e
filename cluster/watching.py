"""A collection of objects, kept current by a thread of its own: listed, then watched.

`Watcher` is given a function that turns an object into a value, so that nothing is kept longer than needed
(None: not wanted). While the API server is away it keeps what it last knew and says so (`trouble`), then goes
on from there; a watch that is too far behind (410), or whose server goes on failing, begins again with a
list, in which what has gone meanwhile is missing.

Called from any thread; `changed` runs in the watcher's.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

from cluster import errors, objects
from cluster.api import Api
from cluster.connection import Stream
from cluster.objects import ChangeKind, Kind, Object

_FIRST_DELAY_SECONDS, _MAX_DELAY_SECONDS = 0.2, 30.0
_BETWEEN_SECONDS = 0.05
"""A server that ends watches at once is asked a few times a second, not thousands."""
_FAILURES_BEFORE_LIST = 5
"""A server that is back is watched from where it was left, because its other clients come back, too, and
lists cost it most; one that goes on refusing may have lost the version that it is asked for."""

_log = logging.getLogger(__name__)
T = TypeVar("T")


class Watcher(Generic[T]):
    """Values by `Object.key`. InvalidError from `parse` is logged, and the object left out."""

    def __init__(
        self,
        api: Api,
        kind: Kind,
        parse: Callable[[Object], T | None],
        *,
        namespace: str | None = None,
        labels: Mapping[str, str] | None = None,
        fields: Mapping[str, str] | None = None,
        everywhere: bool = False,
        changed: Callable[[Mapping[str, T]], None] | None = None,
    ) -> None:
        self._api = api
        self._kind = kind
        self._parse = parse
        self._namespace = namespace
        self._labels, self._fields, self._everywhere = labels, fields, everywhere
        self._changed = changed
        self._lock = threading.Lock()
        self._values: Mapping[str, T] = {}
        self._trouble: errors.ClusterError | None = None
        self._stream: Stream | None = None
        self._stopped = threading.Event()
        self._listed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"watch {kind.plural}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Have the thread end, without waiting for it; `current` keeps answering."""
        self._stopped.set()
        with self._lock:
            stream = self._stream
        if stream is not None:
            stream.close()

    def stop(self) -> None:
        """`end`, and wait for it: as long as an answer may take, where a list is under way."""
        self.end()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def current(self) -> Mapping[str, T]:
        """What was last known; empty before the first list."""
        with self._lock:
            return self._values

    def trouble(self) -> errors.ClusterError | None:
        """Why `current` may be old, None while it is not."""
        with self._lock:
            return self._trouble

    def wait(self, timeout_seconds: float) -> bool:
        """Whether the collection has been listed once, waiting that long for it."""
        return self._listed.wait(timeout_seconds)

    def _run(self) -> None:
        failures, version = 0, ""
        while not self._stopped.is_set():
            try:
                if not version:
                    version = self._list()
                for reached in self._follow(version):
                    version, failures = reached, 0
                failures = 0
            except errors.ExpiredError:
                version = ""
            except errors.ClusterError as exc:
                if self._stopped.is_set():
                    return
                failures += 1
                if not isinstance(exc, errors.UnavailableError) or failures >= _FAILURES_BEFORE_LIST:
                    version = ""
                self._troubled(exc, first=failures == 1)
            nominal = min(_MAX_DELAY_SECONDS, _FIRST_DELAY_SECONDS * 2.0 ** min(failures, 10))
            # Whoever watches comes back to the API server at once when it returns.
            self._stopped.wait(nominal * (0.5 + random.random()) if failures else _BETWEEN_SECONDS)  # noqa: S311

    def _list(self) -> str:
        found = self._api.list(
            self._kind,
            self._namespace,
            labels=self._labels,
            fields=self._fields,
            everywhere=self._everywhere,
        )
        parsed = {each.key: self._value(each) for each in found.objects}
        with self._lock:
            self._trouble = None
        self._replace({key: value for key, value in parsed.items() if value is not None})
        return found.version

    def _follow(self, version: str) -> Iterator[str]:
        """Apply one watch's changes until it ends; yields each version reached."""
        stream = self._api.watch(
            self._kind,
            version,
            self._namespace,
            labels=self._labels,
            fields=self._fields,
            everywhere=self._everywhere,
        )
        with self._lock:
            self._stream, self._trouble = stream, None
        try:
            if self._stopped.is_set():
                return
            for line in stream:
                change = objects.change(line, self._kind.plural)
                if change.kind is not ChangeKind.BOOKMARK:
                    self._apply(change)
                yield change.object.meta.version or version
        finally:
            with self._lock:
                self._stream = None
            stream.close()

    def _apply(self, change: objects.Change) -> None:
        values = dict(self.current())  # only this thread writes
        values.pop(change.object.key, None)
        value = None if change.kind is ChangeKind.DELETED else self._value(change.object)
        if value is not None:
            values[change.object.key] = value
        self._replace(values)

    def _value(self, item: Object) -> T | None:
        try:
            return self._parse(item)
        except errors.InvalidError as exc:
            _log.warning("%s %s is left out: %s", self._kind.name, item.key, exc)
            return None

    def _replace(self, values: Mapping[str, T]) -> None:
        with self._lock:
            same = values == self._values and self._listed.is_set()
            self._values = values
        self._listed.set()
        if not same and self._changed is not None:
            self._changed(values)

    def _troubled(self, exc: errors.ClusterError, first: bool) -> None:
        with self._lock:
            self._trouble = exc
        if first:
            _log.warning("cannot watch %s: %s; going on with what was known", self._kind.plural, exc)
