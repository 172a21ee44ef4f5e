"""The agent's HTTP: a unix socket for what acts (0600, ours alone), a TCP port for what is only to be seen.

Owned by the daemon: `Api(...)`, the parts `add` their routes, `start`, `stop`. An event loop in a thread of
its own carries the connections (aiohttp); handlers are plain blocking functions run in threads, so that no
part needs to know asyncio. What is `public` is served on both, and on TCP with GET and HEAD only; it has
threads of its own, so that a scrape never waits for pulls.

Rules: bodies, headers, requests at a time and idle connections are bounded; a request on TCP must name this
host by an address or a known name (a page of somebody else's must not read ours through a renamed host), and
nothing is said about CORS, so that no other origin gets to read an answer. /healthz is answered by the loop
itself: it means that the process lives, and waits for nothing. Errors of ours become HTTP's here, and nowhere
else; their JSON is that of the device server's control socket, so that `client.py` raises them again.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import errno
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from aiohttp import web

from agent import errors as agent_errors
from imagefs import errors
from imagefs.fuse import controlmessage, statedirectory
from pages import guard, middleware
from pages.loopthread import LoopThread

MAX_BODY_BYTES = 1 << 20
"""Requests are references and digests; nothing that is uploaded."""
_MAX_HEADER_BYTES = 8 << 10
_MAX_HEADERS = 64
_MAX_WAITING = 64
"""Requests that are being answered or wait for a thread, of those that look and of those that act."""
_LOOKING_THREADS = 2
_ACTING_THREADS = 8
_BODY_SECONDS = 10.0
_IDLE_SECONDS = 30.0
_STOP_SECONDS = 2.0
_log = logging.getLogger(__name__)

_STATUS_CODES: tuple[tuple[type[errors.ImagefsError], int], ...] = (
    (errors.InvalidInputError, 400),
    (errors.DeniedError, 403),
    (errors.NotFoundError, 404),
    (errors.BusyError, 409),
    (agent_errors.AlreadyExistsError, 409),
    (agent_errors.FailedPreconditionError, 412),
    (errors.IntegrityError, 502),
    (errors.UnavailableError, 503),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """What a handler gets. `parameters` are the path's {names}, `query` the first value of each."""

    method: str
    path: str
    parameters: Mapping[str, str]
    query: Mapping[str, str]
    body: bytes

    def json(self) -> dict[str, Any]:
        """The body as a JSON object; an empty body is an empty one. Raises InvalidInputError."""
        try:
            document = json.loads(self.body or b"{}")
        except (ValueError, RecursionError) as exc:
            raise errors.InvalidInputError(f"{self.path}: the body is not JSON: {exc}") from exc
        if not isinstance(document, dict):
            raise errors.InvalidInputError(f"{self.path}: the body is not a JSON object")
        return document

    def string(self, field: str) -> str:
        """A field of the JSON body. Raises InvalidInputError."""
        value = self.json().get(field)
        if not isinstance(value, str) or not value:
            raise errors.InvalidInputError(f"{self.path}: {field} must be a string that is not empty")
        return value


@dataclasses.dataclass(frozen=True, slots=True)
class Response:
    """What a handler answers, where a dict (JSON, 200) is not it."""

    body: bytes
    content_type: str = "application/json"
    status: int = 200


Handler = Callable[[Request], "Response | dict[str, Any]"]
"""A blocking function, called in a thread of the pool. Errors of ours that it raises become HTTP's."""


class Routes(Protocol):
    """Where a part registers what it answers; before the API starts."""

    def add(self, method: str, path: str, handler: Handler, *, public: bool = False) -> None:
        """`path` may hold {names}. `public` also on the TCP port: GET only, nothing secret."""


