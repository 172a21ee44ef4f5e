"""The router with a real Envoy: what is asked for is what is routed."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving import service as services
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
