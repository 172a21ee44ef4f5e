"""moto's server, for all tests of a worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.warmpool.providers import autoscaling


@pytest.fixture(scope="session")
def aws() -> Iterator[tuple[str, list[autoscaling.Autoscaling]]]:
    """Its URL, and where whoever lives behind it is put."""
    with pytest.MonkeyPatch.context() as monkeypatch, autoscaling.serve(monkeypatch) as served:
        yield served


@pytest.fixture
def cloud(aws: tuple[str, list[autoscaling.Autoscaling]]) -> Iterator[autoscaling.Autoscaling]:
    """Groups of this test's own."""
    url, worlds = aws
    made = autoscaling.Autoscaling(url)
    worlds.append(made)
    yield made
    worlds.remove(made)
