"""What the kernel reads ahead in the mounts of lazy layers while an image starts, and who lets it read more.

Owned by images.py, which says what it mounts, from any thread; `tell` by the daemon's upkeep. The raising is
done by the device server (imagefs/fuse/startreadahead.py), because it outlives us.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from agent.mounts import LayerMounts
from agent.rows import ImageRow, LayerRow
from imagefs import bootpack, kernelreadahead
from imagefs.fuse.control import DeviceClient
from imagefs.fuse.mapfiles import MapFiles


class StartReadAhead:
    """See the module."""

    def __init__(self, maps: MapFiles, mounts: LayerMounts, devices: DeviceClient) -> None:
        self._maps = maps
        self._mounts = mounts
        self._devices = devices
        self._lock = threading.Lock()
        self._untold: dict[str, set[int]] = {}

    def kib(self, row: ImageRow, *, recorded: bool) -> int:
        """For a layer of the image that is about to be mounted; `recorded`: its start is traced."""
        if row.boot_pack is None:
            return kernelreadahead.TRACE_READ_AHEAD_KIB if recorded else kernelreadahead.START_READ_AHEAD_KIB
        table = self._maps.read(row.boot_pack.table_digest)
        # Unknown, and not yet: what is read ahead too little is no miss.
        return kernelreadahead.TRACE_READ_AHEAD_KIB if table is None else bootpack.decode_read_ahead(table)

    def mounted(self, owner: str, layers: Iterable[LayerRow]) -> None:
        """These layers are, or may be, mounted for `owner`."""
        with self._lock:
            self._untold.setdefault(owner, set()).update(layer.mount_number for layer in layers)

    def tell(self) -> None:
        """Tell the device server. Not at the mount itself: a container of 70 layers would wait for 70
        answers."""
        with self._lock:
            untold, self._untold = self._untold, {}
        for owner, numbers in untold.items():
            names = [self._mounts.backing_device(number) for number in numbers if self._reads_little(number)]
            found = [name for name in names if name is not None]
            if found:
                self._devices.started(owner, found)

    def _reads_little(self, number: int) -> bool:
        kib = self._mounts.read_ahead_kib(number)
        return kib is not None and kib < kernelreadahead.READ_AHEAD_KIB
