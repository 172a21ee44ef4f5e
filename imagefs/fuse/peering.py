"""Blocks for other nodes: how the agent, which peers ask, gets them from the device server.

The agent answers peers over HTTP (agent/peers.py); the bytes are here. Between the two lies a socket of its
own, STATE/peer.sock, SOCK_SEQPACKET: a question and an answer are one message each, a JSON object; a `tag`
says what belongs together, so that any number may be under way. An answer with a block carries its
descriptor (SCM_RIGHTS): the agent sends it on with sendfile, and no byte of it passes through Python.

    {"tag": 7, "map_digest": "sha256:...", "index": 3, "priority": "demand"}
    {"tag": 7, "length": 4194304} and a descriptor, or {"tag": 7, "error": class, "message": ...}

Used by both ends, and by `layers.py` for the paths of requests to peers. In the server: one thread per
connection (there is one agent) takes questions; answers are sent by whichever thread has the block, and a
receiver that takes none for a while loses its connection rather than holding that thread.
"""

from __future__ import annotations

import array
import contextlib
import json
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from imagefs import errors, plan
from imagefs.fuse import controlmessage, statedirectory
from imagefs.fuse.devices import LayerSpec, decode_spec, encode_spec

_log = logging.getLogger(__name__)

SOCKET_NAME = "peer.sock"
MAX_MESSAGE_BYTES = 16 * 1024
_MAX_CONNECTIONS = 4
_MAX_WAITING = 256
_STUCK_SECONDS = 5
_ANSWER_BUFFER_BYTES = 1 << 20
_PATH = "/peer/v1/blocks/"

Done = Callable[[int | Exception, int], None]
"""Called once: with a descriptor (the callee's) and the block's length, or an error and 0."""
Block = Callable[[str, int, plan.Priority, Done], None]


# -- the paths of requests between nodes ---------------------------------------------------------------


def encode_target(spec: LayerSpec, index: int, priority: plan.Priority) -> str:
    """The path, with query, that asks a peer for a block. It says all that the peer needs to fetch it."""
    fields = encode_spec(spec)
    map_digest = fields.pop("map_digest")
    return f"{_PATH}{map_digest}/{index}?{urlencode({**fields, 'priority': priority.name.lower()})}"


def decode_target(target: str) -> tuple[LayerSpec, int, plan.Priority]:
    """Inverse of encode_target. Raises InvalidInputError."""
    try:
        parts = urlsplit(target)
        if not parts.path.startswith(_PATH):
            raise errors.InvalidInputError("not the path of a block")
        map_digest, _, number = parts.path.removeprefix(_PATH).partition("/")
        fields: dict[str, Any] = dict(parse_qsl(parts.query, strict_parsing=True, max_num_fields=8))
        priority = decode_priority(fields.pop("priority", None))
        for name in ("map_size", "blob_size"):
            fields[name] = _number(fields.get(name))
        return decode_spec({**fields, "map_digest": map_digest}), _number(number), priority
    except ValueError as exc:
        raise errors.InvalidInputError(f"a block's path: {exc}") from exc


def _number(value: object) -> int:
    if not isinstance(value, str) or not (value.isascii() and value.isdigit() and len(value) < 20):
        raise errors.InvalidInputError(f"a block's path: {value!r} is no number")
    return int(value)


def decode_priority(value: object) -> plan.Priority:
    """From its name in lower case. Raises InvalidInputError."""
    for priority in plan.Priority:
        if value == priority.name.lower():
            return priority
    raise errors.InvalidInputError(f"{value!r} is no priority")


# -- the agent's messages ------------------------------------------------------------------------------


def encode_question(tag: int, map_digest: str, index: int, priority: plan.Priority) -> bytes:
    """One message to the server."""
    question = {"tag": tag, "map_digest": map_digest, "index": index, "priority": priority.name.lower()}
    return json.dumps(question).encode()


