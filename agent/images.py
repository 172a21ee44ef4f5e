"""The block images of this node: found once, attached once, their layers mounted at first use, let go.

Called by the snapshotter (as its `LazyImages`), by `glowplug pull` and by prefetch, from any thread. The
store has what is known, `imagetable` the same in memory: this process is the only one that writes it.

* An image is attached to the device server as a whole, owner "image:<digest of the block image>"; after the
  server lost it (a reboot), again from the block maps in root/maps, without asking the origin, when one of
  its layers is used.
* A new image counts once its layers are attached, all superblocks were checked and all metadata is at hand.
  What fails before that, or comes after the lookup's deadline, is undone.
* An image goes with its last snapshot, unless it is pinned or prefetched. One that was just found is held for
  a moment, because its snapshots are only about to be made.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path

from agent import config, lookup, snapshots
from agent.flights import Flight, Flights
from agent.imagetable import ImageTable
from agent.lookup import Trust, Wanted
from agent.mounts import LayerMounts
from agent.observer import Observer
from agent.rows import BootPackRow, ImageRow, LayerRow
from agent.sampling import Sampler
from agent.snapshotter import Found
from agent.startreadahead import StartReadAhead
from agent.store import Store
from imagefs import assembly, blockmap, erofs, errors
from imagefs.erofs import ondisk
from imagefs.fuse import statedirectory
from imagefs.fuse.control import DeviceClient
from imagefs.fuse.coverage import Coverage
from imagefs.fuse.devices import LayerSpec, PackSpec
from imagefs.fuse.mapfiles import MapFiles
from imagefs.image import LazyImage
from imagefs.mount import RootAttributes
from imagefs.origin import connect

HOLD_SECONDS = 5.0
"""From an image's being found to its first snapshot: containerd asks for the next layer at once."""
PULL_HOLD_SECONDS = 300.0
"""The same after a `pull` by name, when a person or a program is to act next."""
FILES_SECONDS = 30.0
"""A layer that is mounted through its device, and got a file meanwhile, is mounted from that for whoever
comes so much later."""
_START_SECONDS = 1.0
_COVERAGE_SECONDS = 2.0
_OWNER = "image:"


