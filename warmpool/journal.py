"""What a controller remembers over a restart: one document, kept in a file or in a ConfigMap.

What the pool holds is not in it, because that is read from the platform; in it is what the platform cannot
say: the history of demand, when nodes became warm, what is being left alone, which images this pool asked
for. So losing it loses the forecast for a day and no node.

Called by the controller's thread. A write replaces the whole document, or nothing.
"""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from cluster import api, objects
from cluster import errors as cluster_errors
from warmpool import backoff, errors, lifecycle
from warmpool.backoff import Waits
from warmpool.lifecycle import Roster

_VERSION = 1
_MAX_BYTES = 64 << 20
_KEY = "state.json.gz"


@dataclasses.dataclass(frozen=True, slots=True)
class Kept:
    """The document. `memory` is the text of `decide.State`; `sizes` are the bytes of images as agents said;
    `asked` are images that this pool had nodes fetch."""

    saved_at: float
    memory: str
    roster: Roster
    waits: Waits
    sizes: Mapping[str, int]
    asked: frozenset[str]


class Store(Protocol):
    """Where the document lies."""

    def read(self) -> bytes | None:
        """None if there is none."""

    def write(self, data: bytes) -> None:
        """Replace it."""


def encode(kept: Kept) -> bytes:
    """The document as it is stored."""
    document = {
        "version": _VERSION,
        "saved_at": kept.saved_at,
        "memory": kept.memory,
        "roster": lifecycle.to_json(kept.roster),
        "waits": backoff.to_json(kept.waits),
        "sizes": dict(kept.sizes),
        "asked": sorted(kept.asked),
    }
    return gzip.compress(json.dumps(document).encode(), compresslevel=6, mtime=0)


def decode(data: bytes) -> Kept:
    """Inverse of `encode`. InvalidInputError for anything else."""
    try:
        inflater = zlib.decompressobj(wbits=31)
        text = inflater.decompress(data, _MAX_BYTES)
        if not inflater.eof:
            raise errors.InvalidInputError("the pool's saved state is cut off, or far too large")
        document: Any = json.loads(text)
        if document["version"] != _VERSION:
            raise errors.InvalidInputError(
                f"the pool's saved state is of version {document['version']!r:.20}"
            )
        return Kept(
            float(document["saved_at"]),
            str(document["memory"]),
            lifecycle.from_json(document["roster"]),
            backoff.from_json(document["waits"]),
            {str(name): int(size) for name, size in document["sizes"].items()},
            frozenset(str(each) for each in document["asked"]),
        )
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        OverflowError,
        RecursionError,
        zlib.error,
    ) as exc:
        raise errors.InvalidInputError(
            f"the pool's saved state is not one of this version: {exc!r:.200}"
        ) from exc


class FileStore:
    """A file of a directory that is ours alone."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> bytes | None:
        """See Store. ConfigurationError."""
        try:
            with self._path.open("rb") as file:
                return file.read(_MAX_BYTES)
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise errors.ConfigurationError(f"{self._path}: {exc.strerror}: mend state_directory") from exc

    def write(self, data: bytes) -> None:
        """See Store. ConfigurationError."""
        draft = self._path.with_name(f".{self._path.name}.draft")
        try:
            with draft.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self._path)
        except OSError as exc:
            raise errors.ConfigurationError(f"{self._path}: {exc.strerror}: mend state_directory") from exc


class ConfigMapStore:
    """A ConfigMap, so that a controller which starts on another node finds it. Compressed: an object of the
    API has at most 1 MiB."""

    def __init__(self, cluster: api.Api, name: str) -> None:
        self._api = cluster
        self._name = name

    def read(self) -> bytes | None:
        """See Store. UnavailableError, ConfigurationError."""
        try:
            found = self._api.get(objects.CONFIG_MAP, self._name)
        except cluster_errors.NotFoundError:
            return None
        except cluster_errors.ClusterError as exc:
            raise _unreachable(self._name, exc) from exc
        try:
            return base64.b64decode(found.text("binaryData", _KEY), validate=True)
        except ValueError as exc:
            raise errors.InvalidInputError(f"ConfigMap {self._name}: {_KEY} is not base64") from exc

    def write(self, data: bytes) -> None:
        """See Store."""
        body = {"binaryData": {_KEY: base64.b64encode(data).decode()}}
        try:
            self._api.apply(objects.CONFIG_MAP, self._name, body)
        except cluster_errors.ClusterError as exc:
            raise _unreachable(self._name, exc) from exc


def _unreachable(name: str, exc: cluster_errors.ClusterError) -> errors.WarmPoolError:
    text = f"ConfigMap {name}: {exc}"
    if isinstance(exc, (cluster_errors.ForbiddenError, cluster_errors.InvalidError)):
        return errors.ConfigurationError(text)
    return errors.UnavailableError(text)
