"""The operator's /metrics and /healthz over HTTP: read-only, without authentication, without a secret.

Owned by `process`: `MetricsPort(...)`, `start`, `stop`. An aiohttp loop in a thread of its own, which calls
`metrics`; that only reads what the endpoints' threads have left, so it waits for nobody.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from aiohttp import web

from serving import endpointmetrics, errors, statusapi


class MetricsPort:
    """See the module. `listen` is (address, port); port 0 takes a free one."""

    def __init__(self, listen: tuple[str, int], metrics: Callable[[], bytes]) -> None:
        self._listen = listen
        self._metrics = metrics
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="metrics", daemon=True)
        self._runner: web.AppRunner | None = None

    def start(self) -> tuple[str, int]:
        """Returns where it listens. ConfigurationError if it cannot."""
        self._thread.start()
        try:
            return asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        except OSError as exc:
            self.stop()
            raise errors.ConfigurationError(
                f"--metrics: cannot listen on {self._listen[0]}:{self._listen[1]}: {exc.strerror}; "
                "name another address, or none"
            ) from exc

    def stop(self) -> None:
        """Without a start, nothing."""
        if not self._thread.is_alive():
            return
        if self._runner is not None:
            asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _open(self) -> tuple[str, int]:
        application = web.Application(middlewares=[statusapi.own_host])
        application.router.add_get("/healthz", self._alive)
        application.router.add_get("/metrics", self._answer)
        self._runner = web.AppRunner(application, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, *self._listen).start()
        address, port, *_ = self._runner.addresses[0]
        return str(address), int(port)

    async def _alive(self, request: web.Request) -> web.StreamResponse:
        return web.Response(text="ok\n")

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=self._metrics(), headers={"Content-Type": endpointmetrics.CONTENT_TYPE})
