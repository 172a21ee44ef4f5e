"""One trace through Envoy and an engine: a real endpoint, and a fake collector that keeps what it is sent."""

from __future__ import annotations

import http.server
import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.engine import spans
from tests.serving import shortpaths
from tests.serving.served import Served, document

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class FakeCollector:
    """Takes OTLP over HTTP: protobuf from Envoy, JSON from our proxy."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector.bodies.append(b"".join(self._pieces()))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def _pieces(self) -> Iterator[bytes]:
                """Envoy sends its bodies in chunks."""
                if self.headers["transfer-encoding"] is None:
                    yield self.rfile.read(int(self.headers["content-length"]))
                    return
                while size := int(self.rfile.readline(), 16):
                    yield self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()

            def log_message(self, *_: object) -> None:
                """Nothing to say."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def engine_spans(self) -> list[dict[str, Any]]:
        """Those of the proxy."""
        return [
            span
            for body in list(self.bodies)
            if body.startswith(b"{")
            for span in json.loads(body)["resourceSpans"][0]["scopeSpans"][0]["spans"]
        ]

    def of_envoy(self, identifier: str) -> bool:
        """Whether Envoy sent a span with this trace or span id."""
        raw = bytes.fromhex(identifier)
        return any(raw in body for body in list(self.bodies) if not body.startswith(b"{"))


@pytest.fixture
def collector() -> Iterator[FakeCollector]:
    made = FakeCollector()
    yield made
    made.server.shutdown()


def until(holds: Any) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def test_one_trace_crosses_envoy_and_engine(collector: FakeCollector) -> None:
    with shortpaths.short_directory() as directory:
        served = Served(directory)
        wanted = document(replicas=1, tracing={"collector": collector.url, "sample_percent": 0})
        try:
            served.start(wanted)
            served.until_ready(1)

            def traced() -> bool:
                served.answer("/work", traceparent=f"00-{TRACE}-{PARENT}-01")
                served.answer("/work", traceparent=f"00-{'ee' * 16}-{PARENT}-00")
                served.answer("/work")
                ours = [span for span in collector.engine_spans() if span["traceId"] == TRACE]
                return bool(ours) and collector.of_envoy(ours[0]["parentSpanId"])

            # The engine's parent is a span that Envoy has sent, which is of the caller's trace.
            until(traced)
            assert collector.of_envoy(TRACE)
            assert collector.of_envoy(PARENT)
            # Neither whom the caller left out, nor those outside the sample.
            assert not collector.of_envoy("ee" * 16)
            assert {span["traceId"] for span in collector.engine_spans()} == {TRACE}
            replicas = [each["name"] for each in served.status()["replicas"]]

            # Everything is sampled now, in place.
            served.apply({**wanted, "tracing": {"collector": collector.url, "sample_percent": 100}})
            until(
                lambda: (
                    served.answer("/work")[0] == 200
                    and {span["traceId"] for span in collector.engine_spans()} != {TRACE}
                )
            )
            assert [each["name"] for each in served.status()["replicas"]] == replicas
        finally:
            served.stop()


def test_a_collector_that_is_away_costs_no_request() -> None:
    with shortpaths.short_directory() as directory:
        served = Served(directory)
        try:
            served.start(
                document(replicas=1, tracing={"collector": "http://127.0.0.1:9", "sample_percent": 100})
            )
            served.until_ready(1)
            assert {served.answer("/work")[0] for _ in range(50)} == {200}
        finally:
            served.stop()


@given(st.text() | st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}"))
def test_any_traceparent_is_read(text: str) -> None:
    found = spans.read(text)
    if found is not None:
        assert spans.read(spans.write(found)) == found
        assert re.match(r"[0-9a-f]{2}-", text)


@pytest.mark.parametrize(
    "text", ["", f"ff-{TRACE}-{PARENT}-01", f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{'0' * 16}-01"]
)
def test_what_the_specification_calls_invalid_is_none(text: str) -> None:
    assert spans.read(text) is None
