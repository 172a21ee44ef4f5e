"""The API's sockets: who may ask what, how much, and that one who hangs holds up nobody."""

from __future__ import annotations

import http.client
import json
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import api, client
from agent import errors as agent_errors
from imagefs import errors

_ERRORS = [
    (errors.InvalidInputError("x"), 400),
    (errors.DeniedError("x"), 403),
    (errors.NotFoundError("x"), 404),
    (errors.BusyError("x"), 409),
    (agent_errors.AlreadyExistsError("x"), 409),
    (agent_errors.FailedPreconditionError("x"), 412),
    (errors.IntegrityError("x"), 502),
    (errors.UnavailableError("x", 7.0), 503),
    (errors.ConfigurationError("x"), 500),
]


class _Served:
    """An API with a few routes; `hold` is what POST /hold waits for."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "agent.sock"
        self.error: Exception = errors.NotFoundError("nothing")
        self.release = threading.Event()
        self.holding = threading.Semaphore(0)
        self.api = api.Api(self.path, "127.0.0.1:0", ["node-7"])
        self.api.add("GET", "/look/{name}", self._look, public=True)
        self.api.add("POST", "/echo", lambda request: {"got": request.json()})
        self.api.add("POST", "/need", lambda request: {"got": request.string("reference")})
        self.api.add("POST", "/hold", self._hold)
        self.api.add("GET", "/fail", self._fail)
        self.api.add("GET", "/page", lambda request: api.Response(b"<p>", "text/html"), public=True)
        self.api.start()
        self.client = client.AgentClient(self.path)

    def _look(self, request: api.Request) -> dict[str, object]:
        return {"name": request.parameters["name"], "query": dict(request.query)}

    def _hold(self, request: api.Request) -> dict[str, object]:
        self.holding.release()
        self.release.wait()
        return {}

    def _fail(self, request: api.Request) -> dict[str, object]:
        raise self.error

    def tcp(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes, http.client.HTTPMessage]:
        assert self.api.port is not None
        connection = http.client.HTTPConnection("127.0.0.1", self.api.port, timeout=60)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read(), response.headers
        finally:
            connection.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[_Served]:
    made = _Served(tmp_path)
    yield made
    made.release.set()
    made.api.stop()


def test_the_unix_socket_is_ours_alone_and_serves_everything(served: _Served) -> None:
    assert stat.S_IMODE(served.path.stat().st_mode) == 0o600
    assert served.client.get("/look/it", {"a": "b c"}) == {"name": "it", "query": {"a": "b c"}}
    assert served.client.post("/echo", {"x": [1, "ä"]}) == {"got": {"x": [1, "ä"]}}


def test_the_port_serves_what_is_public_and_only_to_look_at(served: _Served) -> None:
    status, body, headers = served.tcp("GET", "/look/a%2Fb")
    assert (status, json.loads(body)["name"]) == (200, "a/b")
    assert headers["Access-Control-Allow-Origin"] is None
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert served.tcp("HEAD", "/look/a")[:2] == (200, b"")
    assert served.tcp("GET", "/fail")[0] == 404
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
        assert served.tcp(method, "/look/a", b"{}")[0] == 405
    assert served.tcp("POST", "/echo", b"{}")[0] == 405
    assert served.tcp("GET", "/page")[2]["Content-Type"] == "text/html"


@pytest.mark.parametrize("host", ["127.0.0.1:1", "[::1]:7310", "localhost", "NODE-7:80"])
def test_names_of_this_host_are_answered(served: _Served, host: str) -> None:
    assert served.tcp("GET", "/healthz", Host=host)[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[", "localhost.", "a b"])
def test_a_renamed_host_is_refused(served: _Served, host: str) -> None:
    assert served.tcp("GET", "/look/a", Host=host)[0] in (400, 421)


@pytest.mark.parametrize(("error", "status"), _ERRORS)
def test_errors_cross_the_socket(served: _Served, error: errors.ImagefsError, status: int) -> None:
    served.error = error
    assert api.status_code(error) == status
    with pytest.raises(type(error), match=r"^x$") as caught:
        served.client.get("/fail")
    if isinstance(caught.value, errors.UnavailableError):
        assert caught.value.retry_after_seconds == 7.0


def test_a_bug_is_an_error_without_its_inside(served: _Served) -> None:
    served.error = RuntimeError("secret")
    with pytest.raises(errors.ImagefsError, match="RuntimeError") as caught:
        served.client.get("/fail")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff", b"[" * 100_000, b"{}", b'{"reference": 3}'])
def test_bad_bodies_name_what_is_wrong(served: _Served, body: bytes) -> None:
    connection = socket.socket(socket.AF_UNIX)
    with connection:
        connection.connect(str(served.path))
        connection.sendall(b"POST /need HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    assert answer.split(b" ")[1] == b"400"
    assert b"InvalidInputError" in answer


def test_a_body_that_is_too_long_is_refused(served: _Served) -> None:
    with pytest.raises(errors.ImagefsError):
        served.client.post("/echo", {"x": "y" * (api.MAX_BODY_BYTES + 1)})
    assert served.client.post("/echo", {"x": 1}) == {"got": {"x": 1}}


def test_headers_are_bounded(served: _Served) -> None:
    assert served.tcp("GET", "/healthz", Long="x" * 100_000)[0] == 400


def test_those_who_hang_hold_up_neither_health_nor_lookers_and_too_many_are_told(served: _Served) -> None:
    threads = [threading.Thread(target=lambda: served.client.post("/hold"), daemon=True) for _ in range(64)]
    for thread in threads:
        thread.start()
    for _ in range(8):
        assert served.holding.acquire(timeout=60)
    assert served.tcp("GET", "/healthz")[0] == 200
    assert served.tcp("GET", "/look/a")[0] == 200
    # All 64 places are taken once the last of them waits for a thread.
    while True:
        try:
            client.AgentClient(served.path, 0.2).post("/echo")
        except errors.UnavailableError as exc:
            if "too many" in str(exc) and exc.retry_after_seconds == 1.0:
                break
    served.release.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_a_port_that_is_taken_is_said_and_the_socket_serves(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        made = api.Api(tmp_path / "agent.sock", f"127.0.0.1:{taken.getsockname()[1]}")
        made.start()
        try:
            assert made.tcp_error is not None
            assert "in use" in made.tcp_error
            with pytest.raises(errors.NotFoundError):
                client.AgentClient(tmp_path / "agent.sock").get("/nothing")
        finally:
            made.stop()


def test_no_socket_no_api(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigurationError, match=r"agent\.sock"):
        api.Api(tmp_path / "missing" / "agent.sock", None).start()


def test_routes_are_public_only_to_look_at_and_added_before_the_start(served: _Served) -> None:
    with pytest.raises(ValueError, match="read-only"):
        api.Api(served.path, None).add("POST", "/x", lambda request: {}, public=True)
    with pytest.raises(RuntimeError, match="running"):
        served.api.add("GET", "/x", lambda request: {})


def test_stopping_ends_connections_and_may_be_repeated(tmp_path: Path) -> None:
    made = _Served(tmp_path)
    with socket.socket(socket.AF_UNIX) as idle:
        idle.settimeout(60)
        idle.connect(str(made.path))
        idle.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        while not idle.recv(65536).endswith(b"ok\n"):
            pass
        made.api.stop()
        made.api.stop()
        assert idle.recv(1) == b""
    with pytest.raises(errors.UnavailableError):
        made.client.get("/look/a")
