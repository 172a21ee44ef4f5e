"""What a real Envoy does with our settings. Each of these was learned by trying, and fails without its
setting."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving import service as services
from serving.router import clusters
from tests.serving.router import world


@pytest.fixture
def front(tmp_path: Path) -> Iterator[world.Front]:
    with world.Front(tmp_path / "e") as made:
        yield made


def _settings(**values: object) -> services.RouteSettings:
    return services.RouteSettings(**{"health_interval_seconds": 0.1, **values})  # type: ignore[arg-type]


def test_a_backend_that_left_gets_nothing_though_its_health_checks_pass(front: world.Front) -> None:
    with world.backends("a", "b") as (a, b):
        settings = _settings()
        front.serve(services.Service("s", front.listen, (a.value(), b.value()), settings=settings))
        world.until(lambda: {front.get()[1] for _ in range(8)} == {"a", "b"})
        front.serve(services.Service("s", front.listen, (b.value(),), settings=settings))
        before = a.served
        assert {front.get() for _ in range(30)} == {(200, "b")}
        assert a.served == before


def test_no_panic_when_nobody_is_healthy(front: world.Front) -> None:
    with world.backends("a", "b") as (a, b):
        a.healthy = b.healthy = False
        front.serve(
            services.Service("s", front.listen, (a.value(), b.value()), settings=_settings(unhealthy_after=1))
        )
        world.until(lambda: a.requests["/livez"] > 2 and b.requests["/livez"] > 2)
        assert {front.get()[0] for _ in range(10)} == {503}
        assert a.served == b.served == 0


def test_a_replica_that_fails_its_first_check_is_found_ready_soon(front: world.Front) -> None:
    """Without traffic Envoy's default is a check a minute: beyond what `until` waits."""
    with world.backends("a") as (a,):
        a.healthy = False
        front.serve(services.Service("s", front.listen, (a.value(),), settings=_settings()))
        world.until(lambda: a.requests["/livez"] > 0)
        a.healthy = True
        world.until(lambda: front.get() == (200, "a"))


def test_connections_are_dropped_before_the_engine_closes_them(front: world.Front) -> None:
    """A keep-alive of 0.4 s at the engine, idle pauses around it: no request meets a closing connection."""
    with world.Backend("a", keepalive_seconds=0.4) as a:
        settings = services.RouteSettings(health_path=None, upstream_idle_seconds=0.2, retries=0)
        front.serve(services.Service("s", front.listen, (a.value(),), settings=settings))

        def ask(pause: float) -> list[int]:
            statuses = []
            for _ in range(8):
                statuses.append(front.get()[0])
                time.sleep(pause)
            return statuses

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            rounds = pool.map(ask, [0.39 + 0.0015 * each for each in range(16)])
        assert {status for each in rounds for status in each} == {200}


@pytest.mark.parametrize("status", [429, 503, 500])
def test_who_answers_is_not_ejected_whatever_the_answer(front: world.Front, status: int) -> None:
    with world.backends("a", "b") as (a, b):
        a.status = status
        settings = _settings(health_path=None)
        front.serve(services.Service("s", front.listen, (a.value(), b.value()), settings=settings))
        for _ in range(40):
            front.get()
        before = a.served
        for _ in range(20):
            front.get()
        assert a.served > before
        assert front.stat("cluster.s.outlier_detection.ejections_active") == 0


def test_who_cannot_be_reached_is_ejected_and_nobody_notices(front: world.Front) -> None:
    with world.backends("a", "b") as (a, b):
        dead = services.Backend("127.0.0.1", world.free_port())
        settings = _settings(health_path=None)
        front.serve(services.Service("s", front.listen, (a.value(), b.value(), dead), settings=settings))
        assert {front.get()[0] for _ in range(40)} == {200}
        world.until(lambda: front.stat("cluster.s.outlier_detection.ejections_active") == 1)