class Images:
    """See the module. `trust` None takes what the repository lists."""

    def __init__(
        self,
        settings: config.Settings,
        store: Store,
        devices: DeviceClient,
        mounts: LayerMounts,
        observer: Observer,
        origins: connect.Options,
        trust: Trust | None = None,
        clock: Callable[[], float] = time.monotonic,
        sampler: Sampler | None = None,
    ) -> None:
        self._sampler = sampler
        self._settings = settings.images
        self._device_directory = statedirectory.device_directory(settings.state)
        self._store = store
        self._devices = devices
        self._mounts = mounts
        self._observer = observer
        self._origins = origins
        self._trust = trust
        self._clock = clock
        self._maps = MapFiles(settings.root / "maps")
        self.start_read_ahead = StartReadAhead(self._maps, mounts, devices)
        self._table = ImageTable(
            store.images(),
            place_matters=settings.images.trust == "repository",
            is_trusted=lambda row: _still_holds(settings.images, row),
        )
        self._lock = threading.Lock()
        self._attached: set[str] = set()
        self._told: set[str] = set()
        self._attaching: dict[str, threading.Lock] = {}
        self._files: Mapping[str, Path] = {}
        """Map digest -> file, of the layers that had one when that was asked."""
        self._files_at = -FILES_SECONDS
        self._roots: dict[str, RootAttributes | None] = {}
        self._inodes: dict[str, int] = {}
        self._coverage: dict[str, tuple[float, Mapping[str, Coverage]]] = {}
        self._flights = Flights(
            settings.images.lookup_deadline_seconds,
            settings.images.negative_seconds,
            self._open,
            self._report,
            clock,
        )

    # -- for the snapshotter -----------------------------------------------------------------------

    def find_layer(self, chain_id: str, labels: Mapping[str, str]) -> Found | None:
        """The lazy layer of a Prepare that is to become `chain_id`; None: unpack it in the ordinary way (the
        reason was told to the observer)."""
        wanted = lookup.from_labels(labels)
        listed = None if wanted is None else lookup.place(wanted, self._settings.block_repositories)
        known = row = None
        if wanted is not None and listed is not None:
            known = self._table.of_source(wanted.source_digest, listed)
            row = known or self._find_quietly(wanted)
        place = self._table.layer_of_chain(chain_id, listed, row)
        if place is None:
            if row is not None:
                text = f"{row.reference}: its block image has no layer {chain_id}: ordinary unpack of it"
                self._observer.event("layer_missing", text, level="warning", image=row.reference)
            return None
        if known is not None and place == (known.block_digest, 0) and not self._was_told(known.block_digest):
            self._observer.pulled(
                known.reference, lazy=True, seconds=0.0, layers=len(known.layers), reason=None
            )
        self._hold(place[0], HOLD_SECONDS)
        return Found(*place)

    def may_serve(self, block_digest: str, labels: Mapping[str, str]) -> bool:
        """Whether a layer of this block image may be that of the image which a Prepare's labels name: not
        where another repository lists it (imagetable.py)."""
        wanted = lookup.from_labels(labels)
        listed = None if wanted is None else lookup.place(wanted, self._settings.block_repositories)
        return self._table.may_serve(block_digest, listed)

    def directory(self, block_digest: str, layer: int) -> Path:
        """The mount point of a layer, mounted now if it is not. UnavailableError, ConfigurationError."""
        row, found = self._layer(block_digest, layer)
        file = self._files.get(found.map_digest)
        path = self._mounts.find(found.mount_number, row.device(found), in_file=file is not None)
        if path is not None:
            return path
        started = self._clock()
        device = self.attach(block_digest)[layer]
        if self._mounts.find(found.mount_number, row.device(found)) is None:
            # As it is now, because what is mounted stays for long: asked once for all layers of a start.
            self.note_files(_START_SECONDS)
            file = self._files.get(found.map_digest)
        name = f"{row.reference}: layer {layer} ({found.map_digest})"
        recorded = row.boot_pack is None and self._is_recorded(row)
        kib = self.start_read_ahead.kib(row, recorded=recorded)
        path = self._mounts.ensure(found.mount_number, name, device, kib, None if recorded else file)
        self.start_read_ahead.mounted(owner_of(block_digest), [found])
        self._observer.phase(row.reference, "mount", self._clock() - started)
        return path

    def note_files(self, seconds: float = FILES_SECONDS) -> None:
        """Ask which layers have files of their own by now, unless that was asked less than `seconds` ago."""
        if self._clock() - self._files_at >= seconds:
            self._files = self._devices.layer_files()
            self._files_at = self._clock()

    def _is_recorded(self, row: ImageRow) -> bool:
        if self._sampler is None:
            return False
        points = [(each.mount_number, row.device(each)) for each in row.layers]
        return self._sampler.recorded(row, lambda: not any(self._mounts.find(*each) for each in points))

    def root_attributes(self, block_digest: str, layer: int) -> RootAttributes | None:
        """The attributes of the layer's root directory; None when the layer does not say."""
        row, found = self._layer(block_digest, layer)
        device = row.device(found)
        if device not in self._roots:
            self._roots[device] = self._read_root(block_digest, layer, found.map_digest)
        return self._roots[device]

    def usage(self, block_digest: str, layer: int) -> snapshots.Usage:
        """Inodes of the layer, and how many bytes of it are on this machine's disk now. Nothing of an image
        that was not used since the node started: containerd asks for all there are, and must not wait for
        origins."""
        row, found = self._layer(block_digest, layer)
        if block_digest not in self._attached:
            return snapshots.Usage(0, 0)
        name = row.device(found)
        if name not in self._inodes:
            device = self.attach(block_digest)[layer]
            try:
                with open(device, "rb") as file:
                    superblock = erofs.check_superblock(file.read(ondisk.BLOCK_BYTES))
            except OSError as exc:
                raise errors.UnavailableError(f"{device}: cannot be read: {exc.strerror}") from exc
            self._inodes[name] = superblock.inodes
        return snapshots.Usage(self._inodes[name], self._cached_bytes(block_digest, found))

    def released(self, block_digest: str) -> None:
        """A snapshot of the image is gone: the image goes with the last one."""
        row = self._table.find(block_digest)
        if row is not None:
            self._release(row)

    # -- by name -----------------------------------------------------------------------------------

    def pull(self, reference: str) -> ImageRow:
        """Find the block image of a reference, and have all its layers at hand. Raises what the lookup
        raised, UnavailableError after the deadline."""
        return self.pull_opened(reference)[0]

    def pull_opened(self, reference: str) -> tuple[ImageRow, LazyImage]:
        """As `pull`, with the opened image: its config, and the manifests that led to it."""
        flight = self._flights.join(lookup.from_text(reference), remembered=False)
        assert flight.image is not None
        row = self._table.row(flight.image.manifest.digest)
        self._table.name(row.block_digest)
        self._told.add(row.block_digest)
        self._hold(row.block_digest, PULL_HOLD_SECONDS)
        return row, flight.image

    # -- upkeep ------------------------------------------------------------------------------------

    def rows(self) -> list[ImageRow]:
        """The images that are known now."""
        return self._table.rows()

    def attach(self, block_digest: str) -> list[Path]:
        """The device files of an image's layers, attached now if they are not."""
        row = self._table.row(block_digest)
        with self._attaching_lock(block_digest):
            if block_digest not in self._attached:
                specs = [self._spec(row, layer) for layer in row.layers]
                self._devices.attach(owner_of(block_digest), specs, self._origins, self._pack_spec(row))
                self._attached.add(block_digest)
        return [self._device_directory / row.device(layer) for layer in row.layers]

    def reconcile(self, devices: Mapping[str, Set[str]]) -> list[str]:
        """Take note of what the device server has attached, by its own account: owner -> names of devices;
        all else is attached when it is used. Returns the owners that are images not known any more."""
        rows = {owner_of(row.block_digest): row for row in self._table.rows()}
        self._attached = {
            row.block_digest
            for owner, row in rows.items()
            if owner in devices and {row.device(layer) for layer in row.layers} <= devices[owner]
        }
        for owner, row in rows.items():
            if row.block_digest in self._attached:  # an agent that died may not have said so
                self.start_read_ahead.mounted(owner, row.layers)
        return [owner for owner in devices if owner.startswith(_OWNER) and owner not in rows]

    def tidy_maps(self) -> int:
        """Remove the block maps that no image has. How many."""
        return self._maps.keep_only(self._table.files())

    def detach_orphan(self, owner: str) -> bool:
        """Detach what `reconcile` has returned; False for an image that is being taken up meanwhile."""
        digest = owner.removeprefix(_OWNER)
        with self._if_free(digest) as free:
            if not free or self._table.find(digest) is not None:
                return False
            self._devices.detach(owner)
        return True

    def sweep(self) -> None:
        """Let go of every image that nothing keeps: what was found and never used, what `released` could not
        finish."""
        for row in self._table.rows():
            self._release(row)

    def refresh(self, block_digest: str) -> None:
        """The row's pin or prefetch mark was changed in the store."""
        row = self._store.image(block_digest)
        if row is not None:
            self._table.put(row)

    # -- looking up --------------------------------------------------------------------------------

    def _find_quietly(self, wanted: Wanted) -> ImageRow | None:
        try:
            flight = self._flights.join(wanted)
        except errors.ImagefsError:
            return None
        return self._table.find(flight.block_digest or "")

    def _open(self, flight: Flight) -> None:
        """One lookup, on its own thread."""
        image = lookup.open_image(flight.wanted, self._settings, self._origins, self._trust)
        with contextlib.closing(image.origin):
            self._observer.phase(flight.wanted.name, "lookup", self._clock() - flight.started)
            digest = image.manifest.digest
            with self._attaching_lock(digest):
                if self._table.find(digest) is None:
                    self._take_up(flight, image)
                self._table.admit(digest, image.origin.name)
            flight.block_digest, flight.image = digest, image

    def _take_up(self, flight: Flight, image: LazyImage) -> None:
        """Attach a new image's layers, and bring their metadata in. Undone when it fails, or comes late."""
        row = _row(flight.wanted, image)
        try:
            with self._table.coming(row):
                self._take_up_layers(flight, image, row)
        except BaseException:
            for file in self._table.drop(row).files:
                self._maps.remove(file)
            raise

    def _take_up_layers(self, flight: Flight, image: LazyImage, row: ImageRow) -> None:
        pack = assembly.pack_spec(image)
        started = self._clock()
        digest = image.manifest.digest
        for layer, data in zip(image.layers, image.map_bytes, strict=True):
            self._maps.keep(layer.map_digest, data)
        if pack is not None and pack.table_bytes is not None:
            self._maps.keep(pack.table_digest, pack.table_bytes)
        try:
            specs = assembly.layer_specs(image)
            devices = self._devices.attach(owner_of(digest), specs, self._origins, pack)
            flight.cancel = lambda: self._cancel(flight, digest)
            self._commit(flight, None)
            roots = assembly.prepare_layers(image, devices)
            self._commit(flight, digest)
            row = self._store.put_image(row)
        except BaseException:
            self._detach(digest)
            raise
        for stored, root in zip(row.layers, roots, strict=True):
            self._roots[row.device(stored)] = root
        self._attached.add(digest)
        self._table.put(row)
        self._hold(digest, HOLD_SECONDS)
        self._observer.phase(flight.wanted.name, "metadata", self._clock() - started)

    def _commit(self, flight: Flight, block_digest: str | None) -> None:
        """With a digest: from here on the image counts. UnavailableError if nobody waits any more."""
        with self._lock:
            if flight.settled:
                raise errors.UnavailableError(f"{flight.wanted.name}: past its deadline")
            flight.block_digest = block_digest

    def _cancel(self, flight: Flight, block_digest: str) -> None:
        """At the deadline: fail the reads that the lookup waits for, unless it is through."""
        with self._lock:
            late = flight.block_digest is None
        if late:
            self._detach(block_digest)

    def _report(self, flight: Flight) -> None:
        name, error = flight.wanted.name, flight.error
        why = None if error is None else lookup.reason(error)
        if error is not None and why != lookup.NO_BLOCK_IMAGE:
            self._observer.event("lookup_failed", str(error), level="warning", image=name)
        row = self._table.find(flight.block_digest or "")
        seconds = self._clock() - flight.started
        layers = len(row.layers) if row is not None else 0
        self._observer.pulled(name, lazy=error is None, seconds=seconds, layers=layers, reason=why)

    # -- letting go --------------------------------------------------------------------------------

    def _was_told(self, block_digest: str) -> bool:
        """Whether the pull that a Prepare is part of began with one by name, which the observer was told."""
        told = block_digest in self._told
        self._told.discard(block_digest)
        return told

    def _hold(self, block_digest: str, seconds: float) -> None:
        self._table.hold(block_digest, self._clock() + seconds)

    def _release(self, row: ImageRow) -> None:
        """Forget an image, unless something keeps it."""
        digest = row.block_digest
        with self._if_free(digest) as free:
            if not free:
                return  # somebody attaches it, and may be waiting for its origin: the next sweep sees it
            try:
                if self._store.references(digest):
                    self._table.let_go(digest)
                    return
                if row.pinned or row.prefetched or self._table.held_until(digest) > self._clock():
                    return
                self._store.remove_image(digest)
            except errors.ImagefsError:
                return  # a snapshot was made of it meanwhile, or the disk is full: the next sweep sees it
            gone = self._table.drop(row)
            for file in gone.files:
                self._maps.remove(file)
            # Before the unmounts: the last one of a filesystem waits for its reads, and this fails them.
            self._detach(digest)
            for layer in row.layers:
                if (device := row.device(layer)) in gone.devices:
                    self._mounts.unmount(layer.mount_number, device)
                    self._roots.pop(device, None)
                    self._inodes.pop(device, None)
            self._coverage.pop(digest, None)
        self._observer.event("image_released", f"{row.reference} is not used any more", image=row.reference)

    def _detach(self, block_digest: str) -> None:
        self._attached.discard(block_digest)
        self._told.discard(block_digest)
        with contextlib.suppress(errors.NotFoundError, errors.UnavailableError):
            self._devices.detach(owner_of(block_digest))

    @contextlib.contextmanager
    def _if_free(self, block_digest: str) -> Iterator[bool]:
        """The image's lock, if nobody has it: who deletes a pod, or sweeps, waits for no origin."""
        lock = self._attaching_lock(block_digest)
        free = lock.acquire(blocking=False)
        try:
            yield free
        finally:
            if free:
                lock.release()

    # -- layers ------------------------------------------------------------------------------------

    def _layer(self, block_digest: str, layer: int) -> tuple[ImageRow, LayerRow]:
        row = self._table.row(block_digest)
        if not 0 <= layer < len(row.layers):
            raise errors.IntegrityError(
                f"{row.reference}: the database names layer {layer} of {block_digest}, which has "
                f"{len(row.layers)}; remove the image from containerd, and pull it again"
            )
        return row, row.layers[layer]

    def _cached_bytes(self, block_digest: str, layer: LayerRow) -> int:
        """kubelet asks for every snapshot in turn: one answer of the device server serves for all layers of
        an image."""
        at, covered = self._coverage.get(block_digest, (0.0, {}))
        if self._clock() - at > _COVERAGE_SECONDS:
            covered = {}
            with contextlib.suppress(errors.NotFoundError):
                covered = self._devices.coverage(owner_of(block_digest))
            self._coverage[block_digest] = (self._clock(), covered)
        found = covered.get(layer.map_digest)
        return found.present_bytes if found is not None else 0

    def _attaching_lock(self, block_digest: str) -> threading.Lock:
        """Held while an image comes or goes. One for each image that was ever seen: it is small, and a lock
        that somebody may wait for cannot be removed."""
        with self._lock:
            return self._attaching.setdefault(block_digest, threading.Lock())

    def _spec(self, row: ImageRow, layer: LayerRow) -> LayerSpec:
        return LayerSpec(
            origin_ref=row.origin_ref,
            map_digest=layer.map_digest,
            map_size=layer.map_size,
            blob_digest=layer.blob_digest,
            blob_size=layer.blob_size,
            map_bytes=self._maps.read(layer.map_digest),
        )

    def _pack_spec(self, row: ImageRow) -> PackSpec | None:
        pack = row.boot_pack
        if pack is None:
            return None
        return PackSpec(
            origin_ref=row.origin_ref,
            table_digest=pack.table_digest,
            table_size=pack.table_size,
            data_digest=pack.data_digest,
            data_size=pack.data_size,
            table_bytes=self._maps.read(pack.table_digest),
        )

    def _read_root(self, block_digest: str, layer: int, map_digest: str) -> RootAttributes | None:
        device = self.attach(block_digest)[layer]
        data = self._maps.read(map_digest)
        if data is not None and blockmap.decode(data).root_implied:
            return None
        return assembly.root_attributes(device)


