"""Shares of versions, zones and ramps; what services refuse."""

from __future__ import annotations

import collections
from typing import Any

import pytest
from envoy.config.endpoint.v3 import endpoint_pb2
from hypothesis import given
from hypothesis import strategies as st

from serving import errors
from serving import service as services
from serving.router import resources, weights

LISTEN = services.Listen(8080)

_BACKENDS = st.lists(
    st.builds(
        dict,
        version=st.sampled_from(["v1", "v2"]),
        zone=st.sampled_from(["a", "b", "c"]),
        draining=st.booleans(),
        healthy=st.sampled_from([None, True, False]),
        since=st.none() | st.floats(0, 100),
    ),
    max_size=12,
).map(lambda found: tuple(services.Backend("10.0.0.1", 1 + n, **each) for n, each in enumerate(found)))


def _shares(service: services.Service, **more: Any) -> dict[tuple[str, str], float]:
    """By version and zone."""
    given_ = {"now": 0.0, "zone": "", "zone_shares": {}} | more
    found = weights.groups(service, **given_)
    total = sum(group.weight for group in found)
    shares: collections.Counter[tuple[str, str]] = collections.Counter()
    for group in found:
        shares[group.version, group.zone] += group.weight / total  # type: ignore[assignment]
    return {key: pytest.approx(share, abs=1e-4) for key, share in shares.items()}


def _service(*backends: services.Backend, **more: Any) -> services.Service:
    return services.Service("s", LISTEN, backends, **more)


def _backends(**counts: int) -> list[services.Backend]:
    """`v1_a=2`: two of version v1 in zone a."""
    made = []
    for name, count in counts.items():
        version, _, zone = name.partition("_")
        made += [services.Backend("10.0.0.1", len(made) + n + 1, version, zone) for n in range(count)]
    return made


@given(
    backends=_BACKENDS,
    version_weights=st.dictionaries(st.sampled_from(["v1", "v2", "v3"]), st.integers(0, 100)),
    prefer_zone=st.booleans(),
    zone=st.sampled_from(["a", "b", "x"]),
    envoys=st.dictionaries(st.sampled_from(["a", "b", "x"]), st.integers(1, 5), min_size=1),
    now=st.floats(0, 200),
)
def test_every_usable_backend_is_in_one_group_and_no_other_is(
    backends: tuple[services.Backend, ...],
    version_weights: dict[str, int],
    prefer_zone: bool,
    zone: str,
    envoys: dict[str, int],
    now: float,
) -> None:
    settings = services.RouteSettings(ramp_seconds=30)
    service = _service(*backends, version_weights=version_weights, prefer_zone=prefer_zone, settings=settings)
    shares = {each: count / sum(envoys.values()) for each, count in envoys.items()}
    found = weights.groups(service, now, zone, shares)
    assert all(group.weight > 0 for group in found)
    placed = [backend for group in found for backend in group.backends]
    assert len(placed) == len(set(placed))
    usable = {each for each in backends if not each.draining and each.healthy is not False}
    if version_weights:
        usable = {each for each in usable if version_weights.get(each.version)}
    if prefer_zone:
        assert set(placed) <= usable
    else:
        assert set(placed) == usable
    assert bool(placed) == bool(usable)
    upcoming = weights.next_change(service, now)
    assert upcoming is None or upcoming >= now - 1e-6


def test_versions_share_by_weight_or_by_number() -> None:
    backends = _backends(v1=3, v2=1)
    assert _shares(_service(*backends)) == {("v1", ""): 0.75, ("v2", ""): 0.25}
    weighted = _service(*backends, version_weights={"v1": 90, "v2": 10})
    assert _shares(weighted) == {("v1", ""): 0.9, ("v2", ""): 0.1}
    assert _shares(_service(*backends, version_weights={"v2": 5})) == {("v2", ""): 1.0}
    # A version that has nobody leaves its share to the rest.
    assert _shares(_service(*backends, version_weights={"v1": 1, "v3": 9})) == {("v1", ""): 1.0}


