"""The endpoint's HTTP: a unix socket for who may change it, a TCP port for what is only to be seen.

Owned by the server: `Api(...)`, `start`, `stop`. An aiohttp loop in a thread of its own; what the server does
is done on the server's thread (`Actions`), which answers when it has. The socket lies in the endpoint's
folder (0700), so that only its user acts. The TCP port (GET only) answers nobody who names this host by a
name that is not its own, because a page of somebody else's could be pointed at it; what it shows has no
document in it, for a document may hold secrets. Bodies are bounded by what a document may be.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from aiohttp import web

from pages import guard, middleware
from pages.loopthread import LoopThread
from pages.middleware import Answer
from serving import endpoint, endpointmetrics, errors, statuspage

_STOP_SECONDS = 2.0
_MAX_LOG_LINES = 10_000
_STATUS_CODES: tuple[tuple[type[errors.ServingError], int], ...] = (
    (errors.DocumentError, 400),
    (errors.NotFoundError, 404),
    (errors.ConflictError, 409),
    (errors.ConfigurationError, 422),
    (errors.UnavailableError, 503),
)
_log = logging.getLogger(__name__)


class Actions(Protocol):
    """What the server does for who asks. Blocking, from any thread; errors of ours become HTTP's."""

    def status(self) -> dict[str, Any]: ...
    def metrics(self) -> bytes: ...
    def plan(self, text: str, where: str) -> dict[str, Any]: ...
    def apply(self, text: str, where: str) -> dict[str, Any]: ...
    def rollback(self) -> dict[str, Any]: ...
    def scale(self, replicas: int) -> dict[str, Any]: ...
    def delete(self) -> dict[str, Any]: ...
    def logs(self, replica: str, lines: int) -> dict[str, Any]: ...
    def document(self) -> dict[str, Any]: ...
    def decisions(self) -> dict[str, Any]: ...


