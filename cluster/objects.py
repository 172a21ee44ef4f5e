"""Objects of the Kubernetes API as values: what all kinds have in common. Pure.

Called by `api` and `watching`, and by whoever parses a kind of its own from `Object.body`. An object is as
the API server sent it; what makes no sense is an `InvalidError` that names the field.

Spec: Kubernetes API conventions (metadata, resourceVersion, generation, ownerReferences, finalizers).
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import types
from collections.abc import Mapping, Sequence
from typing import Any

from cluster import errors

Body = Mapping[str, Any]
"""A JSON object, as it is sent or was received."""


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """A resource of the API. `group_version` is "v1" or "GROUP/VERSION"; `plural` stands in paths."""

    group_version: str
    name: str
    plural: str
    namespaced: bool = True

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str = "") -> str:
        """Below the API server's URL. No namespace: the whole cluster's collection."""
        root = "/apis/" if "/" in self.group_version else "/api/"
        parts = [root + self.group_version]
        if self.namespaced and namespace is not None:
            parts.append(f"namespaces/{namespace}")
        parts.append(self.plural)
        parts += [each for each in (name, subresource) if each]
        return "/".join(parts)


POD = Kind("v1", "Pod", "pods")
NODE = Kind("v1", "Node", "nodes", namespaced=False)
SERVICE = Kind("v1", "Service", "services")
SECRET = Kind("v1", "Secret", "secrets")
CONFIG_MAP = Kind("v1", "ConfigMap", "configmaps")
EVENT = Kind("v1", "Event", "events")
ENDPOINT_SLICE = Kind("discovery.k8s.io/v1", "EndpointSlice", "endpointslices")
DEPLOYMENT = Kind("apps/v1", "Deployment", "deployments")
LEASE = Kind("coordination.k8s.io/v1", "Lease", "leases")


@dataclasses.dataclass(frozen=True, slots=True)
class Owner:
    """An ownerReference: who this object is deleted with."""

    group_version: str
    kind: str
    name: str
    uid: str
    controller: bool = False

    def body(self) -> Body:
        return {
            "apiVersion": self.group_version,
            "kind": self.kind,
            "name": self.name,
            "uid": self.uid,
            "controller": self.controller,
        }


@dataclasses.dataclass(frozen=True, slots=True)
class Meta:
    """Metadata. Times are seconds since the epoch; `version` is the resourceVersion, opaque."""

    name: str
    namespace: str = ""
    uid: str = ""
    version: str = ""
    generation: int = 0
    created_at: float = 0.0
    deleting_at: float | None = None
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    annotations: Mapping[str, str] = dataclasses.field(default_factory=dict)
    finalizers: tuple[str, ...] = ()
    owners: tuple[Owner, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Object:
    """One object. `body` is all of it, not to be changed."""

    meta: Meta
    body: Body

    def at(self, *path: str) -> Any:
        """What lies at a path of keys, None where it ends early."""
        found: Any = self.body
        for key in path:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found

    def text(self, *path: str) -> str:
        """A string, "" where there is none."""
        found = self.at(*path)
        return found if isinstance(found, str) else ""

    def number(self, *path: str) -> int:
        """An integer, 0 where there is none."""
        found = self.at(*path)
        return found if isinstance(found, int) and not isinstance(found, bool) else 0

    def items(self, *path: str) -> Sequence[Body]:
        """A list's objects, none where there is no list."""
        found = self.at(*path)
        return [each for each in found if isinstance(each, Mapping)] if isinstance(found, list) else []

    @property
    def key(self) -> str:
        """NAMESPACE/NAME, or the name alone where there are no namespaces."""
        return f"{self.meta.namespace}/{self.meta.name}" if self.meta.namespace else self.meta.name


@dataclasses.dataclass(frozen=True, slots=True)
class Listing:
    """A whole collection, and the version to watch it from."""

    objects: tuple[Object, ...]
    version: str


class ChangeKind(enum.Enum):
    ADDED = "ADDED"
    MODIFIED = "MODIFIED"
    DELETED = "DELETED"
    BOOKMARK = "BOOKMARK"


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """One line of a watch. A bookmark's object has a version only."""

    kind: ChangeKind
    object: Object


@dataclasses.dataclass(frozen=True, slots=True)
class Scale:
    """The scale subresource: how many there should be, and how many there are."""

    replicas: int
    current: int
    selector: str
    version: str


def parse(body: object, where: str) -> Object:
    """An object as the API server sent it. InvalidError."""
    if not isinstance(body, Mapping):
        raise errors.InvalidError(f"{where}: not an object")
    return Object(_meta(body, where), body)


