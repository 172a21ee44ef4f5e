"""One layer image that can be read lazily: its block map, and the origin that holds its blob.

A value that `image.py` makes, and the fetcher, the device server and the file-level mount use.
"""

from __future__ import annotations

import dataclasses

from imagefs.blockmap import BlockMap
from imagefs.origin import Origin


@dataclasses.dataclass(frozen=True, slots=True)
class LazyLayer:
    """`map_digest` names the layer everywhere (it commits to every byte of the layer image);
    `blob_digest` is where `origin` keeps the frames. The block map was verified against `map_digest`."""

    map_digest: str
    blob_digest: str
    block_map: BlockMap
    origin: Origin
