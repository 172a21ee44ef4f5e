"""`glowplug engine` as a process, with a small engine behind it that misbehaves when told."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gzip
import http.client
import json
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.engine import running
from tests.serving.engine.running import QUICK, Engine, stub

SLOW = {"TOKEN_SECONDS": "0.05"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One for the tests that leave it as it was: limit 2, two may wait."""
    directory = tmp_path_factory.mktemp("engine")
    with running.engine(
        directory, engine=stub(), limit=2, queue={"requests": 2, "seconds": 20}, health=QUICK
    ) as engine:
        engine.wait_for("ready")
        yield engine


# -- requests ------------------------------------------------------------------------------------------


def test_probes_and_status_of_a_ready_engine(shared: Engine) -> None:
    for path in ("/livez", "/readyz", "/startupz"):
        assert shared.ask(path)[0] == 200
    status = shared.status()
    assert status["starts"] == 1
    assert list(status["phases"]) == ["start"]
    assert status["phases"]["start"] > 0


def test_requests_reach_the_engine_as_they_were(shared: Engine) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    status, headers, body = shared.ask(
        "/echo?a=%20b", ["x" * 300_000], {"traceparent": trace, "Accept": "x/y"}
    )
    seen = json.loads(body)
    assert status == 200
    assert seen["path"] == "/echo?a=%20b"
    assert seen["bytes"] == 300_004
    assert seen["headers"]["traceparent"] == trace
    assert seen["headers"]["Accept"] == "x/y"
    assert "connection" not in headers


@pytest.mark.parametrize("status", [204, 302, 304, 404, 500, 503])
def test_answers_without_a_body_pass(shared: Engine, status: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", shared.port, timeout=30)
    with contextlib.closing(connection):
        for method in ("GET", "HEAD", "DELETE"):  # on one connection: each answer ends where it should
            connection.request(method, f"/status/{status}")
            response = connection.getresponse()
            assert (response.status, response.read()) == (status, b"")
            assert response.getheader("location") == "/echo"


def test_bodies_pass_as_they_are_encoded(shared: Engine) -> None:
    status, headers, body = shared.ask("/packed", headers={"Accept-Encoding": "gzip"})
    assert (status, headers["content-encoding"], gzip.decompress(body)) == (200, "gzip", b"packed")
    connection = http.client.HTTPConnection("127.0.0.1", shared.port, timeout=30)
    with contextlib.closing(connection):
        pieces = iter([b"a" * 70_000, b"b" * 5])
        connection.request("POST", "/echo", pieces, {"Expect": "100-continue"}, encode_chunked=True)
        assert json.loads(connection.getresponse().read())["bytes"] == 70_005


def test_a_stream_passes_piece_by_piece(shared: Engine) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", shared.port, timeout=30)
    with contextlib.closing(connection):
        body = json.dumps({"max_tokens": 100, "stream": True})
        connection.request("POST", "/v1/completions", body)
        response = connection.getresponse()
        assert response.getheader("content-type") == "text/event-stream"
        first = response.readline()
        # The engine has hardly begun, and the first piece is here.
        assert first == b'data: {"token": 0}\n'
        assert shared.status()["in_flight"] == 1
        assert response.read().endswith(b"data: [DONE]\n\n")


def test_above_limit_and_queue_is_429_with_retry_after_and_never_503(shared: Engine) -> None:
    before = shared.status()
    assert before["in_flight"] == 0
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: shared.complete(60), range(8)))
    statuses = sorted(status for status, _, _ in answers)
    assert statuses == [200] * 4 + [429] * 4
    for status, headers, body in answers:
        if status == 429:
            assert int(headers["retry-after"]) >= 1
            assert json.loads(body)["error"]["code"] == 429
    assert json.loads(shared.ask("/control", {"mode": "work"})[2])["most_in_flight"] <= 2


