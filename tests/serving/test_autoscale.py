"""An endpoint that scales itself: the real command, engines with an enforced limit, Envoy, and what comes
between them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serving import client, unixhttp
from tests.serving.served import GLOWPLUG, Load, Served, document, ready, serving
from tests.serving.shortpaths import short_directory

Status = dict[str, Any]


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as made:
        yield made


def scaled(least: int, most: int = 3, **autoscaling: Any) -> dict[str, Any]:
    """Replicas of which each holds two requests and admits four."""
    return {
        **document("one", environment={"DELAY_SECONDS": "0.2"}),
        "replicas": {"min": least, "max": most, "target_concurrency": 2, "concurrency_limit": 4},
        "autoscaling": {"start_seconds": 1, **autoscaling},
    }


def decisions(served: Served) -> dict[str, Any]:
    return client.Client(served.state, "chat").get("/api/v1/decisions")


async def while_asked(served: Served, clients: int, what: str, holds: Callable[[Status], bool]) -> list[str]:
    """Until it holds, with so many clients; whatever went wrong for them."""
    async with Load(served.url, clients, 0.0, stream_each=1_000) as load:
        await asyncio.get_running_loop().run_in_executor(None, served.until, what, holds)
    return [str(each.wrong) for each in load.failed]


def max_requests(served: Served) -> int:
    """Envoy's limit for the whole endpoint, as Envoy has it."""
    _, body = unixhttp.ask(served.state / "chat/envoy/admin.sock", "GET", "/runtime", timeout_seconds=10)
    return int(json.loads(body)["entries"]["circuit_breakers.chat.default.max_requests"]["final_value"])


def three(status: Status) -> bool:
    return len(ready(status)) == 3


def one(status: Status) -> bool:
    return [each["state"] for each in status["replicas"] if each["state"] != "failed"] == ["ready"]


def known(status: Status) -> bool:
    return status["autoscaling"].get("demand") is not None


def test_one_saturated_replica_becomes_three_whatever_is_killed(directory: Path) -> None:
    """The limit is enforced: four are in flight however many wait, and the others must be seen."""
    with serving(directory, scaled(1)) as served:
        served.until_ready(1)
        assert asyncio.run(while_asked(served, 24, "three ready", three)) == []
        raised = [each["text"] for each in served.status()["events"] if "autoscaler: 1 -> " in each["text"]]
        assert any("in flight" in each for each in raised), raised
        demand = served.status()["autoscaling"]["demand"]
        assert demand["service_seconds"] >= 0.2, "the engines' own: queues are not in it"

        follows = 1_000 + 3 * (4 + 64)  # what may be held, and what three admit and queue
        served.until("Envoy's limit follows", lambda _: max_requests(served) == follows)

        victim = ready(served.status())[0]["name"]
        os.killpg(served.pid(victim), signal.SIGKILL)
        lost = lambda now: victim not in [each["name"] for each in ready(now)] and three(now)  # noqa: E731
        asyncio.run(while_asked(served, 24, "three again", lost))

        served.kill()
        served.start(scaled(1))
        status = served.until("the load is known to the next server", known)
        assert (status["wanted_replicas"], len(ready(status))) == (3, 3)
        runs = decisions(served)["runs"]
        assert {each["replicas"] for each in runs} >= {1, 3}, "the server before is not forgotten"

        served.apply(scaled(1, most=1))
        wrong = asyncio.run(while_asked(served, 4, "one left", one))
        assert wrong == [], "who was told to leave finishes first"

        said = subprocess.run(
            [*GLOWPLUG, "autoscale", "explain", "chat", "--state", str(served.state)],
            capture_output=True,
            text=True,
        )
        assert said.returncode == 0, said.stderr
        assert ": 3 replicas, limit 4, target 2" in said.stdout
        assert "    clamp    maximum: " in said.stdout
        refused = served.command("scale", "chat", "1")
        assert refused.returncode == 9
        assert "the autoscaler would undo it" in refused.stderr


def test_from_zero_and_back_and_not_while_nothing_is_heard(directory: Path) -> None:
    """Envoy stands still: its last report was one of an idle endpoint, and must not end the replica."""
    with serving(directory, scaled(0, idle_seconds=5)) as served:
        served.until("the load is known", known)
        assert served.status()["replicas"] == []
        assert served.answer("/work")[0] == 200
        envoy = _envoy(served)
        os.kill(envoy, signal.SIGSTOP)
        try:
            before = served.until("the load is unknown", lambda now: not known(now))["autoscaling"][
                "decisions"
            ]
            status = served.until(
                "it has been for long", lambda now: now["autoscaling"]["decisions"] >= before + 5
            )
            assert (status["wanted_replicas"], len(ready(status))) == (1, 1)
            assert "chat has not reported for" in status["autoscaling"]["because"]["note"]
        finally:
            os.kill(envoy, signal.SIGCONT)
        served.until("none again", lambda now: now["replicas"] == [] and now["wanted_replicas"] == 0)


def test_a_dry_run_says_and_does_not(directory: Path) -> None:
    with serving(directory, scaled(1, mode="dry-run")) as served:
        served.until_ready(1)
        more = lambda now: now["autoscaling"].get("replicas", 0) > 1  # noqa: E731
        asyncio.run(while_asked(served, 16, "more are wanted", more))
        status = served.status()
        assert (status["wanted_replicas"], len(status["replicas"])) == (1, 1)
        assert any("autoscaler (dry run): 1 -> " in each["text"] for each in status["events"])
        served.apply(scaled(1, mode="off"))
        served.until("nothing is decided", lambda now: now["autoscaling"] == {"mode": "off"})


def _envoy(served: Served) -> int:
    """The process, by what it was told to listen on."""
    found = [each for each in served.processes() if b"envoy" in Path(f"/proc/{each}/cmdline").read_bytes()]
    (pid,) = [each for each in found if os.readlink(f"/proc/{each}/exe").endswith("envoy")] or found
    return pid
