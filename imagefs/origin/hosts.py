"""containerd's certs.d: which hosts stand for a registry, in which order, and how each is spoken to. Pure.

A registry's folder holds `hosts.toml`: one `[host."URL"]` table for each mirror, tried in the order of the
file, then the registry itself (`server`), to which the keys outside of any table belong. What is written for
containerd means the same here: capabilities (pull: by digest; resolve: by tag and what refers to an image;
push: writing), `ca`, `client`, `skip_verify`, `header`, `override_path`, `dial_timeout`. Keys that we do not
know are left to containerd. mirrors.py reads the files and carries this out.

Header fields may hold credentials: they are in no repr and no message.
"""

from __future__ import annotations

import dataclasses
import posixpath
import re
import tomllib
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Literal
from urllib.parse import urlsplit

from imagefs import duration, errors

FILE_NAME = "hosts.toml"
DEFAULT_FOLDER = "_default"
MAX_FILE_BYTES = 1 << 20
MAX_HOSTS = 64
DOCKER_HUB = "docker.io"
_DOCKER_HUB_SERVER = "https://registry-1.docker.io"

Capability = Literal["pull", "resolve", "push"]
ALL: frozenset[Capability] = frozenset({"pull", "resolve", "push"})

_FIELD_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")
_NETLOC = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9a-fA-F:.]+\])(?::[0-9]{1,5})?\Z")
_PATH = re.compile(r"(?:/[A-Za-z0-9._~%+-]+)*\Z")


@dataclasses.dataclass(frozen=True, slots=True)
class Host:
    """One host. `url` is scheme, host and port, None for the registry's own by its name; `path` is what comes
    before /REPOSITORY, without a slash at its end. A client certificate is (certificate, key), or one file
    with both. `fields` are sent with each request."""

    url: str | None = None
    path: str = "/v2"
    capabilities: frozenset[Capability] = ALL
    ca_files: tuple[PurePath, ...] = ()
    client_certificates: tuple[tuple[PurePath, PurePath | None], ...] = ()
    skip_verify: bool = False
    dial_timeout_seconds: float | None = None
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Hosts:
    """The hosts of one registry: mirrors in the order of the file, then the registry itself."""

    mirrors: tuple[Host, ...] = ()
    server: Host = dataclasses.field(default_factory=Host)


def folder_names(host: str) -> tuple[str, ...]:
    """The folders to look for, the first that exists counts: HOST_PORT_, HOST:PORT, then the default."""
    name, colon, port = host.rpartition(":")
    with_port = (f"{name}_{port}_",) if colon and name else ()
    return (*with_port, host, DEFAULT_FOLDER)


def default_server(host: str) -> str | None:
    """The URL of the registry called `host` where it is not its name."""
    return _DOCKER_HUB_SERVER if host == DOCKER_HUB else None


def parse(text: str, folder: PurePath) -> Hosts:
    """Parse a hosts.toml; file names in it are relative to its `folder`. InvalidInputError names the key."""
    where = str(folder / FILE_NAME)
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as exc:
        raise errors.InvalidInputError(f"{where}: not TOML: {exc}") from exc
    tables = document.get("host", {})
    if not isinstance(tables, dict) or len(tables) > MAX_HOSTS:
        raise errors.InvalidInputError(f"{where}: host is not a table of at most {MAX_HOSTS} hosts")
    mirrors = []
    for name, table in tables.items():
        key = f"{where}: host {_shown(name)}"
        if not isinstance(table, dict):
            raise errors.InvalidInputError(f"{key} is not a table")
        mirrors.append(_host(name, table, folder, key))
    server = document.get("server") or None
    if server is not None and not isinstance(server, str):
        raise errors.InvalidInputError(f"{where}: server is not a string")
    return Hosts(tuple(mirrors), _host(server, document, folder, where))


def from_certificates(names: list[str], folder: PurePath) -> Hosts:
    """What a folder without hosts.toml says by its files: X.crt are authorities, X.cert and X.key a client's
    certificate, as Docker has it."""
    have = set(names)
    authorities = tuple(folder / name for name in sorted(have) if name.endswith(".crt"))
    clients: list[tuple[PurePath, PurePath | None]] = []
    for name in sorted(have):
        if name.endswith(".cert"):
            key = name[: -len(".cert")] + ".key"
            clients.append((folder / name, folder / key if key in have else None))
    return Hosts(server=Host(ca_files=authorities, client_certificates=tuple(clients)))