class Api:
    """See the module. `listen` is (address, port), or None for no TCP."""

    def __init__(self, socket_path: Path, listen: tuple[str, int] | None, actions: Actions) -> None:
        self._socket_path = socket_path
        self._listen = listen
        self._actions = actions
        self._loop = LoopThread("status-api")
        self._runners: list[web.AppRunner] = []
        self.tcp_address: tuple[str, int] | None = None

    def start(self) -> None:
        """Returns when the sockets answer. ConfigurationError if the unix socket cannot be had; a TCP port
        that is taken is logged and done without, because serving must not depend on being watched."""
        self._loop.start()
        try:
            self._loop.run(self._open())
        except OSError as exc:
            self.stop()
            raise errors.ConfigurationError(f"cannot listen on {self._socket_path}: {exc.strerror}") from exc

    def stop(self) -> None:
        """Refuse new requests, give those in progress a moment. Without a start, nothing."""
        if not self._loop.running:
            return
        self._loop.run(self._close())
        self._loop.stop()

    # -- on the loop -------------------------------------------------------------------------------

    async def _open(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._socket_path.unlink()
        runner = await self._runner([_errors_as_json], acting=True)
        await web.UnixSite(runner, os.fspath(self._socket_path)).start()
        if self._listen is None:
            return
        runner = await self._runner([_errors_as_json, middleware.own_host(guard.own_names())], acting=False)
        site = web.TCPSite(runner, *self._listen)
        try:
            await site.start()
        except OSError as exc:
            _log.error(
                "the status page cannot listen on %s:%d: %s; going on without", *self._listen, exc.strerror
            )
            return
        bound = runner.addresses[0]
        self.tcp_address = (str(bound[0]), int(bound[1]))

    async def _close(self) -> None:
        for runner in self._runners:
            await runner.cleanup()

    async def _runner(self, guards: list[Any], *, acting: bool) -> web.AppRunner:
        application = web.Application(client_max_size=2 * endpoint.MAX_DOCUMENT_BYTES, middlewares=guards)
        add, act = application.router, self._actions
        add.add_get("/healthz", _alive)
        add.add_get("/", self._page)
        add.add_get("/api/v1/status", self._json(lambda request, body: act.status()))
        add.add_get("/metrics", self._metrics)
        if acting:
            add.add_get("/api/v1/document", self._json(lambda request, body: act.document()))
            add.add_get("/api/v1/decisions", self._json(lambda request, body: act.decisions()))
            add.add_get("/api/v1/logs", self._json(self._logs))
            add.add_post("/api/v1/plan", self._json(lambda _, body: act.plan(*_document(body))))
            add.add_post("/api/v1/apply", self._json(lambda _, body: act.apply(*_document(body))))
            add.add_post("/api/v1/rollback", self._json(lambda request, body: act.rollback()))
            add.add_post("/api/v1/scale", self._json(lambda _, body: act.scale(_replicas(body))))
            add.add_post("/api/v1/delete", self._json(lambda request, body: act.delete()))
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=_STOP_SECONDS)
        self._runners.append(runner)
        await runner.setup()
        return runner

    def _json(self, handler: Callable[[web.Request, Mapping[str, Any]], dict[str, Any]]) -> Answer:
        async def answer(request: web.Request) -> web.StreamResponse:
            body = _object(await request.read(), request.path)
            result = await self._loop.loop.run_in_executor(None, handler, request, body)
            return web.json_response(result)

        return answer

    def _logs(self, request: web.Request, body: Mapping[str, Any]) -> dict[str, Any]:
        lines = request.query.get("lines", "100")
        if not (lines.isascii() and lines.isdigit() and len(lines) < 8):
            raise errors.DocumentError(f"lines: {lines[:40]!r} is not a number of lines")
        return self._actions.logs(request.query.get("replica", ""), min(int(lines), _MAX_LOG_LINES))

    async def _page(self, request: web.Request) -> web.StreamResponse:
        status = await self._loop.loop.run_in_executor(None, self._actions.status)
        return web.Response(text=statuspage.render(status), content_type="text/html")

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        text = await self._loop.loop.run_in_executor(None, self._actions.metrics)
        return web.Response(body=text, headers={"Content-Type": endpointmetrics.CONTENT_TYPE})


async def _alive(request: web.Request) -> web.StreamResponse:
    return web.Response(text="ok\n")


@web.middleware
async def _errors_as_json(request: web.Request, handler: Answer) -> web.StreamResponse:
    try:
        response = await handler(request)
    except errors.ServingError as exc:
        code = next((code for kind, code in _STATUS_CODES if isinstance(exc, kind)), 500)
        response = _refused(type(exc).__name__, str(exc), code)
    except web.HTTPException as exc:
        response = _refused("DocumentError", f"{request.method} {request.path}: {exc.reason}", exc.status)
    except Exception as exc:
        _log.exception("%s %s failed", request.method, request.path)
        response = _refused("ServingError", f"the server failed: {type(exc).__name__}", 500)
    response.headers.update(guard.HEADERS)
    return response


def _refused(kind: str, message: str, status: int) -> web.Response:
    return web.json_response({"error": kind, "message": message}, status=status)


def _object(body: bytes, path: str) -> Mapping[str, Any]:
    try:
        document = json.loads(body or b"{}")
    except (ValueError, RecursionError) as exc:
        raise errors.DocumentError(f"{path}: the body is not JSON: {exc}") from exc
    if not isinstance(document, dict):
        raise errors.DocumentError(f"{path}: the body is not a JSON object")
    return document


def _document(body: Mapping[str, Any]) -> tuple[str, str]:
    text, where = body.get("document"), body.get("where", "document")
    if not isinstance(text, str) or not isinstance(where, str):
        raise errors.DocumentError("document: send the endpoint document's text")
    return text, where


def _replicas(body: Mapping[str, Any]) -> int:
    count = body.get("replicas")
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise errors.DocumentError("replicas: send a number, 0 or more")
    return count
