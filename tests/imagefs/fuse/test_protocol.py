"""The kernel's messages: layouts against hand-made bytes, and whatever else may come."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs.fuse import protocol

_HEADER = struct.Struct("=IIQQIIIHH")
_u64 = st.integers(0, (1 << 64) - 1)


def message(opcode: int, body: bytes = b"", unique: int = 7, node: int = 5) -> bytes:
    return _HEADER.pack(_HEADER.size + len(body), opcode, unique, node, 0, 0, 1, 0, 0) + body


def parts(reply: bytes) -> tuple[int, int, bytes]:
    """(error, unique, payload); the length must be right."""
    length, error, unique = struct.unpack_from("=IiQ", reply)
    assert length == len(reply)
    return error, unique, reply[16:]


@given(st.binary(max_size=300))
def test_any_bytes_give_a_value(data: bytes) -> None:
    assert isinstance(protocol.decode(data), protocol.Request)
    assert protocol.decode(memoryview(bytearray(data))) == protocol.decode(data)


@given(st.integers(0, 70), st.binary(max_size=120), _u64)
def test_any_body_under_a_right_header_gives_a_value(opcode: int, body: bytes, unique: int) -> None:
    request = protocol.decode(message(opcode, body, unique))
    assert isinstance(request, protocol.Silent) or request.unique == unique


@given(st.integers(0, 70), st.binary(max_size=120), st.integers(0, 160))
def test_a_message_that_is_cut_or_grown_is_malformed(opcode: int, body: bytes, length: int) -> None:
    whole = message(opcode, body)
    changed = (whole + bytes(200))[:length]
    if len(changed) != len(whole):
        assert isinstance(protocol.decode(changed), protocol.Malformed)


@given(_u64, _u64, _u64, st.integers(0, (1 << 32) - 1))
def test_read(unique: int, node: int, offset: int, size: int) -> None:
    body = struct.pack("=QQIIQII", 9, offset, size, 0, 0, 0, 0)
    assert protocol.decode(message(15, body, unique, node)) == protocol.Read(unique, node, offset, size, 1)
    found = protocol.decode(message(28, body, unique, node))
    assert found == protocol.ReadDirectory(unique, node, offset, size)


@pytest.mark.parametrize("opcode", [15, 28])
def test_a_read_without_its_arguments_is_malformed(opcode: int) -> None:
    request = protocol.decode(message(opcode, bytes(39)))
    assert isinstance(request, protocol.Malformed)
    assert request.unique == 7


def test_lookup() -> None:
    assert protocol.decode(message(1, b"sha256-00\0", node=1)) == protocol.Lookup(7, 1, b"sha256-00")
    for body in (b"", b"\0", b"unterminated"):
        assert isinstance(protocol.decode(message(1, body)), protocol.Malformed)


def test_what_must_not_be_answered() -> None:
    for opcode in (2, 36, 42):
        assert protocol.decode(message(opcode, bytes(16))) == protocol.Silent(opcode)


def test_init_takes_all_64_flags() -> None:
    body = struct.pack("=IIIII", 7, 45, 131072, 1 << 30 | 1 << 22 | 1, 1 << 7) + bytes(44)
    request = protocol.decode(message(26, body))
    assert request == protocol.Init(7, 7, 45, 131072, 1 << 39 | 1 << 30 | 1 << 22 | 1)
    error, unique, payload = parts(protocol.init_reply(request))
    assert (error, unique, len(payload)) == (0, 7, 64)
    major, minor, ahead, flags, background, congestion, write, grain, pages, _, flags2 = struct.unpack_from(
        "=IIIIHHIIHHI", payload
    )
    assert (major, minor, ahead, background, congestion) == (7, protocol.MINOR, 131072, 1024, 1024)
    assert (flags, flags2) == (1 << 30 | 1 << 22 | 1, 1 << 7)
    assert (write, grain, pages) == (4096, 1, 256)


def test_init_of_an_older_kernel_has_no_second_flags() -> None:
    body = struct.pack("=IIII", 7, 31, 131072, 1 << 22 | 1 << 4)
    request = protocol.decode(message(26, body))
    assert isinstance(request, protocol.Init)
    _, _, payload = parts(protocol.init_reply(request))
    assert struct.unpack_from("=IIII", payload) == (7, 31, 131072, 1 << 22)


@pytest.mark.parametrize(("major", "minor"), [(6, 45), (8, 0), (7, 30)])
def test_init_of_another_protocol_is_refused(major: int, minor: int) -> None:
    assert parts(protocol.init_reply(protocol.Init(3, major, minor, 0, 0))) == (-errno.EPROTO, 3, b"")


def test_sizes_of_replies() -> None:
    attributes = protocol.Attributes(2, 4097)
    assert len(parts(protocol.attributes_reply(1, attributes))[2]) == 104
    assert len(parts(protocol.entry_reply(1, attributes))[2]) == 128
    assert len(parts(protocol.open_reply(1, directory=False))[2]) == 16
    assert len(parts(protocol.statfs_reply(1, 3))[2]) == 80
    assert struct.unpack_from("=I", protocol.read_header(1, 1000))[0] == 1016
    assert struct.unpack_from("=QI", parts(protocol.open_reply(1, directory=False))[2])[1] & 2  # KEEP_CACHE


def test_unsupported_operations() -> None:
    for opcode, error in ((16, errno.EROFS), (4, errno.EROFS), (22, errno.ENOSYS), (39, errno.ENOSYS)):
        reply = protocol.unsupported_reply(protocol.Simple(9, 2, opcode))
        assert parts(reply) == (-error, 9, b"")


@given(
    st.lists(st.tuples(_u64, st.binary(min_size=1, max_size=255), _u64), max_size=40),
    st.integers(0, 9000),
)
def test_a_listing_fits_and_parses(rows: list[tuple[int, bytes, int]], size: int) -> None:
    entries = [protocol.DirectoryEntry(node, name, cookie) for node, name, cookie in rows]
    _, _, payload = parts(protocol.directory_reply(1, entries, size))
    assert len(payload) <= size
    found = []
    position = 0
    while position < len(payload):
        node, cookie, length, kind = struct.unpack_from("=QQII", payload, position)
        assert kind == 8
        found.append((node, payload[position + 24 : position + 24 + length], cookie))
        position += (24 + length + 7) // 8 * 8
    assert found == rows[: len(found)]
    if len(found) < len(rows):
        assert len(payload) + (24 + len(rows[len(found)][1]) + 7) // 8 * 8 > size


def test_resend_is_notification_7_to_nobody() -> None:
    assert parts(protocol.resend_notice()) == (7, 0, b"")
