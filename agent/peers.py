"""Sharing blocks with other nodes: the listener that peers ask, and all that belongs to it.

`Sharing` is what the daemon starts and stops. An event loop in a thread of its own carries the connections
(aiohttp); a block goes from the device server, as a descriptor, to the peer by sendfile (copied by Python
only under TLS). Client side and choice of peers are the device server's: `membership.py` tells it who there
is, now and whenever it was replaced.

    GET /peer/v1/blocks/MAP_DIGEST/INDEX?origin_ref=..&map_size=..&blob_digest=..&blob_size=..&priority=..
        200 with the uncompressed block; 400; 401 without the token; 403 and 404 for a layer that we do not
        fetch or cannot find; 503 for a block that did not come in time, or too many requests
    GET /peer/v1/health    204
    what `add` registered (agent/warm.py: prefetch, pin, unpin, warm), as on the agent's own socket, for the
        cluster: never without authentication; an error is {"error": class, "message": ...}

Rules: no peer is listened to without authentication unless `insecure` was said; the token is compared in
constant time; connections, requests at a time, in all and from one address, header sizes and the time that a
block may take to come and to be sent are bounded. A request from a peer never makes us ask another peer.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import hmac
import logging
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

from aiohttp import web

from agent import api, blockchannel, config, guests, membership
from agent.observer import Observer
from imagefs import errors, peerhttp, peersettings, plan
from imagefs.fuse import control, controlmessage, peering
from imagefs.origin import connect

_log = logging.getLogger(__name__)

_MAX_CONNECTIONS = 512
_MAX_REQUESTS = 64
_MAX_REQUESTS_PER_ADDRESS = 16
_MAX_HEADER_BYTES = 8 << 10
_WAIT_SECONDS = 8.0
"""Less than the asker's own patience (imagefs/peers.py): it gets an answer, and knows that we live."""
_SEND_SECONDS = 30.0
_KEEP_ALIVE_SECONDS = 75.0
_MAX_TOKENS_BYTES = 16 << 10
_MAX_BODY_BYTES = 16 << 10
_ACTING_THREADS = 4


class Sharing:
    """See the module. `devices` gives a client of this node's device server, `origins` how this node reaches
    registries. ConfigurationError from `start` names what is missing."""

    def __init__(
        self,
        settings: config.Peers,
        state_dir: Path,
        devices: Callable[[], control.DeviceClient],
        origins: connect.Options,
        discovery: membership.Discovery,
        observer: Observer,
    ) -> None:
        check(settings)
        self._settings = settings
        self._state_dir = state_dir
        self._observer = observer
        self._membership = membership.Membership(settings, discovery, devices, observer)
        self._guests = guests.Guests(settings, devices, origins)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name="peers", daemon=True)
        self._listener: _Listener | None = None
        self._routes: list[tuple[str, str, api.Handler]] = []
        self._tasks: list[asyncio.Task[None]] = []

    def add(self, method: str, path: str, handler: api.Handler, *, public: bool = False) -> None:
        """api.Routes, for whoever authenticates as a member of the cluster; before `start`."""
        self._routes.append((method, path, handler))

    def start(self) -> None:
        """Listen, and tell the device server who the peers are."""
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        except OSError as exc:
            self._end_loop()
            raise errors.ConfigurationError(
                f"peers.listen: cannot listen on {self._settings.listen}: {exc.strerror or exc}"
            ) from exc
        except BaseException:
            self._end_loop()
            raise
        self._membership.start()

    def stop(self) -> None:
        """Listen no more. The device server goes on asking the peers that it knows."""
        self._membership.stop()
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._end_loop()
        self._guests.close()

    @property
    def members(self) -> tuple[str, ...]:
        """Who the agents of the cluster are, as last known, this one included."""
        return self._membership.members

    # -- on the loop -------------------------------------------------------------------------------

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _open(self) -> None:
        channel = blockchannel.BlockChannel(self._state_dir, self._device_server_is_new)
        self._listener = _Listener(self._settings, channel, self._guests, self._routes)
        await self._listener.open()
        self._tasks = [asyncio.create_task(channel.run()), asyncio.create_task(self._guests.sweep())]

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            await self._listener.close()

    def _device_server_is_new(self) -> None:
        self._membership.say_again()
        self._tasks.append(asyncio.create_task(self._adopt()))
        self._tasks = [task for task in self._tasks if not task.done()]

    async def _adopt(self) -> None:
        try:
            await self._guests.adopt()
        except errors.ImagefsError as exc:
            _log.warning("peers: what the device server holds for them is not known: %s", exc)