def test_monitors_are_answered_by_a_full_engine(shared: Engine) -> None:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        full = [pool.submit(shared.complete, 100) for _ in range(4)]
        running.until(lambda: shared.status()["waiting"] == 2)
        assert shared.ask("/health")[0] == 200
        text = shared.ask("/metrics")[2].decode()
        assert shared.ask("/readyz")[0] == 200
        assert [each.result()[0] for each in full] == [200] * 4
    assert "stub_tokens" in text
    assert "glowplug_engine_in_flight_requests 2.0" in text
    assert "glowplug_engine_waiting_requests 2.0" in text


def test_a_client_that_leaves_the_queue_is_forgotten(shared: Engine) -> None:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        full = [pool.submit(shared.complete, 100) for _ in range(2)]
        running.until(lambda: shared.status()["in_flight"] == 2)
        with socket.create_connection(("127.0.0.1", shared.port)) as client:
            client.sendall(
                b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 17\r\n\r\n{"max_tokens": 1}'
            )
            running.until(lambda: shared.status()["waiting"] == 1)
        running.until(lambda: shared.status()["waiting"] == 0)
        assert shared.status()["in_flight"] == 2
        assert [each.result()[0] for each in full] == [200] * 2


def test_the_limit_changes_while_running(shared: Engine) -> None:
    try:
        assert shared.tell("POST", "/limit", {"in_flight": 1, "queue_requests": 7})[0] == 200
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            answers = [pool.submit(shared.complete, 100) for _ in range(6)]
            running.until(lambda: shared.status()["waiting"] == 5)
            assert shared.status()["in_flight"] == 1
            shared.tell("POST", "/limit", {"in_flight": 6})
            running.until(lambda: shared.status()["in_flight"] > 1)
            assert [each.result()[0] for each in answers] == [200] * 6
    finally:
        shared.tell("POST", "/limit", {"in_flight": 2, "queue_requests": 2})


@pytest.mark.parametrize(
    "body",
    [{"in_flight": 0}, {"in_flight": True}, {"in_flight": "2"}, {"limit": 3}, [], {"queue_seconds": -1}],
)
def test_a_limit_that_is_none_changes_nothing(shared: Engine, body: object) -> None:
    status, answer = shared.tell("POST", "/limit", body)
    assert status == 400
    assert answer["error"]
    assert shared.status()["limit"] == 2


def test_the_control_socket_is_ours_alone(shared: Engine) -> None:
    assert shared.control.stat().st_mode & 0o777 == 0o600
    assert shared.ask("/limit", {"in_flight": 9})[0] == 404  # on the port it is only a path of the engine's


# -- life -------------------------------------------------------------------------------------------------


def test_a_crash_is_told_and_mended(tmp_path: Path) -> None:
    with running.engine(tmp_path, engine=stub(), health=QUICK) as engine:
        pid = engine.wait_for("ready")["pid"]
        with contextlib.suppress(http.client.HTTPException, OSError):
            engine.ask("/control", {"mode": "crash"})
        status = engine.wait_for("ready", starts=2)
        assert status["pid"] != pid
        assert engine.complete(1)[0] == 200
        reason = engine.events("failed")[0]["reason"]
        assert "status 3" in reason
        assert "fell off the bus" in reason


def test_while_it_is_respawned_probes_answer_and_requests_get_503(tmp_path: Path) -> None:
    with running.engine(tmp_path, engine=stub(), health=QUICK) as engine:
        pid = engine.wait_for("ready")["pid"]
        os.kill(pid, signal.SIGKILL)
        engine.wait_for("failed")
        assert engine.ask("/livez")[0] == 200
        assert engine.ask("/readyz")[0] == 503
        status, headers, _ = engine.complete(1)
        assert (status, headers["retry-after"]) == (503, "1")
        engine.wait_for("ready", starts=2)


def test_a_hang_is_killed_and_mended(tmp_path: Path) -> None:
    with running.engine(tmp_path, engine=stub(), health=QUICK) as engine:
        pid = engine.wait_for("ready")["pid"]
        engine.ask("/control", {"mode": "hang"})
        status = engine.wait_for("ready", starts=2)
        assert status["hangs"] == 1
        assert running.gone(pid)
        assert "no progress" in engine.events("failed")[0]["reason"]
        assert engine.complete(1)[0] == 200


