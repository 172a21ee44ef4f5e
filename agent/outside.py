"""The agent seen from outside: metrics, readiness, status, events, starts and the page, as public routes.

Called by the daemon: `Outside(...)` first, because every other part is given its `observer`; `show` once
store and API exist; `start` and `stop` with the rest. What is answered is read when it is asked for; what the
store says is kept for some seconds, because a node may have thousands of snapshots and several who watch.
"""

from __future__ import annotations

import collections
import importlib.metadata
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agent import announce, api, config, logs, metrics, observer, snapshots, status
from agent.devicefeed import DeviceFeed
from agent.rows import ImageRow, SnapshotRow
from agent.starts import Starts
from agent.store import Store
from cluster.api import Api
from imagefs import errors, holders

_FRESH_SECONDS = 5.0
_SHOWN_EVENTS = 100

Check = Callable[[], "str | None"]
"""None when all is well, else what is wrong."""


class Outside:
    """See the module. `cluster` is the API server to which warnings go as events of this node; `node` the
    node's name there, or else the host's."""

    def __init__(self, settings: config.Settings, cluster: Api | None = None) -> None:
        self._settings = settings
        self.node = settings.kubernetes.node_name or socket.gethostname()
        self._announcer = announce.Announcer(announce.Node(cluster, self.node)) if cluster else None
        self._metrics = metrics.Metrics()
        self._starts = Starts()
        self._starts.on_settled = self._metrics.on_settled
        listeners: list[observer.Listener] = [self._metrics, self._starts]
        if self._announcer is not None:
            listeners.append(self._announcer)
        self.observer = observer.Recorder(listeners)
        self.feed = DeviceFeed(settings.state, self._starts, self.observer)
        self._checks: dict[str, Check] = {
            "snapshotter socket": lambda: _listens(settings.socket),
            "device server": lambda: self.feed.status().error,
        }
        self._store: _StoreView | None = None
        self._started_at = time.monotonic()

    def show(self, store: Store, routes: api.Routes) -> None:
        """Register the routes, and read from this store."""
        view = _StoreView(store)
        self._store = view
        self._starts.layers_of = view.map_digests
        self._checks["database"] = view.check
        self._metrics.read_from(
            metrics.Sources(self.feed.status, self.feed.replaced, self._starts.misses, view.inventory)
        )
        routes.add("GET", "/metrics", self._render_metrics, public=True)
        routes.add("GET", "/readyz", self._ready, public=True)
        routes.add("GET", "/api/v1/status", lambda request: self.status(), public=True)
        routes.add("GET", "/api/v1/events", self._events, public=True)
        routes.add("GET", "/api/v1/starts", self._all_starts, public=True)
        routes.add("GET", "/", self._page, public=True)

    def start(self) -> None:
        """Follow starts."""
        self.feed.start()
        if self._announcer is not None:
            self._announcer.start()

    def stop(self) -> None:
        """End the threads."""
        self.feed.stop()
        if self._announcer is not None:
            self._announcer.stop()

    # -- answers -----------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Everything at a glance, as JSON values."""
        look = self.feed.status()
        document: dict[str, Any] = {
            "version": importlib.metadata.version("glowplug"),
            "node": self.node,
            "pid": os.getpid(),
            "up_seconds": round(time.monotonic() - self._started_at, 1),
            "not_ready": self.not_ready(),
            "server": look.status,
            "server_error": look.error,
            "replaced": self.feed.replaced(),
            "misses": self._starts.misses(),
            "mounts": self._mounts(),
            **(self._store.to_json() if self._store else {}),
        }
        return document

    def not_ready(self) -> dict[str, str]:
        """What /readyz finds missing: check -> what is wrong."""
        found = {name: check() for name, check in self._checks.items()}
        return {name: wrong for name, wrong in found.items() if wrong is not None}

    def _ready(self, request: api.Request) -> api.Response:
        wrong = self.not_ready()
        body = json.dumps({"ready": not wrong, "not_ready": wrong}).encode()
        return api.Response(body, status=503 if wrong else 200)

    def _render_metrics(self, request: api.Request) -> api.Response:
        self.feed.follow()
        return api.Response(self._metrics.render(), metrics.CONTENT_TYPE)

    def _events(self, request: api.Request) -> dict[str, Any]:
        after = request.query.get("after", "0")
        if not (after.isascii() and after.isdigit() and len(after) < 20):
            raise errors.InvalidInputError(f"/api/v1/events: after={after[:40]!r} is not an event's number")
        return {"events": [_shown(event) for event in self.observer.events(int(after))]}

    def _all_starts(self, request: api.Request) -> dict[str, Any]:
        self.feed.follow()
        return {"starts": self._starts.to_json()}

    def _page(self, request: api.Request) -> api.Response:
        self.feed.follow()
        events = [_shown(event) for event in self.observer.events()[-_SHOWN_EVENTS:]]
        page = status.render(self.status(), self._starts.to_json(), events, time.time())
        return api.Response(page.encode(), "text/html; charset=utf-8")

    def _mounts(self) -> list[dict[str, Any]]:
        """The layers' mount points that are mounted now."""
        below = self._settings.root / "layers"
        return [
            {"directory": point.directory, "filesystem": point.filesystem}
            for point in holders.mount_points()
            if point.directory.startswith(f"{below}/")
        ]