class _Listener:
    """The HTTP side."""

    def __init__(
        self,
        settings: config.Peers,
        channel: blockchannel.BlockChannel,
        guests_: guests.Guests,
        routes: Sequence[tuple[str, str, api.Handler]],
    ) -> None:
        self._settings = settings
        self._routes = routes
        self._acting = concurrent.futures.ThreadPoolExecutor(_ACTING_THREADS, "peers-acting")
        self._channel = channel
        self._guests = guests_
        self._tls = _TlsFiles(settings) if settings.tls_ca is not None else None
        self._tokens = _TokenFile(settings.token_file) if settings.token_file is not None else None
        self._requests = 0
        self._requests_by_address: collections.Counter[str] = collections.Counter()
        self._server: asyncio.Server | None = None
        self._runner: web.AppRunner | None = None

    async def open(self) -> None:
        application = web.Application(client_max_size=0)
        application.router.add_get(peerhttp.PROBE_TARGET, self._health, allow_head=False)
        application.router.add_get("/peer/v1/blocks/{layer}/{index}", self._block, allow_head=False)
        for method, path, handler in self._routes:
            application.router.add_route(method, path, self._answering(handler))
        self._runner = web.AppRunner(
            application,
            access_log=None,
            keepalive_timeout=_KEEP_ALIVE_SECONDS,
            max_line_size=_MAX_HEADER_BYTES,
            max_field_size=_MAX_HEADER_BYTES,
            handler_cancellation=True,
            shutdown_timeout=1.0,
        )
        await self._runner.setup()
        server = self._runner.server
        assert server is not None

        def protocol() -> asyncio.Protocol:
            if len(server.connections) >= _MAX_CONNECTIONS:
                return _Refusal()
            if self._tls is not None:
                self._tls.refresh()
            return server()

        host, port = peersettings.split_address(self._settings.listen or "")
        context = self._tls.context if self._tls is not None else None
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(protocol, host, port, ssl=context, backlog=256)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        if self._runner is not None:
            await self._runner.cleanup()
        self._acting.shutdown(wait=False, cancel_futures=True)

    def _answering(self, handler: api.Handler) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def answer(request: web.Request) -> web.StreamResponse:
            self._admit(request)
            if self._tokens is None and self._tls is None:
                raise web.HTTPForbidden(text="peers.insecure: only blocks are given to strangers\n")
            with self._place(request):
                try:
                    plain = await _plain(request)
                    loop = asyncio.get_running_loop()
                    return api.response(await loop.run_in_executor(self._acting, handler, plain))
                except errors.ImagefsError as exc:
                    return web.json_response(controlmessage.encode_error(exc), status=api.status_code(exc))

        return answer

    async def _health(self, request: web.Request) -> web.StreamResponse:
        self._admit(request)
        return web.Response(status=204)

    async def _block(self, request: web.Request) -> web.StreamResponse:
        self._admit(request)
        with self._place(request):
            try:
                spec, index, priority = peering.decode_target(request.raw_path)
                async with asyncio.timeout(_WAIT_SECONDS):
                    fd, length = await self._find(spec, index, priority)
            except TimeoutError as exc:
                raise web.HTTPServiceUnavailable(text="the block did not come in time\n") from exc
            except errors.ImagefsError as exc:
                raise _http_error(exc) from exc
            with open(fd, "rb", buffering=0) as file:
                return await _send(request, file, length)

    async def _find(
        self, spec: control.LayerSpec, index: int, priority: plan.Priority
    ) -> blockchannel.Answer:
        self._guests.used(spec.map_digest)
        try:
            return await self._channel.block(spec.map_digest, index, priority)
        except errors.NotFoundError:
            await self._guests.attach(spec)
            return await self._channel.block(spec.map_digest, index, priority)

    def _admit(self, request: web.Request) -> None:
        """Raise 401 without the token. Under mTLS the handshake has decided already."""
        if self._tokens is None:
            return
        scheme, _, said = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not self._tokens.accepts(said.strip()):
            raise web.HTTPUnauthorized(headers={"WWW-Authenticate": "Bearer"})

    @contextlib.contextmanager
    def _place(self, request: web.Request) -> Iterator[None]:
        """One request's place; 503 if there is none."""
        address = request.remote or ""
        if self._requests >= _MAX_REQUESTS or self._requests_by_address[address] >= _MAX_REQUESTS_PER_ADDRESS:
            raise web.HTTPServiceUnavailable(headers={"Retry-After": "1"}, text="too many requests\n")
        self._requests += 1
        self._requests_by_address[address] += 1
        try:
            yield
        finally:
            self._requests -= 1
            self._requests_by_address[address] -= 1
            if not self._requests_by_address[address]:
                del self._requests_by_address[address]