def owner_of(block_digest: str) -> str:
    """The name under which an image's layers are attached to the device server."""
    return _OWNER + block_digest


def _still_holds(settings: config.Images, row: ImageRow) -> bool:
    from agent import trust  # with all of cryptography: only who opens images pays for it

    return trust.still_holds(settings, row.origin_ref, row.source_digest, row.block_digest)


def _row(wanted: Wanted, image: LazyImage) -> ImageRow:
    layers = image.block_image.layers
    chain = lookup.chain_ids([layer.diff_id for layer in layers])
    return ImageRow(
        block_digest=image.manifest.digest,
        source_digest=image.source_digest,
        reference=wanted.name,
        origin_ref=image.origin.name,
        layers=tuple(
            LayerRow(
                chain_id,
                each.diff_id,
                each.block_map.digest,
                each.block_map.size,
                each.blob.digest,
                each.blob.size,
            )
            for chain_id, each in zip(chain, layers, strict=True)
        ),
        created_ns=time.time_ns(),
        boot_pack=_pack_row(assembly.pack_spec(image)),
    )


def _pack_row(spec: PackSpec | None) -> BootPackRow | None:
    if spec is None:
        return None
    return BootPackRow(spec.table_digest, spec.table_size, spec.data_digest, spec.data_size)
