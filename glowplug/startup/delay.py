"""A TCP proxy that adds a round-trip time, for measurements where the kernel has no netem.

    python -m glowplug.startup.delay --listen HOST:PORT --to HOST:PORT --rtt-seconds 0.05

A process of its own, so that its work is not the measured one's. Prints `ready HOST:PORT` when it listens
(port 0: any free one), and at SIGTERM or SIGINT, as its last line, `Counters` as JSON. One event loop; each
connection has a `DelayLine` each way.

**Where it stands:** on the server's side of a shaped link, so that the link's queue is the last thing that
bytes pass, as on a real path whose narrow place is near the client.

**What it models:** a connection is set up before its first byte moves (one round trip), and each byte takes
half a round trip each way, without a limit to throughput: `IN_FLIGHT_BYTES` may be under way at once in each
direction of each connection. The server sees a connection when the client's first byte can be there, 1.5
round trips after the client asked for it; each side sees the other close half a round trip late.

**What it does not model:** the client's `connect` returns at once, because its kernel talks to ours: what is
late is the first answer, by the same total. TCP's slow start and loss recovery run on the two short sides,
not over the delay: a real connection of this round-trip time needs some round trips more to its full speed
(about 10 packets arrive in the first, twice as many in each that follows). So a real link is slower
than this one, most of all for who opens many short connections. TLS costs what it costs: its handshake is
bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import selectors
import signal
import socket
import struct
import sys
from collections.abc import Coroutine

from glowplug.startup import delayline

IN_FLIGHT_BYTES = 16 << 20
"""Enough for one connection of 5 Gbit/s at a round trip of 50 ms; beyond it, the sender is held back."""

MAX_CONNECTIONS = 400
"""Two sockets each; select(2) ends at descriptor 1023."""

_PIECE_BYTES = 256 << 10
_METHODS = (b"GET ", b"HEAD ", b"POST ", b"PUT ", b"PATCH ", b"DELETE ")


@dataclasses.dataclass(slots=True)
class Counters:
    """What passed. `requests` counts pieces from clients that began as an HTTP request does: all of those
    of clients that wait for an answer before they ask again, none under TLS. `refused` counts connections
    that the server did not take, or that were too many."""

    connections: int = 0
    refused: int = 0
    requests: int = 0
    bytes_to_server: int = 0
    bytes_to_client: int = 0

    def count(self, data: bytes, to_server: bool) -> None:
        """Note a piece as it came."""
        if to_server:
            self.bytes_to_server += len(data)
            self.requests += data.startswith(_METHODS)
        else:
            self.bytes_to_client += len(data)


class _Way:
    """One direction of a connection: one task receives into the line, one sends what has arrived."""

    def __init__(self, delay_seconds: float) -> None:
        self._line = delayline.DelayLine(delay_seconds, IN_FLIGHT_BYTES)
        self._changed = asyncio.Event()

    async def receive(self, source: socket.socket, counters: Counters, to_server: bool) -> None:
        """Until the source's end."""
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(source, _PIECE_BYTES):
            counters.count(data, to_server)
            self._line.put(data, loop.time())
            self._changed.set()
            while not self._line.has_room:
                await self._wait()
        self._line.end(loop.time())
        self._changed.set()

    async def send(self, sink: socket.socket) -> None:
        """Until the line's end, which the sink is told; its other direction may go on."""
        loop = asyncio.get_running_loop()
        while True:
            now = loop.time()
            if (data := self._line.take(now)) is not None:
                await loop.sock_sendall(sink, data)
                self._changed.set()
            elif self._line.ended(now):
                sink.shutdown(socket.SHUT_WR)
                return
            elif (due := self._line.due) is None:
                await self._wait()
            else:
                await asyncio.sleep(due - now)

    async def _wait(self) -> None:
        # The two tasks never both wait: one does for an empty line, the other for a full one.
        self._changed.clear()
        await self._changed.wait()


class Proxy:
    """Serves until it is cancelled. `counters` may be read at any time from the loop's thread."""

    def __init__(self, target: tuple[str, int], rtt_seconds: float) -> None:
        self.counters = Counters()
        self._target = target
        self._rtt_seconds = rtt_seconds
        self._open = 0

    async def serve(self, listener: socket.socket) -> None:
        """Take connections."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            while True:
                client, _ = await loop.sock_accept(listener)
                if self._open == MAX_CONNECTIONS:
                    self.counters.refused += 1
                    _reset(client)
                else:
                    self._open += 1
                    group.create_task(self._connection(client))

    async def _connection(self, client: socket.socket) -> None:
        self.counters.connections += 1
        server = socket.socket(_family(self._target[0]))
        try:
            await self._carry(client, server)
        except* OSError:  # one side is gone: so is the connection, for the other
            _reset(client)
            _reset(server)
        finally:
            self._open -= 1
            client.close()
            server.close()

    async def _carry(self, client: socket.socket, server: socket.socket) -> None:
        for end in (client, server):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        one_way_seconds = self._rtt_seconds / 2
        up, down = _Way(one_way_seconds), _Way(one_way_seconds)
        await asyncio.sleep(self._rtt_seconds)
        async with asyncio.TaskGroup() as group:

            def start(task: Coroutine[None, None, None]) -> None:
                group.create_task(task)

            start(up.receive(client, self.counters, to_server=True))
            await asyncio.sleep(one_way_seconds)
            try:
                await asyncio.get_running_loop().sock_connect(server, self._target)
            except OSError:
                self.counters.refused += 1
                raise
            start(up.send(server))
            start(down.receive(server, self.counters, to_server=False))
            start(down.send(client))


def _reset(end: socket.socket) -> None:
    """Close so that the other side sees an error, not an end."""
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _place(text: str) -> tuple[str, int]:
    """HOST:PORT or [HOST]:PORT, for argparse."""
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) >= 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _seconds(text: str) -> float:
    value = float(text)  # argparse says what a ValueError was about
    if not 0 <= value <= 10:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 10 seconds")
    return value


async def _serve(proxy: Proxy, listener: socket.socket) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    serving = asyncio.create_task(proxy.serve(listener))
    host, port = listener.getsockname()[:2]
    print(f"ready {f'[{host}]' if ':' in host else host}:{port}", flush=True)
    waiting = asyncio.create_task(stopped.wait())
    await asyncio.wait([serving, waiting], return_when=asyncio.FIRST_COMPLETED)
    serving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await serving
    print(json.dumps(dataclasses.asdict(proxy.counters)), flush=True)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m glowplug.startup.delay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--listen", type=_place, required=True, metavar="HOST:PORT")
    parser.add_argument("--to", type=_place, required=True, metavar="HOST:PORT")
    parser.add_argument("--rtt-seconds", type=_seconds, required=True, metavar="SECONDS")
    options = parser.parse_args()
    try:
        listener = socket.create_server(options.listen, family=_family(options.listen[0]), backlog=1024)
    except OSError as exc:
        sys.exit(f"delay: cannot listen on {options.listen[0]}:{options.listen[1]}: {exc.strerror}")
    listener.setblocking(False)
    # epoll counts in milliseconds, which would be added to every byte's way; select counts in microseconds.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(_serve(Proxy(options.to, options.rtt_seconds), listener))


if __name__ == "__main__":
    main()
