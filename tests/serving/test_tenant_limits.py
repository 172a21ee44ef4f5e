"""What a tenant may have of a served endpoint, over all replicas, with the control plane and without it."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures import stub_engine
from tests.serving import served

RATE = 300.0
TOKENS = 3 + 20
"""Of each request."""
CLIENTS = 6
KEYS = f"heavy h tokens={RATE:g}\nfew f requests=1\nfree k\n"


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gp") as short:
        (Path(short) / "keys").write_text(KEYS)
        yield Path(short)


def document(directory: Path, **sections: Any) -> dict[str, Any]:
    engine = {
        "kind": "command",
        "command": [sys.executable, stub_engine.__file__],
        "environment": {"TOKEN_SECONDS": "0.001"},
    }
    limits = {"keys_file": str(directory / "keys"), **sections.pop("limits", {})}
    return served.document(replicas=3, engine=engine, limits=limits, **sections)


def complete(url: str, key: str, tokens: int = 20, **body: Any) -> tuple[int, Any, Any]:
    """Status, header fields and parsed body."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 0, timeout=30)
    headers = {"content-type": "application/json", "x-api-key": key, "x-glowplug-tenant": "free"}
    connection.request(
        "POST",
        "/v1/completions",
        json.dumps({"prompt": "one two three", "max_tokens": tokens, **body}),
        headers,
    )
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, answer.headers, json.loads(text)


def load(url: str, seconds: float) -> list[int]:
    """The statuses that clients of the limited tenant got in that time."""

    def client() -> list[int]:
        until, found = time.monotonic() + seconds, []
        while time.monotonic() < until:
            found.append(complete(url, "h")[0])
        return found

    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        return [status for each in [pool.submit(client) for _ in range(CLIENTS)] for status in each.result()]


def test_a_tenant_has_its_tokens_once_whatever_the_replicas(directory: Path) -> None:
    with served.serving(directory, document(directory)) as endpoint:
        endpoint.until("3 ready", lambda status: len(served.ready(status)) == 3)
        began = time.monotonic()
        statuses = load(endpoint.url, 3.0)
        endpoint.kill()
        statuses += load(endpoint.url, 1.5)  # the last shares hold
        most = RATE * (time.monotonic() - began)
        # A bucket in each replica from the start, one interval while shares move, what was in flight.
        most += 2 * RATE + CLIENTS * TOKENS
        assert set(statuses) == {200, 429}
        assert statuses.count(200) * TOKENS <= most
        status, headers, body = complete(endpoint.url, "h", 2_000)
        while status == 200:
            status, headers, body = complete(endpoint.url, "h", 2_000)
        assert (status, body["error"]["limit"]) == (429, "tokens_per_second")
        assert int(headers["retry-after"]) >= 1
        assert complete(endpoint.url, "k")[0] == 200
        while complete(endpoint.url, "f")[0] == 200:
            pass
        assert complete(endpoint.url, "f")[2]["error"]["limit"] == "requests_per_second"


def test_limits_change_and_nothing_restarts(directory: Path) -> None:
    with served.serving(directory, document(directory)) as endpoint:
        status = endpoint.until("3 ready", lambda status: len(served.ready(status)) == 3)
        replicas = [each["name"] for each in status["replicas"]]
        endpoint.apply(
            document(
                directory,
                limits={"request_bytes": 2_048, "output_tokens": 30},
                routing={"port": 0, "request_timeout_seconds": 1.0},
            )
        )

        def clamped() -> bool:
            answers = [complete(endpoint.url, "k", 500)[2] for _ in range(6)]
            return all(each["usage"]["completion_tokens"] == 30 for each in answers)

        endpoint.until("answers are short", lambda _: clamped())
        assert complete(endpoint.url, "k", prompt="x" * 4_000)[0] == 413
        endpoint.apply(document(directory, routing={"port": 0, "request_timeout_seconds": 1.0}))
        endpoint.until(
            "answers are long",
            lambda _: complete(endpoint.url, "k", 60)[2]["usage"]["completion_tokens"] == 60,
        )
        late, _, body = complete(endpoint.url, "k", 100_000)
        assert (late, body["error"]["type"]) == (504, "router_error")
        assert [each["name"] for each in endpoint.status()["replicas"]] == replicas
