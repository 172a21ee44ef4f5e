"""The agent: every part built from the settings, started in order, stopped cleanly. The composition root.

`run` is the whole life of `glowplug agent run`, on the process's main thread:

    settings -> locks -> device server -> store -> layer mounts -> images -> API -> reconcile
    -> the snapshotter's socket, last, because containerd asks as soon as it is there

It leaves in the reverse order, and leaves the mounts and the device server where they are: containers go on
reading. Two agents on one root would both write its database; with one state directory, each would take the
other's images for orphans, and detach them under running containers: the second is refused.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import logging
import os
import resource
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agent import (
    api,
    config,
    credentials,
    fill,
    guests,
    kubernetes,
    logs,
    membership,
    peers,
    reconcile,
    sampling,
    service,
    trust,
    warm,
)
from agent.images import Images
from agent.mounts import LayerMounts
from agent.observer import Observer
from agent.outside import Outside
from agent.snapshotter import Snapshotter
from cluster.api import Api
from imagefs import errors, privatedirectory
from imagefs.fuse import control
from imagefs.fuse.control import DeviceClient
from imagefs.fuse.mapfiles import MapFiles
from imagefs.origin import agentcredentials, connect

DEVICE_OWNER = "agent"
"""The agent's hold on the device server: a `glowplug umount` in its state directory must not end that."""
_LOCK = "agent.lock"
_KEPT = {
    "cache.directory": "cache_dir",
    "cache.quota_bytes": "cache_quota_bytes",
    "cache.free_floor_percent": "free_floor_bytes",
    "cache.layer_files": "layer_files",
    "reads.deadline_seconds": "read_deadline_seconds",
    "reads.connections": "connections",
    "reads.workers": "workers",
}
"""Settings that a running device server keeps, and what they are called there."""
_UPKEEP_SECONDS = 5.0
_STOP_GRACE_SECONDS = 10.0

_log = logging.getLogger(__name__)


def run(settings: config.Settings) -> None:
    """Until SIGTERM or SIGINT. Raises errors of imagefs when it cannot start."""
    logs.set_up(settings.log.level, settings.log.format)
    _raise_descriptor_limit()
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    with _sole_agent(settings), Agent(settings) as agent:
        _notify("READY=1")
        _log.info("ready: snapshotter on %s", settings.socket)
        while not stopping.wait(_UPKEEP_SECONDS):
            agent.upkeep()
        _notify("STOPPING=1")
    _log.info("stopped; mounts and device server live on")


class Agent:
    """The parts of a running agent, as a context: ready inside, stopped after."""

    def __init__(self, settings: config.Settings) -> None:
        self._settings = settings
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> Agent:
        try:
            self._start()
        except BaseException:
            self._exit.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def _start(self) -> None:
        settings = self._settings
        client = kubernetes.connect(settings.kubernetes)
        outside = Outside(settings, client)
        self._observer: Observer = outside.observer
        origins = origin_options(settings)
        self._devices = DeviceClient.ensure(server_settings(settings, origins))
        self._devices.hold(DEVICE_OWNER)
        self._say_kept_settings(server_settings(settings, origins))
        store, rebuilt = reconcile.open_store(settings.root, self._observer)
        self._exit.callback(store.close)
        self._mounts = LayerMounts(settings.root / "layers", settings.state)
        if not self._mounts.open():
            self._observer.event("remounting", "the device server was replaced: layers are mounted anew")
        self._sampler = sampling.Sampler(
            settings.traces,
            MapFiles(settings.root / "maps"),
            self._mounts,
            self._devices,
            self._observer,
            sampling.publisher(origins),
        )
        self._images = Images(
            settings,
            store,
            self._devices,
            self._mounts,
            self._observer,
            origins,
            trust.check,
            sampler=self._sampler,
        )
        snapshotter = Snapshotter(settings.root, store, self._images, self._observer)
        self._fills = fill.Fills(settings.fill, self._images, store, self._devices, self._observer)
        # The API first: who mounts what is missing may have to ask it for credentials.
        routes = api.Api(settings.api_socket, settings.http.listen, [outside.node])
        outside.show(store, routes)
        warmth = warm.Warm(self._images, store, self._devices, self._fills, self._observer)
        warmth.register(routes)
        self._give_credentials(routes, client)
        routes.add("POST", "/api/v1/pull", self._pull)
        routes.start()
        self._exit.callback(routes.stop)
        outside.start()
        self._exit.callback(outside.stop)
        self._share(origins, client, warmth)
        self._reconciler = reconcile.Reconciler(
            store,
            self._images,
            self._mounts,
            snapshotter,
            self._devices,
            self._observer,
            settings.images.lookup_deadline_seconds,
        )
        self._reconciler.restore(rebuilt=rebuilt)
        server = service.serve(snapshotter, settings.socket, self._observer)
        self._exit.callback(server.stop, _STOP_GRACE_SECONDS)

    def _say_kept_settings(self, wanted: control.ServerSettings) -> None:
        kept = control.kept_settings(wanted)
        named = [f"{key} ({kept[name]})" for key, name in _KEPT.items() if name in kept]
        if named:
            self._observer.event(
                "settings_kept",
                f"the device server of {wanted.state_dir} goes on as it was started, with another "
                f"{', '.join(named)}: `glowplug agent upgrade` makes the new ones count",
                level="warning",
            )

    def _give_credentials(self, routes: api.Routes, client: Api | None) -> None:
        """To the registry clients of this node: the device server's, and our own."""
        chain, stop = credentials.build(self._settings, client)
        self._exit.callback(stop)
        routes.add("POST", agentcredentials.PATH, credentials.handler(chain))
        agentcredentials.answer_here(self._settings.api_socket, chain.look_up)
        self._exit.callback(agentcredentials.answer_here, self._settings.api_socket, None)

    def _share(self, origins: connect.Options, client: Api | None, warmth: warm.Warm) -> None:
        """Blocks with other nodes, if the settings say so; and what they may have us prepare."""
        settings = self._settings
        if settings.peers.listen is None:
            return
        peers.check(settings.peers)
        discovery = membership.discovery(settings.peers, client)
        sharing = peers.Sharing(
            settings.peers, settings.state, lambda: self._devices, origins, discovery, self._observer
        )
        warmth.register_cluster(sharing, lambda place: guests.check_origin(settings.peers, place))
        sharing.start()
        self._exit.callback(sharing.stop)

    # -- upkeep ------------------------------------------------------------------------------------

    def upkeep(self) -> None:
        """One round: a device server that is gone is started, images that nothing keeps are let go, what is
        quarantined is tried again, and more. What fails is logged, keeps nothing else from being done, and is
        tried again in the next round."""
        for step in (
            self._watch_devices,
            self._images.sweep,
            self._images.note_files,
            self._images.start_read_ahead.tell,
            self._reconciler.heal,
            self._fills.tick,
            self._sampler.tick,
            lambda: reconcile.keep_copy(self._settings.root),
        ):
            try:
                step()
            except errors.ImagefsError as exc:
                _log.warning("upkeep: %s", exc)
            except Exception:
                _log.exception("upkeep failed")

    def _watch_devices(self) -> None:
        DeviceClient.ensure(server_settings(self._settings, origin_options(self._settings)))
        self._devices.hold(DEVICE_OWNER)  # one that was started anew knows nothing of it
        if not self._mounts.renew():
            self._observer.event(
                "remounting",
                "keeper and device server died together: containers that run lost their images' files, and "
                "must be started again",
                level="error",
            )
            self._reconciler.remount()

    # -- routes ------------------------------------------------------------------------------------

    def _pull(self, request: api.Request) -> dict[str, Any]:
        """POST /api/v1/pull {reference}: find the block image, and have its layers at hand."""
        row, image = self._images.pull_opened(request.string("reference"))
        return {
            "reference": row.reference,
            "source_digest": row.source_digest,
            "block_digest": row.block_digest,
            "chain_ids": [layer.chain_id for layer in row.layers],
            "manifests": [
                {
                    "media_type": manifest.media_type,
                    "digest": manifest.digest,
                    "data": base64.b64encode(manifest.data).decode(),
                }
                for manifest in image.sources
            ],
            "config": base64.b64encode(image.config).decode(),
        }


