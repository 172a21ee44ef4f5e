"""The operator's /metrics and /healthz over HTTP: read-only, without authentication, without a secret.

Owned by `process`: `MetricsPort(...)`, `start`, `stop`. An aiohttp loop in a thread of its own, which calls
`metrics`; that only reads what the endpoints' threads have left, so it waits for nobody.
"""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

from pages import guard, middleware
from pages.loopthread import LoopThread
from serving import endpointmetrics, errors


class MetricsPort:
    """See the module. `listen` is (address, port); port 0 takes a free one."""

    def __init__(self, listen: tuple[str, int], metrics: Callable[[], bytes]) -> None:
        self._listen = listen
        self._metrics = metrics
        self._loop = LoopThread("metrics")
        self._runner: web.AppRunner | None = None

    def start(self) -> tuple[str, int]:
        """Returns where it listens. ConfigurationError if it cannot."""
        self._loop.start()
        try:
            return self._loop.run(self._open())
        except OSError as exc:
            self.stop()
            raise errors.ConfigurationError(
                f"--metrics: cannot listen on {self._listen[0]}:{self._listen[1]}: {exc.strerror}; "
                "name another address, or none"
            ) from exc

    def stop(self) -> None:
        """Without a start, nothing."""
        if not self._loop.running:
            return
        if self._runner is not None:
            self._loop.run(self._runner.cleanup())
        self._loop.stop()

    async def _open(self) -> tuple[str, int]:
        application = web.Application(middlewares=[middleware.own_host(guard.own_names())])
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
