"""Where demand comes from: how many nodes of each class real work has or waits for, and which images it runs.

Called by the controller's thread, at each look. A source that does not answer, or whose answer makes no
sense, gives None for the classes that depend on it: a gap, which is not a demand of zero; why is in
`trouble`. Everything that is read is bounded.
"""

from __future__ import annotations

import csv
import datetime
import http.client
import io
import json
import math
import os
import socket
import time
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from warmpool import errors
from warmpool.settings import FileDemand, ServeDemand, ServedEndpoint

_ASK_SECONDS = 5.0
_MAX_ANSWER_BYTES = 8 << 20
_TAIL_BYTES = 256 << 10
_MOST_NODES = 1_000_000
_MAX_IMAGES = 64
"""A cluster where every pod has an image of its own has nothing to fetch ahead."""


class Source(Protocol):
    """See the module."""

    @property
    def trouble(self) -> Mapping[str, str]:
        """Why the last look left classes, or images, out: a place, and what was wrong there."""

    def wanted(self) -> Mapping[str, int | None]:
        """Nodes wanted, by class."""

    def chances(self) -> Mapping[str, Mapping[str, float]]:
        """By class, how likely it is that a node's next work runs each image."""

    def close(self) -> None:
        """Let go of connections."""


class Cluster(Protocol):
    """What of providers.kubernetes is used here."""

    def wanted(self) -> Mapping[str, int]:
        """See Kubernetes."""

    def chances(self) -> Mapping[str, Mapping[str, float]]:
        """See Kubernetes."""


class KubernetesSource:
    """Pods, as the provider sees them."""

    def __init__(self, cluster: Cluster, classes: tuple[str, ...]) -> None:
        self._cluster = cluster
        self._classes = classes
        self.trouble: Mapping[str, str] = {}

    def wanted(self) -> Mapping[str, int | None]:
        """See Source."""
        try:
            found = self._cluster.wanted()
        except errors.WarmPoolError as exc:
            self.trouble = {"kubernetes": str(exc)}
            return dict.fromkeys(self._classes)
        self.trouble = {}
        return dict(found)

    def chances(self) -> Mapping[str, Mapping[str, float]]:
        """See Source."""
        try:
            found = self._cluster.chances()
        except errors.WarmPoolError as exc:
            self.trouble = {"kubernetes": str(exc)}
            return {}
        return {name: _likeliest(several) for name, several in found.items()}

    def close(self) -> None:
        """The provider is closed by who made it."""


class ServeSource:
    """The autoscalers of `glowplug serve`: the replicas that they want, whether or not there is room for
    them."""

    def __init__(self, settings: ServeDemand) -> None:
        self._settings = settings
        self._images: dict[int, tuple[str, int]] = {}
        self.trouble: Mapping[str, str] = {}

    def wanted(self) -> Mapping[str, int | None]:
        """See Source. Endpoints share nodes of a class in whole nodes each."""
        out: dict[str, int | None] = {}
        trouble: dict[str, str] = {}
        for number, endpoint in enumerate(self._settings.endpoints):
            where = endpoint.url or endpoint.socket or ""
            try:
                replicas = _replicas(_get(endpoint, "/api/v1/status"), where)
                self._remember(number, endpoint, replicas)
                nodes: int | None = math.ceil(replicas / endpoint.replicas_per_node)
            except errors.WarmPoolError as exc:
                trouble[where] = str(exc)
                nodes = None
            before = out.get(endpoint.node_class, 0)
            out[endpoint.node_class] = None if nodes is None or before is None else before + nodes
        self.trouble = trouble
        return out

    def chances(self) -> Mapping[str, Mapping[str, float]]:
        """See Source. An endpoint that has no replica now may have one next: it counts as one."""
        totals: dict[str, int] = {}
        counts: dict[str, dict[str, int]] = {}
        for number, endpoint in enumerate(self._settings.endpoints):
            if number in self._images:
                image, replicas = self._images[number]
                totals[endpoint.node_class] = totals.get(endpoint.node_class, 0) + max(1, replicas)
                several = counts.setdefault(endpoint.node_class, {})
                several[image] = several.get(image, 0) + max(1, replicas)
        return {
            name: _likeliest({image: count / totals[name] for image, count in several.items()})
            for name, several in counts.items()
        }

    def close(self) -> None:
        """Connections are not kept."""

    def _remember(self, number: int, endpoint: ServedEndpoint, replicas: int) -> None:
        image = endpoint.image
        if image is None and endpoint.socket is not None:
            document = _get(endpoint, "/api/v1/document").get("document")
            said = document.get("image") if isinstance(document, Mapping) else None
            image = said if isinstance(said, str) and said else None
        if image is None:
            self._images.pop(number, None)
        else:
            self._images[number] = (image, replicas)


