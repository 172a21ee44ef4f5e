"""HTTP for origins: connections, timeouts, bodies; urllib3's exceptions and HTTP statuses become ours.

Used by the registry client for everything and by S3 for reading. One Transport serves all threads of its
origin; an Answer belongs to one thread. Nothing here retries, follows a redirect or knows a credential:
the header it is given goes to the URL it is given, once.

Invariants: an Answer's connection goes back to the pool after the last byte of its body and is closed
otherwise; a body that stalls or trickles is a fault (UnavailableError), not a hang; query strings, which
carry the signatures of presigned URLs, appear in no message and, by a filter, in no log of urllib3.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import logging
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

import urllib3
import urllib3.exceptions

from imagefs import errors
from imagefs.origin import headers

READ_PIECE_BYTES = 256 * 1024
_MIN_BYTES_PER_SECOND = 4096
"""Below this, averaged over one read timeout, a body counts as stalled."""
_MAX_ERROR_BODY_BYTES = 16 * 1024
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})

Body = Callable[[], bytes | Iterator[bytes]]
"""Makes a request's body; called again for each time it is sent."""


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """`plain_http` allows HTTP without TLS to every host; without it, only to loopback addresses, and where a
    server points to one, only with `loopback`: it is on loopback itself. `ca_file` replaces the system's
    authorities, `extra_ca_files` are added; a client certificate is (certificate, key), or one file of both.
    `connections` is how many are kept open to one host. The read timeout is for each wait for bytes."""

    plain_http: bool = False
    loopback: bool = False
    ca_file: Path | None = None
    extra_ca_files: tuple[Path, ...] = ()
    client_certificates: tuple[tuple[Path, Path | None], ...] = ()
    skip_verify: bool = False
    connections: int = 16
    connect_timeout_seconds: float = 10.0
    read_timeout_seconds: float = 30.0


class Transport:
    """A pool of connections. Thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        if settings.ca_file and not settings.ca_file.is_file():
            raise errors.ConfigurationError(f"CA file {settings.ca_file} is not a file")
        self._lock = threading.Lock()
        self._plain = self._new_pool()
        self._tls: urllib3.PoolManager | None = None

    def base_url(self, host: str) -> str:
        """`https://HOST`, or `http://HOST` where plain HTTP was asked for, or HOST is a loopback address
        and no certificate says that TLS is spoken there."""
        settings = self._settings
        tls = settings.ca_file or settings.extra_ca_files or settings.client_certificates
        plain = settings.plain_http or (is_loopback(host) and not tls)
        return f"{'http' if plain else 'https'}://{host}"

    def check_url(self, url: str, what: str) -> None:
        """Refuse a URL that a server told us, unless it is https:, or http: where that is allowed. What
        listens on this machine's loopback is no business of a server elsewhere."""
        parts = _split(url, what)
        settings = self._settings
        allowed = parts.scheme == "https" or (
            parts.scheme == "http"
            and (settings.plain_http or (settings.loopback and is_loopback(parts.netloc)))
        )
        if not allowed or not parts.hostname or parts.username is not None:
            raise errors.ConfigurationError(
                f"{what}: the server points to {shown(url)}; only https: URLs are followed, "
                "and http: from loopback to loopback or where plain HTTP was asked for (--plain-http)"
            )

    def open(
        self,
        method: str,
        url: str,
        what: str,
        *,
        fields: Mapping[str, str] | None = None,
        body: Body | None = None,
        deadline: float | None = None,
    ) -> Answer:
        """Send one request; the Answer's body is still to be read. UnavailableError if none came."""
        settings = self._settings
        timeout = urllib3.Timeout(
            connect=_clip(settings.connect_timeout_seconds, deadline),
            read=_clip(settings.read_timeout_seconds, deadline),
        )
        sent = {"User-Agent": "glowplug", "Accept-Encoding": "identity", **(fields or {})}
        try:
            response = self._pool(url).urlopen(
                method,
                url,
                headers=sent,
                body=body() if body else None,
                redirect=False,
                preload_content=False,
                decode_content=False,
                timeout=timeout,
            )
        except (urllib3.exceptions.HTTPError, OSError) as exc:
            raise _mapped(exc, f"{what}: {shown(url)}") from exc
        # An answer to HEAD has the length of the body that it leaves out.
        empty = method == "HEAD"
        return Answer(response, url, what, settings.read_timeout_seconds, deadline, empty)

    def close(self) -> None:
        self._plain.clear()
        if self._tls is not None:
            self._tls.clear()

    def _pool(self, url: str) -> urllib3.PoolManager:
        if not url.startswith("https:"):
            return self._plain
        with self._lock:
            if self._tls is None:
                # One context for all connections, made when first needed: reading the system's
                # authorities takes longer than a plain connection.
                self._tls = self._new_pool(ssl_context=_context(self._settings))
            return self._tls

    def _new_pool(self, **options: Any) -> urllib3.PoolManager:
        # TCP_NODELAY is urllib3's own default. Hosts: the registry, its token server, its blob storage.
        size = self._settings.connections
        return urllib3.PoolManager(num_pools=8, maxsize=size, block=False, retries=False, **options)


