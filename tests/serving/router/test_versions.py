"""What a stream tells an Envoy, against a model of one that keeps what it is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.router import versions
from serving.router.versions import (
    CLUSTER,
    ENDPOINTS,
    LISTENER,
    ROUTES,
    Request,
    Resource,
    Response,
    Snapshot,
)


def _snapshot(number: int, services: Mapping[str, int]) -> Snapshot:
    """Services with the version of each, all behind one listener."""

    def made(name: str, version: object) -> Resource:
        return Resource(name, str(version), f"{name}={version}".encode())

    clusters = {name: made(name, version // 2) for name, version in services.items()}
    endpoints = {name: made(name, version) for name, version in services.items()}
    routes = {"all": made("all", "+".join(sorted(services)))}
    listeners = {"all": made("all", 0)}
    kinds = {CLUSTER: clusters, ENDPOINTS: endpoints, LISTENER: listeners, ROUTES: routes}
    return Snapshot(f"{number:04}", kinds)


@dataclasses.dataclass
class Model:
    """An Envoy: subscribes to the endpoints of its clusters, acknowledges or refuses, remembers."""

    delta: bool
    stream: versions.Stream
    has: dict[str, dict[str, Resource]] = dataclasses.field(
        default_factory=lambda: {kind: {} for kind in (CLUSTER, ENDPOINTS, LISTENER, ROUTES)}
    )
    asked: set[str] = dataclasses.field(default_factory=set)
    unanswered: dict[str, Response] = dataclasses.field(default_factory=dict)
    numbers: dict[str, str] = dataclasses.field(default_factory=dict)

    def connect(self) -> None:
        self.asked, self.unanswered, self.numbers = set(), {}, {}
        if not self.delta:  # its first answer would be judged by what it has of an earlier stream
            self.has = {kind: {} for kind in self.has}
        for kind, names in ((CLUSTER, ()), (LISTENER, ())):
            self.stream.receive(Request(kind, names=names, known=self._known(kind)))
        self._subscribe(ENDPOINTS, "", set(self.has[CLUSTER]))
        self._subscribe(ROUTES, "", {"all"})

    def hear(self, response: Response) -> None:
        kind = response.type_url
        assert kind not in self.unanswered, "one at a time"
        assert response.number >= self.numbers.get(kind, ""), "numbers only grow"
        assert all(each.body for each in response.resources)
        self.numbers[kind] = response.number
        self.unanswered[kind] = response

    def answer(self, kind: str, error: str | None = None) -> None:
        response = self.unanswered.pop(kind)
        if error is None:
            kept = self.has[kind]
            if not self.delta and kind in (CLUSTER, LISTENER):
                kept.clear()
            kept |= {each.name: each for each in response.resources}
            for name in response.removed:
                kept.pop(name, None)
            self._require_routed()
        names = (
            ()
            if self.delta or kind in (CLUSTER, LISTENER)
            else tuple(self.asked if kind == ENDPOINTS else {"all"})
        )
        self.stream.receive(Request(kind, response.nonce, names, error=error))
        if kind == CLUSTER and error is None:
            self._subscribe(ENDPOINTS, "", set(self.has[CLUSTER]))
            for name in self.has[ENDPOINTS].keys() - self.has[CLUSTER].keys():
                del self.has[ENDPOINTS][name]

    def _subscribe(self, kind: str, nonce: str, names: set[str]) -> None:
        if self.delta:
            before = self.asked if kind == ENDPOINTS else set()
            added, gone = tuple(sorted(names - before)), tuple(sorted(before - names))
            self.stream.receive(Request(kind, nonce, added, gone, self._known(kind)))
        else:
            self.stream.receive(Request(kind, nonce, tuple(sorted(names))))
        if kind == ENDPOINTS:
            self.asked = names

    def _known(self, kind: str) -> dict[str, str]:
        return {name: each.version for name, each in self.has[kind].items()} if self.delta else {}

    def _require_routed(self) -> None:
        """Make before break: whatever is routed to is there."""
        for routes in self.has[ROUTES].values():
            assert set(routes.version.split("+")) - {""} <= self.has[CLUSTER].keys()


_SERVICES = st.dictionaries(st.sampled_from("abcd"), st.integers(0, 5), min_size=1)
_STEPS = st.lists(
    st.tuples(st.just("serve"), _SERVICES) | st.tuples(st.sampled_from(("hear", "drop")), st.none())
)


@pytest.mark.parametrize("delta", [True, False], ids=["delta", "state-of-the-world"])
@given(steps=_STEPS)
def test_an_envoy_ends_up_with_what_there_is(
    delta: bool, steps: list[tuple[str, dict[str, int] | None]]
) -> None:
    envoy = Model(delta, versions.Stream(delta))
    envoy.connect()
    number = 0
    snapshot = _snapshot(number, {"a": 0})

    def turn() -> bool:
        for response in envoy.stream.due(snapshot):
            envoy.hear(response)
        # As Envoy does: in the order in which they came.
        for kind in list(envoy.unanswered):
            envoy.answer(kind)
            return True
        return False

    for what, services in steps:
        if services is not None:
            number += 1
            snapshot = _snapshot(number, services)
        elif what == "drop":
            envoy.stream = versions.Stream(delta)
            envoy.connect()
        turn()
    rounds = 0
    while turn():
        rounds += 1
        assert rounds < 100, "it never comes to rest"
    for kind, resources in snapshot.resources.items():
        assert envoy.has[kind] == resources, kind
    assert envoy.stream.settled(snapshot)
    assert envoy.stream.due(snapshot) == []


def _told(
    stream: versions.Stream, snapshot: Snapshot, error: str | None = None, names: tuple[str, ...] = ()
) -> list[Response]:
    """Answer everything until there is rest; what was told. `names`: of endpoints, with each answer."""
    told = []
    for _ in range(10):
        responses = stream.due(snapshot)
        if not responses:
            return told
        told += responses
        for each in responses:
            repeated = names if each.type_url == ENDPOINTS else ()
            stream.receive(Request(each.type_url, each.nonce, repeated, error=error))
    raise AssertionError("it never comes to rest")


def test_who_comes_back_is_told_what_changed_only() -> None:
    snapshot = _snapshot(7, {"a": 0, "b": 2, "c": 4})
    stream = versions.Stream(delta=True)
    known = {"a": "0", "b": "0", "gone": "0"}
    stream.receive(Request(CLUSTER, known=known))
    (told,) = stream.due(snapshot)
    assert [each.name for each in told.resources] == ["b", "c"]
    # Taken away once the routes without it are acknowledged, which this Envoy has not asked for yet.
    assert told.removed == ()


def test_what_was_refused_is_sent_again_when_it_changed_and_not_before() -> None:
    stream = versions.Stream(delta=True)
    stream.receive(Request(CLUSTER))
    first = _snapshot(1, {"a": 0})
    assert len(_told(stream, first, error="no")) == 1
    assert _told(stream, first) == []
    assert not stream.settled(first)
    assert stream.standing()[CLUSTER] == versions.Standing(None, "0001", "no")
    second = _snapshot(2, {"a": 2})
    assert len(_told(stream, second)) == 1
    assert stream.standing()[CLUSTER] == versions.Standing("0002", None, None)
    assert stream.settled(second)


@pytest.mark.parametrize("delta", [True, False])
def test_endpoints_follow_their_changed_cluster(delta: bool) -> None:
    stream = versions.Stream(delta)
    for kind, names in ((CLUSTER, ()), (ENDPOINTS, ("a", "b"))):
        stream.receive(Request(kind, names=names))
    before = _snapshot(1, {"a": 0, "b": 0})
    repeated = () if delta else ("a", "b")
    _told(stream, before, names=repeated)
    after = Snapshot("0002", before.resources | {CLUSTER: _snapshot(2, {"a": 2, "b": 0}).resources[CLUSTER]})
    told = _told(stream, after, names=repeated)
    assert [each.type_url for each in told] == [CLUSTER, ENDPOINTS]
    assert [each.name for each in told[1].resources] == ["a"]


def test_an_answer_to_something_older_is_no_answer() -> None:
    stream = versions.Stream(delta=False)
    stream.receive(Request(CLUSTER))
    (told,) = stream.due(_snapshot(1, {"a": 0}))
    stream.receive(Request(CLUSTER, "0000/1"))
    assert stream.standing()[CLUSTER].accepted is None
    stream.receive(Request(CLUSTER, told.nonce))
    assert stream.standing()[CLUSTER].accepted == "0001"