class FileSource:
    """A CSV file that somebody appends to: `time,node_class,wanted`, of which the last line of each class
    counts. `time` is seconds since the epoch, or RFC 3339."""

    def __init__(
        self, settings: FileDemand, classes: tuple[str, ...], clock: Callable[[], float] = time.time
    ) -> None:
        self._settings = settings
        self._classes = classes
        self._clock = clock
        self.trouble: Mapping[str, str] = {}

    def wanted(self) -> Mapping[str, int | None]:
        """See Source."""
        path = self._settings.path
        out: dict[str, int | None] = dict.fromkeys(self._classes)
        trouble: dict[str, str] = {}
        try:
            latest = last_samples(_tail(Path(path)), path)
        except errors.WarmPoolError as exc:
            self.trouble = {path: str(exc)}
            return out
        now = self._clock()
        for name in self._classes:
            if name not in latest:
                trouble[name] = f"{path}: no line of {name} among the last {_TAIL_BYTES >> 10} KiB"
            elif now - latest[name][0] > self._settings.stale_after_seconds:
                trouble[name] = f"{path}: the last line of {name} is {now - latest[name][0]:.0f} s old"
            else:
                out[name] = latest[name][1]
        self.trouble = trouble
        return out

    def chances(self) -> Mapping[str, Mapping[str, float]]:
        """Nothing: a file says numbers."""
        return {}

    def close(self) -> None:
        """Nothing is kept open."""


def last_samples(text: str, where: str) -> dict[str, tuple[float, int]]:
    """The last sample of each class: its time, and the nodes wanted. A last line without its end is still
    being written, and is left out. InvalidInputError names the line, counted from the end of the file."""
    complete = text[: text.rfind("\n") + 1]
    try:
        lines = list(csv.reader(io.StringIO(complete, newline="")))
    except csv.Error as exc:
        raise errors.InvalidInputError(f"{where}: not CSV: {exc}") from exc
    out: dict[str, tuple[float, int]] = {}
    for number, fields in enumerate(lines):
        from_end = len(lines) - number
        if not fields or (number == 0 and fields[:1] == ["time"]):
            continue
        if len(fields) != 3:
            raise errors.InvalidInputError(
                f"{where}, line {from_end} from the end: {len(fields)} fields, not time,node_class,wanted"
            )
        at, wanted = _time(fields[0]), fields[2].strip()
        if at is None:
            raise errors.InvalidInputError(
                f"{where}, line {from_end} from the end: {fields[0][:40]!r} is no time; give seconds since "
                "the epoch or RFC 3339"
            )
        if not (wanted.isascii() and wanted.isdigit() and len(wanted) < 8 and int(wanted) <= _MOST_NODES):
            raise errors.InvalidInputError(
                f"{where}, line {from_end} from the end: {wanted[:40]!r} is no number of nodes"
            )
        out[fields[1].strip()] = (at, int(wanted))
    return out


def _time(text: str) -> float | None:
    try:
        found = float(text)
    except ValueError:
        try:
            parsed = datetime.datetime.fromisoformat(text.strip())
            found = (parsed if parsed.tzinfo else parsed.replace(tzinfo=datetime.UTC)).timestamp()
        except (ValueError, OverflowError):
            return None
    return found if math.isfinite(found) else None


def _tail(path: Path) -> str:
    """The end of a file, from the beginning of a line."""
    try:
        with path.open("rb") as file:
            size_bytes = file.seek(0, os.SEEK_END)
            start = max(0, size_bytes - _TAIL_BYTES)
            file.seek(start)
            data = file.read(_TAIL_BYTES)
    except OSError as exc:
        raise errors.UnavailableError(f"demand.path: {path}: {exc.strerror or exc}") from exc
    if start:
        data = data[data.find(b"\n") + 1 :]
    return data.decode("utf-8", "replace")


def _likeliest(chances: Mapping[str, float]) -> dict[str, float]:
    best = sorted(chances.items(), key=lambda item: (-item[1], item[0]))
    return dict(best[:_MAX_IMAGES])


def _replicas(document: Mapping[str, Any], where: str) -> int:
    wanted = document.get("wanted_replicas")
    if type(wanted) is not int or not 0 <= wanted <= _MOST_NODES:
        raise errors.InvalidInputError(f"{where}: wanted_replicas is {wanted!r:.40}, no number of replicas")
    return wanted


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_ASK_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_ASK_SECONDS)
        self.sock.connect(self._path)


def _get(endpoint: ServedEndpoint, path: str) -> Mapping[str, Any]:
    where = endpoint.url or endpoint.socket or ""
    connection = _connection(endpoint)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        data = answer.read(_MAX_ANSWER_BYTES)
        document = json.loads(data) if answer.status == 200 else None
    except (OSError, http.client.HTTPException) as exc:
        raise errors.UnavailableError(f"{where}: {exc or type(exc).__name__}") from exc
    except (ValueError, RecursionError) as exc:
        raise errors.InvalidInputError(f"{where}{path}: not JSON: {exc}") from exc
    finally:
        connection.close()
    if not isinstance(document, Mapping):
        raise errors.UnavailableError(f"{where}{path}: HTTP {answer.status}, or no JSON object")
    return document


def _connection(endpoint: ServedEndpoint) -> http.client.HTTPConnection:
    if endpoint.socket is not None:
        return _UnixConnection(endpoint.socket)
    parts = urllib.parse.urlsplit(endpoint.url or "")
    make = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    try:
        return make(parts.hostname or "", parts.port, timeout=_ASK_SECONDS)
    except ValueError as exc:
        raise errors.ConfigurationError(f"demand.endpoints: {endpoint.url!r}: {exc}") from exc
