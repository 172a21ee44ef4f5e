"""What a snapshot is: its words, the filters that find it, its labels, the mount that shows it.

Pure. `store.py` keeps these values, `snapshotter.py` decides with them, `service.py` puts them on the wire.

Follows containerd's snapshots API v1 (kinds, label names) and its filter language: selectors separated by
commas, all of which must match; several filters are alternatives.

    selector  = field path, then nothing (present), == value, != value or ~= regular expression
    field path = name, kind, parent, labels."any.key" (a part is letters, digits, _ or quoted)
    value     = up to a comma or white space, or quoted as in Go; an expression may be quoted by / or |
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from imagefs import errors

REF_LABEL = "containerd.io/snapshot.ref"
"""On a Prepare: the chain id that it will be committed as. A snapshotter that has it already says so."""

UID_MAPPING_LABEL = "containerd.io/snapshot/uidmapping"
GID_MAPPING_LABEL = "containerd.io/snapshot/gidmapping"

MAX_LABEL_BYTES = 4096
"""A label's key and value together, containerd's limit."""


class Kind(enum.IntEnum):
    """With the numbers of the wire."""

    VIEW = 1
    ACTIVE = 2
    COMMITTED = 3


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """What a snapshot itself takes, its parents not counted."""

    inodes: int
    size_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Info:
    """A snapshot as containerd sees it. `parent` is a name, empty for none."""

    name: str
    parent: str
    kind: Kind
    labels: Mapping[str, str]
    created_ns: int
    updated_ns: int


@dataclasses.dataclass(frozen=True, slots=True)
class Mount:
    """One mount that containerd is to make."""

    type: str
    source: str
    options: tuple[str, ...]


# --- labels ----------------------------------------------------------------------------------------------


def checked_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """The labels that are kept: one with an empty value is none. Raises InvalidInputError when one is too
    long."""
    for key, value in labels.items():
        if len(key.encode()) + len(value.encode()) > MAX_LABEL_BYTES:
            raise errors.InvalidInputError(
                f"label {key[:64]!r}: key and value are more than {MAX_LABEL_BYTES} bytes; "
                "make one of them shorter"
            )
    return {key: value for key, value in labels.items() if value}


def updated_labels(
    old: Mapping[str, str], new: Mapping[str, str], field_paths: Sequence[str]
) -> dict[str, str]:
    """Labels after an Update with this field mask (none: all of them are replaced). InvalidInputError for a
    field that no Update may change."""
    result = dict(old) if field_paths else dict(new)
    for path in field_paths:
        if path == "labels":
            result = dict(new)
        elif path.startswith("labels."):
            key = path.removeprefix("labels.")
            result[key] = new.get(key, "")
        else:
            raise errors.InvalidInputError(f"field {path!r} of a snapshot cannot be updated; labels can")
    return checked_labels(result)


@dataclasses.dataclass(frozen=True, slots=True)
class IdMapping:
    """A user namespace: ranges of (id in the container, id on the host, length), for users and for groups."""

    uids: tuple[tuple[int, int, int], ...]
    gids: tuple[tuple[int, int, int], ...]

    def host_ids(self, uid: int, gid: int) -> tuple[int, int]:
        """Ids on the host; those that the namespace does not have become its root's."""
        return _host_id(self.uids, uid), _host_id(self.gids, gid)


def id_mapping(labels: Mapping[str, str]) -> IdMapping | None:
    """The user namespace that a snapshot is made for, or None. Raises InvalidInputError."""
    if UID_MAPPING_LABEL not in labels and GID_MAPPING_LABEL not in labels:
        return None
    return IdMapping(_ranges(labels, UID_MAPPING_LABEL), _ranges(labels, GID_MAPPING_LABEL))


def _ranges(labels: Mapping[str, str], key: str) -> tuple[tuple[int, int, int], ...]:
    result = []
    for part in labels.get(key, "").split(","):
        match = re.fullmatch(r"(\d{1,10}):(\d{1,10}):(\d{1,10})", part, re.ASCII)
        if match is None:
            raise errors.InvalidInputError(
                f"label {key}: {part[:64]!r} is not CONTAINER:HOST:LENGTH "
                "(users and groups are both mapped, or none)"
            )
        result.append((int(match[1]), int(match[2]), int(match[3])))
    ranges = tuple(result)
    if not any(start == 0 and length for start, _, length in ranges):
        raise errors.InvalidInputError(f"label {key}: {labels[key][:64]!r} does not map the id 0")
    return ranges


def _host_id(ranges: tuple[tuple[int, int, int], ...], number: int) -> int:
    for start, host, length in ranges:
        if start <= number < start + length:
            return host + number - start
    return _host_id(ranges, 0)


# --- mounts ----------------------------------------------------------------------------------------------