def _shown(event: observer.Event) -> dict[str, Any]:
    """An event for whoever may read the status: its text is as a registry or a kernel said it."""
    return {**event.to_json(), "message": logs.masked(event.message)}


def _listens(path: Path) -> str | None:
    """Whether containerd could connect. Nothing is asked: the loop that accepts is what may be missing."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.setblocking(False)
        try:
            connection.connect(str(path))
        except OSError as exc:
            return f"nobody takes connections on {path}: {exc.strerror}"
    return None


class _StoreView:
    """What the store holds, at most some seconds old. Any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._read_at = float("-inf")
        self._rows: tuple[Sequence[SnapshotRow], Sequence[ImageRow]] = ((), ())
        self._error: str | None = None

    def check(self) -> str | None:
        """Whether the store answers."""
        self._read()
        return self._error

    def map_digests(self, reference: str) -> list[str]:
        """The block maps of a reference's newest image, bottom first. Not kept: a start asks once."""
        try:
            rows = [row for row in self._store.images() if row.reference == reference]
        except errors.ImagefsError:
            return []
        newest = max(rows, key=lambda row: row.created_ns, default=None)
        return [layer.map_digest for layer in newest.layers] if newest else []

    def inventory(self) -> metrics.Inventory | None:
        """Counts, None when the store does not answer."""
        found, images = self._read()
        if self._error is not None:
            return None
        kinds = collections.Counter(row.kind for row in found)
        return metrics.Inventory(
            snapshots={kind.name.lower(): kinds[kind] for kind in snapshots.Kind},
            quarantined=sum(row.broken is not None for row in found),
            images=len(images),
            pinned=sum(image.pinned for image in images),
        )

    def to_json(self) -> Mapping[str, Any]:
        """The store's part of the status."""
        found, images = self._read()
        kinds = collections.Counter(row.kind for row in found)
        users = collections.Counter(row.image for row in found if row.image)
        return {
            "snapshots": {kind.name.lower(): kinds[kind] for kind in snapshots.Kind},
            "quarantined": [
                {"name": row.name, "why": logs.masked(row.broken)} for row in found if row.broken is not None
            ],
            "images": [
                {
                    "reference": image.reference,
                    "block_digest": image.block_digest,
                    "source_digest": image.source_digest,
                    "layers": len(image.layers),
                    "map_digests": [layer.map_digest for layer in image.layers],
                    "blob_bytes": sum(layer.blob_size for layer in image.layers),
                    "snapshots": users[image.block_digest],
                    "pinned": image.pinned,
                    "prefetched": image.prefetched,
                }
                for image in images
            ],
        }

    def _read(self) -> tuple[Sequence[SnapshotRow], Sequence[ImageRow]]:
        with self._lock:
            if time.monotonic() - self._read_at >= _FRESH_SECONDS:
                try:
                    self._rows = (self._store.walk(), self._store.images())
                    self._error = None
                except errors.ImagefsError as exc:
                    self._error = str(exc)
                self._read_at = time.monotonic()
            return self._rows
