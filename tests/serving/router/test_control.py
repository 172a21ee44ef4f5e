"""The router with a real Envoy: what is asked for is what is routed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from serving import errors
from serving import service as services
from serving.router import envoy
from tests.serving.router import world


@pytest.mark.parametrize("delta", [True, False], ids=["delta", "state-of-the-world"])
def test_backends_come_and_go(tmp_path: Path, delta: bool) -> None:
    with world.backends("a", "b") as (a, b), world.Front(tmp_path / "e", delta=delta) as front:
        front.serve(services.Service("s", front.listen, (a.value(),)))
        world.until(lambda: front.get() == (200, "a"))
        front.serve(services.Service("s", front.listen, (a.value(), b.value())))
        world.until(lambda: {front.get()[1] for _ in range(8)} == {"a", "b"})
        front.serve(services.Service("s", front.listen, (b.value(),)))
        assert {front.get() for _ in range(8)} == {(200, "b")}
        front.serve()
        world.until(lambda: not front.envoy.administer("GET", "/listeners"))


def test_what_envoy_refuses_never_replaces_what_it_has(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with world.backends("a", "b") as (a, b), world.Front(tmp_path / "e") as front:
        good = services.Service("s", front.listen, (a.value(),))
        front.serve(good)
        world.until(lambda: front.get() == (200, "a"))
        # Twice the same to Envoy, which does not tell capitals from small letters.
        front.router.update([dataclasses.replace(good, hosts=("a.test", "A.test"), backends=(b.value(),))])
        world.until(lambda: any(node.refused for node in front.router.nodes()))
        assert "refused RouteConfiguration" in caplog.text
        # Its endpoints are good, and are not held up by what is not.
        world.until(lambda: front.get() == (200, "b"))
        front.serve(good)
        assert not any(node.refused for node in front.router.nodes())
        world.until(lambda: front.get() == (200, "a"))


def test_envoys_of_two_zones_see_their_own_weights_and_versions_shift(tmp_path: Path) -> None:
    with world.backends("a", "b") as (a, b), world.Front(tmp_path / "here", zone="a") as front:
        other_settings = dataclasses.replace(
            front.settings, node="there", zone="b", admin=f"{tmp_path}/there/admin.sock"
        )
        (tmp_path / "there").mkdir(mode=0o700)
        there = envoy.Envoy(tmp_path / "there", other_settings, workers=1)
        settings = services.RouteSettings(health_path=None)
        service = services.Service(
            "s",
            front.listen,
            (a.value(zone="a", version="v1"), b.value(zone="b", version="v1")),
            prefer_zone=True,
            settings=settings,
        )
        front.serve(service)
        # Alone, the Envoy of zone a has all the requests, and b's half of them to spare for.
        world.until(lambda: {front.get()[1] for _ in range(8)} == {"a", "b"})
        try:
            there.start()
            world.until(
                lambda: len(front.router.nodes()) == 2 and all(n.current for n in front.router.nodes())
            )
            assert {front.get()[1] for _ in range(20)} == {"a"}
        finally:
            there.stop()
        shifted = (a.value(version="v1"), b.value(version="v2"))
        front.serve(dataclasses.replace(service, backends=shifted, version_weights={"v1": 0, "v2": 1}))
        assert {front.get()[1] for _ in range(20)} == {"b"}
        front.serve(dataclasses.replace(service, backends=shifted, version_weights={"v1": 1, "v2": 1}))
        assert {front.get()[1] for _ in range(20)} == {"a", "b"}


def test_equal_services_send_nothing(tmp_path: Path) -> None:
    with world.backends("a") as (a,), world.Front(tmp_path / "e") as front:
        front.serve(services.Service("s", front.listen, (a.value(),)))
        (before,) = front.router.nodes()
        front.serve(services.Service("s", front.listen, (a.value(),)))
        assert front.router.nodes() == [before]
        with pytest.raises(errors.NotFoundError, match="no service is called t"):
            front.router.set_max_requests("t", 1)


def test_every_balancing_is_accepted_and_keeps_to_the_weights_of_versions(tmp_path: Path) -> None:
    with world.backends("a", "b") as (a, b), world.Front(tmp_path / "e") as front:
        there = (a.value(version="v1"), b.value(version="v2"))
        for balancing in services.Balancing:
            settings = services.RouteSettings(health_path=None, balancing=balancing)
            service = services.Service(
                "s", front.listen, there, version_weights={"v1": 1, "v2": 1}, settings=settings
            )
            front.serve(service)
            names = [front.get(headers={"x-session-id": str(n)})[1] for n in range(24)]
            assert set(names) == {"a", "b"}, balancing
            front.serve(dataclasses.replace(service, version_weights={"v1": 0, "v2": 1}))
            assert {front.get(headers={"x-session-id": str(n)})[1] for n in range(8)} == {"b"}, balancing
            if balancing is services.Balancing.STICKY:
                front.serve(service)
                assert len({front.get(headers={"x-session-id": "one"})[1] for _ in range(8)}) == 1
