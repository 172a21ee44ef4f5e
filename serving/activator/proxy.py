"""HTTP in, held, HTTP out: one service's requests while no replica was healthy when they came.

Runs in the activator's loop; `process` owns it. Decisions are `hold`'s and `choice`'s. A request's body stays
unread until there is a replica for it, so that what is held costs a connection's buffer each and no more, and
a replica that cannot be reached can be passed over: nothing was sent yet. What a replica answers, a refusal
included, is passed on as it comes.

What a client gets from here: 429 when too many wait, 503 when no replica was up in time, both with
Retry-After; 502 when the replica took the request and gave no answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import random
from collections.abc import Callable, Collection

import aiohttp
import yarl
from aiohttp import web

from serving import headers
from serving.activator import hold
from serving.activator.choice import Place, Replicas
from serving.activator.control import Held

_log = logging.getLogger(__name__)

_PROBE_SECONDS = 0.1
_PROBE_TIMEOUT_SECONDS = 2.0
_CONNECT_TIMEOUT_SECONDS = 1.0
_RETRY_AFTER_SECONDS = "2"
_EXPIRE_SECONDS = 0.25
"""How late a wait may end."""
_CHUNK_BYTES = 64 * 1024


@dataclasses.dataclass(slots=True)
class Counters:
    """Since the process began. `entered` were taken in; of these, `released` got a replica, `expired` none in
    time, `left` were given up by their clients, `broken` lost their replica in the middle. `refused` found no
    room to wait."""

    entered: int = 0
    released: int = 0
    expired: int = 0
    refused: int = 0
    left: int = 0
    broken: int = 0


class Proxy:
    """See the module. `health_path`: a replica that answers it with 200 is up."""

    def __init__(
        self,
        service: str,
        limits: hold.Limits,
        replicas: Replicas,
        health_path: str,
        woken: Callable[[], object],
    ) -> None:
        self.counters = Counters()
        self._service = service
        self._hold = hold.Hold(limits)
        self._replicas = replicas
        self._health_path = health_path
        self._woken = woken
        self._turns: dict[int, asyncio.Future[Place | None]] = {}
        self._deadlines: dict[int, float] = {}
        self._session: aiohttp.ClientSession | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._held = asyncio.Event()
        self._changed = asyncio.Event()

    # -- life ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to look for replicas whenever somebody waits. Inside the loop."""
        self._session = aiohttp.ClientSession(
            auto_decompress=False,
            # A connection each: on a kept one, a replica that was replaced looks like one that broke.
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_SECONDS),
        )
        self._tasks = [asyncio.create_task(self._probe()), asyncio.create_task(self._expire())]

    async def close(self) -> None:
        """Refuse whoever still waits, and stop."""
        for task in self._tasks:
            task.cancel()
        for ticket in list(self._turns):
            self._answer(ticket, None)
        if self._session is not None:
            await self._session.close()

    def load(self) -> Held:
        """What the control plane is told."""
        counters = self.counters
        errors = counters.expired + counters.refused + counters.broken
        in_flight = len(self._hold) + self._replicas.in_flight
        return Held(in_flight, counters.entered, errors)

    def replicas_changed(self, places: Collection[Place]) -> None:
        """The endpoints of the service, from now on."""
        self._replicas.replace(places)
        self._changed.set()
        self._release()

    # -- requests -----------------------------------------------------------------------------------

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """One request, from arrival to the last byte of its answer."""
        ticket = self._hold.enter(asyncio.get_running_loop().time())
        if ticket is None:
            self.counters.refused += 1
            return _refusal(429, f"{self._service} is starting, and too many requests wait for it already")
        self.counters.entered += 1
        try:
            return await self._forward(request, ticket)
        except asyncio.CancelledError:
            self.counters.left += 1
            raise

    async def _forward(self, request: web.BaseRequest, ticket: int) -> web.StreamResponse:
        while (place := await self._turn(ticket)) is not None:
            try:
                upstream = await self._send(request, place)
            except aiohttp.ClientConnectorError as exc:
                _log.warning("%s: replica %s:%d cannot be reached: %s", self._service, *place, exc)
                self._replicas.mark(place, up=False)
                self._give_back(place)
                self._hold.enter_again(ticket, self._deadlines[ticket])
                continue
            except aiohttp.ClientError as exc:
                self._give_back(place)
                self._deadlines.pop(ticket, None)
                self.counters.broken += 1
                _log.warning("%s: replica %s:%d gave no answer: %r", self._service, *place, exc)
                return web.Response(status=502, text=f"a replica of {self._service} gave no answer\n")
            except BaseException:
                self._give_back(place)
                self._deadlines.pop(ticket, None)
                raise
            self.counters.released += 1
            self._deadlines.pop(ticket, None)
            try:
                async with upstream:
                    return await self._pass_on(request, upstream)
            finally:
                self._give_back(place)
        self._deadlines.pop(ticket, None)
        self.counters.expired += 1
        return _refusal(503, f"no replica of {self._service} was up in time")

    async def _turn(self, ticket: int) -> Place | None:
        """Wait for a replica; None when the time is up."""
        turn: asyncio.Future[Place | None] = asyncio.get_running_loop().create_future()
        self._turns[ticket] = turn
        self._held.set()
        self._changed.set()
        if len(self._hold) == 1:
            self._woken()
        self._release()
        try:
            return await turn
        except asyncio.CancelledError:
            self._hold.leave(ticket)
            self._deadlines.pop(ticket, None)
            if turn.done() and not turn.cancelled() and (place := turn.result()) is not None:
                self._give_back(place)  # its turn came at the same moment
            raise
        finally:
            self._turns.pop(ticket, None)

    async def _send(self, request: web.BaseRequest, place: Place) -> aiohttp.ClientResponse:
        assert self._session is not None
        host, port = place
        url = yarl.URL(
            f"http://{f'[{host}]' if ':' in host else host}:{port}{request.raw_path}", encoded=True
        )
        body = request.content.iter_chunked(_CHUNK_BYTES) if request.can_read_body else None
        return await self._session.request(
            request.method,
            url,
            headers=headers.end_to_end(request.headers),
            data=body,
            allow_redirects=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        )

    async def _pass_on(
        self, request: web.BaseRequest, upstream: aiohttp.ClientResponse
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=upstream.status, reason=upstream.reason)
        response.headers.extend(headers.end_to_end(upstream.headers))
        await response.prepare(request)
        try:
            async for piece in upstream.content.iter_any():
                await response.write(piece)
            await response.write_eof()
        except (aiohttp.ClientError, TimeoutError) as exc:
            # Half an answer must not look like a whole one.
            self.counters.broken += 1
            _log.warning("%s: a replica broke off its answer: %s", self._service, exc)
            if request.transport is not None:
                request.transport.abort()
        return response

    # -- turns --------------------------------------------------------------------------------------

    def _release(self) -> None:
        """Give replicas that have room to those who wait longest."""
        while len(self._hold):
            place = self._replicas.take(random.random(), random.random())  # noqa: S311 - it balances
            if place is None:
                return
            released = self._hold.release()
            assert released is not None
            ticket, deadline = released
            self._deadlines[ticket] = deadline
            if not self._answer(ticket, place):
                self._replicas.give_back(place)

    def _give_back(self, place: Place) -> None:
        self._replicas.give_back(place)
        self._release()

    def _answer(self, ticket: int, place: Place | None) -> bool:
        turn = self._turns.get(ticket)
        if turn is None or turn.done():
            return False
        turn.set_result(place)
        return True

    async def _expire(self) -> None:
        """End the wait of those whose time is up."""
        loop = asyncio.get_running_loop()
        while True:
            await self._held.wait()
            deadline = self._hold.next_deadline()
            if deadline is None:
                self._held.clear()
                continue
            await asyncio.sleep(min(max(0.0, deadline - loop.time()), _EXPIRE_SECONDS))
            for ticket in self._hold.expire(loop.time()):
                self._answer(ticket, None)

    async def _probe(self) -> None:
        """While somebody waits, ask the replicas that are not known to be up whether they are."""
        while True:
            await self._held.wait()
            unknown = self._replicas.to_probe()
            if unknown:
                await asyncio.gather(*(self._ask(place) for place in unknown))
                self._release()
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), _PROBE_SECONDS)

    async def _ask(self, place: Place) -> None:
        assert self._session is not None
        host, port = place
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}{self._health_path}"
        limit = aiohttp.ClientTimeout(total=_PROBE_TIMEOUT_SECONDS)
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with self._session.get(url, timeout=limit, allow_redirects=False) as answer:
                self._replicas.mark(place, up=answer.status == 200)


def _refusal(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=f"{text}\n", headers={"Retry-After": _RETRY_AFTER_SECONDS})