def _context(settings: Settings) -> ssl.SSLContext:
    file: Path | None = settings.ca_file
    try:
        context = ssl.create_default_context(cafile=file)
        for file in settings.extra_ca_files:
            context.load_verify_locations(file)
        for file, key in settings.client_certificates:
            context.load_cert_chain(file, key)
    except (OSError, ValueError) as exc:
        raise errors.ConfigurationError(f"certificate file {file}: {exc}") from exc
    if settings.skip_verify:
        # The operator said so, once; urllib3 would say it again for each request.
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class Answer:
    """A status, header fields, and a body that is read once, in order. `on_fault` is told when the body
    broke off or stalled."""

    def __init__(
        self,
        response: urllib3.BaseHTTPResponse,
        url: str,
        what: str,
        read_timeout_seconds: float,
        deadline: float | None,
        empty: bool,
    ) -> None:
        self.status = response.status
        self.fields = response.headers
        self.url = url
        self.what = what
        self.on_fault: Callable[[errors.ImagefsError], None] | None = None
        self._response = response
        self._read_timeout_seconds = read_timeout_seconds
        self._deadline = deadline
        self._empty = empty
        self._window_seconds = 0.0
        self._window_bytes = 0

    def read_piece(self, limit_bytes: int) -> bytes:
        """The next bytes, at most `limit_bytes`, as they come off the socket; empty at the end."""
        started = time.monotonic()
        try:
            if self._deadline is not None:
                self._tighten(self._deadline - started)
            # Not readinto of what lies below: the copy costs 0.2 s of CPU per GB, going round urllib3's
            # accounting of the body's length would cost more. read1, so that trickling is noticed.
            piece = self._response.read1(limit_bytes, decode_content=False)
        except (urllib3.exceptions.HTTPError, OSError) as exc:
            raise self._fault(_mapped(exc, f"{self.what}: {shown(self.url)}: body")) from exc
        # Only the time spent waiting counts: a consumer that takes its time is no fault of the server's.
        self._window_seconds += time.monotonic() - started
        self._window_bytes += len(piece)
        if self._window_seconds >= self._read_timeout_seconds:
            if piece and self._window_bytes < self._window_seconds * _MIN_BYTES_PER_SECOND:
                raise self._fault(
                    errors.UnavailableError(
                        f"{self.what}: {shown(self.url)}: body: {self._window_bytes} bytes in "
                        f"{self._window_seconds:.0f} s, taken for stalled"
                    )
                )
            self._window_seconds, self._window_bytes = 0.0, 0
        return piece or b""

    def read(self, limit_bytes: int) -> bytes:
        """The rest of the body. InvalidInputError if it is larger than `limit_bytes`."""
        out = bytearray()
        while piece := self.read_piece(READ_PIECE_BYTES):
            out += piece
            if len(out) > limit_bytes:
                self.close()
                raise errors.InvalidInputError(f"{self.what}: answer is larger than {limit_bytes} bytes")
        return bytes(out)

    def discard(self) -> None:
        """Done with this answer: keep the connection if little is left of the body, else close it."""
        length = 0 if self._empty else headers.content_length(self.fields.get("Content-Length"))
        if length is None or length > _MAX_ERROR_BODY_BYTES:
            self.close()
            return
        try:
            while self.read_piece(_MAX_ERROR_BODY_BYTES):
                pass
        except errors.ImagefsError:
            self.close()

    def close(self) -> None:
        """Close the connection, unless the body was read to its end."""
        self._response.close()

    def _fault(self, error: errors.ImagefsError) -> errors.ImagefsError:
        self.close()
        if self.on_fault is not None:
            self.on_fault(error)
        return error

    def _tighten(self, left_seconds: float) -> None:
        """Wait for the next bytes no longer than the deadline allows."""
        if left_seconds <= 0:
            raise urllib3.exceptions.TimeoutError("deadline passed")
        connection = self._response.connection
        socket = getattr(connection, "sock", None)  # None once the server announced Connection: close
        if socket is not None:
            socket.settimeout(min(self._read_timeout_seconds, max(left_seconds, 0.01)))


