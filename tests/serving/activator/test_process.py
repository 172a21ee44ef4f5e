"""The activator as a process, behind a real Envoy and our router: from nothing to an answer."""

import concurrent.futures
import contextlib
import dataclasses
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving import service as services
from tests.serving.router import world

GLOWPLUG = Path(sys.executable).with_name("glowplug")


@dataclasses.dataclass(frozen=True)
class Scene:
    """A service without replicas; `place` is where its activator listens."""

    front: world.Front
    service: services.Service
    place: tuple[str, int]
    metrics: int
    process: subprocess.Popen[str]

    def held(self) -> int:
        """What the router knows of the load at the activator."""
        return sum(load.in_flight for load in self.front.router.loads() if load.port == self.place[1])

    def passes(self) -> bool:
        """Whether a request still comes by the activator."""
        before = self.metric("released_total")
        assert self.front.get()[0] == 200
        return self.metric("released_total") > before

    def metric(self, name: str) -> float:
        text = urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics").read().decode()
        (line,) = (line for line in text.splitlines() if line.startswith(f"glowplug_activator_{name}{{"))
        return float(line.split()[-1])


@contextlib.contextmanager
def activator(front: world.Front, *more: str) -> Iterator[tuple[subprocess.Popen[str], tuple[str, int], int]]:
    place, metrics = ("127.0.0.1", world.free_port()), world.free_port()
    command = [GLOWPLUG, "activator", "--control", front.address, "--service", f"demo={place[0]}:{place[1]}"]
    command += ["--health-path", "/livez", "--metrics", f"127.0.0.1:{metrics}", *more]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if "ready" in line:
                break
        else:
            pytest.fail("the activator ended")
        yield process, place, metrics
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with world.Front(tmp_path / "front") as front, activator(front) as (process, place, metrics):
        service = services.Service("demo", front.listen, activator=place)
        front.serve(service)
        yield Scene(front, service, place, metrics, process)


def test_from_no_replica_to_answers_and_then_out_of_the_way(scene: Scene) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(scene.front.get, f"/{number}") for number in range(8)]
        world.until(lambda: scene.held() == 8)
        assert {scene.held() for _ in range(40) if not time.sleep(0.05)} == {8}  # Envoy counts the same ones
        with world.Backend("one") as replica:
            scene.front.router.update([dataclasses.replace(scene.service, backends=(replica.value(),))])
            assert [each.result() for each in waiting] == [(200, "one")] * 8
            assert scene.metric("released_total") == 8
            world.until(lambda: scene.held() == 0)
            world.until(lambda: not scene.passes())  # Envoy's own check of the replica
            before = scene.metric("released_total")
            assert [scene.front.get() for _ in range(20)] == [(200, "one")] * 20
            assert scene.metric("released_total") == before


def test_the_control_plane_away_and_back(scene: Scene) -> None:
    with world.Backend("one") as replica, concurrent.futures.ThreadPoolExecutor(2) as pool:
        scene.front.router.stop()
        waiting = pool.submit(scene.front.get)
        world.until(lambda: scene.metric("requests") == 1)
        scene.front.router.start()
        scene.front.router.update([dataclasses.replace(scene.service, backends=(replica.value(),))])
        assert waiting.result() == (200, "one")


def test_told_to_end_it_lets_what_waits_be_answered_first(scene: Scene) -> None:
    with world.Backend("one") as replica, concurrent.futures.ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(scene.front.get)
        world.until(lambda: scene.held() == 1)
        scene.process.send_signal(signal.SIGTERM)
        world.until(lambda: _refuses(scene.place))
        scene.front.router.update([dataclasses.replace(scene.service, backends=(replica.value(),))])
        assert waiting.result() == (200, "one")
        assert scene.process.wait(world.WAIT_SECONDS) == 0


def _refuses(place: tuple[str, int]) -> bool:
    try:
        socket.create_connection(place, 1).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--service", "demo"], "NAME=ADDRESS:PORT"),
        (["--service", "demo=127.0.0.1:99999"], "ADDRESS:PORT"),
        (["--service", "demo=127.0.0.1:1", "--service", "demo=127.0.0.1:2"], "twice"),
        (["--service", "demo=127.0.0.1:1", "--control", "10.0.0.1:18000"], "--control-ca"),
        (["--service", "demo=127.0.0.1:1", "--concurrency", "0"], "at least 1"),
        (["--service", "demo=127.0.0.1:1", "--max-held", "0"], "max_held"),
        (["--service", "demo=127.0.0.1:1", "--deadline", "soon"], "duration"),
        (["--service", "demo=192.0.2.1:1"], "192.0.2.1:1"),
    ],
)
def test_wrong_arguments(arguments: list[str], said: str) -> None:
    control = [] if "--control" in arguments else ["--control", "unix:/nowhere"]
    command = [GLOWPLUG, "activator", *control, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert result.returncode in (2, 3, 8), result
    assert said in result.stderr
    assert "Traceback" not in result.stderr
