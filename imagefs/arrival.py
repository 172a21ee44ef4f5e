"""A block that is on its way: its frames are there before the rest of it, for whoever asks for those.

Made and fed by `carrier.py` in a fetcher thread, with that thread's buffer; `part` is called by any thread,
until `finish` or `close`, which wait for it: then the buffer is the thread's again. A descriptor that `part`
gives stays readable whatever becomes of the block; of its bytes those frames that it names were verified, and
no others.
"""

from __future__ import annotations

import dataclasses
import threading

from imagefs import frames
from imagefs.draft import Draft
from imagefs.lazylayer import LazyLayer


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A descriptor of a block, the callee's to close, and which of its frames (framemask.py) are valid."""

    fd: int
    frames: int


class Arrival:
    """See the module."""

    def __init__(self, layer: LazyLayer, index: int, buffer: memoryview, draft: Draft) -> None:
        self.layer = layer
        self.index = index
        self.draft = draft
        self._assembly = frames.Assembly(layer.block_map, index, layer.map_digest, buffer, draft.write)
        self._lock = threading.Lock()
        self._open = True

    @property
    def key(self) -> tuple[str, int]:
        """Layer and index."""
        return self.layer.map_digest, self.index

    @property
    def decoded(self) -> int:
        """The frames that came; nobody has verified them."""
        return self._assembly.decoded

    @property
    def count(self) -> int:
        """Of its frames."""
        return self._assembly.count

    def place(self, number: int) -> int:
        """See frames.Assembly."""
        return self._assembly.place(number)

    def decode(self, number: int, pieces: frames.Pieces) -> None:
        """See frames.Assembly."""
        self._assembly.decode(number, pieces)

    def part(self, wanted: int) -> Part | None:
        """The frames `wanted`, all of them decoded, and others that were verified before. None when it is too
        late, or the disk refuses: then there is the whole block to wait for. Raises IntegrityError."""
        with self._lock:
            if not self._open:
                return None
            # Before the descriptor: an error must not leave one behind.
            verified = self._assembly.verify(wanted)
            fd = self.draft.reader()
        return Part(fd, verified) if fd is not None else None

    def finish(self) -> memoryview:
        """All of the block, once all frames came. Raises IntegrityError."""
        with self._lock:
            self._open = False
        return self._assembly.finish()

    def close(self) -> None:
        """The buffer is needed for something else."""
        with self._lock:
            self._open = False
        self.draft.close()
