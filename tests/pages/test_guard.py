"""Who is answered: those who ask for this host by an address, or by a name of its own."""

from __future__ import annotations

import asyncio
import socket
import urllib.error
import urllib.request

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from pages import guard, middleware
from pages.loopthread import LoopThread

NAMES = guard.own_names(["Node-7.example"])


@pytest.mark.parametrize(
    "header",
    [
        *("localhost", "LOCALHOST:80", "127.0.0.1", "127.0.0.1:7310", "[::1]", "[fe80::1]:80", "10.9.8.7:1"),
        *("node-7.example", "NODE-7.example:7310", socket.gethostname()),
    ],
)
def test_this_host(header: str) -> None:
    assert guard.is_this_host(header, NAMES)


@pytest.mark.parametrize(
    "header",
    ["", "evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "[::1", "u@evil", ":80"],
)
def test_another(header: str) -> None:
    assert not guard.is_this_host(header, NAMES)


@given(st.text(max_size=40))
def test_any_header_is_answered(header: str) -> None:
    guard.is_this_host(header, NAMES)


def test_the_middleware_on_a_loop_of_its_own() -> None:
    async def open_() -> tuple[web.AppRunner, int]:
        async def page(request: web.Request) -> web.StreamResponse:
            return web.Response(text="seen")

        application = web.Application(middlewares=[middleware.own_host(NAMES)])
        application.router.add_get("/", page)
        runner = web.AppRunner(application)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner, int(runner.addresses[0][1])

    thread = LoopThread("pages")
    assert not thread.running
    thread.start()
    runner, port = thread.run(open_())

    def ask(host: str) -> int:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/", headers={"Host": host})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as exc:
            return exc.code

    assert ask(f"localhost:{port}") == 200
    assert ask("evil.example") == 421
    thread.run(runner.cleanup())
    thread.stop()
    assert not thread.running


def test_what_goes_wrong_on_the_loop_is_raised_here() -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise OSError("no port")

    thread = LoopThread("failing")
    thread.start()
    try:
        with pytest.raises(OSError, match="no port"):
            thread.run(fail())
    finally:
        thread.stop()
