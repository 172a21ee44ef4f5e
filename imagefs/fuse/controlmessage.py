"""The messages of the device server's control socket, for both its ends.

A message is four bytes of length (big-endian) and a JSON object. Requests: {"op": ..., ...}. Replies: {"ok":
value} or {"error": class, "message": ..., "retry_after_seconds": ...}, the class being one of imagefs.errors.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping
from typing import Any

from imagefs import errors

MAX_REQUEST_BYTES = 4 << 20
MAX_REPLY_BYTES = 64 << 20
UNKNOWN_OPERATION = "control: unknown operation"
_LENGTH = struct.Struct(">I")


class StoppingError(errors.UnavailableError):
    """The server was stopping when the request came; the next one will take it."""


def send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    """One message."""
    data = json.dumps(message).encode()
    connection.sendall(_LENGTH.pack(len(data)) + data)


def receive(connection: socket.socket, max_bytes: int = MAX_REQUEST_BYTES) -> dict[str, Any] | None:
    """One message; None at the end of the connection. InvalidInputError for anything but a JSON object of at
    most `max_bytes`."""
    head = _receive_exactly(connection, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > max_bytes:
        raise errors.InvalidInputError(f"control: a message of {length} bytes, over the limit of {max_bytes}")
    data = _receive_exactly(connection, length)
    if data is None:
        return None
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise errors.InvalidInputError(f"control: not JSON: {exc}") from exc
    if not isinstance(document, dict):
        raise errors.InvalidInputError("control: not a JSON object")
    return document


def _receive_exactly(connection: socket.socket, length: int) -> bytes | None:
    data = bytearray()
    while len(data) < length:
        piece = connection.recv(min(length - len(data), 1 << 20))
        if not piece:
            return None
        data += piece
    return bytes(data)


def string(request: Mapping[str, Any], field: str) -> str:
    """A field of a request. Raises InvalidInputError."""
    value = request.get(field)
    if not isinstance(value, str):
        raise errors.InvalidInputError(f"control: {field} {value!r} is not a string")
    return value


def number(request: Mapping[str, Any], field: str) -> int:
    """A field of a request. Raises InvalidInputError."""
    value = request.get(field)
    if type(value) is not int or value < 0:
        raise errors.InvalidInputError(f"control: {field} {value!r} is not a number of 0 or more")
    return value


def encode_error(error: errors.ImagefsError) -> dict[str, Any]:
    """A reply that raises the same class at the other end."""
    reply: dict[str, Any] = {"error": type(error).__name__, "message": str(error)}
    if isinstance(error, errors.UnavailableError):
        reply["retry_after_seconds"] = error.retry_after_seconds
    return reply


def decode_error(reply: Mapping[str, Any]) -> errors.ImagefsError:
    """Inverse of encode_error; a class that this build lacks becomes ImagefsError."""
    name, message = str(reply.get("error")), str(reply.get("message"))
    kind = StoppingError if name == StoppingError.__name__ else getattr(errors, name, None)
    if not (isinstance(kind, type) and issubclass(kind, errors.ImagefsError)):
        return errors.ImagefsError(message)
    if issubclass(kind, errors.UnavailableError):
        wish = reply.get("retry_after_seconds")
        return kind(message, wish if isinstance(wish, (int, float)) else None)
    return kind(message)
