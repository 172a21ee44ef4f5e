"""The delaying proxy as a process: what passes is what was sent, whatever the order of ends and failures.

How late it is, is the delay line's matter (test_delayline.py): nothing here looks at a clock.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

Handler = Callable[[socket.socket], None]


@contextlib.contextmanager
def serving(handler: Handler) -> Iterator[int]:
    """A server on loopback that gives each connection to `handler`; its port."""
    with socket.create_server(("127.0.0.1", 0), backlog=500) as listener:

        def handle(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                handler(connection)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=handle, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


class Proxy:
    """The process. `stop` ends it and returns its counters."""

    def __init__(self, port: int, rtt_seconds: float) -> None:
        command = [sys.executable, "-m", "glowplug.startup.delay", "--listen", "127.0.0.1:0"]
        command += ["--to", f"127.0.0.1:{port}", "--rtt-seconds", str(rtt_seconds)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        word, _, place = self.process.stdout.readline().partition(" ")
        assert word == "ready", self.process.communicate()
        self.port = int(place.rpartition(":")[2])

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), 30)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> dict[str, int]:
        self.process.send_signal(number)
        said, errors = self.process.communicate(timeout=30)
        assert (self.process.returncode, errors) == (0, "")
        counters: dict[str, int] = json.loads(said)
        return counters


@contextlib.contextmanager
def proxied(handler: Handler, rtt_seconds: float = 0.02) -> Iterator[Proxy]:
    with serving(handler) as port:
        proxy = Proxy(port, rtt_seconds)
        try:
            yield proxy
        finally:
            proxy.process.kill()
            proxy.process.communicate()


def echo(connection: socket.socket) -> None:
    while data := connection.recv(65536):
        connection.sendall(data)


def read_all(connection: socket.socket) -> bytes:
    pieces = []
    while data := connection.recv(1 << 20):
        pieces.append(data)
    return b"".join(pieces)


@pytest.mark.parametrize("rtt_seconds", [0, 0.005])
def test_more_than_may_be_under_way_comes_whole_both_ways(rtt_seconds: float) -> None:
    """48 MB each way at once, a reader that starts late: what is held back is held back, and not lost."""
    data = random.Random(4).randbytes(48 << 20)
    with proxied(echo, rtt_seconds) as proxy, proxy.connect() as connection:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:

            def send() -> None:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)

            sent = pool.submit(send)
            came = read_all(connection)
            sent.result()
        assert hashlib.sha256(came).digest() == hashlib.sha256(data).digest()
        assert proxy.stop() == {
            "connections": 1,
            "refused": 0,
            "requests": 0,
            "bytes_to_server": len(data),
            "bytes_to_client": len(data),
        }


def test_a_side_that_has_said_all_still_hears_the_other() -> None:
    """The server answers once it has seen the client's end: a proxy that closed would lose that."""

    def answer_at_the_end(connection: socket.socket) -> None:
        connection.sendall(hashlib.sha256(read_all(connection)).hexdigest().encode())

    with proxied(answer_at_the_end) as proxy, proxy.connect() as connection:
        connection.sendall(b"question")
        connection.shutdown(socket.SHUT_WR)
        assert read_all(connection).decode() == hashlib.sha256(b"question").hexdigest()


def test_the_server_ends_first_and_still_hears_the_client() -> None:
    heard = concurrent.futures.Future[bytes]()

    def greet_and_listen(connection: socket.socket) -> None:
        connection.sendall(b"hello")
        connection.shutdown(socket.SHUT_WR)
        heard.set_result(read_all(connection))

    with proxied(greet_and_listen) as proxy, proxy.connect() as connection:
        assert read_all(connection) == b"hello"
        connection.sendall(b"and you")
        connection.shutdown(socket.SHUT_WR)
        assert heard.result(30) == b"and you"


def test_many_connections_at_once_do_not_mix() -> None:
    def ask(number: int) -> bool:
        data = random.Random(number).randbytes(50_000)
        with proxy.connect() as connection:
            for at in range(0, len(data), 9_973):
                piece = data[at : at + 9_973]
                connection.sendall(piece)
                came = b""
                while len(came) < len(piece):
                    came += connection.recv(65536)
                if came != piece:
                    return False
        return True

    with proxied(echo) as proxy:
        with concurrent.futures.ThreadPoolExecutor(50) as pool:
            assert all(pool.map(ask, range(200)))
        counters = proxy.stop()
    assert (counters["connections"], counters["bytes_to_client"]) == (200, 200 * 50_000)


def test_requests_are_counted() -> None:
    def respond(connection: socket.socket) -> None:
        while connection.recv(65536):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    with proxied(respond) as proxy:
        for _ in range(2):
            with proxy.connect() as connection:
                for _ in range(3):
                    connection.sendall(b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n")
                    assert connection.recv(65536).endswith(b"ok")
        assert proxy.stop(signal.SIGINT)["requests"] == 6


def test_a_client_that_goes_away_is_gone_for_the_server_too() -> None:
    gone = threading.Event()

    def send_for_ever(connection: socket.socket) -> None:
        try:
            while True:
                connection.sendall(bytes(1 << 20))
        except OSError:
            gone.set()

    with proxied(send_for_ever) as proxy:
        with proxy.connect() as connection:
            assert connection.recv(1)
        assert gone.wait(30)
        with proxy.connect() as connection:  # and the proxy serves on
            assert connection.recv(1)


def test_a_server_that_is_away_is_an_error_for_the_client_not_an_empty_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    proxy = Proxy(port, 0.01)
    try:
        with proxy.connect() as connection:
            connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with pytest.raises(ConnectionError):
                connection.recv(1)
        assert proxy.stop()["refused"] == 1
    finally:
        proxy.process.kill()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--listen", "5000", "--to", "127.0.0.1:1", "--rtt-seconds", "0"],
        ["--listen", "127.0.0.1:0", "--to", "127.0.0.1:65536", "--rtt-seconds", "0"],
        ["--listen", "127.0.0.1:0", "--to", "127.0.0.1:1", "--rtt-seconds", "-1"],
        ["--listen", "127.0.0.1:0", "--to", "127.0.0.1:1", "--rtt-seconds", "nan"],
        ["--listen", "203.0.113.7:0", "--to", "127.0.0.1:1", "--rtt-seconds", "0"],
    ],
)
def test_what_cannot_be_is_said(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "glowplug.startup.delay", *arguments]
    said = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert said.returncode
    assert "Traceback" not in said.stderr
    assert said.stdout == ""
