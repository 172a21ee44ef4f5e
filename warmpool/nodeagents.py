"""Asks the agents of many nodes at once what they have cached, and has them fetch and pin.

The agents' API for members of the cluster: HTTP on the port for peers, with the cluster's token, a
certificate of its authority, or both. Called by the controller's thread; each node is asked in a thread of a
pool, a connection for each, so that one that hangs costs one timeout.

Invariants: answers are bounded and each field is checked before it is believed; the token is read again for
each round, goes to nodes that the provider named only, and into no message.
"""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import ssl
import urllib.parse
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from warmpool import errors, warmth
from warmpool.settings import Agents
from warmpool.warmth import Cached, Reading, Task, Verb

_AT_ONCE = 16
_MAX_ANSWER_BYTES = 1 << 20
_MAX_TOKEN_BYTES = 4_096


class NodeAgents:
    """See the module. ConfigurationError where the files that are named cannot be read."""

    def __init__(self, settings: Agents) -> None:
        self._settings = settings
        self._context = _context(settings)
        self._token()
        self._pool = concurrent.futures.ThreadPoolExecutor(_AT_ONCE, "agents")

    def read(
        self, nodes: Mapping[str, str | None], images: Mapping[str, Collection[str]]
    ) -> dict[str, Reading]:
        """What the agents of `nodes` (name: address) say of their `images`."""
        asked = {
            name: self._pool.submit(self._read, address, sorted(images.get(name, ())))
            for name, address in nodes.items()
        }
        return {name: future.result() for name, future in asked.items()}

    def do(self, nodes: Mapping[str, str | None], tasks: Mapping[str, Sequence[Task]]) -> dict[str, str]:
        """Have each node do its tasks, in order; the first error of each node that has one."""
        asked = {
            name: self._pool.submit(self._do, nodes[name], several)
            for name, several in tasks.items()
            if several
        }
        return {name: said for name, future in asked.items() if (said := future.result())}

    def close(self) -> None:
        """Wait for nobody."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    # -- in a thread of the pool -------------------------------------------------------------------

    def _read(self, address: str | None, images: Sequence[str]) -> Reading:
        if address is None:
            return Reading(error="its address is not known")
        try:
            connection = self._connect(address)
            try:
                if not images:  # being there is all that is asked
                    self._ask(connection, address, "GET", "/peer/v1/health", None)
                return Reading({image: self._cached(connection, address, image) for image in images})
            finally:
                connection.close()
        except errors.WarmPoolError as exc:
            return Reading(error=str(exc))

    def _do(self, address: str | None, tasks: Sequence[Task]) -> str:
        if address is None:
            return "its address is not known"
        first = ""
        try:
            connection = self._connect(address)
            try:
                for task in tasks:
                    first = first or self._task(connection, address, task)
            finally:
                connection.close()
        except errors.WarmPoolError as exc:
            return str(exc)
        return first

    def _cached(self, connection: http.client.HTTPConnection, address: str, image: str) -> Cached | None:
        path = f"/api/v1/warm?{urllib.parse.urlencode({'image': image})}"
        status, document = self._ask(connection, address, "GET", path, None)
        if status == 404:
            return None
        if status != 200:
            raise errors.UnavailableError(f"the agent at {address}: HTTP {status}: {_message(document)}")
        return warmth.parse(document, f"the agent at {address}, {image}")

    def _task(self, connection: http.client.HTTPConnection, address: str, task: Task) -> str:
        """What went wrong, "" if nothing did. An image that cannot be had does not hold up the others."""
        body = json.dumps({"image": task.image}).encode()
        status, document = self._ask(connection, address, "POST", f"/api/v1/{task.verb.value}", body)
        gone = task.verb is Verb.UNPIN and status == 404
        return "" if status == 200 or gone else f"{task.verb.value} {task.image}: {_message(document)}"

    def _ask(
        self, connection: http.client.HTTPConnection, address: str, method: str, path: str, body: bytes | None
    ) -> tuple[int, Any]:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        token = self._token()
        if token:
            headers["Authorization"] = f"Bearer {token}"
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            data = answer.read(_MAX_ANSWER_BYTES)
            if answer.read(1):
                raise errors.InvalidInputError(
                    f"the agent at {address}: an answer of over {_MAX_ANSWER_BYTES} bytes"
                )
        except (OSError, http.client.HTTPException) as exc:
            raise errors.UnavailableError(f"the agent at {address}: {exc or type(exc).__name__}") from exc
        if answer.status == 401:
            raise errors.ConfigurationError(
                f"warmth.agents.token_file: the agent at {address} does not take our token: it must be the "
                "cluster's"
            )
        try:
            return answer.status, json.loads(data) if data else None
        except (ValueError, RecursionError) as exc:
            raise errors.InvalidInputError(
                f"the agent at {address}: HTTP {answer.status} and no JSON"
            ) from exc

    def _connect(self, address: str) -> http.client.HTTPConnection:
        port, timeout = self._settings.port, self._settings.timeout_seconds
        if self._context is not None:
            return http.client.HTTPSConnection(address, port, timeout=timeout, context=self._context)
        return http.client.HTTPConnection(address, port, timeout=timeout)

    def _token(self) -> str:
        if self._settings.token_file is None:
            return ""
        try:
            with Path(self._settings.token_file).open("rb") as file:
                first = file.read(_MAX_TOKEN_BYTES).splitlines()[0].strip().decode("ascii")
        except (OSError, IndexError, UnicodeDecodeError) as exc:
            raise errors.ConfigurationError(
                f"warmth.agents.token_file: cannot read a token from {self._settings.token_file}"
            ) from exc
        if not first or not first.isprintable() or " " in first:
            raise errors.ConfigurationError(
                f"warmth.agents.token_file: {self._settings.token_file}: no token there"
            )
        return first


def _context(settings: Agents) -> ssl.SSLContext | None:
    if settings.tls_ca is None:
        return None
    try:
        # The authority is the cluster's own: whoever it vouches for is a node, whatever address it has.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(settings.tls_ca)
        if settings.tls_certificate is not None:
            context.load_cert_chain(settings.tls_certificate, settings.tls_key)
    except (OSError, ValueError) as exc:
        raise errors.ConfigurationError(f"warmth.agents.tls_ca ...: {settings.tls_ca}: {exc}") from exc
    return context


def _message(document: object) -> str:
    said = document.get("message") if isinstance(document, Mapping) else None
    return "".join(c if c.isprintable() else " " for c in str(said or "no reason said")[:300])
