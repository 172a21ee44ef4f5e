"""An endpoint that scales itself: the real command, engines with an enforced limit, Envoy, and what comes
between them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serving import client
from tests.serving.served import Load, Served, document, ready, serving
from tests.serving.shortpaths import short_directory


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as made:
        yield made


def scaled(least: int, most: int = 3, **autoscaling: Any) -> dict[str, Any]:
    """Replicas of which each holds two requests and admits four."""
    return {
        **document("one", environment={"DELAY_SECONDS": "0.2"}),
        "replicas": {"min": least, "max": most, "target_concurrency": 2, "concurrency_limit": 4},
        "autoscaling": {"start_seconds": 1, "down_window_seconds": 3, "idle_seconds": 3, **autoscaling},
    }


def decisions(served: Served) -> dict[str, Any]:
    return client.Client(served.state, "chat").get("/api/v1/decisions")


async def while_asked(
    served: Served, clients: int, what: str, holds: Callable[[dict[str, Any]], bool]
) -> list[str]:
    """Until it holds, with so many clients; whatever went wrong for them."""
    async with Load(served.url, clients, 0.0, stream_each=1_000) as load:
        await asyncio.get_running_loop().run_in_executor(None, served.until, what, holds)
    return [str(each.wrong) for each in load.failed]


def test_one_saturated_replica_becomes_three_and_one_again(directory: Path) -> None:
    """The limit is enforced: four are in flight however many wait, and the others must be seen."""
    with serving(directory, scaled(1)) as served:
        served.until_ready(1)
        wrong = asyncio.run(while_asked(served, 24, "three ready", lambda now: len(ready(now)) == 3))
        assert wrong == []
        raised = [each["text"] for each in served.status()["events"] if "autoscaler: " in each["text"]]
        assert any("in flight" in each for each in raised), raised
        served.apply(scaled(1, most=1))
        one = "one left", lambda now: [each["state"] for each in now["replicas"]] == ["ready"]
        assert asyncio.run(while_asked(served, 4, *one)) == []  # who was told to leave finished first
        runs = decisions(served)["runs"]
        assert {each["replicas"] for each in runs} >= {1, 3}


def test_from_zero_and_back(directory: Path) -> None:
    with serving(directory, scaled(0)) as served:
        served.until("the load is known", lambda now: now["autoscaling"].get("demand") is not None)
        assert served.status()["replicas"] == []
        assert served.answer("/work")[0] == 200
        served.until("none again", lambda now: now["replicas"] == [] and now["wanted_replicas"] == 0)
