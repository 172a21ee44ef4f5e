"""The agent's client where there is no agent, or not one that speaks as it should."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from agent import client
from imagefs import errors


def _answering(path: Path, answer: bytes) -> socket.socket:
    """A socket that gives one connection this answer, and then ends it."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def run() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(answer)

    threading.Thread(target=run, daemon=True).start()
    return listener


def test_without_an_agent(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    assert client.AgentClient.found(path) is None
    with pytest.raises(errors.UnavailableError, match="glowplug agent run"):
        client.AgentClient(path).get("/")


def test_a_file_is_no_socket_and_a_dead_socket_no_agent(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert client.AgentClient.found(tmp_path / "file") is None
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead"))
    found = client.AgentClient.found(tmp_path / "dead")
    assert found is not None
    with pytest.raises(errors.UnavailableError, match="no agent listens"):
        found.get("/")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"hello\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
        b"HTTP/1.1 500 No\r\nContent-Length: 4\r\n\r\noops",
    ],
)
def test_nonsense_is_an_agent_that_does_not_answer(tmp_path: Path, answer: bytes) -> None:
    with _answering(tmp_path / "s", answer), pytest.raises(errors.UnavailableError):
        client.AgentClient(tmp_path / "s").get("/x")


def test_an_agent_that_hangs_is_left(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with pytest.raises(errors.UnavailableError, match="GET /x"):
            client.AgentClient(tmp_path / "s", 0.05).get("/x")


def test_an_error_of_a_class_that_nobody_knows_is_still_one_of_ours(tmp_path: Path) -> None:
    body = b'{"error": "OddError", "message": "odd"}'
    answer = b"HTTP/1.1 500 No\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with _answering(tmp_path / "s", answer), pytest.raises(errors.ImagefsError, match="odd"):
        client.AgentClient(tmp_path / "s").get("/x")
