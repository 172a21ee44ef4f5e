"""Replicas with set service times, and open-loop load on whatever stands in front of them.

A replica works on `slots` requests at once and queues the rest, as an inference engine does; how long it
works on one, in milliseconds, stands in the request's path (`/40`), so that the same requests can be given
to one balancer after another. Runs as a process of its own: `python -m e2e.replicas SLOTS SPEED...`, one
replica for each speed (1.0 is nominal), prints their ports.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import time
from collections.abc import Sequence

_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


async def _replica(slots: int, speed: float) -> int:
    free = asyncio.Semaphore(slots)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                milliseconds = float(head.split(b" ", 2)[1].strip(b"/") or 0)
                async with free:
                    await asyncio.sleep(milliseconds / 1000 / speed)
                writer.write(_ANSWER)
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1024)
    return int(server.sockets[0].getsockname()[1])


async def _main(slots: int, speeds: Sequence[float]) -> None:
    print(*[await _replica(slots, speed) for speed in speeds], flush=True)
    await asyncio.Event().wait()


def requests(count: int, rate: float, usual: float, seed: int) -> list[tuple[float, float]]:
    """When each is sent (seconds from the start, Poisson) and how long it takes by itself (milliseconds):
    one of twenty takes twenty times longer."""
    draw = random.Random(seed)
    at, made = 0.0, []
    for _ in range(count):
        at += draw.expovariate(rate)
        made.append((at, usual * (20 if draw.random() < 0.05 else 1)))
    return made


class Load:
    """Sends requests at their times over kept connections, whatever the answers do. One event loop."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.failed = 0

    async def run(self, sent: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        """Latency in seconds, and its ratio to the request's own service time, of each that was answered."""
        began = time.monotonic() + 0.1
        answers = await asyncio.gather(*(self._one(began + at, own) for at, own in sent))
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()
        return [answer for answer in answers if answer is not None]

    async def _one(self, at: float, milliseconds: float) -> tuple[float, float] | None:
        await asyncio.sleep(at - time.monotonic())
        began = time.monotonic()
        try:
            reader, writer = (
                self._idle.pop() if self._idle else await asyncio.open_connection("127.0.0.1", self._port)
            )
            writer.write(b"GET /%g HTTP/1.1\r\nhost: s\r\n\r\n" % milliseconds)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise ConnectionError(head.split(b"\r\n")[0])
            await reader.readexactly(2)
        except (asyncio.IncompleteReadError, OSError):
            self.failed += 1
            return None
        latency = time.monotonic() - began
        self._idle.append((reader, writer))
        return latency, latency * 1000 / milliseconds


def quantile(values: Sequence[float], share: float) -> float:
    return statistics.quantiles(values, n=1000, method="inclusive")[min(998, round(share * 1000) - 1)]


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1]), [float(each) for each in sys.argv[2:]]))
