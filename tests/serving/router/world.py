"""Real backends and a real Envoy, for the tests of the router."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from aiohttp import web

from serving import service as services
from serving.router import bootstrap, control, envoy

WAIT_SECONDS = 20.0


class Backend:
    """An HTTP server that says its name. `status`, `delay_seconds` and `healthy` may be changed at any
    time."""

    def __init__(self, name: str, keepalive_seconds: float = 75.0) -> None:
        self.name = name
        self.status = 200
        self.delay_seconds = 0.0
        self.healthy = True
        self.requests: collections.Counter[str] = collections.Counter()
        self.headers: list[dict[str, str]] = []
        self.port = 0
        self._keepalive_seconds = keepalive_seconds
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Backend:
        self._thread.start()
        assert self._ready.wait(WAIT_SECONDS)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the port and all connections."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    def value(self, **values: object) -> services.Backend:
        return services.Backend("127.0.0.1", self.port, **values)  # type: ignore[arg-type]

    @property
    def served(self) -> int:
        return self.requests.total() - self.requests["/livez"]

    def _run(self) -> None:
        self._loop.run_until_complete(self._main())

    async def _main(self) -> None:
        self._stop = asyncio.Event()
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(
            app, keepalive_timeout=self._keepalive_seconds, access_log=None, shutdown_timeout=0.1
        )
        await runner.setup()
        listening = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = listening.getsockname()[1]
        await web.SockSite(runner, listening).start()
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests[request.path] += 1
        if request.path == "/livez":
            return web.Response(status=200 if self.healthy else 500)
        self.headers.append(dict(request.headers))
        if request.path == "/stream":
            return await self._stream(request)
        await request.read()
        await asyncio.sleep(self.delay_seconds)
        return web.Response(status=self.status, text=self.name)

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        for number in range(int(request.query["events"])):
            await answer.write(f"data: {number}\n\n".encode())
            await asyncio.sleep(float(request.query["seconds"]))
        return answer


class Front:
    """A router, and an Envoy that it feeds."""

    def __init__(self, directory: Path, delta: bool = True, zone: str = "") -> None:
        directory.mkdir(mode=0o700, exist_ok=True)
        self.directory = directory
        self.address = f"unix:{directory}/xds.sock"
        self.router = control.Router(self.address)
        self.settings = bootstrap.Settings(
            node=f"test-{directory.name}",
            control=f"{directory}/xds.sock",
            admin=f"{directory}/admin.sock",
            zone=zone,
            delta=delta,
        )
        self.envoy = envoy.Envoy(directory, self.settings, workers=1)
        self.port = free_port()
        self.listen = services.Listen(self.port)

    def __enter__(self) -> Front:
        self.router.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.envoy.stop()
        self.router.stop()

    def serve(self, *found: services.Service) -> None:
        """Update, start Envoy if need be, and wait until it has accepted everything."""
        self.envoy.keep_open({(each.listen.address, each.listen.port) for each in found})
        self.router.update(found)
        if self.envoy.pid is None:
            self.envoy.start()
            self.envoy.wait_ready()
        self.settle()

    def settle(self) -> None:
        until(lambda: any(node.current for node in self.router.nodes()))

    def get(self, path: str = "/", headers: dict[str, str] | None = None) -> tuple[int, str]:
        """Status and text of one request on a connection of its own."""
        return request(self.port, path, headers or {})

    def stat(self, name: str) -> int:
        text = self.envoy.administer("GET", f"/stats?filter=^{name}$").decode()
        return int(text.rpartition(": ")[2] or 0)


def request(
    port: int, path: str = "/", headers: dict[str, str] | None = None, body: bytes | None = None
) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_SECONDS)
    with contextlib.closing(connection):
        connection.request("POST" if body is not None else "GET", path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "did not come to pass"
        time.sleep(0.01)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def backends(*names: str) -> Iterator[list[Backend]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Backend(name)) for name in names]