def chain_mount(kind: Kind, own: Path, lower: Sequence[Path], lazy: bool, labels: Mapping[str, str]) -> Mount:
    """The mount of an active snapshot or a view, in the forms that containerd's own overlayfs uses.

    `own` is the snapshot's folder (fs and work in it), `lower` the parents' directories, the topmost first.
    `lazy`: there is a lazy layer among them. A view of one then has its own fs as its topmost directory: it
    carries the root's attributes, and the whiteouts of a lowest layer are never shown as they lie there.
    """
    identity = [
        f"{option}={labels[key]}"
        for option, key in (("uidmap", UID_MAPPING_LABEL), ("gidmap", GID_MAPPING_LABEL))
        if key in labels
    ]
    if kind is Kind.VIEW and lazy:
        lower = [own / "fs", *lower]
    if not lower or (kind is Kind.VIEW and len(lower) == 1):
        source = lower[0] if lower else own / "fs"
        writable = "ro" if kind is Kind.VIEW else "rw"
        return Mount("bind", str(source), (*identity, writable, "rbind"))
    options = identity
    if kind is Kind.ACTIVE:
        options += [f"workdir={own / 'work'}", f"upperdir={own / 'fs'}"]
    options += ["lowerdir=" + ":".join(str(directory) for directory in lower), "index=off"]
    return Mount("overlay", "overlay", tuple(options))


# --- filters ---------------------------------------------------------------------------------------------

Filter = Callable[[Info], bool]


def parse_filters(texts: Iterable[str]) -> Filter:
    """One predicate for all: it is true where one of the filters is; no filters: always. Raises
    InvalidInputError that names the filter and the place in it."""
    alternatives = [_Parser(text).selectors() for text in texts]

    def matches(info: Info) -> bool:
        return not alternatives or any(all(each(info) for each in selectors) for selectors in alternatives)

    return matches


def _field(info: Info, path: Sequence[str]) -> str | None:
    match path:
        case ["name"]:
            return info.name
        case ["kind"]:
            return info.kind.name.lower()
        case ["parent"]:
            return info.parent
        case ["labels", *key] if key:
            return info.labels.get(".".join(key))
    return None


_FIELD = re.compile(r"[A-Za-z0-9_]+")
_OPERATOR = re.compile(r"[=!~]+")
_VALUE = re.compile(r"[^\s,]+")
_SPACE = re.compile(r"\s*")
_ESCAPE = re.compile(r"x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|[0-7]{3}|.", re.DOTALL)
_ESCAPED = {"a": 7, "b": 8, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11, "\\": 92}


class _Parser:
    """Recursive descent over one filter."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def selectors(self) -> list[Filter]:
        """The whole filter; empty means no condition."""
        if not self._text:
            return []
        result = [self._selector()]
        while self._peek():
            if self._peek() != ",":
                raise self._error("a comma between two selectors is missing")
            self._at += 1
            result.append(self._selector())
        return result

    def _selector(self) -> Filter:
        path = [self._part()]
        while self._peek() == ".":
            self._at += 1
            path.append(self._part())
        if self._peek() in ("", ","):
            return lambda info: _field(info, path) is not None
        operator = self._token(_OPERATOR) or ""
        if operator == "==":
            value = self._value('"')
            return lambda info: _field(info, path) == value
        if operator == "!=":
            value = self._value('"')
            return lambda info: (_field(info, path) or "") != value
        if operator == "~=":
            expression = self._expression()
            return lambda info: expression.search(_field(info, path) or "") is not None
        raise self._error("expected ==, != or ~=")

    def _part(self) -> str:
        if self._peek() == '"':
            return self._quoted('"')
        token = self._token(_FIELD)
        if token is None:
            raise self._error("expected a field's name or a quoted one")
        return token

    def _value(self, quotes: str) -> str:
        first = self._peek()
        if first and first in quotes:
            return self._quoted(first)
        token = self._token(_VALUE)
        if token is None:
            raise self._error("expected a value")
        return token

    def _expression(self) -> re.Pattern[str]:
        text = self._value('"/|')
        try:
            return re.compile(text)
        except (re.error, RecursionError, OverflowError) as exc:
            raise self._error(f"not a regular expression: {exc}") from exc

    def _quoted(self, quote: str) -> str:
        result = bytearray()
        self._at += 1
        while True:
            if self._at >= len(self._text) or self._text[self._at] == "\n":
                raise self._error(f"the closing {quote} is missing")
            character = self._text[self._at]
            self._at += 1
            if character == quote:
                break
            result += self._escape(quote) if character == "\\" else character.encode(errors="replace")
        return result.decode(errors="replace")

    def _escape(self, quote: str) -> bytes:
        match = _ESCAPE.match(self._text, self._at)
        if match is None:
            raise self._error("an escape that ends with the filter")
        self._at = match.end()
        text = match[0]
        if text == quote:
            return quote.encode()
        if text in _ESCAPED:
            return bytes([_ESCAPED[text]])
        if len(text) > 1 and text[0] in "uU" and int(text[1:], 16) <= 0x10FFFF:
            return chr(int(text[1:], 16)).encode(errors="replace")
        if len(text) > 1 and text[0] not in "uU":
            number = int(text[1:], 16) if text[0] == "x" else int(text, 8)
            if number < 256:
                return bytes([number])
        raise self._error("an escape that Go does not know")

    def _peek(self) -> str:
        self._skip_space()
        return self._text[self._at : self._at + 1]

    def _token(self, pattern: re.Pattern[str]) -> str | None:
        self._skip_space()
        match = pattern.match(self._text, self._at)
        if match is None:
            return None
        self._at = match.end()
        return match[0]

    def _skip_space(self) -> None:
        match = _SPACE.match(self._text, self._at)
        assert match is not None
        self._at = match.end()

    def _error(self, why: str) -> errors.InvalidInputError:
        return errors.InvalidInputError(f"filter {self._text[:200]!r}, at character {self._at}: {why}")