def origin_options(settings: config.Settings) -> connect.Options:
    """How registries and buckets are reached."""
    return connect.Options(
        plain_http=settings.registries.plain_http,
        ca_file=settings.registries.ca_file,
        docker_config=settings.credentials.docker_config,
        hosts_directory=settings.registries.hosts_directory,
        credentials_socket=settings.api_socket,
        s3_endpoint_url=settings.registries.s3_endpoint_url,
    )


def server_settings(settings: config.Settings, origins: connect.Options) -> control.ServerSettings:
    """What the device server is started with, if it does not run yet."""
    return control.ServerSettings(
        state_dir=settings.state,
        cache_dir=settings.cache.directory,
        cache_quota_bytes=settings.cache.quota_bytes,
        free_floor_bytes=control.free_floor_bytes(
            settings.cache.directory, settings.cache.free_floor_percent
        ),
        workers=settings.reads.workers or control.WORKERS,
        read_deadline_seconds=settings.reads.deadline_seconds,
        connections=settings.reads.connections,
        layer_files=settings.cache.layer_files,
        origins=origins,
    )


def hand_over(settings: config.Settings) -> bool:
    """Have this build's device server take over from the one that runs, whoever started it; it takes up
    these settings. False if none runs. Containers see a pause; raises what DeviceClient.hand_over does."""
    try:
        DeviceClient(server_settings(settings, origin_options(settings))).hand_over()
    except errors.NotFoundError:
        return False
    return True


@contextlib.contextmanager
def _sole_agent(settings: config.Settings) -> Iterator[None]:
    """The locks on what an agent has for itself. BusyError if another agent has one, ConfigurationError."""
    with contextlib.ExitStack() as held:
        for directory in (settings.root, settings.state):
            try:
                privatedirectory.make(directory)
            except OSError as exc:
                raise errors.ConfigurationError(f"cannot use {directory}: {exc.strerror}") from exc
        own = {
            settings.root / _LOCK: (settings.root, "--root"),
            settings.state / _LOCK: (settings.state, "--state"),
            settings.socket.with_name(f"{settings.socket.name}.lock"): (settings.socket, "--socket"),
        }
        for file, (what, option) in own.items():
            held.enter_context(_locked(file, what, option))
        yield


@contextlib.contextmanager
def _locked(file: Path, what: Path, option: str) -> Iterator[None]:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise errors.ConfigurationError(f"cannot use {what}: {file}: {exc.strerror}") from exc
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(fd, 32, 0).decode(errors="replace").strip()
            raise errors.BusyError(
                f"another agent (pid {pid}) runs on {what}; stop it first, or use another {option}"
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


def _raise_descriptor_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _notify(state: str) -> None:
    """Tell systemd, if it started us (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
        connection.connect(address)
        connection.send(state.encode())
