"""What counts as an answer: servers of all manners on loopback."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from glowplug import readiness, until
from imagefs import errors


@pytest.fixture(
    params=[
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", True),
        (b"HTTP/1.1 503 Starting\r\nContent-Length: 0\r\n\r\n", False),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", False),
        (b"HTTP/1.1 302 Found\r\nLocation: ftp://elsewhere/\r\nContent-Length: 0\r\n\r\n", False),
        (b"SSH-2.0-nothing of the kind\r\n", False),
        (b"\xff" * 100_000, False),
        (b"", False),
    ]
)
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, bool]]:
    """An address that answers every request so, and whether that is an answer."""
    said, answers = request.param
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(said)

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}", answers


def test_urls(server: tuple[str, bool]) -> None:
    address, answers = server
    assert readiness.answers_now(f"http://{address}/health") is answers


def test_nobody_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert readiness.answers_now(f":{port}")
    assert not readiness.answers_now(f":{port}")
    assert not readiness.answers_now(f"http://127.0.0.1:{port}/")


@pytest.mark.parametrize("address", ["http://x/", "https://x:1/y", ":80", "host:65535", "[::1]:80"])
def test_addresses(address: str) -> None:
    assert until.check_address(address) == address


@pytest.mark.parametrize("address", ["", "8000", "host", "host:0", "host:65536", "host:\u00b2", "ftp://x/y"])
def test_other_words(address: str) -> None:
    with pytest.raises(errors.InvalidInputError):
        until.check_address(address)
