"""Keeps the ports of an Envoy open while it is away.

Called by `envoy`. When Envoy dies its listening sockets go with it, and clients are refused until the next
one listens. `Ports` listens at the same places all the time, on sockets that share the port (SO_REUSEPORT,
which Envoy sets too), with a program in the kernel that gives new connections to Envoy's sockets as long
as there are any. While there are none, clients wait in our queue; what has queued there is passed on to
the next Envoy, byte by byte.

Invariants: a place where somebody else listens is refused, since sharing it would split the traffic silently;
we accept nothing while Envoy cannot take it. Without us the kernel goes on with Envoy's sockets alone.

Spec: socket(7), SO_ATTACH_REUSEPORT_CBPF: the program's result is an index among the sockets of the port, in
the order in which they began to listen (when one closes, the last takes its place); a result beyond the last
means a choice by hash.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import ipaddress
import logging
import socket
import struct
import threading
from collections.abc import Collection

from serving import errors

_log = logging.getLogger(__name__)

Place = tuple[str, int]

_BACKLOG = 4096
_PIECE_BYTES = 64 << 10
_SO_ATTACH_REUSEPORT_CBPF = 51
_LOAD_RANDOM = (0x20, 0xFFFFF000 + 56)  # BPF_LD | BPF_W | BPF_ABS, SKF_AD_OFF + SKF_AD_RANDOM
_MODULO, _ADD, _RETURN = 0x94, 0x04, 0x16  # BPF_ALU | BPF_MOD | BPF_K, BPF_ALU | BPF_ADD | BPF_K, BPF_RET | A


class Ports:
    """The ports of one Envoy with `workers` sockets at each. Any thread may call."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._lock = threading.Lock()
        self._sockets: dict[Place, socket.socket] = {}

    def keep(self, places: Collection[Place], envoys: Collection[Place]) -> None:
        """Keep exactly these open. `envoys`: where our Envoy listens already. ConfigurationError where
        another process does; nothing has changed then."""
        with self._lock:
            added = {}
            try:
                for place in set(places) - self._sockets.keys():
                    first = place not in envoys
                    if first:
                        _require_free(place)
                    added[place] = _listen(place)
                    self._steer(added[place], first)
            except OSError as exc:
                for each in added.values():
                    each.close()
                raise errors.ConfigurationError(
                    f"listen: {place[0]}:{place[1]}: {exc.strerror}; choose another port or address"
                ) from exc
            for place in self._sockets.keys() - set(places):
                self._sockets.pop(place).close()
            self._sockets |= added

    def alone(self) -> None:
        """Envoy's sockets are gone: ours are the first for its successor's."""
        with self._lock:
            for each in self._sockets.values():
                self._steer(each, first=True)

    def sockets(self) -> list[socket.socket]:
        """Readable when somebody has queued."""
        with self._lock:
            return list(self._sockets.values())

    def pass_on(self, ready: bool) -> int:
        """Give those who have queued to Envoy, on a thread of its own, for as long as their connections live;
        where it is not ready, hang up. Their number."""
        queued: list[tuple[Place, socket.socket]] = []
        with self._lock:
            for place, listening in self._sockets.items():
                with contextlib.suppress(BlockingIOError):
                    while True:
                        queued.append((place, listening.accept()[0]))
        if not ready:
            for _, connection in queued:
                connection.close()
        elif queued:
            threading.Thread(target=_relay_all, args=(queued,), name="handover", daemon=True).start()
        return len(queued)

    def close(self) -> None:
        with self._lock:
            for each in self._sockets.values():
                each.close()
            self._sockets = {}

    def _steer(self, listening: socket.socket, first: bool) -> None:
        """Have new connections go to Envoy's sockets, which come after ours, or before."""
        offset = 1 if first else 0
        code = (_LOAD_RANDOM, (_MODULO, self._workers), (_ADD, offset), (_RETURN, 0))
        program = ctypes.create_string_buffer(
            b"".join(struct.pack("HBBI", operation, 0, 0, value) for operation, value in code)
        )
        pointer = struct.pack("HP", len(code), ctypes.addressof(program))  # struct sock_fprog
        listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, pointer)


def _listen(place: Place) -> socket.socket:
    listening = socket.socket(_family(place), socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.setblocking(False)
        listening.bind(place)
        listening.listen(_BACKLOG)
    except OSError:
        listening.close()
        raise
    return listening


def _require_free(place: Place) -> None:
    """Not to be found out by SO_REUSEPORT: it would share with another Envoy of the same user."""
    with socket.socket(_family(place), socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(place)


def _family(place: Place) -> socket.AddressFamily:
    return socket.AF_INET6 if ipaddress.ip_address(place[0]).version == 6 else socket.AF_INET


def _relay_all(queued: list[tuple[Place, socket.socket]]) -> None:
    async def run() -> None:
        results = await asyncio.gather(*(_relay(*each) for each in queued), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                _log.warning("a connection that had waited for Envoy is lost: %s", result)

    asyncio.run(run())


async def _relay(place: Place, connection: socket.socket) -> None:
    host = ipaddress.ip_address(place[0])
    target = ("::1" if host.version == 6 else "127.0.0.1") if host.is_unspecified else place[0]
    client_reader, client_writer = await asyncio.open_connection(sock=connection)
    try:
        reader, writer = await asyncio.open_connection(target, place[1])
    except OSError:
        client_writer.close()
        raise
    await asyncio.gather(_copy(client_reader, writer), _copy(reader, client_writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while piece := await reader.read(_PIECE_BYTES):
            writer.write(piece)
            await writer.drain()
    except OSError:
        pass  # either end is gone; the other learns it by the close below
    finally:
        writer.close()
