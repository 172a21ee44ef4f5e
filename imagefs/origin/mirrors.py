"""The places that a repository is read from: its registry, and the mirrors that containerd was told of.

Used by RegistryOrigin, from any thread. `Places.first` asks the places in order, mirrors first, and takes the
first answer; the registry itself has the last word on what does not exist, and is the only place written to.
A mirror that failed is passed over for DOWN_SECONDS, and is then the last resort behind the registry, so that
neither a dead mirror nor a dead registry stops what the other can still give. Nothing that a mirror sends is
believed more than what the registry sends: digests are checked by the same callers.

Credentials are looked up by each place's own host: those of the registry never go to a mirror.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, urlsplit

from imagefs import errors
from imagefs.origin import auth, credentials, hosts, retry, session, transport

_log = logging.getLogger(__name__)

T = TypeVar("T")

DOWN_SECONDS = 30.0
LOOK_SECONDS = 5.0
"""How often the files are looked at, while something is read."""


class Place:
    """One host as one repository is read from it. Thread-safe: its state is one number."""

    def __init__(
        self, host: hosts.Host, registry: str, repository: str, settings: transport.Settings, make: Sources
    ) -> None:
        self.is_server = False
        self.capabilities = host.capabilities
        self.has_referrers_api = True
        self.http = transport.Transport(_settings(host, registry, settings))
        url = host.url or hosts.default_server(registry) or self.http.base_url(registry)
        self.host = registry if host.url is None else urlsplit(host.url).netloc
        # What a mirror's token server calls the repository: a path before it is part of its name there.
        self.repository = "/".join(p for p in (host.path.removeprefix("/v2").strip("/"), repository) if p)
        authenticator = auth.Authenticator(make.source(self.host, self.repository), self.http, make.policy)
        self.session = session.Session(url, self.http, authenticator, host.fields)
        self._prefix = f"{host.path}/{repository}"
        # As containerd asks: a mirror of several registries learns which one is meant.
        self._query = "" if host.url is None or self.host == registry else f"?ns={quote(registry)}"
        self._down_until = 0.0

    @property
    def pull(self) -> frozenset[str]:
        """The scope to read with."""
        return frozenset({f"repository:{self.repository}:pull"})

    @property
    def push(self) -> frozenset[str]:
        """The scope to write with."""
        return frozenset({f"repository:{self.repository}:pull,push"})

    def url(self, kind: str, name: str) -> str:
        """Where a manifest, a blob or a list of referrers is read."""
        return f"{self.session.base_url}{self._prefix}/{kind}/{quote(name, safe=':')}{self._query}"

    def write_url(self, rest: str) -> str:
        """Where below the repository something is written, or asked for because it is to be written."""
        return f"{self.session.base_url}{self._prefix}/{rest}"

    def is_up(self) -> bool:
        return self.is_server or time.monotonic() >= self._down_until

    def failed(self, why: errors.ImagefsError) -> None:
        """Pass this place over for a while, if it is a mirror."""
        if self.is_server:
            return
        if self.is_up():
            _log.warning("mirror %s is passed over for %.0f s: %s", self.host, DOWN_SECONDS, why)
        self._down_until = time.monotonic() + DOWN_SECONDS


@dataclasses.dataclass(frozen=True, slots=True)
class Sources:
    """How each place gets its credentials."""

    source: Callable[[str, str], credentials.Source]
    policy: retry.Policy


class Places:
    """All places of one repository. Thread-safe."""

    def __init__(self, mirrors: list[Place], server: Place) -> None:
        self._mirrors = mirrors
        self.server = server
        server.is_server = True

    def first(
        self,
        capability: hosts.Capability,
        what: str,
        attempt: Callable[[Place, float | None], T],
        deadline: float | None = None,
    ) -> T:
        """What `attempt(place, deadline)` gives at the first place where it raises nothing.

        NotFoundError at a mirror leads to the next place; the registry's own is final. If no place helps, the
        registry's error is raised, or that of the last place where the registry is not to be read from.
        """
        able = [place for place in self._ordered() if capability in place.capabilities]
        if not able:
            raise errors.ConfigurationError(f"{what}: {hosts.FILE_NAME} leaves no host that may {capability}")
        failure: errors.ImagefsError | None = None
        for place in able:
            try:
                return attempt(place, deadline if place is able[-1] else _half(deadline))
            except errors.NotFoundError as exc:
                if place.is_server:
                    raise
                failure = failure or exc
            except errors.ImagefsError as exc:
                place.failed(exc)
                if place.is_server or failure is None or isinstance(failure, errors.NotFoundError):
                    failure = exc
        assert failure is not None
        raise failure

    def doubt(self, why: errors.IntegrityError) -> bool:
        """Somebody sent wrong bytes: whether it may have been a mirror. None is asked first for a while."""
        suspects = [mirror for mirror in self._mirrors if mirror.is_up()]
        for mirror in suspects:
            mirror.failed(why)
        return bool(suspects)

    def close(self) -> None:
        for place in (*self._mirrors, self.server):
            place.http.close()

    def _ordered(self) -> list[Place]:
        up = [mirror for mirror in self._mirrors if mirror.is_up()]
        return [*up, self.server, *(mirror for mirror in self._mirrors if mirror not in up)]


def load(directory: Path | None, registry: str) -> hosts.Hosts:
    """What containerd's `directory` says about a registry. ConfigurationError if it cannot be understood."""
    if directory is None:
        return hosts.Hosts()
    for name in hosts.folder_names(registry):
        folder = directory / name
        try:
            if not folder.is_dir():
                continue
            file = folder / hosts.FILE_NAME
            if not file.exists():
                return hosts.from_certificates([entry.name for entry in folder.iterdir()], folder)
            with file.open("rb") as stream:
                data = stream.read(hosts.MAX_FILE_BYTES + 1)
            if len(data) > hosts.MAX_FILE_BYTES:
                raise errors.ConfigurationError(f"{file} is larger than {hosts.MAX_FILE_BYTES} bytes")
            return hosts.parse(data.decode(), folder)
        except (OSError, UnicodeDecodeError, errors.InvalidInputError) as exc:
            raise errors.ConfigurationError(f"mirrors of {registry}: {exc}") from exc
    return hosts.Hosts()


