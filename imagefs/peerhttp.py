"""HTTP to peers: connections that are kept, one block per request, nothing believed.

Called by the threads of `peers.py`; a Connections is for all of them, a Body for one. Here foreign exceptions
become ours, and what an answer means is decided by who is at fault:

* peerhealth.RefusedError: the peer is well, and does not give this block (HTTP 403, 404, 429, 503 and more).
* UnavailableError: the peer cannot be reached, broke off, hung, or does not let us in (401).
* IntegrityError: the answer cannot be the block: no length, another length, an encoding.

No body is read past the block's own length, no wait lasts past the deadline that the caller gave, no redirect
is followed. The cluster's secret goes to members only, and into no message.
"""

from __future__ import annotations

import collections
import contextlib
import http.client
import ssl
import threading
import time

from imagefs import errors, peerhealth, peersettings
from imagefs.peersettings import PeerSettings

PROBE_TARGET = "/peer/v1/health"
_IDLE_PER_PEER = 8
_MAX_TOKEN_BYTES = 4096
_LEAST_WAIT_SECONDS = 0.01
_REFUSALS = frozenset({400, 403, 404, 409, 429, 500, 502, 503, 504})


class Connections:
    """Keep-alive connections by peer."""

    def __init__(self, settings: PeerSettings) -> None:
        self._settings = settings
        self._context = _tls_context(settings)
        self._fields = {"Accept-Encoding": "identity", "User-Agent": "glowplug"}
        if settings.token_file is not None:
            self._fields["Authorization"] = f"Bearer {_read_token(settings)}"
        self._lock = threading.Lock()
        self._idle: dict[str, collections.deque[http.client.HTTPConnection]] = {}
        self._closed = False

    def open(self, peer: str, target: str, length: int, deadline: float) -> Body:
        """Ask for `length` bytes. Returns once the peer began to answer with just these."""
        connection, response = self._get(peer, target, deadline)
        if response.status == 200 and response.getheader("Content-Encoding", "identity") == "identity":
            if response.length == length:
                return Body(self, peer, connection, response, deadline)
            connection.close()
            raise errors.IntegrityError(f"peer {peer}: sends {response.length} bytes for a block of {length}")
        connection.close()
        raise _status_error(peer, response)

    def probe(self, peer: str, deadline: float) -> bool:
        """Whether the peer answers, and lets us in."""
        try:
            connection, response = self._get(peer, PROBE_TARGET, deadline)
        except errors.ImagefsError:
            return False
        connection.close()
        return 200 <= response.status < 300

    def close(self) -> None:
        """Drop what is idle; what is in use is dropped when it comes back."""
        with self._lock:
            self._closed = True
            idle = [connection for kept in self._idle.values() for connection in kept]
            self._idle.clear()
        for connection in idle:
            connection.close()

    def keep(self, peer: str, connection: http.client.HTTPConnection) -> None:
        """A connection whose answer was read to its end."""
        with self._lock:
            kept = self._idle.setdefault(peer, collections.deque())
            if not self._closed and len(kept) < _IDLE_PER_PEER:
                kept.append(connection)
                return
        connection.close()

    # -- inside ------------------------------------------------------------------------------------

    def _get(
        self, peer: str, target: str, deadline: float
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        with self._lock:
            kept = self._idle.get(peer)
            connection = kept.pop() if kept else None
        if connection is not None:
            # The peer may have closed it meanwhile: that says nothing about the peer.
            with contextlib.suppress(OSError, http.client.HTTPException):
                return connection, self._ask(connection, target, deadline)
            connection.close()
            if time.monotonic() >= deadline:
                raise errors.UnavailableError(f"peer {peer}: did not answer in time")
        connection = self._new(peer)
        try:
            connection.connect()
            return connection, self._ask(connection, target, deadline)
        except TimeoutError as exc:
            connection.close()
            raise errors.UnavailableError(f"peer {peer}: did not answer in time") from exc
        except (OSError, http.client.HTTPException) as exc:
            connection.close()
            raise errors.UnavailableError(f"peer {peer}: {type(exc).__name__}: {exc}") from exc

    def _ask(
        self, connection: http.client.HTTPConnection, target: str, deadline: float
    ) -> http.client.HTTPResponse:
        wait_until(connection, deadline)
        connection.request("GET", target, headers=self._fields)
        return connection.getresponse()

    def _new(self, peer: str) -> http.client.HTTPConnection:
        host, port = peersettings.split_address(peer)
        timeout = self._settings.connect_timeout_seconds
        if self._context is not None:
            return http.client.HTTPSConnection(host, port, timeout=timeout, context=self._context)
        return http.client.HTTPConnection(host, port, timeout=timeout)


class Body:
    """The bytes of one answer, in order; exactly as many as were asked for. Closed by who opened it."""

    def __init__(
        self,
        connections: Connections,
        peer: str,
        connection: http.client.HTTPConnection,
        response: http.client.HTTPResponse,
        deadline: float,
    ) -> None:
        self._connections = connections
        self._peer = peer
        self._connection = connection
        self._response = response
        self._deadline = deadline

    def read_piece(self, limit_bytes: int) -> bytes:
        """The next bytes, at most `limit_bytes`, never none. UnavailableError where the peer breaks off or
        the deadline passes."""
        try:
            wait_until(self._connection, self._deadline)
            piece = self._response.read1(limit_bytes)
        except (OSError, http.client.HTTPException) as exc:
            raise errors.UnavailableError(f"peer {self._peer}: body: {type(exc).__name__}: {exc}") from exc
        if not piece:
            raise errors.UnavailableError(f"peer {self._peer}: broke off in the middle of a block")
        return piece

    def close(self) -> None:
        """Keep the connection if the body was read to its end and the peer wants to."""
        response, connection = self._response, self._connection
        if response.length == 0 and not response.will_close and connection.sock is not None:
            response.read()  # nothing is left; it lets go of the connection
            self._connections.keep(self._peer, connection)
        else:
            connection.close()


def wait_until(connection: http.client.HTTPConnection, deadline: float) -> None:
    """Have the next wait on the connection's socket end at the deadline."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the deadline passed")
    if connection.sock is not None:
        connection.sock.settimeout(max(left, _LEAST_WAIT_SECONDS))


def _status_error(peer: str, response: http.client.HTTPResponse) -> errors.ImagefsError:
    status = response.status
    if status == 401:
        return errors.UnavailableError(
            f"peer {peer}: does not take our token (HTTP 401): is it the same on all nodes?"
        )
    if status in _REFUSALS:
        return peerhealth.RefusedError(f"peer {peer}: HTTP {status}", whole_layer=status in (403, 404))
    return errors.UnavailableError(f"peer {peer}: unexpected answer, HTTP {status}")


def _read_token(settings: PeerSettings) -> str:
    assert settings.token_file is not None
    try:
        with settings.token_file.open("rb") as file:
            first = file.read(_MAX_TOKEN_BYTES).splitlines()[0].strip().decode("ascii")
    except (OSError, IndexError, UnicodeDecodeError) as exc:
        raise errors.ConfigurationError(f"cannot read the peers' token from {settings.token_file}") from exc
    if not first.isprintable() or " " in first or not first:
        raise errors.ConfigurationError(f"{settings.token_file}: the first line is no token")
    return first


def _tls_context(settings: PeerSettings) -> ssl.SSLContext | None:
    if settings.tls_ca is None:
        return None
    try:
        # The authority is the cluster's own: whoever it vouches for is a peer, whatever address it has. A
        # peer that stands in for another gains nothing by it, as every block is verified.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(settings.tls_ca)
        if settings.tls_certificate is not None:
            context.load_cert_chain(settings.tls_certificate, settings.tls_key)
    except (OSError, ValueError) as exc:
        raise errors.ConfigurationError(f"peers' TLS files ({settings.tls_ca} ...): {exc}") from exc
    return context
