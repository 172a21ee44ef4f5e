"""What each Envoy has been told, what it said to that, and what to tell it next. Pure.

Called by `ads`, which translates between these values and the two forms of the protocol; a `Stream` belongs
to one gRPC stream and is used from the control plane's loop only.

Invariants:
- Numbers of snapshots only grow, also over a restart of the control plane (the number begins with its start).
  A resource's own version is a digest of its bytes, so an Envoy that comes back to another control plane
  and says what it has gets only what differs.
- At most one response of a type waits for its ACK; changes meanwhile are sent together after it.
- What was sent and refused is not sent again until it changes; a refusal changes nothing else.
- Make before break: clusters and endpoints first, then listeners and routes; a cluster that is gone is taken
  away only after the Envoy acknowledged routes without it. (State of the world does not say what an Envoy
  that comes back has: there, this holds within a stream.)
- After a cluster was sent its endpoints are sent, changed or not: Envoy warms a changed cluster, and would
  wait 15 s for them.

Spec: xDS protocol, "Ack/Nack and resource type instance version", "Incremental xDS", "Eventual consistency".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

CLUSTER = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
ENDPOINTS = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
SECRET = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"  # noqa: S105 (a name)
LISTENER = "type.googleapis.com/envoy.config.listener.v3.Listener"
ROUTES = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
RUNTIME = "type.googleapis.com/envoy.service.runtime.v3.Runtime"

TYPES = (CLUSTER, ENDPOINTS, SECRET, LISTENER, ROUTES, RUNTIME)
"""In the order in which they are sent."""
_WILDCARD = frozenset({CLUSTER, LISTENER})
"""Types of which an Envoy that names nothing wants everything; a response has all of them."""


@dataclasses.dataclass(frozen=True, slots=True)
class Resource:
    """One resource: `body` is its message, encoded; `version` a digest of that."""

    name: str
    version: str
    body: bytes = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """All that there is at one time, as one zone's Envoys are to see it."""

    number: str
    resources: Mapping[str, Mapping[str, Resource]]
    """By type and name."""


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """What an Envoy said. State of the world: `names` is all that it wants now. Delta: `names` are added,
    `unsubscribed` leave, `known` (first request of a stream) are the versions that it has already."""

    type_url: str
    nonce: str = ""
    names: tuple[str, ...] = ()
    unsubscribed: tuple[str, ...] = ()
    known: Mapping[str, str] = dataclasses.field(default_factory=dict)
    error: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Response:
    """What to tell an Envoy. `removed` is for delta only."""

    type_url: str
    number: str
    nonce: str
    resources: tuple[Resource, ...]
    removed: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Standing:
    """How an Envoy stands with one type: what it accepted last, and why it refused what came after, if so."""

    accepted: str | None
    refused: str | None
    error: str | None


@dataclasses.dataclass(slots=True)
class _Subscription:
    delta: bool
    wildcard: bool
    names: set[str] = dataclasses.field(default_factory=set)
    sent: dict[str, Resource] = dataclasses.field(default_factory=dict)
    again: set[str] = dataclasses.field(default_factory=set)
    """Names to be sent although they have not changed."""
    answered: bool = False
    nonces: int = 0
    waiting: tuple[str, str] | None = None
    """Nonce and number of the response that waits for its ACK."""
    accepted: str | None = None
    refused: str | None = None
    error: str | None = None

    def wanted(self, resources: Mapping[str, Resource]) -> dict[str, Resource]:
        if self.wildcard:
            return dict(resources)
        return {name: resources[name] for name in self.names if name in resources}

    def missing(self, resources: Mapping[str, Resource]) -> set[str]:
        """Names in `sent` that are not, or no longer, to be there."""
        return {name for name in self.sent if name not in resources}


