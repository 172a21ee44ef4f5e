"""What one can ask of a Kubernetes API server, typed: `Api`.

Called by the serving provider, the operator, the warm pool and `leader`, from any thread; every call blocks
its caller for a bounded time. Nothing is retried here but what `with_conflicts` is given: callers are loops
that look again anyway.

Writes: `apply` for objects that we own whole (server-side apply: fields of ours that we no longer say go
away, those of others stay), `patch` for a few fields of what others own, with `version` where it must be the
object that was read. A dry run is checked and admitted by the API server, and changes nothing.

Spec: Kubernetes API concepts: server-side apply, optimistic concurrency, subresources, dryRun=All.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from cluster import errors, objects
from cluster.connection import Connection, Stream
from cluster.objects import Body, Kind, Listing, Object, Scale

_MANAGER = "glowplug"
_PAGE_OBJECTS = 500
_MAX_OBJECTS = 50_000
_WATCH_SECONDS = 240
"""How long the API server is asked to keep one watch open."""
_WATCH_SILENCE_SECONDS = 300.0
_MAX_LOG_BYTES = 1 << 20
_CONFLICTS = 8
_CONFLICT_SECONDS = 0.02

T = TypeVar("T")


class Api:
    """See the module. `namespace` is what a namespace left out means."""

    def __init__(self, connection: Connection, namespace: str | None = None) -> None:
        self._connection = connection
        self.namespace = namespace or connection.namespace

    # -- reading -----------------------------------------------------------------------------------

    def get(self, kind: Kind, name: str, namespace: str | None = None) -> Object:
        """NotFoundError."""
        path = kind.path(namespace or self.namespace, name)
        return objects.parse(self._connection.request("GET", path), path)

    def list(
        self,
        kind: Kind,
        namespace: str | None = None,
        *,
        labels: Mapping[str, str] | None = None,
        fields: Mapping[str, str] | None = None,
        everywhere: bool = False,
    ) -> Listing:
        """A whole collection, page by page; `everywhere` is all namespaces."""
        path = kind.path(None if everywhere else namespace or self.namespace)
        query = {"limit": str(_PAGE_OBJECTS), **_selected(labels, fields)}
        found: list[Object] = []
        while True:
            page, version, rest = objects.listing(self._connection.request("GET", path, query=query), path)
            found += page
            if len(found) > _MAX_OBJECTS:
                raise errors.InvalidError(f"{path}: more than {_MAX_OBJECTS} objects; select fewer")
            if not rest:
                return Listing(tuple(found), version)
            query["continue"] = rest

    def watch(
        self,
        kind: Kind,
        version: str,
        namespace: str | None = None,
        *,
        labels: Mapping[str, str] | None = None,
        fields: Mapping[str, str] | None = None,
        everywhere: bool = False,
    ) -> Stream:
        """The lines of one watch, for `objects.change`; `watching.Watcher` is what most want."""
        query = {
            "watch": "true",
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(_WATCH_SECONDS),
            **_selected(labels, fields),
        }
        path = kind.path(None if everywhere else namespace or self.namespace)
        return self._connection.stream(path, query, _WATCH_SILENCE_SECONDS)

    def logs(
        self, pod: str, namespace: str | None = None, *, container: str, lines: int, previous: bool = False
    ) -> str:
        """The last lines of a container, at most 1 MiB of them; `previous`: of the one before it crashed."""
        query = {"container": container, "tailLines": str(lines), "limitBytes": str(_MAX_LOG_BYTES)}
        if previous:
            query["previous"] = "true"
        path = objects.POD.path(namespace or self.namespace, pod, "log")
        return self._connection.text(path, query, _MAX_LOG_BYTES)

    # -- writing -----------------------------------------------------------------------------------

    def create(
        self, kind: Kind, body: Body, namespace: str | None = None, *, dry_run: bool = False
    ) -> Object:
        """ConflictError if the name is taken."""
        path = kind.path(namespace or self.namespace)
        return objects.parse(
            self._connection.request("POST", path, query=_written(dry_run), body=_typed(kind, body)), path
        )

    def apply(
        self,
        kind: Kind,
        name: str,
        body: Body,
        namespace: str | None = None,
        *,
        subresource: str = "",
        manager: str = _MANAGER,
        dry_run: bool = False,
    ) -> Object:
        """Make the object have what `body` says, creating it if need be; takes fields over from others."""
        path = kind.path(namespace or self.namespace, name, subresource)
        query = {"fieldManager": manager, "force": "true", **_written(dry_run)}
        whole = _typed(kind, body)
        metadata = {**whole.get("metadata", {}), "name": name}
        if kind.namespaced:
            metadata["namespace"] = namespace or self.namespace
        answer = self._connection.request(
            "PATCH",
            path,
            query=query,
            body={**whole, "metadata": metadata},
            content_type="application/apply-patch+yaml",
        )
        return objects.parse(answer, path)

    def patch(
        self,
        kind: Kind,
        name: str,
        body: Body,
        namespace: str | None = None,
        *,
        subresource: str = "",
        version: str | None = None,
        dry_run: bool = False,
    ) -> Object:
        """Merge fields into the object (RFC 7396); None in `body` takes a field away. With `version`, only if
        the object is still that one: ConflictError otherwise."""
        path = kind.path(namespace or self.namespace, name, subresource)
        return objects.parse(self._merge(path, body, version, dry_run), path)

    def delete(
        self,
        kind: Kind,
        name: str,
        namespace: str | None = None,
        *,
        grace_seconds: int | None = None,
        uid: str | None = None,
        dry_run: bool = False,
    ) -> None:
        """What it owns goes after it. With `uid`, only that very object: ConflictError otherwise. An object
        that is gone already is no error."""
        body: dict[str, Any] = {"propagationPolicy": "Background"}
        if grace_seconds is not None:
            body["gracePeriodSeconds"] = grace_seconds
        if uid is not None:
            body["preconditions"] = {"uid": uid}
        path = kind.path(namespace or self.namespace, name)
        try:
            self._connection.request("DELETE", path, query=_written(dry_run), body=body)
        except errors.NotFoundError:
            return

    def evict(self, pod: str, namespace: str | None = None, *, grace_seconds: int | None = None) -> None:
        """End a pod as far as its PodDisruptionBudget allows: DisruptionError where it does not."""
        options = {} if grace_seconds is None else {"deleteOptions": {"gracePeriodSeconds": grace_seconds}}
        body = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": pod, "namespace": namespace or self.namespace},
            **options,
        }
        path = objects.POD.path(namespace or self.namespace, pod, "eviction")
        try:
            self._connection.request("POST", path, body=body)
        except errors.NotFoundError:
            return

    # -- scaling -----------------------------------------------------------------------------------

    def scale(self, kind: Kind, name: str, namespace: str | None = None) -> Scale:
        """The scale subresource."""
        path = kind.path(namespace or self.namespace, name, "scale")
        return objects.scale(self._connection.request("GET", path), path)

    def set_scale(
        self,
        kind: Kind,
        name: str,
        replicas: int,
        namespace: str | None = None,
        *,
        version: str | None = None,
        dry_run: bool = False,
    ) -> Scale:
        """Have this many. With `version` (of a `Scale`), only if nobody changed it since: ConflictError."""
        path = kind.path(namespace or self.namespace, name, "scale")
        return objects.scale(self._merge(path, {"spec": {"replicas": replicas}}, version, dry_run), path)

    def _merge(self, path: str, body: Body, version: str | None, dry_run: bool) -> Any:
        if version is not None:
            body = {**body, "metadata": {**body.get("metadata", {}), "resourceVersion": version}}
        return self._connection.request(
            "PATCH",
            path,
            query={"fieldManager": _MANAGER, **_written(dry_run)},
            body=body,
            content_type="application/merge-patch+json",
        )


def with_conflicts(action: Callable[[], T], stopping: threading.Event | None = None) -> T:
    """Run `action` (read, decide, write with the version that was read) again while somebody else wrote in
    between. ConflictError when that does not end."""
    for attempt in range(_CONFLICTS):
        try:
            return action()
        except errors.ConflictError:
            if attempt + 1 == _CONFLICTS or (stopping is not None and stopping.is_set()):
                raise
            pause_seconds = _CONFLICT_SECONDS * 2**attempt * (0.5 + random.random())  # noqa: S311
            (stopping or threading.Event()).wait(pause_seconds)
    raise AssertionError("not reached")


def _typed(kind: Kind, body: Body) -> dict[str, Any]:
    return {"apiVersion": kind.group_version, "kind": kind.name, **body}


def _written(dry_run: bool) -> dict[str, str]:
    return {"dryRun": "All"} if dry_run else {}


def _selected(labels: Mapping[str, str] | None, fields: Mapping[str, str] | None) -> dict[str, str]:
    query = {}
    if labels:
        query["labelSelector"] = objects.labels(labels)
    if fields:
        query["fieldSelector"] = objects.labels(fields)
    return query
