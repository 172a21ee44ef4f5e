"""Requests through the activator: real connections, replicas that are small servers in the same loop."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import pytest
from aiohttp import web

from serving.activator import choice, hold, proxy

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
HEALTH = "/readyz"


class World:
    """One activator in front of as many replicas as the test starts."""

    def __init__(self, limits: hold.Limits, concurrency: int) -> None:
        self.woken = 0
        self.replicas = choice.Replicas(concurrency)
        self.proxy = proxy.Proxy("demo", limits, self.replicas, HEALTH, self._wake)
        self.seen: list[tuple[str, str, bytes]] = []
        self.busy = self.busiest = 0
        self._ending = contextlib.AsyncExitStack()

    def _wake(self) -> None:
        self.woken += 1

    async def start(self) -> None:
        self.proxy.start()
        self._ending.push_async_callback(self.proxy.close)
        _, self.url = await self.serve(self.proxy.handle, cancel=True)
        self.client = await self._ending.enter_async_context(aiohttp.ClientSession())

    async def serve(self, handler: Handler, cancel: bool = False) -> tuple[choice.Place, str]:
        runner = web.ServerRunner(web.Server(handler, handler_cancellation=cancel), shutdown_timeout=0.1)
        await runner.setup()
        self._ending.push_async_callback(runner.cleanup)
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        (address,) = runner.addresses
        return (address[0], address[1]), f"http://127.0.0.1:{address[1]}"

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """A replica that is up, and notes what it gets."""
        if request.path == HEALTH:
            return web.Response(text="ok")
        self.busy += 1
        self.busiest = max(self.busiest, self.busy)
        body = await request.read()
        await asyncio.sleep(0.01)
        self.busy -= 1
        self.seen.append((request.method, request.raw_path, body))
        return web.Response(text=f"answer {len(self.seen)}", headers={"x-replica": "1"})

    async def held(self, count: int) -> None:
        while self.proxy.load().in_flight < count:
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        await self._ending.aclose()


@contextlib.asynccontextmanager
async def world(max_held: int = 100, deadline: float = 30.0, concurrency: int = 16) -> AsyncIterator[World]:
    it = World(hold.Limits(max_held, deadline), concurrency)
    try:
        await it.start()
        yield it
    finally:
        await it.stop()


def test_held_until_a_replica_is_up_then_answered_whole() -> None:
    async def run() -> None:
        async with world() as it:
            body = bytes(range(256)) * 4096
            waiting = asyncio.create_task(it.client.post(f"{it.url}/v1/x%2Fy?q=1", data=body))
            await it.held(1)
            assert it.woken == 1
            assert it.proxy.load().issued == 1
            place, _ = await it.serve(it.answer)
            it.proxy.replicas_changed([place])
            answer = await waiting
            assert (answer.status, answer.headers["x-replica"]) == (200, "1")
            assert await answer.text() == "answer 1"
            assert it.seen == [("POST", "/v1/x%2Fy?q=1", body)]
            assert it.proxy.load().in_flight == 0

    asyncio.run(run())


def test_what_was_issued_never_falls_while_a_replica_takes_its_time() -> None:
    """Reports are differences: one below nothing ended them, and the autoscaler heard no more."""

    async def run() -> None:
        async with world() as it:
            answering = asyncio.Event()

            async def slow(request: web.BaseRequest) -> web.StreamResponse:
                if request.path != HEALTH:
                    await answering.wait()
                return await it.answer(request)

            waiting = asyncio.create_task(it.client.get(f"{it.url}/"))
            await it.held(1)
            place, _ = await it.serve(slow)
            it.proxy.replicas_changed([place])
            while len(it.proxy._hold):
                await asyncio.sleep(0.005)
            assert (it.proxy.load().issued, it.proxy.load().in_flight) == (1, 1)
            answering.set()
            assert (await waiting).status == 200
            assert it.proxy.load().issued == 1

    asyncio.run(run())


def test_a_hundred_that_wait_are_given_out_as_there_is_room() -> None:
    async def run() -> None:
        async with world(concurrency=3) as it:
            waiting = [asyncio.create_task(it.client.get(f"{it.url}/{n}")) for n in range(100)]
            await it.held(100)
            assert it.woken == 1, "one that waits is enough to wake; the level is said each interval"
            place, _ = await it.serve(it.answer)
            it.proxy.replicas_changed([place])
            answers = await asyncio.gather(*waiting)
            assert {each.status for each in answers} == {200}
            assert it.busiest == 3
            assert it.proxy.counters.released == 100

    asyncio.run(run())


def test_a_replica_that_starts_late_is_found_without_a_word() -> None:
    async def run() -> None:
        async with world() as it:
            up = False

            async def starting(request: web.BaseRequest) -> web.StreamResponse:
                return await it.answer(request) if up else web.Response(status=503)

            place, _ = await it.serve(starting)
            it.proxy.replicas_changed([place])
            waiting = asyncio.create_task(it.client.get(it.url))
            await it.held(1)
            await asyncio.sleep(0.3)
            assert not waiting.done()
            up = True
            assert (await waiting).status == 200

    asyncio.run(run())


def test_too_many_and_too_long() -> None:
    async def run() -> None:
        async with world(max_held=2, deadline=0.2) as it:
            waiting = [asyncio.create_task(it.client.get(it.url)) for _ in range(2)]
            await it.held(2)
            refused = await it.client.get(it.url)
            assert (refused.status, "Retry-After" in refused.headers) == (429, True)
            late = await asyncio.gather(*waiting)
            assert [(each.status, "Retry-After" in each.headers) for each in late] == [(503, True)] * 2
            counters = it.proxy.counters
            assert (counters.refused, counters.expired, counters.released) == (1, 2, 0)
            assert it.proxy.load().in_flight == 0

    asyncio.run(run())


def test_a_client_that_is_gone_takes_no_turn() -> None:
    async def run() -> None:
        async with world(concurrency=1) as it:
            gone = asyncio.create_task(it.client.get(f"{it.url}/gone"))
            await it.held(1)
            stays = asyncio.create_task(it.client.get(f"{it.url}/stays"))
            await it.held(2)
            gone.cancel()
            while it.proxy.counters.left == 0:
                await asyncio.sleep(0.005)
            place, _ = await it.serve(it.answer)
            it.proxy.replicas_changed([place])
            assert (await stays).status == 200
            assert [path for _, path, _ in it.seen] == ["/stays"]
            assert it.proxy.load().in_flight == 0

    asyncio.run(run())


def test_a_replica_that_cannot_be_reached_is_passed_over() -> None:
    async def run() -> None:
        async with world() as it:
            dead, _ = await it.serve(it.answer)
            it.replicas.replace([dead])
            it.replicas.mark(dead, up=True)
            # Nobody listens there: the runner's socket is replaced by a port that was free a moment ago.
            nobody = ("127.0.0.1", _free_port())
            it.replicas.replace([nobody])
            it.replicas.mark(nobody, up=True)
            waiting = asyncio.create_task(it.client.post(it.url, data=b"body"))
            while it.replicas.to_probe() == []:
                await asyncio.sleep(0.005)
            it.proxy.replicas_changed([nobody, dead])
            assert (await waiting).status == 200
            assert it.seen == [("POST", "/", b"body")]

    asyncio.run(run())


def test_a_stream_comes_as_it_is_made_and_one_that_breaks_is_not_whole() -> None:
    async def run() -> None:
        async with world() as it:
            go_on = asyncio.Event()

            async def streaming(request: web.BaseRequest) -> web.StreamResponse:
                if request.path == HEALTH:
                    return web.Response()
                response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
                await response.prepare(request)
                await response.write(b"data: 1\n\n")
                await go_on.wait()
                if request.path == "/breaks":
                    assert request.transport is not None
                    request.transport.abort()
                else:
                    await response.write(b"data: 2\n\n")
                return response

            place, _ = await it.serve(streaming)
            it.proxy.replicas_changed([place])
            whole = await it.client.get(f"{it.url}/whole")
            assert await whole.content.readuntil(b"\n\n") == b"data: 1\n\n"
            broken = await it.client.get(f"{it.url}/breaks")
            assert await broken.content.readuntil(b"\n\n") == b"data: 1\n\n"
            go_on.set()
            assert await whole.content.read() == b"data: 2\n\n"
            with pytest.raises(aiohttp.ClientPayloadError):
                await broken.content.read()
            assert it.proxy.counters.broken == 1

    asyncio.run(run())


def test_headers_between_neighbours_stay_there() -> None:
    async def run() -> None:
        async with world() as it:
            headers: dict[str, str] = {}

            async def noting(request: web.BaseRequest) -> web.StreamResponse:
                headers.update(request.headers)
                return web.Response(headers={"Keep-Alive": "timeout=9", "x-kept": "yes"})

            place, _ = await it.serve(noting)
            it.proxy.replicas_changed([place])
            sent = {"Connection": "x-mine", "x-mine": "1", "traceparent": "00-a-b-01", "Host": "api.example"}
            answer = await it.client.get(it.url, headers=sent)
            assert answer.headers["x-kept"] == "yes"
            assert "Keep-Alive" not in answer.headers
            assert (headers["Host"], headers["traceparent"]) == ("api.example", "00-a-b-01")
            assert "x-mine" not in headers

    asyncio.run(run())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