def status_error(answer: Answer) -> errors.ImagefsError:
    """The error that a status stands for; reads the rest of the answer. The server's own words stay out
    of the message, but for an OCI error code: they could repeat what we sent."""
    code = _oci_error_code(answer)
    said = f"HTTP {answer.status}{f' {code}' if code else ''}"
    text = f"{answer.what}: {shown(answer.url)}: {said}"
    status = answer.status
    if status in (401, 403, 407):
        return errors.DeniedError(f"{text}: access denied")
    if status in (404, 410):
        return errors.NotFoundError(f"{text}: not found")
    if status == 416:
        return errors.IntegrityError(f"{text}: the blob ends before the range that was asked for")
    if status in _TRANSIENT:
        wish = headers.retry_after_seconds(answer.fields.get("Retry-After"), time.time())
        return errors.UnavailableError(text, wish)
    if code in ("DIGEST_INVALID", "SIZE_INVALID"):
        return errors.IntegrityError(f"{text}: the registry received other bytes than announced")
    return errors.InvalidInputError(f"{text}: unexpected answer")


def is_loopback(host: str) -> bool:
    """Whether HOST[:PORT] is this machine by its name alone: 127.0.0.0/8, [::1] or localhost."""
    name = urlsplit(f"//{host}").hostname or ""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def join(base: str, target: str, what: str) -> str:
    """The URL that a server's Location or Link means. UnavailableError if it is none."""
    try:
        return urljoin(base, target)
    except ValueError as exc:
        raise errors.UnavailableError(f"{what}: the server points to what is no URL: {exc}") from exc


def _split(url: str, what: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError as exc:
        raise errors.UnavailableError(f"{what}: the server points to what is no URL: {exc}") from exc


def shown(url: str) -> str:
    """A URL for messages: host and path, without user and query."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(no URL)"
    netloc = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{netloc}{parts.path}"[:512]


def _clip(seconds: float, deadline: float | None) -> float:
    return seconds if deadline is None else max(0.01, min(seconds, deadline - time.monotonic()))


def _mapped(exc: Exception, text: str) -> errors.ImagefsError:
    """Our error for one of urllib3's or the system's; only UnavailableError is worth another attempt."""
    if isinstance(exc, urllib3.exceptions.SSLError):
        if "CERTIFICATE_VERIFY_FAILED" in str(exc):
            return errors.ConfigurationError(
                f"{text}: its certificate is not trusted: {exc}; name the authority's certificate "
                "(--ca-file, registries.ca_file of the agent)"
            )
        if "WRONG_VERSION_NUMBER" in str(exc) or "RECORD_LAYER_FAILURE" in str(exc):
            return errors.ConfigurationError(
                f"{text}: the server speaks no TLS; allow plain HTTP if that is meant "
                "(--plain-http, registries.plain_http of the agent)"
            )
        return errors.UnavailableError(f"{text}: TLS failed: {exc}")
    if isinstance(exc, urllib3.exceptions.NewConnectionError):
        # Without its connection, which `text` names.
        return errors.UnavailableError(f"{text}: cannot connect: {str(exc).removeprefix(f'{exc.conn}: ')}")
    if isinstance(exc, urllib3.exceptions.TimeoutError):
        return errors.UnavailableError(f"{text}: timed out")
    return errors.UnavailableError(f"{text}: {type(exc).__name__}: {exc}")


def _oci_error_code(answer: Answer) -> str:
    try:
        document = json.loads(answer.read(_MAX_ERROR_BODY_BYTES))
        code = document["errors"][0]["code"]
    except (errors.ImagefsError, ValueError, LookupError, TypeError, RecursionError):
        answer.close()
        return ""
    return code if isinstance(code, str) and re.fullmatch(r"[A-Z_]{1,40}", code) else ""


class _WithoutQueries(logging.Filter):
    """Takes the query strings out of what urllib3 logs."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(arg.partition("?")[0] if isinstance(arg, str) else arg for arg in record.args)
        return True


logging.getLogger("urllib3.connectionpool").addFilter(_WithoutQueries())