def test_a_stopped_process_is_a_hang_too_and_who_waits_is_answered(tmp_path: Path) -> None:
    with running.engine(tmp_path, engine=stub(), health=QUICK) as engine:
        os.kill(engine.wait_for("ready")["pid"], signal.SIGSTOP)
        status, _, body = engine.complete(1)
        assert status == 502
        assert json.loads(body)["error"]["type"] == "engine_error"
        engine.wait_for("ready", starts=2, hangs=1)


def test_a_loaded_engine_is_not_killed_for_being_busy(tmp_path: Path) -> None:
    """Its probes are never answered, but its streams go on: three times as long as a hang may last."""
    with running.engine(tmp_path, engine=stub(**SLOW), health=QUICK) as engine:
        engine.wait_for("ready")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            stream = pool.submit(engine.complete, 140, stream=True)
            running.until(lambda: engine.status()["in_flight"] == 1)
            engine.ask("/control", {"mode": "hang"})
            assert stream.result()[2].endswith(b"[DONE]\n\n")
        assert engine.status()["hangs"] == 0
        assert engine.status()["starts"] == 1


def test_an_engine_that_sheds_its_probes_is_alive(tmp_path: Path) -> None:
    with running.engine(tmp_path, engine=stub(), health=QUICK) as engine:
        engine.wait_for("ready")
        engine.ask("/control", {"mode": "shed"})
        time.sleep(3 * QUICK["stall_seconds"])
        assert engine.status()["starts"] == 1
        assert engine.status()["state"] == "ready"


def test_an_engine_that_says_not_yet_is_not_ready(tmp_path: Path) -> None:
    with running.engine(tmp_path, engine=stub(STUB_LOADS_SECONDS="2"), health=QUICK) as engine:
        engine.wait_for("starting")
        assert engine.wait_for("ready")["phases"]["start"] >= 2
        assert engine.complete(1)[0] == 200


def test_no_process_of_a_crashed_engine_is_left(tmp_path: Path) -> None:
    with running.engine(tmp_path, engine=stub(STUB_HELPER="1"), health=QUICK) as engine:
        pid = engine.wait_for("ready")["pid"]
        assert len(running.group(pid)) == 2
        os.kill(pid, signal.SIGKILL)
        engine.wait_for("ready", starts=2)
        assert not running.group(pid)  # nor a zombie


def test_an_engine_that_cannot_be_started_again_is_tried_again(tmp_path: Path) -> None:
    program = tmp_path / "program"
    text = f"#!/bin/sh\nexec {' '.join(stub()['command'])}\n"
    program.write_text(text)
    program.chmod(0o755)
    described = {"kind": "command", "command": [str(program)]}
    with running.engine(tmp_path, engine=described, health=QUICK) as engine:
        pid = engine.wait_for("ready")["pid"]
        program.unlink()
        os.kill(pid, signal.SIGKILL)
        running.until(lambda: any("No such file" in each["reason"] for each in engine.events("failed")))
        assert engine.ask("/livez")[0] == 200
        program.write_text(text)
        program.chmod(0o755)
        engine.wait_for("ready")


def test_a_first_start_that_fails_ends_with_the_reason(tmp_path: Path) -> None:
    with running.engine(tmp_path, engine=stub(STUB_FAILS="1")) as engine:
        assert engine.process.wait(30) == 7
        assert "ValueError: no such checkpoint" in engine.log.read_text().splitlines()[-1]


def test_an_interpreter_without_vllm_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with running.engine(
        tmp_path, engine={"kind": "vllm", "python": sys.executable}, model=str(tmp_path)
    ) as engine:
        assert engine.process.wait(60) == 7
        assert f"{sys.executable} has no vLLM; name" in engine.log.read_text()