@contextlib.contextmanager
def _silent() -> Iterator[services.Backend]:
    """Connections to it are neither taken nor refused: its queue of them is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, contextlib.ExitStack() as waiting:
        for _ in range(2):
            client = waiting.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        yield services.Backend("127.0.0.1", server.getsockname()[1])


def test_replicas_that_cannot_be_reached_are_no_limit_of_the_callers(front: world.Front) -> None:
    """More retries at once than are free: what ran out is Envoy's business, and no replica is full."""
    clients = 2 * clusters._FREE_RETRIES + 20
    with _silent() as one, _silent() as two:
        settings = _settings(health_path=None, connect_timeout_seconds=0.5, retry_budget_percent=0.1)
        front.serve(services.Service("s", front.listen, (one, two), settings=settings))
        with concurrent.futures.ThreadPoolExecutor(clients) as pool:
            answers = list(pool.map(lambda _: front.get(), range(clients)))
        assert front.stat("cluster.s.upstream_rq_retry_overflow") > 0
        assert {status for status, _ in answers} == {503}
        assert {json.loads(text)["error"]["type"] for _, text in answers} == {"router_error"}


def test_nothing_that_was_sent_is_sent_again(front: world.Front) -> None:
    """A backend that takes a request and closes: the client hears of it, no other backend gets the
    request."""
    with world.backends("a") as (a,), socket.create_server(("127.0.0.1", 0)) as rude:
        taken = []

        def take() -> None:
            while True:
                try:
                    connection, _ = rude.accept()
                except OSError:
                    return
                taken.append(connection.recv(65536))
                connection.close()

        threading.Thread(target=take, daemon=True).start()
        there = (services.Backend("127.0.0.1", rude.getsockname()[1]), a.value())
        front.serve(services.Service("s", front.listen, there, settings=_settings(health_path=None)))
        statuses = [front.get()[0] for _ in range(20)]
        assert statuses.count(503) == len(taken) > 0
        assert statuses.count(200) == a.served == 20 - len(taken)
        rude.shutdown(socket.SHUT_RDWR)


def test_a_limit_reaches_envoy_without_a_new_cluster(front: world.Front) -> None:
    with world.backends("a") as (a,):
        a.delay_seconds = 0.3
        front.serve(services.Service("s", front.listen, (a.value(),), settings=_settings(max_requests=100)))
        world.until(lambda: front.get()[0] == 200)

        def burst() -> list[int]:
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                return sorted(status for status, _ in pool.map(lambda _: front.get(), range(8)))

        assert burst() == [200] * 8
        updates = front.envoy.administer("GET", "/config_dump?resource=dynamic_active_clusters")
        front.router.set_max_requests("s", 2)
        front.settle()
        assert burst() == [200] * 2 + [429] * 6
        assert front.envoy.administer("GET", "/config_dump?resource=dynamic_active_clusters") == updates


def test_a_changed_cluster_does_not_wait_for_its_endpoints(front: world.Front) -> None:
    """Envoy waits 15 s for endpoints that are not sent again, and `settle` would not tell: routing does."""
    with world.backends("a") as (a,):
        first = services.Service("s", front.listen, (a.value(),), settings=_settings())
        front.serve(first)
        world.until(lambda: front.get() == (200, "a"))
        began = time.monotonic()
        front.serve(services.Service("s", front.listen, (a.value(),), settings=_settings(eject_seconds=7.0)))

        def applied() -> bool:
            active = front.envoy.administer("GET", "/config_dump?resource=dynamic_active_clusters")
            warming = front.envoy.administer("GET", "/config_dump?resource=dynamic_warming_clusters")
            return b'"7s"' in active and b'"name": "s"' not in warming

        world.until(applied)
        assert front.envoy.administer("GET", "/stats?filter=init_fetch_timeout").strip() in (b"",)
        assert time.monotonic() - began < 15


