"""Finished layer images as what lies below a layer: `tree.Lower` over block maps and layer blobs.

Called by the pipeline for a layer that depends on others: they are finished by then, in a spool file of this
conversion or in an origin (a layer that was converted before). Blocks are fetched whole and verified against
their block map; a small cache, shared by the layers of one `Stack`, keeps the metadata blocks at hand.
A `Stack` belongs to one thread.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import pathlib
import stat
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Protocol

from converter.mergedlower import MergedLower
from converter.rootedpath import Path
from imagefs import blockmap, erofs, errors, frames
from imagefs.lazylayer import LazyLayer

_CACHE_BYTES = 24 * 1024 * 1024
_MIN_CACHED_BLOCKS = 2
_PIECE_BYTES = 256 * 1024


class LayerFile(Protocol):
    """A finished layer blob in a local file (`blob.FinishedBlob` is one)."""

    @property
    def path(self) -> pathlib.Path: ...
    @property
    def digest(self) -> str: ...
    @property
    def block_map(self) -> blockmap.BlockMap: ...


class Stack(MergedLower):
    """The merged view of `layers`, given bottom first as the manifest has them."""

    def __init__(self, layers: Sequence[LayerFile | LazyLayer]) -> None:
        cache = _Cache()
        super().__init__([_Layer(_Blocks(layer, cache)) for layer in reversed(layers)])


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A `LowerEntry` over an inode; target and attributes are read when asked for."""

    reader: erofs.Reader
    inode: erofs.Inode
    zeros_from: Callable[[int], int]

    @property
    def mode(self) -> int:
        return self.inode.mode

    @property
    def uid(self) -> int:
        return self.inode.uid

    @property
    def gid(self) -> int:
        return self.inode.gid

    @property
    def mtime_ns(self) -> int:
        return self.inode.mtime_ns

    @property
    def rdev_major(self) -> int:
        return self.inode.rdev_major

    @property
    def rdev_minor(self) -> int:
        return self.inode.rdev_minor

    @property
    def size(self) -> int:
        return self.inode.size

    @functools.cached_property
    def target(self) -> bytes:
        return self.reader.readlink(self.inode) if stat.S_ISLNK(self.inode.mode) else b""

    @functools.cached_property
    def xattrs(self) -> Mapping[bytes, bytes]:
        return self.reader.xattrs(self.inode)

    def hole_ahead(self, offset: int) -> int:
        flat_bytes = self.inode.size - self.inode.tail_bytes
        if self.inode.data_start < 0 or offset >= flat_bytes:
            return 0
        return min(self.zeros_from(self.inode.data_start + offset), flat_bytes - offset)

    def read(self, offset: int, length: int) -> bytes:
        return self.reader.read(self.inode, offset, length)


class _Layer:
    """One layer image as a `Lower`."""

    def __init__(self, blocks: _Blocks) -> None:
        self._reader = erofs.Reader(blocks.read)
        self._zeros_from = blocks.zeros_from
        self._directories: dict[Path, erofs.Inode | None] = {(): self._reader.root()}

    def lookup(self, path: Path) -> _Entry | None:
        inode = self._find(path)
        return None if inode is None else _Entry(self._reader, inode, self._zeros_from)

    def children(self, path: Path) -> Iterable[bytes]:
        directory = self._directory(path)
        return () if directory is None else [entry.name for entry in self._reader.readdir(directory)]

    def _find(self, path: Path) -> erofs.Inode | None:
        if not path:
            return self._directories[()]
        parent = self._directory(path[:-1])
        return None if parent is None else self._reader.lookup(parent, path[-1])

    def _directory(self, path: Path) -> erofs.Inode | None:
        if path not in self._directories:
            inode = self._find(path)
            is_directory = inode is not None and stat.S_ISDIR(inode.mode)
            self._directories[path] = inode if is_directory else None
        return self._directories[path]


class _Blocks:
    """The bytes of one layer image, from its blob, verified."""

    def __init__(self, layer: LayerFile | LazyLayer, cache: _Cache) -> None:
        self._layer = layer
        self._map = layer.block_map
        self._cache = cache
        self._name = layer.blob_digest if isinstance(layer, LazyLayer) else layer.digest
        # A spool file of this converter or a map from anywhere: its claims are checked the same way.
        frames.check_sizes(self._map, self._name)

    def zeros_from(self, offset: int) -> int:
        """How far from byte `offset` of the image its blocks are holes."""
        block_bytes, blocks = self._map.block_bytes, self._map.blocks
        end = offset // block_bytes
        while end < len(blocks) and blocks[end].zero:
            end += 1
        return max(0, end * block_bytes - offset)

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset` of the image."""
        end = offset + length
        if not 0 <= offset <= end <= self._map.image_bytes:
            raise errors.InvalidInputError(f"layer {self._name}: bytes {offset}-{end} lie outside the image")
        pieces = []
        while offset < end:
            index, within = divmod(offset, self._map.block_bytes)
            block = self._cache.get((self, index), functools.partial(self._fetch, index))
            piece = block[within : within + end - offset]
            pieces.append(piece)
            offset += len(piece)
        return b"".join(pieces)

    def _fetch(self, index: int) -> bytes:
        block = self._map.blocks[index]
        if block.zero:
            return bytes(self._map.block_length(index))
        length = block.compressed_bytes
        if isinstance(self._layer, LazyLayer):
            stream = self._layer.origin.stream_range(self._layer.blob_digest, block.offset, length)
        else:
            stream = _stream_file(self._layer.path, block.offset, length)
        buffer = memoryview(bytearray(self._map.block_length(index)))
        with contextlib.closing(stream):
            return bytes(frames.decode_block(self._map, index, frames.Pieces(stream), self._name, buffer))


class _Cache:
    """The blocks read last, of all layers of a stack."""

    def __init__(self) -> None:
        self._blocks: collections.OrderedDict[tuple[_Blocks, int], bytes] = collections.OrderedDict()
        self._bytes = 0

    def get(self, key: tuple[_Blocks, int], fetch: Callable[[], bytes]) -> bytes:
        found = self._blocks.pop(key, None)
        if found is None:
            found = fetch()
            self._bytes += len(found)
        self._blocks[key] = found
        while self._bytes > _CACHE_BYTES and len(self._blocks) > _MIN_CACHED_BLOCKS:
            self._bytes -= len(self._blocks.popitem(last=False)[1])
        return found


def _stream_file(path: pathlib.Path, offset: int, length: int) -> Generator[bytes, None, None]:
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while length:
                piece = file.read(min(length, _PIECE_BYTES))
                if not piece:
                    raise errors.IntegrityError(f"spool file {path} ends {length} bytes early")
                length -= len(piece)
                yield piece
    except OSError as exc:
        raise errors.ConfigurationError(f"spool file {path}: {exc.strerror}") from exc
