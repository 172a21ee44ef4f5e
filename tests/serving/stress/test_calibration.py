"""`glowplug engine calibrate` on an engine whose costs are known."""

from __future__ import annotations

import asyncio
import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web

from serving import endpoint, errors
from serving.stress import calibration
from serving.stress.calibration import Kind, Target
from tests.fixtures import block_images

REQUEST, INPUT, OUTPUT = 0.004, 0.00002, 0.0005


class OneAtATime:
    """A replica that works on one request at a time, for as long as its tokens say."""

    def __init__(self) -> None:
        self.port = 0
        self.bad = False
        self.prompts: list[str] = []
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)

    def __enter__(self) -> OneAtATime:
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _main(self) -> None:
        self._loop, self._stop, self._busy = asyncio.get_running_loop(), asyncio.Event(), asyncio.Lock()
        application = web.Application()
        application.router.add_post("/v1/completions", self._complete)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.port = runner.addresses[0][1]
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _complete(self, request: web.Request) -> web.Response:
        wanted: dict[str, Any] = await request.json()
        if self.bad:
            return web.json_response({"error": "no such model"}, status=404)
        self.prompts.append(wanted["prompt"])
        given, made = len(wanted["prompt"].split()), wanted["max_tokens"]
        async with self._busy:
            await asyncio.sleep(REQUEST + INPUT * given + OUTPUT * made)
        return web.json_response({"usage": {"prompt_tokens": given, "completion_tokens": made}})


@pytest.fixture
def engine() -> Iterator[OneAtATime]:
    with OneAtATime() as found:
        yield found


def test_the_costs_of_an_engine_are_found_and_written_for_a_document(
    engine: OneAtATime, tmp_path: Path
) -> None:
    out = tmp_path / "units.yaml"
    done = subprocess.run(
        [
            *(block_images.GLOWPLUG, "engine", "calibrate", f"http://127.0.0.1:{engine.port}", "--out", out),
            *("--prompts", "10,1000", "--shared", "0", "--outputs", "1,20,80", "--clients", "2,4"),
            *("--seconds", "0.2s", "--rounds", "2", "--json"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    written = yaml.safe_load(out.read_text())
    assert written == json.loads(done.stdout)
    units = endpoint.Units.model_validate(written["units"])
    # A busy machine makes them dearer, never cheaper; the dearest kind is known best.
    whole = units.request_seconds + 1_000 * units.input_token_seconds + 80 * units.output_token_seconds
    assert whole > 0.8 * (REQUEST + 1_000 * INPUT + 80 * OUTPUT)
    assert units.output_token_seconds > 0.5 * OUTPUT
    assert [(each["input_tokens"], each["output_tokens"]) for each in written["measured"]] == [
        (given, made) for given in (10, 1_000) for made in (1, 20, 80)
    ]
    assert done.stderr.count("requests a second") == 24
    assert written["next_best_round_slower_percent"] >= 0


def test_how_near_the_next_best_round_came_is_said(engine: OneAtATime) -> None:
    target = Target(f"http://127.0.0.1:{engine.port}", "m")
    said: list[calibration.Measured] = []
    (best,) = calibration.measure(target, [Kind(100, 0, 1)], [1], 0.1, 3, 1, said.append)
    first, second, _ = sorted(each.point.seconds for each in said)
    assert best.point.seconds == first
    assert best.slower_percent == pytest.approx(100 * (second / first - 1))
    (once,) = calibration.measure(target, [Kind(100, 0, 1)], [1], 0.1, 1, 1, lambda _: None)
    assert once.slower_percent is None


def test_prompts_share_what_they_are_to_share_and_nothing_else(engine: OneAtATime) -> None:
    target = Target(f"http://127.0.0.1:{engine.port}", "m", replicas=2)
    found = calibration.measure(target, [Kind(100, 75, 1)], [2], 0.2, 1, 1, lambda _: None)
    assert found[0].point.input_tokens == 100
    heads = {prompt.rsplit(" ", 26)[0] for prompt in engine.prompts}
    assert len(heads) == 1
    assert len(set(engine.prompts)) == len(engine.prompts)
    assert found[0].point.seconds > 2 * 0.9 * REQUEST  # of both replicas


def test_an_engine_that_refuses_is_said(engine: OneAtATime) -> None:
    engine.bad = True
    target = Target(f"http://127.0.0.1:{engine.port}", "m")
    with pytest.raises(errors.UnavailableError, match="no such model"):
        calibration.measure(target, [Kind(5, 0, 1)], [2], 5.0, 1, 1, lambda _: None)


def test_an_engine_that_is_not_there_is_said() -> None:
    with pytest.raises(errors.UnavailableError):
        calibration.measure(
            Target("http://127.0.0.1:1", "m"), [Kind(5, 0, 1)], [2], 1.0, 1, 1, lambda _: None
        )


@pytest.mark.parametrize(
    "wrong", [["--prompts", "x"], ["--prompts", "0"], ["--outputs", "1", "--shared", "0"]]
)
def test_kinds_that_say_too_little_are_refused(wrong: list[str]) -> None:
    done = subprocess.run(
        [block_images.GLOWPLUG, "engine", "calibrate", "http://127.0.0.1:1", *wrong], capture_output=True
    )
    assert done.returncode == 2