def test_a_ramp_grows_and_says_when() -> None:
    settings = services.RouteSettings(ramp_seconds=100)
    new = services.Backend("10.0.0.2", 80, "v1", since=1000.0)
    service = _service(services.Backend("10.0.0.1", 80, "v1"), new, settings=settings)

    def share(now: float) -> float:
        found = {group.step: group.weight for group in weights.groups(service, now, "", {})}
        return found.get(1 + int((now - 1000) / 10), 0) / sum(found.values())

    assert share(1000.0) == pytest.approx(1 / 11, abs=1e-4)
    assert share(1040.0) == pytest.approx(5 / 15, abs=1e-4)
    assert weights.next_change(service, 1040.0) == pytest.approx(1050.0)
    (warm,) = weights.groups(service, 1095.0, "", {})
    assert len(warm.backends) == 2
    assert weights.next_change(service, 1095.0) is None


@pytest.mark.parametrize(
    ("zone", "expected"),
    [
        ("a", {("v1", "a"): 0.5, ("v1", "b"): 0.5}),  # a has a quarter of the backends, half of the Envoys
        ("b", {("v1", "b"): 1.0}),
        ("elsewhere", {("v1", "b"): 1.0}),  # only b has something to spare
    ],
)
def test_zones_keep_their_requests_as_far_as_they_reach(
    zone: str, expected: dict[tuple[str, str], float]
) -> None:
    service = _service(*_backends(v1_a=1, v1_b=3), prefer_zone=True)
    assert _shares(service, zone=zone, zone_shares={"a": 0.5, "b": 0.5}) == expected


@given(
    st.dictionaries(st.sampled_from("abc"), st.integers(1, 9), min_size=1),
    st.dictionaries(st.sampled_from("abcd"), st.integers(1, 9), min_size=1),
)
def test_spilling_gives_every_zone_its_capacity(capacity: dict[str, int], envoys: dict[str, int]) -> None:
    def normal(counts: dict[str, int]) -> dict[str, float]:
        return {name: count / sum(counts.values()) for name, count in counts.items()}

    parts, shares = normal(capacity), normal(envoys)
    load: collections.Counter[str] = collections.Counter()
    for zone, share in shares.items():
        spilled = weights.spill(parts, zone, shares)
        assert sum(spilled.values()) == pytest.approx(1.0)
        for target, part in spilled.items():
            load[target] += share * part  # type: ignore[assignment]
    assert {name: pytest.approx(part, abs=1e-6) for name, part in parts.items()} == dict(load)


def test_a_version_whose_share_is_0_is_named_without_a_weight() -> None:
    """It was 503 for as long as its first health checks took when it was given its traffic back."""
    service = _service(*_backends(v1_a=2, v2_a=1), version_weights={"v1": 100, "v2": 0})
    made = endpoint_pb2.ClusterLoadAssignment.FromString(resources.endpoints(service, 0.0, "", {}).body)
    given = {each.locality.sub_zone: each.load_balancing_weight.value for each in made.endpoints}
    assert set(given) == {"v1/10", "v2/10"}
    assert given["v1/10"] > 0
    assert not made.endpoints[1].HasField("load_balancing_weight")


def test_endpoint_weights_are_never_set() -> None:
    """Unequal ones would leave P2C without a word."""
    service = _service(*_backends(v1_a=2, v2_b=3), version_weights={"v1": 90, "v2": 10})
    made = endpoint_pb2.ClusterLoadAssignment.FromString(resources.endpoints(service, 0, "", {}).body)
    assert len(made.endpoints) == 2
    assert not any(
        each.HasField("load_balancing_weight") for group in made.endpoints for each in group.lb_endpoints
    )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: services.Backend("replica-1", 80), "not an IP address"),
        (lambda: services.Backend("10.0.0.1", 0), "port 0"),
        (lambda: services.RouteSettings(max_requests=0), "settings.max_requests"),
        (lambda: services.RouteSettings(retry_budget_percent=101), "retry_budget_percent"),
        (lambda: services.Service("S", LISTEN), "name 'S'"),
        (lambda: services.Service("s", LISTEN, prefix="x"), "begin with /"),
        (lambda: services.Service("s", LISTEN, version_weights={"v": -1}), "version_weights.v"),
        (lambda: services.Key("t", ""), "not empty"),
        (lambda: resources.check([_service(), _service()]), "there twice"),
        (
            lambda: resources.check([_service(), services.Service("t", LISTEN)]),
            "belongs to s; give one another host, prefix or port",
        ),
    ],
)
def test_what_cannot_be_routed_is_refused(make: Any, said: str) -> None:
    with pytest.raises(errors.DocumentError, match=said):
        make()