class Api:
    """See the module. `listen` is "ADDRESS:PORT" or None; `host_names` are further names of this host. A TCP
    port that is taken is said and done without (`tcp_error`): pods must start all the same."""

    def __init__(self, socket_path: Path, listen: str | None, host_names: Iterable[str] = ()) -> None:
        self._socket_path = socket_path
        self._listen = listen
        self._host_names = guard.own_names(host_names)
        self._routes: list[tuple[str, str, Handler, bool]] = []
        self._looking = _Threads(_LOOKING_THREADS, "api-look")
        self._acting = _Threads(_ACTING_THREADS, "api-act")
        self._loop = LoopThread("api-loop")
        self._runners: list[web.AppRunner] = []
        self.port: int | None = None
        self.tcp_error: str | None = None

    def add(self, method: str, path: str, handler: Handler, *, public: bool = False) -> None:
        """See Routes."""
        if public and method != "GET":
            raise ValueError(f"{method} {path}: what is public is read-only")
        if self._loop.running:
            raise RuntimeError(f"{method} {path}: the API is running already")
        self._routes.append((method, path, handler, public))

    def start(self) -> None:
        """Returns when the sockets take requests. ConfigurationError if the unix socket cannot be had."""
        self._loop.start()
        try:
            self._loop.run(self._open())
        except OSError as exc:
            self.stop()
            raise errors.ConfigurationError(f"cannot listen on {self._socket_path}: {exc.strerror}") from exc

    def stop(self) -> None:
        """Refuse new requests, give those in progress a moment, end."""
        if not self._loop.running:
            return
        self._loop.run(self._close())
        self._loop.stop()
        self._looking.end()
        self._acting.end()

    # -- on the loop -------------------------------------------------------------------------------

    async def _open(self) -> None:
        listener = statedirectory.listen(self._socket_path, socket.SOCK_STREAM)
        await self._serve(listener, self._application(tcp=False))
        if self._listen is None:
            return
        try:
            listener = _tcp_listener(self._listen)
        except OSError as exc:
            self.tcp_error = f"cannot listen on {self._listen}: {exc.strerror or exc}"
            _log.error("%s; going on without", self.tcp_error)
            return
        self.port = int(listener.getsockname()[1])
        await self._serve(listener, self._application(tcp=True))

    async def _serve(self, listener: socket.socket, application: web.Application) -> None:
        runner = web.AppRunner(
            application,
            access_log=None,
            keepalive_timeout=_IDLE_SECONDS,
            max_line_size=_MAX_HEADER_BYTES,
            max_field_size=_MAX_HEADER_BYTES,
            max_headers=_MAX_HEADERS,
            auto_decompress=False,  # a small body must not become a large one
            shutdown_timeout=_STOP_SECONDS,
        )
        self._runners.append(runner)
        await runner.setup()
        await web.SockSite(runner, listener).start()

    async def _close(self) -> None:
        for runner in self._runners:
            await runner.cleanup()

    def _application(self, *, tcp: bool) -> web.Application:
        guards = (
            [_errors_as_json, middleware.own_host(self._host_names), _read_only] if tcp else [_errors_as_json]
        )
        application = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=guards)
        application.router.add_get("/healthz", _health)
        for method, path, handler, public in self._routes:
            if public or not tcp:
                answer = self._answering(handler, self._looking if public else self._acting)
                if method == "GET":
                    application.router.add_get(path, answer)
                else:
                    application.router.add_route(method, path, answer)
        return application

    def _answering(
        self, handler: Handler, threads: _Threads
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def answer(request: web.Request) -> web.StreamResponse:
            with threads.place():
                try:
                    async with asyncio.timeout(_BODY_SECONDS):
                        body = await request.read()
                except TimeoutError as exc:
                    raise errors.InvalidInputError("the request's body did not arrive") from exc
                plain = Request(
                    request.method, request.path, dict(request.match_info), dict(request.query), body
                )
                return response(await self._loop.loop.run_in_executor(threads.pool, handler, plain))

        return answer


class _Threads:
    """A pool, and how many requests may be in it or wait for it. Used on the loop."""

    def __init__(self, threads: int, name: str) -> None:
        self.pool = concurrent.futures.ThreadPoolExecutor(threads, name)
        self._waiting = 0

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """One request's place. UnavailableError if all are taken."""
        if self._waiting >= _MAX_WAITING:
            raise errors.UnavailableError("the agent has too many requests waiting", 1.0)
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    def end(self) -> None:
        """Without waiting for who hangs in an origin."""
        self.pool.shutdown(wait=False, cancel_futures=True)


def response(result: Response | dict[str, Any]) -> web.Response:
    """What a handler answered, as aiohttp sends it."""
    if isinstance(result, dict):
        return web.json_response(result)
    return web.Response(body=result.body, status=result.status, headers={"Content-Type": result.content_type})


async def _health(request: web.Request) -> web.StreamResponse:
    return web.Response(text="ok\n")


@web.middleware
async def _errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        response = await handler(request)
    except errors.ImagefsError as exc:
        response = web.json_response(controlmessage.encode_error(exc), status=status_code(exc))
        if isinstance(exc, errors.UnavailableError) and exc.retry_after_seconds is not None:
            response.headers["Retry-After"] = str(max(1, round(exc.retry_after_seconds)))
    except web.HTTPException as exc:
        error = errors.NotFoundError if exc.status == 404 else errors.InvalidInputError
        reply = controlmessage.encode_error(error(f"{request.method} {request.path}: {exc.reason}"))
        response = web.json_response(reply, status=exc.status)
    except Exception as exc:
        _log.exception("%s %s failed", request.method, request.path)
        reply = controlmessage.encode_error(errors.ImagefsError(f"the agent failed: {type(exc).__name__}"))
        response = web.json_response(reply, status=500)
    response.headers.update(guard.HEADERS)
    return response


@web.middleware
async def _read_only(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    if request.method not in ("GET", "HEAD"):
        raise web.HTTPMethodNotAllowed(request.method, ["GET", "HEAD"])
    return await handler(request)


def status_code(error: errors.ImagefsError) -> int:
    """HTTP's number for an error of ours."""
    return next((code for kind, code in _STATUS_CODES if isinstance(error, kind)), 500)


def _tcp_listener(listen: str) -> socket.socket:
    """A listening socket on "ADDRESS:PORT" ("[::]:7310" for IPv6). OSError if it cannot be had."""
    host, separator, port = listen.rpartition(":")
    if not separator or not port.isdigit() or int(port) > 65535:
        raise OSError(errno.EINVAL, "not ADDRESS:PORT")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, int(port)))
        listener.listen(64)
    except OSError:
        listener.close()
        raise
    os.set_inheritable(listener.fileno(), False)
    return listener
