"""Unix sockets by long paths."""

import os
import socket
from pathlib import Path

import pytest

from imagefs import unixsocket


@pytest.mark.parametrize("length", [60, 107, 108, 250])
def test_any_length_of_path(length: int) -> None:
    name = "control.sock"
    folder = Path("/tmp") / f"glowplug-{os.getpid()}"
    while len(str(folder / name)) < length:
        folder /= "x" * min(100, length - len(str(folder / name)) - 1 or 1)
    folder.mkdir(parents=True)
    path = folder / name
    try:
        with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as connection:
            before = len(os.listdir("/proc/self/fd"))
            unixsocket.bind(listener, path)
            listener.listen()
            unixsocket.connect(connection, path)
            assert path.is_socket()
            assert len(os.listdir("/proc/self/fd")) == before
            peer, _ = listener.accept()
            with peer:
                peer.sendall(b"hello")
                assert connection.recv(5) == b"hello"
    finally:
        path.unlink(missing_ok=True)
        while folder != Path("/tmp"):
            folder.rmdir()
            folder = folder.parent


def test_nobody_listens(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 100) / "control.sock"
    with socket.socket(socket.AF_UNIX) as connection:
        with pytest.raises(FileNotFoundError):
            unixsocket.connect(connection, path)
        path.parent.mkdir()
        with pytest.raises(FileNotFoundError):
            unixsocket.connect(connection, path)
