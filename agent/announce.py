"""What a cluster's operators should see without looking at this node: warnings, as Kubernetes events.

A listener of the observer, made by the daemon where an API server is configured. `on_event` only queues; a
thread posts, so that an API server that hangs holds up nobody. Rate-limited by kind, and bounded: of what is
too much, the number is told with the next one.
"""

from __future__ import annotations

import datetime
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from agent import logs, observer
from cluster import objects
from cluster.api import Api

_NAMESPACE = "default"
_LEVELS = ("warning", "error")
_QUIET_SECONDS = 60.0
_BURST = 5
_WAITING = 64
_MAX_MESSAGE_CHARACTERS = 1000

_log = logging.getLogger(__name__)


class NodeEvents(Protocol):
    """Where events go."""

    def post(self, reason: str, message: str, *, warning: bool) -> None:
        """Make an event on this node. May block, and raise errors of ours."""


class Node:
    """This node's events in the API server."""

    def __init__(self, api: Api, node: str) -> None:
        self._api = api
        self._node = node

    def post(self, reason: str, message: str, *, warning: bool) -> None:
        """As NodeEvents; once for each event: they are rate-limited before they come here."""
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        document: dict[str, Any] = {
            "metadata": {"generateName": "glowplug-", "namespace": _NAMESPACE},
            # As kubelet does: a node is not in a namespace, and its uid here is its name.
            "involvedObject": {
                "apiVersion": "v1",
                "kind": "Node",
                "name": self._node,
                "uid": self._node,
            },
            "reason": reason,
            "message": message,
            "type": "Warning" if warning else "Normal",
            "source": {"component": "glowplug-agent", "host": self._node},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        self._api.create(objects.EVENT, document, _NAMESPACE)


class Announcer:
    """See the module."""

    def __init__(self, target: NodeEvents, clock: Callable[[], float] = time.monotonic) -> None:
        self._target = target
        self._clock = clock
        self._lock = threading.Lock()
        self._windows: dict[str, tuple[float, int]] = {}
        self._left_out: dict[str, int] = {}
        self._queue: queue.Queue[tuple[str, str, bool] | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._run, name="announce", daemon=True)

    def start(self) -> None:
        """Begin to post."""
        self._thread.start()

    def stop(self) -> None:
        """What is still queued is left out."""
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            _log.warning("%d events were not posted", self._queue.qsize())

    def on_event(self, event: observer.Event) -> None:
        """Queue it, if it is for the cluster."""
        if event.level not in _LEVELS and event.kind != observer.ORDINARY_PULL:
            return
        with self._lock:
            left_out = self._admitted(event.kind)
        if left_out is None:
            return
        more = f" (and {left_out} more of this kind)" if left_out else ""
        message = logs.masked(event.message)[:_MAX_MESSAGE_CHARACTERS] + more
        reason = "".join(word.capitalize() for word in event.kind.split("_"))
        try:
            self._queue.put_nowait((reason, message, event.level in _LEVELS))
        except queue.Full:
            with self._lock:
                self._left_out[event.kind] = self._left_out.get(event.kind, 0) + left_out + 1

    def on_pull(self, reference: str, *, lazy: bool, seconds: float, layers: int, reason: str | None) -> None:
        """The observer makes an event of it."""

    def on_phase(self, reference: str, phase: str, seconds: float) -> None:
        """Not for the cluster."""

    def on_grpc(self, method: str, code: str, seconds: float) -> None:
        """Not for the cluster."""

    def _admitted(self, kind: str) -> int | None:
        """How many of this kind were left out before this one; None if it is to be left out itself."""
        now = self._clock()
        began, count = self._windows.get(kind, (now, 0))
        if now - began >= _QUIET_SECONDS:
            began, count = now, 0
        if count >= _BURST:
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return None
        self._windows[kind] = (began, count + 1)
        return self._left_out.pop(kind, 0)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            reason, message, warning = item
            try:
                self._target.post(reason, message, warning=warning)
            except Exception as exc:
                # The event is in the log and on the status page; the API server may be back for the next.
                _log.warning("a Kubernetes event could not be posted: %s", exc)
