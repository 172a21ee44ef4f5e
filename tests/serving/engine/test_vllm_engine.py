"""`glowplug engine` with real vLLM on a tiny model: two API server processes behind one port and one limit.

One start for all tests of the file but the soak ones, because a start takes most of a minute. They leave the
engine as they found it; the last one ends it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import http.server
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.dataset
import pytest

from serving.engine import phases
from tests.fixtures import vllm_environment
from tests.serving.engine import running
from tests.serving.engine.running import Engine

_START_SECONDS = 600.0


def document(*arguments: str, api_servers: int = 2) -> dict[str, Any]:
    return {
        "engine": {
            "kind": "vllm",
            "python": str(vllm_environment.python()),
            "arguments": ["--max-model-len", "512", *arguments],
            "environment": {"VLLM_CPU_KVCACHE_SPACE": "1"},
            "api_servers": api_servers,
        },
        "model": str(vllm_environment.model()),
        "model_name": "tiny",
        "limit": 2,
        "queue": {"requests": 2, "seconds": 60},
    }


class Collector(http.server.BaseHTTPRequestHandler):
    """Takes OTLP spans over HTTP and keeps their bytes."""

    received: ClassVar[list[bytes]] = []

    def do_POST(self) -> None:
        self.received.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing to say."""


@pytest.fixture(scope="module")
def collector() -> Iterator[str]:
    """Where spans go."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1/traces"
        server.shutdown()


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory, collector: str) -> Iterator[Engine]:
    settings = document("--enforce-eager") | {"traces_endpoint": collector}
    settings["engine"]["environment"] |= {
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    with running.engine(tmp_path_factory.mktemp("vllm"), **settings) as engine:
        engine.wait_for("starting")
        # Its processes are minutes away, and the port answers.
        assert engine.ask("/startupz")[0] == 503
        status, headers, _ = complete(engine, 1)
        assert (status, headers["connection"]) == (503, "close")
        engine.wait_for("ready", _START_SECONDS)
        yield engine


def complete(engine: Engine, tokens: int, **more: Any) -> tuple[int, Any, bytes]:
    wanted = {"model": "tiny", "prompt": "import os", "max_tokens": tokens, "ignore_eos": True}
    return engine.ask("/v1/completions", {**wanted, **more})


def worker(engine: Engine) -> int:
    """The process with the model."""
    group = running.group(engine.status()["pid"])
    return next(pid for pid in group if Path(f"/proc/{pid}/comm").read_text() == "VLLM::Worker\n")


def api_server(engine: Engine) -> int:
    """One of the two, while the other goes on."""
    return int(engine.status()["servers"][1]["pid"])


@contextlib.contextmanager
def frozen(engine: Engine) -> Iterator[None]:
    """The model stands still, for much less than a hang takes: what is in flight stays there."""
    model = worker(engine)
    os.kill(model, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(model, signal.SIGCONT)


def test_it_starts_in_phases_and_answers_probes(vllm: Engine) -> None:
    status = vllm.status()
    assert list(status["phases"]) == [each for each in phases.ORDER if each in status["phases"]]
    assert {phases.IMPORTS, phases.WEIGHTS, phases.FIRST_TOKEN} <= set(status["phases"])
    assert len({each["pid"] for each in status["servers"]}) == 2
    for path in ("/livez", "/readyz", "/startupz"):
        assert vllm.ask(path)[0] == 200
    doors = [*vllm.run.glob("server-*"), *vllm.run.glob("ledger")]
    assert len(doors) == 3
    assert all(each.stat().st_mode & 0o077 == 0 for each in doors)


def test_an_answer_whole_and_as_a_stream(vllm: Engine) -> None:
    status, headers, body = complete(vllm, 5)
    assert (status, json.loads(body)["usage"]["completion_tokens"]) == (200, 5)
    assert "connection" not in headers
    status, headers, body = complete(vllm, 5, stream=True)
    assert headers["content-type"].startswith("text/event-stream")
    assert body.endswith(b"data: [DONE]\n\n")


def test_its_spans_are_children_of_the_callers(vllm: Engine) -> None:
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    body = {"model": "tiny", "prompt": "import os", "max_tokens": 2}
    assert vllm.ask("/v1/completions", body, {"traceparent": f"00-{trace}-{parent}-01"})[0] == 200
    # Identifiers are plain bytes in the encoding.
    found = (bytes.fromhex(trace), bytes.fromhex(parent))
    until = time.monotonic() + 60
    while not any(all(each in spans for each in found) for spans in Collector.received):
        assert time.monotonic() < until, f"{len(Collector.received)} exports, none with the caller's trace"
        time.sleep(0.05)


def test_bodies_are_logged_by_both_server_processes_while_it_is_asked_for(
    vllm: Engine, tmp_path: Path
) -> None:
    log = {"destination": str(tmp_path), "sample_rate": 1.0, "file_seconds": 0.2}
    assert vllm.tell("POST", "/request-log", {"request_log": log})[0] == 200
    found: list[dict[str, Any]] = []

    def streamed() -> list[dict[str, Any]]:
        assert complete(vllm, 3)[0] == 200
        assert complete(vllm, 3, stream=True, stream_options={"include_usage": True})[0] == 200
        read = pyarrow.dataset.dataset(tmp_path, partitioning="hive").to_table().to_pylist()
        found[:] = [row for row in read if row["response_type"].startswith("text/event-stream")]
        return found

    running.until(streamed)
    assert json.loads(found[0]["request_body"])["prompt"] == "import os"
    assert found[0]["response_body"].endswith(b"data: [DONE]\n\n")
    assert (found[0]["outcome"], found[0]["output_tokens"]) == ("whole", 3)
    assert vllm.tell("POST", "/request-log", {"request_log": None})[0] == 200


def test_two_server_processes_keep_one_limit(vllm: Engine) -> None:
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        with frozen(vllm):
            answers = [pool.submit(complete, vllm, 5) for _ in range(12)]
            running.until(lambda: sum(each.done() for each in answers) == 8)
            status = vllm.status()
            assert (status["in_flight"], status["waiting"]) == (2, 2)
            for each in answers:
                if each.done():
                    refused, headers, _ = each.result()
                    assert refused == 429
                    assert int(headers["retry-after"]) >= 1
        assert sorted(each.result()[0] for each in answers) == [200] * 4 + [429] * 8
    text = vllm.ask("/metrics")[2].decode()
    assert "vllm:iteration_tokens_total_count" in text
    assert "glowplug_engine_limit_requests 2.0" in text


def test_the_limit_changes_in_both(vllm: Engine) -> None:
    try:
        vllm.tell("POST", "/limit", {"in_flight": 1, "queue_requests": 20})
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            with frozen(vllm):
                answers = [pool.submit(complete, vllm, 5) for _ in range(8)]
                running.until(lambda: vllm.status()["waiting"] == 7)
                assert vllm.status()["in_flight"] == 1
                vllm.tell("POST", "/limit", {"in_flight": 6})
                running.until(lambda: vllm.status()["waiting"] == 2)
                assert vllm.status()["in_flight"] == 6
            assert [each.result()[0] for each in answers] == [200] * 8
    finally:
        vllm.tell("POST", "/limit", {"in_flight": 2, "queue_requests": 2})


def test_tenants_pay_what_vllm_counts_and_ask_for_what_they_may(vllm: Engine) -> None:
    rations = {
        "tenants": {"acme": {"per_second": 10_000.0, "priority": 3}},
        "output_tokens": 6,
        "coefficients": {"request": 0.5, "input": 1.0, "output": 1.0, "cached": 0.0},
    }

    def had() -> dict[str, Any]:
        return dict(vllm.tell("POST", "/rations", rations)[1]["tenants"]["acme"])

    had()
    body = {"model": "tiny", "prompt": "x = [" + "1, " * 200, "max_tokens": 500, "ignore_eos": True}
    acme = {"x-glowplug-tenant": "acme"}
    try:
        whole = json.loads(vllm.ask("/v1/completions", body, acme)[2])["usage"]
        assert whole["completion_tokens"] == 6
        assert had()["charged"] == pytest.approx(whole["total_tokens"])
        before = vllm.status()["counters"]["unit_micros"]
        stream = vllm.ask("/v1/completions", {**body, "stream": True}, acme)[2]
        assert stream.endswith(b"data: [DONE]\n\n")
        assert b'"usage":{' not in stream  # asked for by the gate, and kept to itself
        assert had()["charged"] == pytest.approx(2 * whole["total_tokens"])
        cost = (vllm.status()["counters"]["unit_micros"] - before) / 1e6
        assert 6.5 < cost < whole["total_tokens"] / 2  # the prompt was cached by then
        assert vllm.ask("/v1/completions", {**body, "priority": -(10**9)}, acme)[0] == 200
        assert vllm.status()["units_in_flight"] == 0
        while vllm.ask("/v1/completions", body, acme)[0] == 200:
            rations["tenants"] = {"acme": {"per_second": 1.0}}
            had()
        assert vllm.ask("/v1/completions", body)[0] == 200  # nobody else is
    finally:
        vllm.tell("POST", "/rations", {})


def test_a_client_that_leaves_the_queue_is_forgotten(vllm: Engine) -> None:
    vllm.tell("POST", "/limit", {"in_flight": 1})
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            with frozen(vllm):
                before_it = pool.submit(complete, vllm, 5)
                running.until(lambda: vllm.status()["in_flight"] == 1)
                client = http.client.HTTPConnection("127.0.0.1", vllm.port)
                body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 1})
                client.request("POST", "/v1/completions", body, {"content-type": "application/json"})
                running.until(lambda: vllm.status()["waiting"] == 1)
                client.close()
                running.until(lambda: vllm.status()["waiting"] == 0)
                assert vllm.status()["in_flight"] == 1
            assert before_it.result()[0] == 200
    finally:
        vllm.tell("POST", "/limit", {"in_flight": 2})


def test_a_full_engine_is_ready_and_shows_its_models(vllm: Engine) -> None:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        with frozen(vllm):
            full = [pool.submit(complete, vllm, 5) for _ in range(2)]
            running.until(lambda: vllm.status()["in_flight"] == 2)
            assert vllm.ask("/readyz")[0] == 200
            assert json.loads(vllm.ask("/v1/models")[2])["data"][0]["id"] == "tiny"
        assert [each.result()[0] for each in full] == [200, 200]


def test_last_a_drain_finishes_the_stream_and_leaves_nothing(vllm: Engine) -> None:
    processes = running.group(vllm.status()["pid"])
    assert len(processes) >= 4
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with frozen(vllm):
            stream = pool.submit(complete, vllm, 50, stream=True)
            running.until(lambda: vllm.status()["in_flight"] == 1)
            vllm.process.send_signal(signal.SIGTERM)
            vllm.wait_for("draining")
            status, headers, _ = vllm.ask("/v1/models")
            assert (status, headers["connection"]) == (200, "close")
            assert vllm.ask("/readyz")[0] == 503
        assert stream.result()[2].endswith(b"data: [DONE]\n\n")
    assert vllm.process.wait(60) == 0
    assert all(running.gone(pid) for pid in processes)


@pytest.mark.soak
@pytest.mark.parametrize("who", [worker, api_server])
def test_whichever_process_hangs_the_engine_is_back(tmp_path: Path, who: Callable[[Engine], int]) -> None:
    with running.engine(tmp_path, **document("--enforce-eager")) as engine:
        engine.wait_for("ready", _START_SECONDS)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            load = [pool.submit(complete, engine, 400) for _ in range(2)]
            time.sleep(0.3)
            os.kill(who(engine), signal.SIGSTOP)
            began = time.monotonic()
            for each in load:
                with contextlib.suppress(http.client.HTTPException, OSError):
                    each.result()
            engine.wait_for("starting", _START_SECONDS, hangs=1)
            print(f"{who.__name__}: killed {time.monotonic() - began:.1f} s after it stopped")
        engine.wait_for("ready", _START_SECONDS, starts=2)
        assert complete(engine, 3)[0] == 200


@pytest.mark.soak
def test_the_second_start_finds_what_the_first_compiled(tmp_path: Path) -> None:
    settings = document(api_servers=1) | {"cache_directory": str(tmp_path / "cache")}
    took = []
    for number in (1, 2):
        directory = tmp_path / str(number)
        directory.mkdir()
        with running.engine(directory, **settings) as engine:
            took.append(engine.wait_for("ready", _START_SECONDS)["phases"])
            assert engine.end() == 0
    print(took)
    cold, warm = (each[phases.COMPILE] + each.get(phases.GRAPHS, 0) for each in took)
    assert warm < cold