class Configured:
    """The places as containerd's files have them: read again when they changed, as containerd does for each
    pull. Layers stay attached for months. Thread-safe."""

    def __init__(
        self,
        directory: Path | None,
        registry: str,
        repository: str,
        settings: transport.Settings,
        sources: Sources,
    ) -> None:
        """Opens no connection. ConfigurationError for files that cannot be understood."""
        self._directory = directory
        self._registry = registry
        self._repository = repository
        self._settings = settings
        self._sources = sources
        self._lock = threading.Lock()
        self._stamp = _stamp(directory, registry)
        self._look_at = time.monotonic() + LOOK_SECONDS
        self._places = self._made()

    def current(self) -> Places:
        if self._directory is None or time.monotonic() < self._look_at:
            return self._places
        with self._lock:
            self._look_at = time.monotonic() + LOOK_SECONDS
            stamp = _stamp(self._directory, self._registry)
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self._places = self._made()
                except errors.ConfigurationError as exc:
                    _log.warning("%s; going on with what it said before", exc)
            return self._places

    def _made(self) -> Places:
        found = load(self._directory, self._registry)
        mirrors = [self._place(host) for host in found.mirrors]
        return Places(mirrors, self._place(found.server))

    def _place(self, host: hosts.Host) -> Place:
        return Place(host, self._registry, self._repository, self._settings, self._sources)


def _stamp(directory: Path | None, registry: str) -> tuple[tuple[int, int, int] | None, ...]:
    """What changes when a registry's folders or files do."""
    if directory is None:
        return ()
    folders = [directory / name for name in hosts.folder_names(registry)]
    out: list[tuple[int, int, int] | None] = []
    for path in (*folders, *(folder / hosts.FILE_NAME for folder in folders)):
        try:
            status = path.stat()
        except OSError:
            out.append(None)
        else:
            out.append((status.st_mtime_ns, status.st_ino, status.st_size))
    return tuple(out)


def _settings(host: hosts.Host, registry: str, settings: transport.Settings) -> transport.Settings:
    address = registry if host.url is None else urlsplit(host.url).netloc
    return dataclasses.replace(
        settings,
        plain_http=settings.plain_http or (host.url or "").startswith("http://"),
        loopback=transport.is_loopback(address),
        extra_ca_files=tuple(Path(file) for file in host.ca_files),
        client_certificates=tuple(
            (Path(certificate), Path(key) if key else None) for certificate, key in host.client_certificates
        ),
        skip_verify=host.skip_verify,
        connect_timeout_seconds=host.dial_timeout_seconds or settings.connect_timeout_seconds,
    )


def _half(deadline: float | None) -> float | None:
    """A mirror may use half of the time that is left: the next place needs some, too."""
    if deadline is None:
        return None
    now = time.monotonic()
    return now + max(0.0, deadline - now) / 2