def test_the_activator_gets_requests_only_while_nobody_is_healthy(front: world.Front) -> None:
    with world.backends("a", "b", "c", "activator") as (a, b, c, activator):
        a.healthy = b.healthy = c.healthy = False
        service = services.Service(
            "s",
            front.listen,
            (a.value(), b.value(), c.value()),
            activator=("127.0.0.1", activator.port),
            settings=_settings(unhealthy_after=1),
        )
        front.serve(service)
        world.until(lambda: front.get() == (200, "activator"))
        b.healthy = True
        world.until(lambda: front.get() == (200, "b"))
        # One of three is healthy: by Envoy's default a part of the requests would go on to the activator.
        assert {front.get() for _ in range(30)} == {(200, "b")}
        b.healthy = False
        world.until(lambda: front.get() == (200, "activator"))


def test_equal_weights_leave_p2c_in_force(front: world.Front) -> None:
    """A backend that holds its requests gets few while others are idle; in turns it would get a quarter."""
    with world.backends("slow", "a", "b", "c") as (slow, *quick):
        slow.delay_seconds = 0.2
        settings = _settings(health_path=None)
        there = tuple(each.value() for each in (slow, *quick))
        front.serve(services.Service("s", front.listen, there, settings=settings))
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: front.get(), range(200)))
        # Not none: Envoy draws its two with replacement, so one of sixteen draws is the slow one twice.
        assert slow.served < 32


def test_a_stream_outlives_every_timeout_that_is_not_about_silence(front: world.Front) -> None:
    with world.backends("a") as (a,):
        settings = _settings(stream_idle_seconds=0.5, upstream_idle_seconds=0.2)
        front.serve(services.Service("s", front.listen, (a.value(),), settings=settings))
        world.until(lambda: front.get()[0] == 200)
        status, text = front.get("/stream?events=8&seconds=0.2")
        assert status == 200
        assert text.count("data:") == 8
        with pytest.raises(http.client.IncompleteRead):
            front.get("/stream?events=2&seconds=5")


def test_a_draining_backend_leaves_and_finishes_what_it_has(front: world.Front) -> None:
    with world.backends("a", "b") as (a, b):
        front.serve(services.Service("s", front.listen, (a.value(),), settings=_settings()))
        world.until(lambda: front.get() == (200, "a"))
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            stream = pool.submit(front.get, "/stream?events=10&seconds=0.1")
            world.until(lambda: a.requests["/stream"] == 1)
            there = (a.value(draining=True), b.value())
            front.serve(services.Service("s", front.listen, there, settings=_settings()))
            world.until(lambda: front.get() == (200, "b"))
            assert {front.get() for _ in range(20)} == {(200, "b")}
            assert stream.result()[1].count("data:") == 10


def test_an_envoy_that_crashes_is_back_and_no_client_is_refused(front: world.Front) -> None:
    with world.backends("a") as (a,):
        front.serve(services.Service("s", front.listen, (a.value(),), settings=_settings()))
        world.until(lambda: front.get() == (200, "a"))
        outcomes: list[object] = []
        stopping = threading.Event()

        def ask() -> None:
            while not stopping.is_set():
                try:
                    outcomes.append(front.get())
                except (OSError, http.client.HTTPException) as exc:
                    outcomes.append(exc)

        clients = [threading.Thread(target=ask) for _ in range(4)]
        for client in clients:
            client.start()
        dead = front.envoy.pid
        assert dead is not None
        world.until(lambda: len(outcomes) > 50)
        os.kill(dead, signal.SIGKILL)
        world.until(lambda: front.envoy.pid != dead)
        seen = len(outcomes)
        world.until(lambda: len(outcomes) > seen + 50)
        stopping.set()
        for client in clients:
            client.join()
        failed = [each for each in outcomes if each != (200, "a")]
        # With the process that was killed: for each client the one it worked on, and one that came into its
        # queue while it was being torn down. Nobody else, and nobody is refused.
        assert len(failed) <= 2 * len(clients)
        assert not any(isinstance(each, ConnectionRefusedError) for each in failed)
        assert front.envoy.restarts == 1