def _host(name: str | None, table: Mapping[str, Any], folder: PurePath, where: str) -> Host:
    url, path = None, ""
    override = _boolean(table, "override_path", where)
    if name is not None:
        url, path = _address(name, where)
    if not override and not path.endswith("/v2"):
        path += "/v2"
    timeout = table.get("dial_timeout")
    return Host(
        url=url,
        path=path,
        capabilities=_capabilities(table.get("capabilities"), where),
        ca_files=tuple(folder / file for file in _files(table.get("ca"), f"{where}: ca")),
        client_certificates=_clients(table.get("client"), folder, f"{where}: client"),
        skip_verify=_boolean(table, "skip_verify", where),
        dial_timeout_seconds=duration.parse(timeout, f"{where}: dial_timeout") if timeout else None,
        fields=_fields(table.get("header"), f"{where}: header"),
    )


def _address(name: str, where: str) -> tuple[str, str]:
    try:
        parts = urlsplit(name if name.startswith(("https://", "http://")) else f"https://{name}")
        port = parts.port
    except ValueError as exc:
        raise errors.InvalidInputError(f"{where}: not a URL") from exc
    if not _NETLOC.match(parts.netloc) or port == 0 or parts.query or parts.fragment:
        raise errors.InvalidInputError(f"{where}: expected http(s)://HOST[:PORT][/PATH]")
    path = posixpath.normpath(parts.path).rstrip("/") if parts.path else ""
    path = re.sub(r"\A/+", "/", path)
    if not _PATH.match(path):
        raise errors.InvalidInputError(f"{where}: {path!r} is no path for a registry")
    return f"{parts.scheme}://{parts.netloc}", path


def _capabilities(value: object, where: str) -> frozenset[Capability]:
    if value is None or value == []:
        return ALL
    if not isinstance(value, list):
        raise errors.InvalidInputError(f"{where}: capabilities is not a list")
    out: set[Capability] = set()
    for entry in value:
        if not isinstance(entry, str) or entry not in ALL:
            raise errors.InvalidInputError(
                f"{where}: capabilities: {str(entry)[:40]!r}: pull, resolve and push are known"
            )
        out.add(entry)
    return frozenset(out)


def _files(value: object, where: str) -> list[str]:
    if value is None:
        return []
    out: list[str] = []
    for file in value if isinstance(value, list) else [value]:
        if not isinstance(file, str) or not file or "\0" in file:
            raise errors.InvalidInputError(f"{where} is not a file name or a list of them")
        out.append(file)
    return out


def _clients(value: object, folder: PurePath, where: str) -> tuple[tuple[PurePath, PurePath | None], ...]:
    """A file name; or a list of file names and [certificate, key] pairs."""
    out: list[tuple[PurePath, PurePath | None]] = []
    entries = value if isinstance(value, list) else [] if value is None else [value]
    for entry in entries:
        if isinstance(entry, list) and len(entry) == 2 and entry[1] == "":
            entry = entry[:1]  # how containerd's users write "the key is in the same file"
        names = _files(entry, where)
        if not 1 <= len(names) <= 2:
            raise errors.InvalidInputError(f"{where}: a pair is [certificate, key]")
        out.append((folder / names[0], folder / names[1] if len(names) == 2 else None))
    return tuple(out)


def _fields(value: object, where: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise errors.InvalidInputError(f"{where} is not a table")
    out = {}
    for name, content in value.items():
        parts = content if isinstance(content, list) else [content]
        if not _FIELD_NAME.match(name):
            raise errors.InvalidInputError(f"{where}: {name[:40]!r} is no name of a header field")
        for part in parts:
            if not isinstance(part, str) or not part.isascii() or not part.isprintable():
                raise errors.InvalidInputError(
                    f"{where}: the value of {name} is not what a header field can hold"
                )
        out[name] = ", ".join(parts)
    return out


def _boolean(table: Mapping[str, Any], key: str, where: str) -> bool:
    value = table.get(key, False)
    if not isinstance(value, bool):
        raise errors.InvalidInputError(f"{where}: {key} is not true or false")
    return value


def _shown(name: str) -> str:
    """A host's name for messages: without what could be a password."""
    return repr(name.rpartition("@")[2][:200])
