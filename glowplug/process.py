"""What `glowplug run` starts: arguments, environment, directory and user, from image config and options.

Pure. Configs and the image's /etc/passwd and /etc/group are strangers' input; what is not as it should be
raises InvalidInputError naming the field. Follows the OCI image spec's "config" object.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from imagefs import errors

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclasses.dataclass(frozen=True, slots=True)
class Process:
    """`user` is NAME|UID[:GROUP|GID], resolved inside the image by `resolve_user`; "" is root."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    directory: str
    user: str


@dataclasses.dataclass(frozen=True, slots=True)
class Identity:
    """Numbers that a process runs under. `home` is "" when the image has no such user."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


def from_config(
    config: Mapping[str, Any],
    command: Sequence[str],
    *,
    environment: Sequence[str] = (),
    directory: str | None = None,
    user: str | None = None,
    terminal: str | None = None,
) -> Process:
    """The process that an image config and the options make. `command` replaces Entrypoint and Cmd
    altogether; `environment` is KEY=VALUE; `terminal` is TERM's value where there is a terminal."""
    own = config.get("config") or {}
    if not isinstance(own, dict):
        raise errors.InvalidInputError("image config: config is not an object")
    argv = list(command) or [*_strings(own, "Entrypoint"), *_strings(own, "Cmd")]
    if not argv:
        raise errors.InvalidInputError("the image names no command; give one after --")
    values = {"PATH": DEFAULT_PATH}
    if terminal:
        values["TERM"] = terminal
    for assignment in [*_strings(own, "Env"), *environment]:
        key, equals, value = assignment.partition("=")
        if not key or not equals:
            raise errors.InvalidInputError(f"environment {assignment!r}: expected KEY=VALUE")
        values[key] = value
    where = directory or _string(own, "WorkingDir") or "/"
    if not where.startswith("/"):
        raise errors.InvalidInputError(f"working directory {where!r} is not an absolute path")
    return Process(tuple(argv), values, where, _string(own, "User") if user is None else user)


def resolve_user(spec: str, passwd: bytes, group: bytes) -> Identity:
    """The numbers behind NAME|UID[:GROUP|GID], by an image's /etc/passwd and /etc/group. A user that the
    image does not know must be a number; its group is 0 unless given."""
    name, _, group_name = spec.partition(":")
    name = name or "0"
    uid, gid, home, login = _number(name), 0, "", name
    for fields in _rows(passwd, 7):
        if fields[0] == name or (uid is not None and fields[2] == str(uid)):
            uid, gid, home, login = int(fields[2]), int(fields[3]), fields[5], fields[0]
            break
    if uid is None:
        raise errors.InvalidInputError(f"user {name!r} is not in the image's /etc/passwd")
    rows = list(_rows(group, 4))
    if group_name:
        named = [int(fields[2]) for fields in rows if fields[0] == group_name]
        number = named[0] if named else _number(group_name)
        if number is None:
            raise errors.InvalidInputError(f"group {group_name!r} is not in the image's /etc/group")
        return Identity(uid, number, (number,), home)
    extra = {int(fields[2]) for fields in rows if login in fields[3].split(",")}
    return Identity(uid, gid, tuple(sorted({gid, *extra})), home)


def _rows(data: bytes, columns: int) -> list[list[str]]:
    """The well-formed lines of a passwd-like file: numbers where numbers belong."""
    out = []
    for line in data.decode("utf-8", "surrogateescape").splitlines():
        fields = line.split(":")
        if len(fields) == columns and _number(fields[2]) is not None:
            if columns == 7 and _number(fields[3]) is None:
                continue
            out.append(fields)
    return out


def _number(text: str) -> int | None:
    # At most ten digits: Python refuses to parse thousands, with an exception of its own.
    plain = text.isascii() and text.isdigit() and len(text) <= 10
    return int(text) if plain and int(text) < (1 << 32) - 1 else None


def _strings(value: Mapping[str, Any], field: str) -> list[str]:
    found = value.get(field) or []
    if not isinstance(found, list) or not all(isinstance(item, str) and "\0" not in item for item in found):
        raise errors.InvalidInputError(f"image config: {field} is not a list of strings")
    return found


def _string(value: Mapping[str, Any], field: str) -> str:
    found = value.get(field) or ""
    if not isinstance(found, str) or "\0" in found:
        raise errors.InvalidInputError(f"image config: {field} is not a string")
    return found
