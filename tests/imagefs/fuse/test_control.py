"""The control socket's messages and settings, without a server."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs import errors
from imagefs.fuse import control, controlmessage, statedirectory
from imagefs.origin.connect import Options


def test_settings_come_back() -> None:
    value = control.ServerSettings(
        Path("/s"), Path("/c"), 5, 6, workers=3, origins=Options(plain_http=True, ca_file=Path("/ca"))
    )
    assert control.decode_settings(control.encode_settings(value)) == value


@given(st.binary(max_size=200))
def test_other_settings_are_refused(data: bytes) -> None:
    with pytest.raises(errors.ConfigurationError):
        control.decode_settings(data)


@pytest.mark.parametrize(
    "kind",
    [
        errors.InvalidInputError,
        errors.NotFoundError,
        errors.DeniedError,
        errors.IntegrityError,
        errors.ConfigurationError,
        errors.BusyError,
        controlmessage.StoppingError,
    ],
)
def test_errors_keep_their_class(kind: type[errors.ImagefsError]) -> None:
    found = controlmessage.decode_error(controlmessage.encode_error(kind("what happened")))
    assert type(found) is kind
    assert str(found) == "what happened"


def test_unavailable_keeps_its_wish() -> None:
    found = controlmessage.decode_error(controlmessage.encode_error(errors.UnavailableError("later", 2.5)))
    assert isinstance(found, errors.UnavailableError)
    assert found.retry_after_seconds == 2.5


@pytest.mark.parametrize("name", ["SystemExit", "annotations", "NoSuchError", "__doc__"])
def test_a_class_that_we_lack_is_the_root(name: str) -> None:
    assert type(controlmessage.decode_error({"error": name, "message": "m"})) is errors.ImagefsError


def test_messages_come_back_and_end() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        controlmessage.send(ours, {"op": "x", "text": "\u00e9" * 1000})
        controlmessage.send(ours, {})
        ours.shutdown(socket.SHUT_WR)
        assert controlmessage.receive(theirs) == {"op": "x", "text": "\u00e9" * 1000}
        assert controlmessage.receive(theirs) == {}
        assert controlmessage.receive(theirs) is None


def test_no_server_is_no_client(tmp_path: Path) -> None:
    assert control.DeviceClient.connect(tmp_path) is None
    with pytest.raises(errors.NotFoundError):
        control.DeviceClient(control.ServerSettings(tmp_path, tmp_path, 0, 0)).status()


def test_the_log_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    statedirectory.bound_log(path)
    path.write_bytes(b"x" * (5 << 20))
    with path.open("ab") as writer:
        statedirectory.bound_log(path)
        assert path.stat().st_size == 0
        writer.write(b"next\n")
    assert path.read_bytes() == b"next\n"
    assert (tmp_path / "server.log.1").stat().st_size == 4 << 20
