"""The control socket's routes on a port, for a pod's engine, for whoever has the token.

Made by `front`, on the supervisor's event loop. The token is read from its file for each request, because a
Secret is rotated in place; without a readable token nobody is let in. Drain is not here: kubelet's signal is.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from aiohttp import web

_MAX_TOKEN_BYTES = 4_096
_MAX_BODY_BYTES = 1 << 20
"""As on the control socket: the rations of as many tenants as a budget has places for."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def application(
    token_file: Path, questions: Mapping[str, Handler], orders: Mapping[str, Handler]
) -> web.Application:
    """What is served on the control port: GET and POST, by path."""

    @web.middleware
    async def only_with_token(request: web.Request, handler: Handler) -> web.StreamResponse:
        token = _read(token_file)
        given = request.headers.get("Authorization", "").encode("utf-8", "replace")
        if token is None or not hmac.compare_digest(given, b"Bearer " + token):
            return web.json_response({"error": "the token is missing or wrong"}, status=401)
        return await handler(request)

    inside = web.Application(client_max_size=_MAX_BODY_BYTES, middlewares=[only_with_token])
    for path, handler in questions.items():
        inside.router.add_get(path, handler)
    for path, handler in orders.items():
        inside.router.add_post(path, handler)
    return inside


def _read(file: Path) -> bytes | None:
    try:
        with file.open("rb") as opened:
            return opened.read(_MAX_TOKEN_BYTES).strip() or None
    except OSError:
        return None