def listing(body: object, where: str) -> tuple[tuple[Object, ...], str, str]:
    """A page of a list: its objects, its version, and what to continue with ("" at the end). InvalidError."""
    if not isinstance(body, Mapping) or not isinstance(body.get("items") or [], list):
        raise errors.InvalidError(f"{where}: not a list")
    found = _mapping(body, "metadata", where)
    objects = tuple(parse(each, where) for each in body.get("items") or [])
    return objects, _string(found, "resourceVersion", where), _string(found, "continue", where)


def change(body: object, where: str) -> Change:
    """A line of a watch. ExpiredError (the watch is too far behind), UnavailableError (the server ends it),
    InvalidError."""
    if not isinstance(body, Mapping):
        raise errors.InvalidError(f"{where}: a change that is no object")
    said, item = body.get("type"), body.get("object")
    if said == "ERROR":
        found = item if isinstance(item, Mapping) else {}
        text = f"{where}: {explained(found, 'the watch ends')}"
        raise errors.ExpiredError(text) if found.get("code") == 410 else errors.UnavailableError(text)
    try:
        kind = ChangeKind(said)
    except ValueError:
        raise errors.InvalidError(f"{where}: a change of type {said!r:.40}") from None
    if kind is ChangeKind.BOOKMARK:
        found = _mapping(item if isinstance(item, Mapping) else {}, "metadata", where)
        return Change(kind, Object(Meta("", version=_string(found, "resourceVersion", where)), {}))
    return Change(kind, parse(item, where))


def scale(body: object, where: str) -> Scale:
    """A scale subresource. InvalidError."""
    found = parse(body, where)
    return Scale(
        replicas=found.number("spec", "replicas"),
        current=found.number("status", "replicas"),
        selector=found.text("status", "selector"),
        version=found.meta.version,
    )


def explained(status: Body, otherwise: str) -> str:
    """The message of a Status, short and printable."""
    message = status.get("message")
    if not isinstance(message, str) or not message:
        return otherwise
    return "".join(c if c.isprintable() else " " for c in message[:600])


def seconds(text: object) -> float | None:
    """An RFC 3339 time as seconds since the epoch, None for what is none."""
    if not isinstance(text, str):
        return None
    try:
        found = datetime.datetime.fromisoformat(text)
    except ValueError:
        return None
    if found.tzinfo is None:
        found = found.replace(tzinfo=datetime.UTC)
    try:
        return found.timestamp()
    except (OverflowError, ValueError):
        return None


def micro_time(at: float) -> str:
    """Seconds since the epoch as the API's MicroTime."""
    moment = datetime.datetime.fromtimestamp(at, datetime.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def whole_time(at: float) -> str:
    """Seconds since the epoch as the API's Time."""
    return datetime.datetime.fromtimestamp(int(at), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def labels(selected: Mapping[str, str]) -> str:
    """An equality selector."""
    return ",".join(f"{name}={value}" for name, value in sorted(selected.items()))


def _meta(body: Body, where: str) -> Meta:
    found = _mapping(body, "metadata", where)
    generation = found.get("generation")
    return Meta(
        name=_string(found, "name", where),
        namespace=_string(found, "namespace", where),
        uid=_string(found, "uid", where),
        version=_string(found, "resourceVersion", where),
        generation=generation if isinstance(generation, int) else 0,
        created_at=seconds(found.get("creationTimestamp")) or 0.0,
        deleting_at=seconds(found.get("deletionTimestamp")),
        labels=_strings(found, "labels", where),
        annotations=_strings(found, "annotations", where),
        finalizers=tuple(str(each) for each in _sequence(found, "finalizers", where)),
        owners=tuple(_owner(each) for each in _sequence(found, "ownerReferences", where)),
    )


def _owner(found: object) -> Owner:
    said = found if isinstance(found, Mapping) else {}
    words = [str(said.get(key) or "") for key in ("apiVersion", "kind", "name", "uid")]
    return Owner(words[0], words[1], words[2], words[3], said.get("controller") is True)


def _mapping(body: Body, key: str, where: str) -> Body:
    found = body.get(key)
    if found is None:
        return types.MappingProxyType({})
    if not isinstance(found, Mapping):
        raise errors.InvalidError(f"{where}: {key} is no object")
    return found


def _sequence(body: Body, key: str, where: str) -> Sequence[object]:
    found = body.get(key) or []
    if not isinstance(found, list):
        raise errors.InvalidError(f"{where}: metadata.{key} is no list")
    return found


def _string(body: Body, key: str, where: str) -> str:
    found = body.get(key)
    if found is None:
        return ""
    if not isinstance(found, str):
        raise errors.InvalidError(f"{where}: metadata.{key} is no string")
    return found


def _strings(body: Body, key: str, where: str) -> Mapping[str, str]:
    found = body.get(key) or {}
    if not isinstance(found, Mapping) or not all(isinstance(each, str) for each in found.values()):
        raise errors.InvalidError(f"{where}: metadata.{key} is no map of strings")
    return types.MappingProxyType(dict(found))
