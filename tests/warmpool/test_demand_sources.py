"""Demand, as files and servers say it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.statusapi import Api
from warmpool import demand_sources, errors
from warmpool.demand_sources import FileSource, KubernetesSource, ServeSource
from warmpool.settings import FileDemand, ServeDemand


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


def test_the_last_line_of_each_class_counts(tmp_path: Path) -> None:
    path = tmp_path / "demand.csv"
    clock = Clock()
    source = FileSource(FileDemand(kind="file", path=str(path)), ("gpu", "big"), clock)
    assert source.wanted() == {"gpu": None, "big": None}
    assert str(path) in source.trouble[str(path)]
    path.write_text("time,node_class,wanted\n990,gpu,3\n1970-01-01T00:16:35Z,big,1\n")
    assert source.wanted() == {"gpu": 3, "big": 1}
    assert source.trouble == {}
    with path.open("a") as file:
        file.write("999,gpu,4\n1000,gpu,5")  # its end is not written yet
    assert source.wanted()["gpu"] == 4
    clock.now = 1_298.0
    assert source.wanted() == {"gpu": 4, "big": None}, "what is old says nothing"
    assert "old" in source.trouble["big"]


def test_a_long_file_is_read_from_its_end(tmp_path: Path) -> None:
    path = tmp_path / "demand.csv"
    path.write_text("x,x,x\n" + "990,gpu,1\n" * 100_000 + "991,gpu,2\n")
    source = FileSource(FileDemand(kind="file", path=str(path)), ("gpu",), Clock())
    assert source.wanted() == {"gpu": 2}


@pytest.mark.parametrize(
    "line",
    [
        "990,gpu",
        "990,gpu,1,2",
        "soon,gpu,1",
        "nan,gpu,1",
        "990,gpu,-1",
        "990,gpu,1.5",
        "990,gpu,٣",
        "990,gpu,99999999",
    ],
)
def test_a_line_that_makes_no_sense_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "demand.csv"
    path.write_text(f"{line}\n990,gpu,1\n")
    source = FileSource(FileDemand(kind="file", path=str(path)), ("gpu",), Clock())
    assert source.wanted() == {"gpu": None}
    assert "line 2 from the end" in source.trouble[str(path)]


@given(st.text(max_size=100))
def test_any_text_is_samples_or_our_error(text: str) -> None:
    try:
        found = demand_sources.last_samples(text, "file")
    except errors.InvalidInputError:
        return
    assert all(wanted >= 0 for _, wanted in found.values())


class Endpoint:
    """What `glowplug serve` says of an endpoint; serving/statusapi.py carries it. The rest is not asked."""

    def __init__(self) -> None:
        self.replicas: Any = 3
        self.image = "registry.example/llm:v1"

    def status(self) -> dict[str, Any]:
        return {"name": "chat", "wanted_replicas": self.replicas}

    def document(self) -> dict[str, Any]:
        return {"document": {"name": "chat", "image": self.image}}

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} is not asked by a pool")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Endpoint, Path, str]]:
    endpoint = Endpoint()
    api = Api(tmp_path / "control.sock", ("127.0.0.1", 0), endpoint)  # type: ignore[arg-type]
    api.start()
    assert api.tcp_address is not None
    yield endpoint, tmp_path / "control.sock", f"http://127.0.0.1:{api.tcp_address[1]}"
    api.stop()


def settings(*endpoints: Mapping[str, object]) -> ServeDemand:
    return ServeDemand.model_validate({"kind": "serve", "endpoints": endpoints})


def test_replicas_of_an_autoscaler_become_nodes(served: tuple[Endpoint, Path, str]) -> None:
    endpoint, socket, url = served
    source = ServeSource(
        settings(
            {"socket": str(socket), "node_class": "gpu", "replicas_per_node": 2},
            {"url": url, "node_class": "gpu", "image": "other:v1"},
        )
    )
    assert source.wanted() == {"gpu": 2 + 3}
    assert source.chances() == {"gpu": {"other:v1": 0.5, "registry.example/llm:v1": 0.5}}
    endpoint.replicas, endpoint.image = 0, "registry.example/llm:v2"
    assert source.wanted() == {"gpu": 0}
    assert "registry.example/llm:v2" in source.chances()["gpu"]


@pytest.mark.parametrize("said", [None, -1, "3", 2.5, True, 1 << 40])
def test_an_endpoint_that_makes_no_sense_is_a_gap(served: tuple[Endpoint, Path, str], said: object) -> None:
    endpoint, _, url = served
    endpoint.replicas = said
    source = ServeSource(settings({"url": url, "node_class": "gpu"}))
    assert source.wanted() == {"gpu": None}
    assert "wanted_replicas" in source.trouble[url]


def test_an_endpoint_that_is_away_is_a_gap_for_its_class_only(
    served: tuple[Endpoint, Path, str], tmp_path: Path
) -> None:
    _, _, url = served
    away = str(tmp_path / "none.sock")
    source = ServeSource(
        settings(
            {"url": url, "node_class": "gpu"},
            {"socket": away, "node_class": "gpu"},
            {"url": url, "node_class": "big"},
        )
    )
    assert source.wanted() == {"gpu": None, "big": 3}
    assert list(source.trouble) == [away]


def test_a_cluster_that_is_away_is_a_gap() -> None:
    class Away:
        def wanted(self) -> Mapping[str, int]:
            raise errors.UnavailableError("no API server")

        def chances(self) -> Mapping[str, Mapping[str, float]]:
            raise errors.UnavailableError("no API server")

    source = KubernetesSource(Away(), ("gpu",))
    assert (source.wanted(), source.chances()) == ({"gpu": None}, {})
    assert source.trouble == {"kubernetes": "no API server"}