async def _send(request: web.Request, file: object, length: int) -> web.StreamResponse:
    """The block as the answer's body. A peer that takes none of it for long is cut off."""
    response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
    response.content_length = length
    await response.prepare(request)
    writer = request.transport
    if writer is None:
        raise ConnectionResetError("the peer has gone")
    try:
        async with asyncio.timeout(_SEND_SECONDS):
            await asyncio.get_running_loop().sendfile(writer, file, 0, length)  # type: ignore[arg-type]
    except TimeoutError:
        writer.abort()
        raise
    await response.write_eof()
    return response


async def _plain(request: web.Request) -> api.Request:
    body = b""
    try:
        async with asyncio.timeout(_WAIT_SECONDS):
            while piece := await request.content.readany():
                body += piece
                if len(body) > _MAX_BODY_BYTES:
                    raise errors.InvalidInputError(f"{request.path}: a body of over {_MAX_BODY_BYTES} bytes")
    except TimeoutError as exc:
        raise errors.InvalidInputError(f"{request.path}: the body did not arrive") from exc
    return api.Request(request.method, request.path, dict(request.match_info), dict(request.query), body)


class _Refusal(asyncio.Protocol):
    """What a connection too many gets."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


class _TokenFile:
    """The secrets that are accepted, one a line; read again when the file changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = ""
        self._tokens: tuple[bytes, ...] = ()
        self._read()

    def accepts(self, said: str) -> bool:
        """Compared with each in constant time."""
        with contextlib.suppress(errors.ConfigurationError):  # while it is being replaced, the old ones hold
            self._read()
        given = said.encode(errors="surrogateescape")
        matches = [hmac.compare_digest(given, token) for token in self._tokens]
        return any(matches)

    def _read(self) -> None:
        stamp = membership.file_stamp([self._path])
        if stamp == self._stamp:
            return
        try:
            data = self._path.read_bytes()[:_MAX_TOKENS_BYTES]
        except OSError as exc:
            raise errors.ConfigurationError(f"peers.token_file: {self._path}: {exc.strerror}") from exc
        tokens = tuple(line.strip() for line in data.splitlines() if line.strip())
        if not tokens:
            raise errors.ConfigurationError(f"peers.token_file: {self._path} holds no secret")
        self._stamp, self._tokens = stamp, tokens


class _TlsFiles:
    """The context of the listener; new handshakes use the files as they are now."""

    def __init__(self, settings: config.Peers) -> None:
        self._settings = settings
        self._files = [file for file in (settings.tls_certificate, settings.tls_key, settings.tls_ca) if file]
        self._stamp = membership.file_stamp(self._files)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.verify_mode = ssl.CERT_REQUIRED
        self._load()

    def refresh(self) -> None:
        """Take up certificates that were renewed. An authority that is taken out counts until a restart."""
        stamp = membership.file_stamp(self._files)
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._load()
            except errors.ConfigurationError as exc:
                _log.warning("%s; going on with the certificate that we have", exc)

    def _load(self) -> None:
        settings = self._settings
        assert settings.tls_certificate is not None
        try:
            self.context.load_verify_locations(settings.tls_ca)
            self.context.load_cert_chain(settings.tls_certificate, settings.tls_key)
        except (OSError, ValueError) as exc:
            raise errors.ConfigurationError(f"peers.tls_certificate, tls_key or tls_ca: {exc}") from exc


def check(settings: config.Peers) -> None:
    """Raise ConfigurationError for settings that make no safe listener."""
    peersettings.split_address(settings.listen or "")
    tls = (settings.tls_certificate, settings.tls_key, settings.tls_ca)
    if any(tls) and not all(tls):
        raise errors.ConfigurationError(
            "peers: mTLS needs tls_certificate, tls_key and tls_ca, all three of them"
        )
    if not settings.token_file and not all(tls) and not settings.insecure:
        raise errors.ConfigurationError(
            "peers.listen without authentication: give token_file or the tls_ files, or say insecure = true"
        )


def _http_error(error: errors.ImagefsError) -> web.HTTPException:
    """What a peer is told; the message stays here."""
    if isinstance(error, errors.InvalidInputError):
        return web.HTTPBadRequest()
    if isinstance(error, errors.DeniedError):
        return web.HTTPForbidden()
    if isinstance(error, errors.NotFoundError):
        return web.HTTPNotFound()
    return web.HTTPServiceUnavailable()