def test_a_first_start_that_never_ends_is_ended(tmp_path: Path) -> None:
    engine_document = {"kind": "command", "command": ["sleep", "600"], "start_timeout_seconds": 1}
    with running.engine(tmp_path, engine=engine_document) as engine:
        assert engine.process.wait(30) == 7
        assert "not ready within 1 s" in engine.log.read_text()


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"engine": {"kind": "command", "command": ["/no/such/program"]}}, "/no/such/program"),
        ({"engine": {"kind": "vllm"}, "model": "/no/such/model"}, "/no/such/model"),
        ({"engine": stub(), "control": "/tmp/" + "x" * 120}, "shorter"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    tmp_path: Path, document: dict[str, object], message: str
) -> None:
    with running.engine(tmp_path, **document) as engine:
        assert engine.process.wait(30) == 8
        assert message in engine.log.read_text().splitlines()[-1]


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with running.engine(tmp_path, engine=stub(), port=port) as engine:
            assert engine.process.wait(30) == 8
            assert f"127.0.0.1:{port}" in engine.log.read_text()


# -- the end ------------------------------------------------------------------------------------------------


def test_a_drain_finishes_streams_and_says_close(tmp_path: Path) -> None:
    with running.engine(tmp_path, engine=stub(**SLOW), limit=1) as engine:
        pid = engine.wait_for("ready")["pid"]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            stream = pool.submit(engine.complete, 60, stream=True)
            running.until(lambda: engine.status()["in_flight"] == 1)
            waiting = pool.submit(engine.complete, 2)
            running.until(lambda: engine.status()["waiting"] == 1)
            assert engine.tell("POST", "/drain")[0] == 202
            engine.wait_for("draining")
            engine.process.send_signal(signal.SIGTERM)  # as a kubelet, after the hook that said so
            assert engine.ask("/readyz")[0] == 503
            assert engine.ask("/livez")[0] == 200
            assert stream.result()[2].endswith(b"[DONE]\n\n")
            status, headers, _ = waiting.result()
            assert (status, headers["connection"]) == (200, "close")
        assert engine.process.wait(30) == 0
        assert running.gone(pid)
        assert engine.events("ending")[0]["cut_off"] == 0


def test_a_drain_ends_at_its_time_with_what_is_left(tmp_path: Path) -> None:
    with running.engine(tmp_path, engine=stub(**SLOW), drain={"notice_seconds": 0, "seconds": 0.5}) as engine:
        engine.wait_for("ready")
        errors: list[BaseException] = []

        def stream() -> None:
            try:
                engine.complete(2_000, stream=True)
            except (http.client.HTTPException, OSError) as exc:
                errors.append(exc)

        thread = threading.Thread(target=stream)
        thread.start()
        running.until(lambda: engine.status()["in_flight"] == 1)
        assert engine.end() == 0
        thread.join(30)
        assert errors, "half an answer passed for a whole one"
        assert engine.events("ending")[0]["cut_off"] == 1


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    with running.engine(tmp_path, engine=stub(), drain={"notice_seconds": 60, "seconds": 600}) as engine:
        engine.wait_for("ready")
        engine.process.send_signal(signal.SIGTERM)
        engine.wait_for("draining")
        assert engine.end() == 0


def test_the_engine_does_not_outlive_its_supervisor(tmp_path: Path) -> None:
    with running.engine(tmp_path, engine=stub()) as engine:
        pid = engine.wait_for("ready")["pid"]
        engine.process.kill()
        assert running.gone(pid)


def test_nor_does_what_the_engine_has_started(tmp_path: Path) -> None:
    written = tmp_path / "pid"
    command = f"sleep 600 & echo $! >{written}; exec {shlex.join(stub()['command'])}"
    document = {"kind": "command", "command": ["sh", "-c", command]}
    with running.engine(tmp_path, engine=document) as engine:
        engine.wait_for("ready")
        engine.process.kill()
        assert running.gone(int(written.read_text()))
