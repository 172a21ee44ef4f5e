"""The supervisor's two doors: the port, and the control socket.

The port is accepted from by the supervisor while there is no vLLM that does (while it starts, is respawned,
has failed), and always for command engines, whose requests it passes on. Both share one listening socket with
the engine's processes, so that `accept` and `leave_to_engine` change who answers, and never whether a
connection is taken. The control socket (status, limit, drain) is a unix socket for the machine's own.

Runs on the supervisor's event loop.
"""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from aiohttp import web

from serving import errors
from serving.engine import admission, remote
from serving.engine.ledger import Ledger
from serving.engine.proxy import Proxy
from serving.engine.requestlog import keeper
from serving.engine.state import Limits, Rations, Spent, State
from serving.observability import RequestLog

_MAX_CONTROL_BYTES = 1 << 20
"""The rations of as many tenants as a budget has places for, four times."""
_PATH_BYTES = 107
"""What the kernel takes for a unix socket's address."""


class Engine(Protocol):
    """What the doors lead to: the supervisor."""

    def status(self) -> Mapping[str, Any]:
        """As JSON values."""

    def set_limits(self, limits: Limits) -> None:
        """In force for the next request."""

    def ration(self, rations: Rations) -> Mapping[str, Spent]:
        """In force for the next request; what the tenants that it names have had."""

    async def set_request_log(self, wanted: RequestLog | None) -> None:
        """Log like this from now on. ConfigurationError."""

    def drain(self) -> None:
        """Begin to leave."""

    def metrics(self) -> bytes:
        """Prometheus text."""


class Front:
    """Both doors. `open` first, `close` last."""

    def __init__(self, engine: Engine, ledger: Ledger, proxy: Proxy | None) -> None:
        self._engine, self._ledger, self._proxy = engine, ledger, proxy
        self._port_runner: web.AppRunner | None = None
        self._control_runner: web.AppRunner | None = None
        self._remote_runner: web.AppRunner | None = None
        self._site: web.SockSite | None = None

    async def open(self, listener: socket.socket, control: Path) -> None:
        """ConfigurationError where the control socket cannot be made."""
        if len(os.fsencode(control)) > _PATH_BYTES:
            raise errors.ConfigurationError(
                f"control: {control}: a socket's path has at most {_PATH_BYTES} bytes; name a shorter one"
            )
        self._listener = listener
        port = web.Application(client_max_size=0)
        port.router.add_route("*", "/{path:.*}", self._request)
        self._port_runner = web.AppRunner(
            port, handler_cancellation=True, access_log=None, keepalive_timeout=75.0, auto_decompress=False
        )
        await self._port_runner.setup()
        inside = web.Application(client_max_size=_MAX_CONTROL_BYTES)
        inside.router.add_get("/status", self._status)
        inside.router.add_post("/limit", self._limit)
        inside.router.add_post("/rations", self._rations)
        inside.router.add_post("/request-log", self._request_log)
        inside.router.add_post("/drain", self._drain)
        self._control_runner = web.AppRunner(inside, access_log=None)
        await self._control_runner.setup()
        control.unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            await web.UnixSite(self._control_runner, os.fspath(control)).start()
        except OSError as exc:
            raise errors.ConfigurationError(f"control: {control}: {exc.strerror or exc}") from exc
        finally:
            os.umask(before)

    async def open_remote(self, address: str, port: int, token_file: Path) -> None:
        """The control port. ConfigurationError where it cannot be had."""
        orders = {"/limit": self._limit, "/rations": self._rations, "/request-log": self._request_log}
        inside = remote.application(token_file, {"/status": self._status}, orders)
        self._remote_runner = web.AppRunner(inside, access_log=None)
        await self._remote_runner.setup()
        await web.SockSite(self._remote_runner, listen(address, port)).start()

    async def accept(self) -> None:
        """Answer on the port."""
        if self._site is None:
            assert self._port_runner is not None
            self._site = web.SockSite(self._port_runner, self._listener.dup())
            await self._site.start()

    async def leave_to_engine(self) -> None:
        """Leave the port to the engine's own processes, which accept from it. Requests here are finished."""
        site, self._site = self._site, None
        if site is not None:
            await site.stop()

    async def close(self) -> None:
        """Close connections; requests have a moment to end."""
        self._site = None
        for runner in (self._port_runner, self._control_runner, self._remote_runner):
            if runner is not None:
                await runner.cleanup()

    # -- the port ------------------------------------------------------------------------------------

    async def _request(self, request: web.Request) -> web.StreamResponse:
        response = await self._answer(request)
        if self._proxy is None and not response.prepared:
            # No connection outlives this: its next request might be one for the engine, which is not here.
            response.force_close()
        return response

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        state = self._ledger.state
        if request.path in admission.PROBES:
            status, body = admission.probe(request.path, state)
            return web.Response(status=status, body=body, content_type="application/json")
        if request.path == admission.METRICS:
            return await self._metrics()
        if self._proxy is not None and state in (State.READY, State.DRAINING):
            return await self._proxy.handle(request)
        message = f"The engine does not serve now: {state.name.lower()}."
        return web.Response(
            status=503,
            body=admission.refusal(503, message, "engine_unavailable"),
            content_type="application/json",
            headers={"Retry-After": "1"},
        )

    async def _metrics(self) -> web.Response:
        text = self._engine.metrics()
        if self._proxy is not None and self._ledger.state in (State.READY, State.DRAINING):
            text = await self._proxy.metrics() + text
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    # -- the control socket ----------------------------------------------------------------------------

    async def _status(self, request: web.Request) -> web.Response:
        return web.json_response(self._engine.status())

    async def _limit(self, request: web.Request) -> web.Response:
        """`{"in_flight": 8}`, and `queue_requests`, `queue_seconds` where they change, too."""
        try:
            wanted = admission.limits(await request.json(), self._ledger.limits)
        except (ValueError, RecursionError, errors.DocumentError) as exc:
            return web.json_response({"error": str(exc)}, status=400)
        self._engine.set_limits(wanted)
        return web.json_response(dataclasses.asdict(wanted))

    async def _rations(self, request: web.Request) -> web.Response:
        """What each tenant may have of this engine from now on; the answer says what each has had."""
        try:
            spent = self._engine.ration(admission.rations(await request.json()))
        except (ValueError, RecursionError, errors.DocumentError) as exc:
            return web.json_response({"error": str(exc)}, status=400)
        return web.json_response(
            {"tenants": {name: dataclasses.asdict(each) for name, each in spent.items()}}
        )

    async def _request_log(self, request: web.Request) -> web.Response:
        """`{"request_log": ...}`, as in the document, or null."""
        try:
            await self._engine.set_request_log(keeper.parse(await request.read()))
        except (errors.DocumentError, errors.ConfigurationError) as exc:
            return web.json_response({"error": str(exc)}, status=400)
        return web.json_response({})

    async def _drain(self, request: web.Request) -> web.Response:
        self._engine.drain()
        return web.json_response({}, status=202)


def listen(address: str, port: int) -> socket.socket:
    """The port of the engine, open and listening, for us and for our child. ConfigurationError."""
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(2_048)
    except OSError as exc:
        listener.close()
        raise errors.ConfigurationError(
            f"port: {address}:{port}: {exc.strerror or exc}; choose another, or 0 for a free one"
        ) from exc
    return listener