class Stream:
    """The conversation with one Envoy on one stream."""

    def __init__(self, delta: bool) -> None:
        self._delta = delta
        self._subscriptions: dict[str, _Subscription] = {}

    def receive(self, request: Request) -> None:
        """Take note of a request. Unknown types are subscribed to like others and never answered."""
        known = self._subscriptions.get(request.type_url)
        first = known is None
        subscription = known or _Subscription(
            self._delta, request.type_url in _WILDCARD and not (set(request.names) - {"*"})
        )
        self._subscriptions[request.type_url] = subscription
        if first:
            # What the Envoy has from an earlier stream: of unknown bytes, which are never looked at.
            subscription.sent = {
                name: Resource(name, version, b"") for name, version in request.known.items()
            }
            subscription.answered = bool(request.known)
        if request.nonce:
            self._answered(subscription, request)
        if self._delta:
            self._subscribe(subscription, request, first)
        elif not request.nonce or subscription.waiting is None:
            self._replace(subscription, request)

    def due(self, snapshot: Snapshot) -> list[Response]:
        """What is to be sent now, in order. What it returns counts as sent."""
        responses = []
        for type_url in TYPES:
            subscription = self._subscriptions.get(type_url)
            if subscription is None or subscription.waiting is not None:
                continue
            if type_url in (LISTENER, ROUTES) and self._clusters_behind(snapshot):
                continue
            response = self._next(type_url, subscription, snapshot)
            if response is not None:
                responses.append(response)
        return responses

    def standing(self) -> dict[str, Standing]:
        """By type."""
        return {
            type_url: Standing(each.accepted, each.refused, each.error)
            for type_url, each in self._subscriptions.items()
        }

    def settled(self, snapshot: Snapshot) -> bool:
        """The Envoy has, and accepted, everything that it wants of the snapshot."""
        return all(self._has(type_url, snapshot) for type_url in TYPES if type_url in self._subscriptions)

    # -- one request -------------------------------------------------------------------------------

    def _answered(self, subscription: _Subscription, request: Request) -> None:
        if subscription.waiting is None or subscription.waiting[0] != request.nonce:
            return  # an answer to something that a later response replaced
        _, number = subscription.waiting
        subscription.waiting = None
        if request.error is None:
            subscription.accepted, subscription.refused, subscription.error = number, None, None
        else:
            subscription.refused, subscription.error = number, request.error

    def _subscribe(self, subscription: _Subscription, request: Request, first: bool) -> None:
        added = set(request.names) - {"*"}
        if "*" in request.names:
            subscription.wildcard = True
        subscription.names |= added
        if not first:
            # Asking again for what it was sent is asking for it to be sent again.
            subscription.again |= added & subscription.sent.keys()
        for name in request.unsubscribed:
            if name == "*":
                subscription.wildcard = False
            subscription.names.discard(name)
            subscription.sent.pop(name, None)
            subscription.again.discard(name)

    def _replace(self, subscription: _Subscription, request: Request) -> None:
        names = set(request.names) - {"*"}
        for name in subscription.names - names:
            subscription.sent.pop(name, None)
            subscription.again.discard(name)
        subscription.names = names
        if names:
            subscription.wildcard = False

    # -- one response ------------------------------------------------------------------------------

    def _next(self, type_url: str, subscription: _Subscription, snapshot: Snapshot) -> Response | None:
        resources = snapshot.resources.get(type_url, {})
        wanted = subscription.wanted(resources)
        if type_url in (CLUSTER, ENDPOINTS) and not self._routes_settled(snapshot):
            leaving = subscription.missing(resources)
            wanted = {name: subscription.sent[name] for name in leaving} | wanted
        changed = {
            name: resource
            for name, resource in wanted.items()
            if (name in subscription.again and name in resources)
            or name not in subscription.sent
            or subscription.sent[name].version != resource.version
        }
        gone = tuple(sorted(name for name in subscription.sent if name not in wanted))
        everything = type_url in _WILDCARD
        subscription.again -= wanted.keys()
        if (
            not changed
            and not (gone and (self._delta or everything))
            and (
                subscription.answered or not everything  # a first answer is owed even if it is empty
            )
        ):
            subscription.sent = wanted
            return None
        subscription.nonces += 1
        nonce = f"{snapshot.number}/{subscription.nonces}"
        subscription.waiting = (nonce, snapshot.number)
        subscription.sent = wanted
        subscription.answered = True
        if type_url == CLUSTER:
            self._send_endpoints_again(changed)
        if self._delta:
            return Response(type_url, snapshot.number, nonce, _ordered(changed.values()), gone)
        sent = wanted if everything else changed
        return Response(type_url, snapshot.number, nonce, _ordered(sent.values()))

    def _send_endpoints_again(self, clusters: Mapping[str, Resource]) -> None:
        endpoints = self._subscriptions.get(ENDPOINTS)
        if endpoints is not None:
            endpoints.again |= clusters.keys() & endpoints.sent.keys()

    def _routes_settled(self, snapshot: Snapshot) -> bool:
        listeners = self._subscriptions.get(LISTENER)
        if listeners is None or not self._has(LISTENER, snapshot):
            return False
        if ROUTES not in self._subscriptions:
            return not listeners.sent
        return self._has(ROUTES, snapshot)

    def _clusters_behind(self, snapshot: Snapshot) -> bool:
        """There are clusters that routes may name already, and that wait for an ACK before they are sent."""
        clusters = self._subscriptions.get(CLUSTER)
        if clusters is None or clusters.waiting is None:
            return False
        return not clusters.wanted(snapshot.resources.get(CLUSTER, {})).keys() <= clusters.sent.keys()

    def _has(self, type_url: str, snapshot: Snapshot) -> bool:
        subscription = self._subscriptions[type_url]
        if subscription.waiting is not None or subscription.error is not None:
            return False
        wanted = subscription.wanted(snapshot.resources.get(type_url, {}))
        sent = {name: resource.version for name, resource in subscription.sent.items()}
        return sent == {name: resource.version for name, resource in wanted.items()}


def _ordered(resources: Iterable[Resource]) -> tuple[Resource, ...]:
    return tuple(sorted(resources, key=lambda each: each.name))