def receive_answer(connection: socket.socket) -> tuple[int, int | errors.ImagefsError, int] | None:
    """The next answer: its tag, a descriptor (the caller's) or an error, and the block's length. None when
    the server is gone. BlockingIOError where a non-blocking socket has none."""
    rights = array.array("i")
    data, ancillary, _, _ = connection.recvmsg(MAX_MESSAGE_BYTES, socket.CMSG_SPACE(rights.itemsize))
    for _, _, payload in ancillary:
        rights.frombytes(payload[: len(payload) - len(payload) % rights.itemsize])
    if not data:
        return None
    answer = json.loads(data)
    if "error" in answer:
        return int(answer["tag"]), controlmessage.decode_error(answer), 0
    return int(answer["tag"]), rights[0], int(answer["length"])


# -- the server's end ----------------------------------------------------------------------------------


class PeerSocket:
    """STATE/peer.sock. Serves as long as the process lives."""

    def __init__(self, state_dir: Path, block: Block) -> None:
        self._block = block
        self._listener = statedirectory.listen(state_dir / SOCKET_NAME, socket.SOCK_SEQPACKET)
        threading.Thread(target=self._accept, name="peer-socket", daemon=True).start()

    def _accept(self) -> None:
        slots = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        while True:
            slots.acquire()
            try:
                connection, _ = self._listener.accept()
            except OSError as exc:
                _log.warning("peer socket: %s", exc)
                slots.release()
                threading.Event().wait(1.0)  # no descriptor left: somebody may give one back
                continue
            threading.Thread(target=self._serve, args=(connection, slots), daemon=True).start()

    def _serve(self, connection: socket.socket, slots: threading.BoundedSemaphore) -> None:
        try:
            if statedirectory.same_user(connection):
                _Asker(connection, self._block).run()
        finally:
            connection.close()
            slots.release()


class _Asker:
    """One connection. Any thread may answer."""

    def __init__(self, connection: socket.socket, block: Block) -> None:
        self._connection = connection
        self._block = block
        self._lock = threading.Lock()  # a descriptor number must not be reused between close and send
        self._open = True
        self._waiting = 0
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ANSWER_BUFFER_BYTES)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", _STUCK_SECONDS, 0))

    def run(self) -> None:
        """Until the agent is gone, or says what is no question."""
        try:
            while data := self._connection.recv(MAX_MESSAGE_BYTES):
                self._ask(json.loads(data))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, errors.ImagefsError) as exc:
            _log.warning("peer socket: %r", exc)
        finally:
            with self._lock:
                self._open = False

    def _ask(self, question: dict[str, Any]) -> None:
        tag, index = int(question["tag"]), int(question["index"])
        map_digest, priority = str(question["map_digest"]), decode_priority(question["priority"])
        with self._lock:
            self._waiting += 1
            busy = self._waiting > _MAX_WAITING

        def done(result: int | Exception, length: int) -> None:
            self._answer(tag, result, length)

        if busy:
            done(errors.UnavailableError(f"{_MAX_WAITING} blocks are waited for already"), 0)
        else:
            self._block(map_digest, index, priority, done)

    def _answer(self, tag: int, result: int | Exception, length: int) -> None:
        rights = []
        if isinstance(result, int):
            message: dict[str, Any] = {"tag": tag, "length": length}
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [result]))]
        else:
            wrapped = result if isinstance(result, errors.ImagefsError) else errors.ImagefsError(str(result))
            message = {"tag": tag, **controlmessage.encode_error(wrapped)}
            message["message"] = message["message"][: MAX_MESSAGE_BYTES // 16]
        with self._lock:
            self._waiting -= 1
            if self._open:
                try:
                    self._connection.sendmsg([json.dumps(message).encode()], rights)
                except OSError:
                    self._open = False
                    with contextlib.suppress(OSError):
                        self._connection.shutdown(socket.SHUT_RDWR)
        if isinstance(result, int):
            os.close(result)
