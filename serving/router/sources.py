"""Where a router that stands alone has its services from: a file, and the EndpointSlices that it names.

`Sources` owns a thread with a loop: it looks at the file and at those that the file names, follows the
Kubernetes Services in it (a `cluster.watching.Watcher` each), and calls `update` with all services whenever
something changed.

Invariants: the first document must be good; later ones that are not are logged, and the last good one stands.
Nothing is said before every Kubernetes Service of the first document was listed once: what is not known yet
would look like services without backends.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cluster import access, objects
from cluster import errors as cluster_errors
from cluster.api import Api
from cluster.connection import Connection
from cluster.objects import Object
from cluster.watching import Watcher
from serving import errors, routes
from serving import service as services
from serving.router import document, endpointslices

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.1
"""How often files are looked at: a stat of each, which also sees the exchanged links of a ConfigMap."""

_Stamp = Mapping[Path, tuple[int, int, int] | None]


@dataclasses.dataclass(frozen=True, slots=True)
class _Loaded:
    """A good document. `services` without the backends from Kubernetes; `api` if it names any."""

    document: document.Document
    api: Api | None
    services: tuple[services.Service, ...]
    files: tuple[Path, ...]


class Sources:
    """Start with `start`; `update` runs in the thread of this object."""

    def __init__(self, path: Path, update: Callable[[Sequence[services.Service]], None]) -> None:
        self._path = path
        self._update = update
        self._loaded = load(path)
        self._found: dict[document.Reference, tuple[services.Backend, ...]] = {}
        self._watches: dict[document.Reference, Watcher[Object]] = {}
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="sources", daemon=True)
        self._stopping = threading.Event()

    @property
    def services(self) -> tuple[services.Service, ...]:
        """As the first document has them, before Kubernetes said anything."""
        return self._loaded.services

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    async def _run(self) -> None:
        stamp = _stamp(self._loaded.files)
        self._follow()
        self._publish()
        while not self._stopping.is_set():
            await asyncio.sleep(_LOOK_SECONDS)
            now = _stamp(self._loaded.files)
            if now == stamp:
                continue
            stamp = now
            try:
                self._loaded = load(self._path)
            except errors.ServingError as exc:
                _log.error("what was routed stays so: %s", exc)
                continue
            stamp = _stamp(self._loaded.files)
            self._follow()
            self._publish()
        for watch in self._watches.values():
            watch.end()

    def _follow(self) -> None:
        """Watch what the document names, and nothing else."""
        wanted = self._loaded.document.references()
        for reference in self._watches.keys() - wanted:
            self._watches.pop(reference).end()
            self._found.pop(reference, None)
        for reference in wanted - self._watches.keys():
            self._watches[reference] = self._watch(reference)

    def _watch(self, reference: document.Reference) -> Watcher[Object]:
        loop = asyncio.get_running_loop()

        def changed(slices: Mapping[str, Object]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody wants to know
                loop.call_soon_threadsafe(self._changed, reference, watcher, slices)

        assert self._loaded.api is not None
        watcher: Watcher[Object] = Watcher(
            self._loaded.api,
            objects.ENDPOINT_SLICE,
            lambda item: item,
            namespace=reference.namespace,
            labels={endpointslices.SERVICE_LABEL: reference.service},
            changed=changed,
        )
        watcher.start()
        return watcher

    def _changed(
        self, reference: document.Reference, watcher: Watcher[Object], slices: Mapping[str, Object]
    ) -> None:
        if self._watches.get(reference) is not watcher:
            return
        bodies = (each.body for each in slices.values())
        found = endpointslices.backends(bodies, reference.port, reference.version)
        if self._found.get(reference) != found:
            self._found[reference] = found
            self._publish()

    def _publish(self) -> None:
        if self._loaded.document.references() - self._found.keys():
            return
        found = []
        for entry, service in zip(self._loaded.document.services, self._loaded.services, strict=True):
            backends = {(each.address, each.port): each for each in service.backends}
            for reference in entry.kubernetes:
                backends |= {(each.address, each.port): each for each in self._found[reference]}
            found.append(dataclasses.replace(service, backends=tuple(backends.values())))
        try:
            self._update(found)
        except errors.ServingError as exc:
            _log.error("what was routed stays so: %s", exc)


def load(path: Path) -> _Loaded:
    """The file, and those that it names, relative to it. DocumentError, NotFoundError."""
    text = _read(path).decode(errors="replace")
    parsed = document.parse(text, str(path))
    api = _connect(parsed.kubernetes) if parsed.references() else None
    files = (path, *(path.parent / name for name in sorted(parsed.files())))
    return _Loaded(parsed, api, tuple(_service(entry, path) for entry in parsed.services), files)


def _service(entry: document.Entry, path: Path) -> services.Service:
    where = f"{path}: services.{entry.name}"
    tls = None
    if entry.listen.tls is not None:
        files = entry.listen.tls
        tls = services.Tls(
            _read(path.parent / files.certificate),
            _read(path.parent / files.key),
            _read(path.parent / files.client_ca) if files.client_ca is not None else None,
        )
    keys: tuple[services.Key, ...] = ()
    if entry.keys is not None:
        keys = routes.keys(_read(path.parent / entry.keys).decode(errors="replace"), entry.keys)
        if any(
            (each.tokens_per_second, each.units_per_second, each.priority) != (None, None, 0) for each in keys
        ):
            raise errors.DocumentError(
                f"{entry.keys}: tokens, units and priority are kept by engines, which only `glowplug serve` "
                "tells of them; leave them out here"
            )
    try:
        return services.Service(
            name=entry.name,
            listen=services.Listen(entry.listen.port, entry.listen.address, tls),
            backends=tuple(services.Backend(**each.model_dump()) for each in entry.backends),
            hosts=tuple(entry.hosts),
            prefix=entry.prefix,
            version_weights=entry.version_weights,
            prefer_zone=entry.prefer_zone,
            activator=document.place(entry.activator, "activator") if entry.activator else None,
            keys=keys,
            settings=document.settings(entry, str(path)),
        )
    except errors.DocumentError as exc:
        raise errors.DocumentError(f"{where}: {exc}") from exc


def _connect(named: document.Cluster) -> Api:
    """ConfigurationError. The router may be up before its token is: that is an error of each request."""
    ca, token = _path(named.ca), _path(named.token)
    try:
        where = access.in_pod(ca, token) if named.url is None else access.Where(named.url, ca, token)
        return Api(Connection(dataclasses.replace(where, token_may_come_later=True)))
    except cluster_errors.ConfigurationError as exc:
        raise errors.ConfigurationError(f"kubernetes.url, ca, token: {exc}") from exc


def _path(name: str | None) -> Path | None:
    return Path(name) if name is not None else None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as exc:
        raise errors.NotFoundError(f"{path} is not there") from exc
    except OSError as exc:
        raise errors.ConfigurationError(f"{path}: {exc.strerror}") from exc


def _stamp(files: Sequence[Path]) -> _Stamp:
    stamps: dict[Path, tuple[int, int, int] | None] = {}
    for path in files:
        try:
            found = path.stat()
        except OSError:
            stamps[path] = None
        else:
            stamps[path] = (found.st_mtime_ns, found.st_ino, found.st_size)
    return stamps
