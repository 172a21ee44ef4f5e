"""Updates without downtime, on the real thing under load: the heart of `glowplug serve`."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.served import Load, Served, document, ready, serving, settled
from tests.serving.shortpaths import short_directory


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as made:
        yield made


async def _in_thread(function: Any, *arguments: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, function, *arguments)


async def _through_everything(served: Served, load: Load) -> tuple[float, float]:
    """An update, the server killed in the middle of it, a replica killed after it. When the replica died:
    from, to."""
    await asyncio.sleep(0.5)
    second = document("two", 3)
    version = (await _in_thread(served.apply, second), await _in_thread(served.status))[1]["version"]
    await _in_thread(served.until, "traffic shifts", lambda status: status["phase"] == "shifting")
    await _in_thread(served.kill)
    await asyncio.sleep(1.0)  # nobody controls anything, and requests go on
    await _in_thread(served.start, second)
    await _in_thread(served.until, "the update is through", settled(version))
    status = await _in_thread(served.until_ready, 3)
    victim = ready(status)[0]["name"]
    began = time.monotonic()
    os.kill(served.pid(victim), signal.SIGKILL)
    status = await _in_thread(
        served.until, "it is replaced", lambda now: len(ready(now)) == 3 and victim not in str(ready(now))
    )
    died = next(each for each in status["events"] if f"replica {victim} failed" in each["text"])
    await asyncio.sleep(0.5)
    return began, began + (died["at"] - (time.time() - (time.monotonic() - began)))


async def _measure(served: Served, requests: int, pause_seconds: float) -> None:
    async with Load(served.url, pause_seconds=pause_seconds) as load:
        began, noticed = await _through_everything(served, load)
        while len(load.asked) < requests:
            await asyncio.sleep(0.1)
    names = {each.name for each in load.asked if each.wrong is None}
    assert {"one", "two", "stream"} <= names
    # In flight on the replica as it was killed, and no other: begun before its death was seen, ended after
    # it. They cannot be more than one a client.
    lost = [each for each in load.failed if each.began <= noticed and each.ended >= began]
    assert load.failed == lost, "\n".join(f"{each.began - began:+.2f} s {each.wrong}" for each in load.failed)
    assert len(lost) <= 16
    print(f"{len(load.asked)} requests, {len(lost)} lost in flight on the killed replica")


def test_update_kills_and_restart_lose_only_what_was_on_the_killed_replica(directory: Path) -> None:
    with serving(directory, document("one", 3)) as served:
        served.until_ready(3)
        asyncio.run(_measure(served, 500, pause_seconds=0.05))
        assert served.stop() == 0
        assert served.processes() == []


@pytest.mark.soak
def test_ten_thousand_requests_through_the_same(directory: Path) -> None:
    with serving(directory, document("one", 3)) as served:
        served.until_ready(3)
        asyncio.run(_measure(served, 10_000, pause_seconds=0.0))
