"""The process of an Envoy: taken over, replaced, refused."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from serving import errors
from serving import service as services
from serving.router import control, envoy
from tests.serving.router import world


def _service(front: world.Front, backend: world.Backend) -> services.Service:
    settings = services.RouteSettings(health_path=None)
    return services.Service("s", front.listen, (backend.value(),), settings=settings)


def test_envoy_outlives_the_control_plane_and_is_taken_over(tmp_path: Path) -> None:
    with world.backends("a", "b") as (a, b), world.Front(tmp_path / "e") as front:
        front.serve(_service(front, a))
        pid = front.envoy.pid
        front.envoy.leave()
        front.router.stop()
        assert {front.get() for _ in range(5)} == {(200, "a")}

        front.router = control.Router(front.address)
        front.router.start()
        front.envoy = envoy.Envoy(front.directory, front.settings, workers=1)
        # It is connected and has what it had: nothing is told before the first update.
        world.until(front.router.nodes)
        assert {front.get() for _ in range(5)} == {(200, "a")}
        front.serve(_service(front, b))
        assert front.envoy.pid == pid
        world.until(lambda: front.get() == (200, "b"))
        assert front.envoy.restarts == 0


def test_envoy_outlives_a_control_plane_that_is_killed(tmp_path: Path) -> None:
    """It asks the kernel to be ended with its parent: it must have none by then."""
    with world.backends("a") as (a,):
        port = world.free_port()
        program = f"""
            import os, pathlib, signal
            from serving import service as services
            from tests.serving.router import world
            front = world.Front(pathlib.Path({str(tmp_path / "e")!r})).__enter__()
            backend = services.Backend("127.0.0.1", {a.port})
            settings = services.RouteSettings(health_path=None)
            front.serve(services.Service("s", services.Listen({port}), (backend,), settings=settings))
            os.kill(os.getpid(), signal.SIGKILL)
        """
        subprocess.run([sys.executable, "-c", textwrap.dedent(program)])
        assert world.request(port) == (200, "a")
        with world.Front(tmp_path / "e") as front:
            front.listen = services.Listen(port)
            front.serve(_service(front, a))
            assert world.request(port) == (200, "a")


def test_another_bootstrap_is_a_hot_restart(tmp_path: Path) -> None:
    with world.backends("a") as (a,), world.Front(tmp_path / "e") as front:
        front.serve(_service(front, a))
        first = front.envoy.pid
        front.envoy.leave()
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(lambda: [front.get() for _ in range(100)]) for _ in range(2)]
            changed = dataclasses.replace(front.settings, max_connections=1_000)
            front.envoy = envoy.Envoy(front.directory, changed, workers=1)
            front.envoy.keep_open({(front.listen.address, front.listen.port)})
            front.envoy.start()
            front.envoy.wait_ready()
            assert front.envoy.pid != first
            assert {each for answer in answers for each in answer.result()} == {(200, "a")}


def test_a_port_in_use_is_said_before_anything_starts(tmp_path: Path) -> None:
    with world.backends("a") as (a,), world.Front(tmp_path / "e") as front:
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            other.bind(("127.0.0.1", front.port))
            other.listen()
            with pytest.raises(errors.ConfigurationError, match=f"127.0.0.1:{front.port}.*another port"):
                front.serve(_service(front, a))
        assert front.envoy.pid is None


def test_an_envoy_that_does_not_start_says_why(tmp_path: Path) -> None:
    settings = dataclasses.replace(world.Front(tmp_path / "e").settings, admin="/nowhere/admin.sock")
    with pytest.raises(errors.ConfigurationError, match="does not start"):
        envoy.Envoy(tmp_path / "e", settings, workers=1).start()


def test_draining_waits_for_requests(tmp_path: Path) -> None:
    with world.backends("a") as (a,), world.Front(tmp_path / "e") as front:
        front.serve(_service(front, a))
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            stream = pool.submit(front.get, "/stream?events=10&seconds=0.1")
            world.until(lambda: a.requests["/stream"])
            front.envoy.stop(drain_seconds=10)
            assert stream.result()[1].count("data:") == 10
        with pytest.raises(ConnectionRefusedError):
            front.get()
