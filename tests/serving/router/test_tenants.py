"""A tenant's requests a second, divided among Envoys: never more than there is, and by where they come."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from envoy.config.route.v3 import route_pb2
from envoy.extensions.filters.http.local_ratelimit.v3 import local_rate_limit_pb2
from hypothesis import given
from hypothesis import strategies as st

from serving import errors
from serving import service as services
from serving.router import bootstrap, control, envoy, reports, resources, tenants
from tests.serving.router import world

PLACE = ("127.0.0.1", 1)
_NODES = st.sets(st.sampled_from("abcd"), min_size=1)


def service(rate: int | None = 90) -> services.Service:
    keys = (services.Key("acme", "k", requests_per_second=rate), services.Key("free", "f"))
    return services.Service("s", services.Listen(1), keys=keys)


def report(node: str, issued: int) -> reports.Report:
    return reports.Report(node, 1.0, {"s": {PLACE: reports.Counts(0, issued, 0)}}, {})


@given(turns=st.lists(st.tuples(_NODES, st.integers(0, 500), st.floats(0, 20)), min_size=1, max_size=12))
def test_all_rates_together_are_the_rate(turns: list[tuple[set[str], int, float]]) -> None:
    found, now = tenants.Tenants(), 0.0
    for nodes, issued, wait in turns:
        now += wait
        for number, node in enumerate(sorted(nodes)):
            found.passed(report(node, issued * number))
        found.divide([service()], nodes, now)
        rates = [found.of(node).get("s/acme", 90.0) for node in nodes]
        assert sum(rates) <= 90 * (1 + 1e-9)
        assert min(rates) > 0


def test_rates_follow_the_traffic_and_stay_while_it_stays() -> None:
    found = tenants.Tenants()
    assert not found.divide([service()], {"a"}, 0.0)
    assert not found.of("a")  # alone, it has all of it
    assert found.divide([service()], {"a", "b", "activator/1"}, 1.0)
    assert found.of("a") == found.of("b") == {"s/acme": 45.0}
    changed = 0
    for second in range(2, 40):
        found.passed(report("a", 90 + second % 3))
        found.passed(report("b", 10))
        changed += found.divide([service()], {"a", "b"}, float(second))
    assert 70 < found.of("a")["s/acme"] < 85
    assert 0 < changed < 6  # a bucket is full again after each


def test_who_went_keeps_its_share_for_a_while() -> None:
    found = tenants.Tenants()
    found.divide([service()], {"a", "b"}, 0.0)
    found.divide([service()], {"a"}, reports.GONE_SECONDS - 1)
    assert found.of("a") == {"s/acme": 45.0}
    found.divide([service()], {"a"}, reports.GONE_SECONDS + 1)
    assert not found.of("a")


def test_another_limit_is_divided_at_once() -> None:
    found = tenants.Tenants()
    found.divide([service()], {"a", "b"}, 0.0)
    assert found.divide([service(30)], {"a", "b"}, 0.1)
    assert found.of("b") == {"s/acme": 15.0}
    assert found.divide([service(None)], {"a", "b"}, 0.2)
    assert found.of("b") == {}


@pytest.mark.parametrize(("rate", "most", "seconds"), [(90.0, 90, 1.0), (7.5, 7, 7 / 7.5), (0.25, 1, 4.0)])
def test_a_bucket_has_whole_requests_at_the_exact_rate(rate: float, most: int, seconds: float) -> None:
    made = resources.of_routes([service()], {"s/acme": rate})
    (body,) = (each.body for each in made.values())
    route = route_pb2.RouteConfiguration.FromString(body)
    limit = local_rate_limit_pb2.LocalRateLimit()
    route.virtual_hosts[0].typed_per_filter_config["envoy.filters.http.local_ratelimit"].Unpack(limit)
    bucket = limit.descriptors[0].token_bucket
    assert (bucket.max_tokens, bucket.tokens_per_fill.value) == (most, most)
    assert bucket.fill_interval.ToNanoseconds() / 1e9 == pytest.approx(seconds, abs=1e-5)


def test_two_envoys_have_one_rate(tmp_path: Path) -> None:
    """Real ones, told over xDS."""
    tmp_path.chmod(0o700)
    router = control.Router(f"unix:{tmp_path}/xds.sock")
    key = services.Key("acme", "k", requests_per_second=40)
    router.start()
    try:
        with contextlib.ExitStack() as stack:
            router.update([services.Service("s", services.Listen(world.free_port()), keys=(key,))])
            one = stack.enter_context(running(tmp_path, "one"))
            world.until(lambda: bucket(one) == 40)
            other = stack.enter_context(running(tmp_path, "other"))
            world.until(lambda: bucket(one) == bucket(other) == 20)
    finally:
        router.stop()


@contextlib.contextmanager
def running(directory: Path, node: str) -> Iterator[envoy.Envoy]:
    folder = directory / node
    folder.mkdir(mode=0o700)
    settings = bootstrap.Settings(node=node, control=f"{directory}/xds.sock", admin=f"{folder}/admin.sock")
    found = envoy.Envoy(folder, settings, workers=1)
    try:
        found.start()
        yield found
    finally:
        found.stop()


def bucket(found: envoy.Envoy) -> int:
    """How many requests its configuration has for the tenant, at a time; 0 before it has any."""
    with contextlib.suppress(errors.UnavailableError):
        dump = found.administer("GET", "/config_dump?resource=dynamic_route_configs").decode()
        if (matched := re.search(r'"descriptors": .*?"max_tokens": (\d+)', dump, re.DOTALL)) is not None:
            return int(matched[1])
    return 0
