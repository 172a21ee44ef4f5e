"""A collection of the Kubernetes API, listed and then watched. Nothing here knows what an object is.

Called by `sources`; runs in its loop. While the API server is away the last state stands; a watch that is
told 410 Gone, or whose server does not know the version any more, is begun again from a list, and what has
gone meanwhile is found missing there.

Invariants: the token is read again for each request, and goes to the API server only, over TLS or loopback;
answers and lines are bounded.

Spec: Kubernetes API concepts: resourceVersion, `limit` and `continue`, watch, bookmarks, 410 Gone.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from serving import errors

_log = logging.getLogger(__name__)

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_WATCH_SECONDS = 240
_SILENCE_SECONDS = 300.0
_LIST_SECONDS = 30.0
_PAGE_OBJECTS = 500
_MAX_LINE_BYTES = 4 << 20
_FIRST_DELAY_SECONDS, _MAX_DELAY_SECONDS = 0.2, 30.0

Object = Mapping[str, Any]
Key = tuple[str, str]
"""Namespace and name."""


class GoneError(errors.UnavailableError):
    """The version that was watched from is too old: list again."""


class Api:
    """One API server. `url`, `ca` and `token` (files): None for what a pod is given."""

    def __init__(self, url: str | None, ca: Path | None, token: Path | None) -> None:
        if url is None:
            host = os.environ.get("KUBERNETES_SERVICE_HOST")
            port = os.environ.get("KUBERNETES_SERVICE_PORT", "443")
            if host is None:
                raise errors.ConfigurationError("kubernetes.url: this is no pod; name the API server's URL")
            url = f"https://{f'[{host}]' if ':' in host else host}:{port}"
            ca, token = ca or _SERVICE_ACCOUNT / "ca.crt", token or _SERVICE_ACCOUNT / "token"
        parts = urlsplit(url)
        if parts.scheme != "https" and parts.hostname not in ("127.0.0.1", "::1", "localhost"):
            raise errors.ConfigurationError(f"kubernetes.url: {url} is not an https: URL")
        self._url = url.rstrip("/")
        self._token = token
        try:
            self._tls = ssl.create_default_context(cafile=ca)
        except (OSError, ssl.SSLError) as exc:
            raise errors.ConfigurationError(f"kubernetes.ca: {ca}: {exc}") from exc

    async def follow(self, path: str, selector: str, changed: Callable[[Mapping[Key, Object]], None]) -> None:
        """Call `changed` with the whole collection, at first and whenever it changes. Runs until
        cancelled."""
        delay = _FIRST_DELAY_SECONDS
        async with aiohttp.ClientSession(read_bufsize=_MAX_LINE_BYTES) as session:
            while True:
                try:
                    objects, version = await self._list(session, path, selector)
                    changed(objects)
                    delay = _FIRST_DELAY_SECONDS
                    await self._watch(session, path, selector, objects, version, changed)
                except GoneError:
                    continue
                except errors.UnavailableError as exc:
                    _log.warning("%s; again in %.1f s", exc, delay)
                    await asyncio.sleep(delay)
                    delay = min(_MAX_DELAY_SECONDS, 2 * delay)

    async def _list(
        self, session: aiohttp.ClientSession, path: str, selector: str
    ) -> tuple[dict[Key, Object], str]:
        objects: dict[Key, Object] = {}
        query = {"labelSelector": selector, "limit": str(_PAGE_OBJECTS)}
        timeout = aiohttp.ClientTimeout(total=_LIST_SECONDS)
        while True:
            try:
                async with self._get(session, path, query, timeout) as answer:
                    self._require(answer, path)
                    page = await answer.json(content_type=None)
            except (aiohttp.ClientError, TimeoutError, ValueError, OSError) as exc:
                raise errors.UnavailableError(f"Kubernetes API: list {path}: {exc!r}") from exc
            try:
                metadata = page["metadata"]
                objects |= {_key(item): item for item in page.get("items") or []}
                if not metadata.get("continue"):
                    return objects, str(metadata["resourceVersion"])
            except (KeyError, TypeError, AttributeError) as exc:
                raise errors.UnavailableError(f"Kubernetes API: list {path}: not a list: {exc!r}") from exc
            query["continue"] = metadata["continue"]

    async def _watch(
        self,
        session: aiohttp.ClientSession,
        path: str,
        selector: str,
        objects: dict[Key, Object],
        version: str,
        changed: Callable[[Mapping[Key, Object]], None],
    ) -> None:
        """Returns never; raises GoneError, or UnavailableError where the version may no longer do."""
        timeout = aiohttp.ClientTimeout(total=None, sock_read=_SILENCE_SECONDS)
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            query = {
                "labelSelector": selector,
                "watch": "true",
                "resourceVersion": version,
                "allowWatchBookmarks": "true",
                "timeoutSeconds": str(_WATCH_SECONDS),
            }
            try:
                async with self._get(session, path, query, timeout) as answer:
                    self._require(answer, path)
                    async for line in answer.content:
                        version = _apply(line, objects)
                        changed(objects)
            except (aiohttp.ClientError, TimeoutError, ValueError, OSError) as exc:
                raise errors.UnavailableError(f"Kubernetes API: watch {path}: {exc!r}") from exc
            # A server that ends watches at once is asked a few times a second, not thousands.
            await asyncio.sleep(max(0.0, _FIRST_DELAY_SECONDS - (loop.time() - began)))

    def _get(
        self,
        session: aiohttp.ClientSession,
        path: str,
        query: Mapping[str, str],
        timeout: aiohttp.ClientTimeout,
    ) -> Any:
        headers = {}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token.read_text().strip()}"
        return session.get(
            self._url + path,
            params=query,
            headers=headers,
            ssl=self._tls,
            timeout=timeout,
            allow_redirects=False,
        )

    @staticmethod
    def _require(answer: aiohttp.ClientResponse, path: str) -> None:
        if answer.status == 410:
            raise GoneError(f"Kubernetes API: {path}: 410 Gone")
        if answer.status != 200:
            raise errors.UnavailableError(
                f"Kubernetes API: {path}: {answer.status}"
                + ("; may the service account list and watch it?" if answer.status in (401, 403) else "")
            )


def _apply(line: bytes, objects: dict[Key, Object]) -> str:
    """One line of a watch; the version that it brings. GoneError, ValueError."""
    try:
        change = json.loads(line)
        kind, item = change["type"], change["object"]
        if kind == "ERROR":
            if item.get("code") == 410:
                raise GoneError("Kubernetes API: 410 Gone")
            raise ValueError(f"the API server ends the watch: {item.get('message')}")
        version = str(item["metadata"]["resourceVersion"])
        if kind == "DELETED":
            objects.pop(_key(item), None)
        elif kind != "BOOKMARK":
            objects[_key(item)] = item
    except (KeyError, TypeError, AttributeError) as exc:
        raise ValueError(f"a line of the watch makes no sense: {exc!r}") from exc
    return version


def _key(item: Object) -> Key:
    return str(item["metadata"].get("namespace", "")), str(item["metadata"]["name"])
