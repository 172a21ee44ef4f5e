"""Who the agents of the cluster are, and telling the device server.

Owned by `peers.py`. A `Discovery` knows the members: a list in the settings, the addresses of a DNS name, or
the ready endpoints of a Kubernetes service. `Membership` has one thread that asks it now and then and tells
the device server what changed; `say_again` has it told once more, because a device server that was replaced
knows nobody. Discovery that fails changes nothing: the members that are known stay. Which of them answer is
found out where they are asked (imagefs/peerhealth.py), in moments, not by rounds of pings.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from agent import config, kubernetes
from agent.observer import Observer
from cluster import objects
from cluster.api import Api
from cluster.watching import Watcher
from imagefs import errors, peersettings
from imagefs.fuse import control
from imagefs.peersettings import PeerSettings

_EVERY_SECONDS = 10.0
_RETRY_SECONDS = 1.0
_SERVICE_LABEL = "kubernetes.io/service-name"


class Discovery(Protocol):
    """Where members come from."""

    def members(self) -> Sequence[str]:
        """All "host:port" of now. UnavailableError if they cannot be known."""

    def close(self) -> None:
        """Nobody asks any more."""


class Static:
    """A list in the settings."""

    def __init__(self, members: Sequence[str]) -> None:
        for member in members:
            peersettings.split_address(member)
        self._members = tuple(members)

    def members(self) -> Sequence[str]:
        return self._members

    def close(self) -> None:
        pass


class Dns:
    """All addresses of a name, each with our own port."""

    def __init__(self, name: str, port: int) -> None:
        self._name = name
        self._port = port

    def members(self) -> Sequence[str]:
        try:
            found = socket.getaddrinfo(self._name, self._port, type=socket.SOCK_STREAM)
        except OSError as exc:
            raise errors.UnavailableError(f"peers.dns_name: {self._name}: {exc}") from exc
        return sorted({_address(str(place[0]), self._port) for _, _, _, _, place in found})

    def close(self) -> None:
        pass


class EndpointSlices:
    """The ready endpoints of a service, watched. `wait_seconds`: how long the first question waits for the
    first answer of the API server."""

    def __init__(self, api: Api, service: str, wait_seconds: float = 5.0) -> None:
        namespace, separator, name = service.partition("/")
        if not separator or not namespace or not name or "/" in name:
            raise errors.ConfigurationError(f"peers.service: {service!r} is not NAMESPACE/NAME")
        self._wait_seconds = wait_seconds
        self._service = service
        self._watcher = Watcher(
            api,
            objects.ENDPOINT_SLICE,
            kubernetes.parser(lambda item: slice_members(item.body)),
            namespace=namespace,
            labels={_SERVICE_LABEL: name},
        )
        self._watcher.start()

    def members(self) -> Sequence[str]:
        if not self._watcher.wait(self._wait_seconds):
            raise errors.UnavailableError(f"peers.service: {self._service}: the API server has not answered")
        return sorted({member for members in self._watcher.current().values() for member in members})

    def close(self) -> None:
        self._watcher.stop()


def discovery(settings: config.Peers, client: Api | None) -> Discovery:
    """The one that the settings name. ConfigurationError for what it lacks."""
    if settings.discovery == "dns":
        if settings.dns_name is None:
            raise errors.ConfigurationError('peers.discovery = "dns" needs peers.dns_name')
        return Dns(settings.dns_name, peersettings.split_address(settings.listen or "")[1])
    if settings.discovery == "endpointslice":
        if settings.service is None or client is None:
            raise errors.ConfigurationError(
                'peers.discovery = "endpointslice" needs peers.service and an API server '
                "(kubernetes.in_cluster or api_url)"
            )
        return EndpointSlices(client, settings.service)
    return Static(settings.members)


def slice_members(item: Mapping[str, object]) -> tuple[str, ...] | None:
    """ "host:port" of the ready endpoints of an EndpointSlice; None for one of names. InvalidInputError
    names the field that is wrong."""
    if item.get("addressType") not in ("IPv4", "IPv6"):
        return None
    ports = [port for port in _list(item, "ports") if isinstance(port.get("port"), int)]
    named = [port for port in ports if port.get("name") == "peers"]
    chosen = (named or ports)[:1]
    if not chosen:
        raise errors.InvalidInputError("EndpointSlice: ports: none")
    out = []
    for endpoint in _list(item, "endpoints"):
        conditions = endpoint.get("conditions") or {}
        # Absent is ready: the API says so.
        if isinstance(conditions, dict) and conditions.get("ready") is not False:
            addresses = endpoint.get("addresses")
            if not isinstance(addresses, list) or not all(isinstance(each, str) for each in addresses):
                raise errors.InvalidInputError("EndpointSlice: addresses: not a list of strings")
            out += [_address(each, int(str(chosen[0]["port"]))) for each in addresses[:1]]
    for member in out:
        peersettings.split_address(member)
    return tuple(out)


class Membership:
    """See the module."""

    def __init__(
        self,
        settings: config.Peers,
        source: Discovery,
        devices: Callable[[], control.DeviceClient],
        observer: Observer,
    ) -> None:
        self._settings = settings
        self._source = source
        self._devices = devices
        self._observer = observer
        self._address = own_address(settings)
        self._files = [
            file
            for file in (
                settings.token_file,
                settings.tls_certificate,
                settings.tls_key,
                settings.tls_ca,
            )
            if file is not None
        ]
        self._wake = threading.Event()
        self._stopped = False
        self._again = True
        self._failing: set[str] = set()
        self._said: PeerSettings | None = None
        self.members: tuple[str, ...] = (self._address,)
        self._thread = threading.Thread(target=self._run, name="membership", daemon=True)

    def start(self) -> None:
        """Begin telling."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopped = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        self._source.close()

    def say_again(self) -> None:
        """The device server is new, and knows no peers. Any thread, at once."""
        self._again = True
        self._wake.set()

    def _run(self) -> None:
        while not self._stopped:
            self._wake.clear()
            told = self._tell()
            self._wake.wait(_EVERY_SECONDS if told else _RETRY_SECONDS)

    def _tell(self) -> bool:
        """Whether the device server knows what there is to know."""
        try:
            self.members = tuple(sorted({*self._source.members(), self._address}))
            self._note("discovery", None)
        except errors.ImagefsError as exc:
            self._note("discovery", exc)
        settings = self._peer_settings()
        if settings == self._said and not self._again:
            return True
        self._again = False
        try:
            self._devices().set_peers(settings)
        except errors.ImagefsError as exc:
            self._again = True
            self._note("device server", exc)
            return False
        self._note("device server", None)
        if self._said is None or settings.members != self._said.members:
            self._observer.event("peers", f"{len(settings.members)} nodes share blocks, this one included")
        self._said = settings
        return True

    def _note(self, what: str, error: errors.ImagefsError | None) -> None:
        """Say once that something fails, until it worked again."""
        if error is None:
            self._failing.discard(what)
        elif what not in self._failing:
            self._failing.add(what)
            self._observer.event("peers", f"peers cannot be brought up to date: {error}", level="warning")

    def _peer_settings(self) -> PeerSettings:
        settings = self._settings
        return PeerSettings(
            address=self._address,
            members=self.members,
            token_file=settings.token_file,
            tls_certificate=settings.tls_certificate,
            tls_key=settings.tls_key,
            tls_ca=settings.tls_ca,
            stamp=file_stamp(self._files),
            connect_timeout_seconds=settings.connect_timeout_seconds,
            down_seconds=settings.down_seconds,
            hedge_seconds=settings.hedge_seconds,
        )


def own_address(settings: config.Peers) -> str:
    """This node's "host:port" as the others know it. ConfigurationError if the settings do not say."""
    address = settings.advertise or settings.listen or ""
    host, _ = peersettings.split_address(address)
    if host in ("0.0.0.0", "::"):  # noqa: S104 - it is refused here
        raise errors.ConfigurationError(
            f"peers.listen = {settings.listen!r} says not how others reach this node: set peers.advertise"
        )
    return address


def file_stamp(files: Sequence[Path]) -> str:
    """Changes when one of the files does."""
    out = []
    for file in files:
        try:
            status = os.stat(file)
            out.append(f"{status.st_ino}:{status.st_mtime_ns}:{status.st_size}")
        except OSError:
            out.append("-")
    return " ".join(out)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _list(item: Mapping[str, object], field: str) -> list[dict[str, object]]:
    value = item.get(field) or []
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise errors.InvalidInputError(f"EndpointSlice: {field}: not a list of objects")
    return value
