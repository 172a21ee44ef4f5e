"""Keeps the ports of a crashed Envoy open until its successor listens.

Called by `envoy`. When Envoy dies, its listening sockets go with it and clients are refused for the tenth of
a second that a new one takes to start. `hold` listens in its place at once, on sockets that share the port
(SO_REUSEPORT, which Envoy sets as well), and answers nothing: clients wait in the kernel's queue. When the
successor listens, `Held.release` stops listening and passes what had queued on to it, byte by byte.

Invariants: a held socket is closed before anything is connected to its port, or the kernel might give that
connection to ourselves; whoever is refused (another user's port) is left out, since holding is a kindness.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import threading
from collections.abc import Collection

_log = logging.getLogger(__name__)

_BACKLOG = 4096
_PIECE_BYTES = 64 << 10

Place = tuple[str, int]


class Held:
    """Ports that are held. Owned by one thread."""

    def __init__(self, sockets: dict[Place, socket.socket]) -> None:
        self._sockets = sockets

    def release(self, successor: bool) -> int:
        """Stop listening. With a successor, what had queued goes there, on a thread of its own, for as long
        as those connections live; without, it is closed. The number of connections that were held."""
        queued: list[tuple[Place, socket.socket]] = []
        for place, listening in self._sockets.items():
            with contextlib.suppress(BlockingIOError):
                while True:
                    queued.append((place, listening.accept()[0]))
            listening.close()
        self._sockets = {}
        if not successor:
            for _, connection in queued:
                connection.close()
        elif queued:
            threading.Thread(target=_relay_all, args=(queued,), name="handover", daemon=True).start()
        return len(queued)


def hold(places: Collection[Place]) -> Held:
    """Listen at `places`, as far as we may."""
    sockets = {}
    for place in places:
        family = socket.AF_INET6 if ipaddress.ip_address(place[0]).version == 6 else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listening.setblocking(False)
            listening.bind(place)
            listening.listen(_BACKLOG)
        except OSError as exc:
            listening.close()
            _log.warning("port %d is not held while Envoy starts: %s", place[1], exc)
        else:
            sockets[place] = listening
    return Held(sockets)


def _relay_all(queued: list[tuple[Place, socket.socket]]) -> None:
    async def run() -> None:
        await asyncio.gather(*(_relay(place, each) for place, each in queued), return_exceptions=True)

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
