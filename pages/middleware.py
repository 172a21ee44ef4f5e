"""`guard` as aiohttp's middleware."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import Any

from aiohttp import web

from pages import guard

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


def own_host(names: Collection[str]) -> Any:
    """421 for those who ask for this host by a name that is not its own."""

    @web.middleware
    async def guarded(request: web.Request, handler: Answer) -> web.StreamResponse:
        if not guard.is_this_host(request.headers.get("Host", ""), names):
            raise web.HTTPMisdirectedRequest(reason=guard.REFUSAL)
        return await handler(request)

    return guarded
