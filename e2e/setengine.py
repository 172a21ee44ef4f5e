"""An inference engine with a set service time: $SLOTS requests at once, each for $SERVICE_SECONDS, the rest
in its queue; on $PORT after $START_SECONDS. Run as a program of its own, by `glowplug engine`."""

from __future__ import annotations

import asyncio
import os
import time

_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


async def _main() -> None:
    service_seconds = float(os.environ["SERVICE_SECONDS"])
    free = asyncio.Semaphore(int(os.environ["SLOTS"]))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                for line in head.lower().split(b"\r\n"):
                    if line.startswith(b"content-length:"):
                        await reader.readexactly(int(line.partition(b":")[2]))
                if not head.startswith(b"GET /health "):
                    async with free:
                        await asyncio.sleep(service_seconds)
                writer.write(_ANSWER)
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", int(os.environ["PORT"]), backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    time.sleep(float(os.environ["START_SECONDS"]))
    asyncio.run(_main())
