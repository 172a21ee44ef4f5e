"""Layers that other nodes asked for and that no image of ours has: attached for them, let go when idle.

Owned by `peers.py`, on its event loop; what blocks (the device server's control socket) runs in its threads.
A peer names a layer and where it lies; here it is decided whether we go there. What an authenticated peer can
make us do is bounded: `_MAX_LAYERS` layers, `_MAX_MAPS_BYTES` of block maps, `_MAX_ATTACHING` at once; and
described in docs/threat-model.md. A layer is attached under an owner name of its own, so that whatever a
killed agent left is found again by name.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import time
from collections.abc import Callable
from typing import TypeVar

from agent import config
from imagefs import errors, reference
from imagefs.fuse import control
from imagefs.origin import connect, transport

T = TypeVar("T")

_OWNER = "peer:"
_MAX_LAYERS = 512
_MAX_MAP_BYTES = 64 << 20
_MAX_MAPS_BYTES = 256 << 20
_MAX_ATTACHING = 4
_IDLE_SECONDS = 600.0
_IN_USE_SECONDS = 30.0
_SWEEP_SECONDS = 60.0


@dataclasses.dataclass(slots=True)
class _Guest:
    map_bytes: int
    used_at: float


class Guests:
    """See the module."""

    def __init__(
        self,
        settings: config.Peers,
        devices: Callable[[], control.DeviceClient],
        origins: connect.Options,
    ) -> None:
        self._settings = settings
        self._devices = devices
        self._origins = origins
        self._threads = concurrent.futures.ThreadPoolExecutor(_MAX_ATTACHING, "peer-attach")
        self._guests: dict[str, _Guest] = {}
        self._attaching: dict[str, asyncio.Task[None]] = {}

    async def attach(self, spec: control.LayerSpec) -> None:
        """Have the layer attached, once however many ask. DeniedError for an origin that is not allowed,
        UnavailableError when there is no room, and what the device server raises."""
        check_origin(self._settings, spec.origin_ref)
        task = self._attaching.get(spec.map_digest)
        if task is None:
            if len(self._attaching) >= 4 * _MAX_ATTACHING:
                raise errors.UnavailableError("too many layers are being attached for peers", 1.0)
            task = asyncio.create_task(self._attach(spec))
            self._attaching[spec.map_digest] = task
            task.add_done_callback(lambda _: self._attaching.pop(spec.map_digest, None))
        # Whoever asked may go; the others still want it.
        await asyncio.shield(task)

    def used(self, map_digest: str) -> None:
        """A block of this layer was asked for."""
        guest = self._guests.get(map_digest)
        if guest is not None:
            guest.used_at = time.monotonic()

    async def adopt(self) -> None:
        """Learn from the device server which layers it holds for peers: after it, or we, began anew."""
        status = await self._call(lambda: self._devices().status())
        now = time.monotonic()
        known = self._guests
        self._guests = {}
        for device in status["devices"]:
            name = str(device["map_digest"])
            if _OWNER + name in device["owners"]:
                self._guests[name] = known.get(name) or _Guest(0, now)

    async def sweep(self) -> None:
        """Let go of what has been idle, again and again. Until cancelled."""
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            idle_since = time.monotonic() - _IDLE_SECONDS
            for name in [name for name, guest in self._guests.items() if guest.used_at < idle_since]:
                await self._detach(name)

    def close(self) -> None:
        """Stay attached: the next agent adopts them."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    # -- inside ------------------------------------------------------------------------------------

    async def _attach(self, spec: control.LayerSpec) -> None:
        await self._make_room(spec)
        # Counted before it is there, so that others that come meanwhile see it.
        self._guests[spec.map_digest] = _Guest(spec.map_size, time.monotonic())
        owner = _OWNER + spec.map_digest
        try:
            await self._call(lambda: self._devices().attach(owner, [spec], self._origins))
        except BaseException:
            self._guests.pop(spec.map_digest, None)
            raise

    async def _make_room(self, spec: control.LayerSpec) -> None:
        if spec.map_size > _MAX_MAP_BYTES:
            raise errors.DeniedError(
                f"layer {spec.map_digest}: a block map of {spec.map_size} bytes, over {_MAX_MAP_BYTES}"
            )
        while (
            len(self._guests) >= _MAX_LAYERS
            or sum(guest.map_bytes for guest in self._guests.values()) + spec.map_size > _MAX_MAPS_BYTES
        ):
            name, oldest = min(self._guests.items(), key=lambda item: item[1].used_at)
            if time.monotonic() - oldest.used_at < _IN_USE_SECONDS:
                raise errors.UnavailableError("as many layers as there may be are in use by peers", 30.0)
            await self._detach(name)

    async def _detach(self, name: str) -> None:
        self._guests.pop(name, None)
        try:
            await self._call(lambda: self._devices().detach(_OWNER + name))
        except errors.ImagefsError:
            return  # without a device server there is nothing to let go of; `adopt` finds what is left

    async def _call(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)


def check_origin(settings: config.Peers, origin_ref: str) -> None:
    """Raise DeniedError unless peers may have us fetch from there."""
    try:
        ref = reference.parse(origin_ref)
    except errors.ImagefsError as exc:
        raise errors.DeniedError(f"origin of a peer's layer: {exc}") from exc
    if ref.tag or ref.digest or ref.transport not in ("docker", "s3"):
        raise errors.DeniedError(f"{origin_ref}: no registry or bucket that peers may name")
    if settings.origins:
        if not any(_within(str(ref), place) for place in settings.origins):
            raise errors.DeniedError(f"{origin_ref}: not one of peers.origins")
        return
    if settings.insecure and settings.token_file is None and settings.tls_ca is None:
        raise errors.DeniedError(
            f"{origin_ref}: strangers may not have us fetch: name peers.origins, or authenticate peers"
        )
    if ref.transport == "docker" and transport.is_loopback(ref.host):
        raise errors.DeniedError(f"{origin_ref}: loopback is another place here than where it was said")


def _within(ref: str, place: str) -> bool:
    """Whether `ref` is `place`, or lies below it."""
    return ref == place.rstrip("/") or ref.startswith(place if place.endswith("/") else place + "/")
