"""Registry credentials: what one is, where the registry client asks for one, and docker's and podman's files.

`parse` and `choose` are pure; `Store` reads the files again for every look-up, so that a `docker login` or a
rotated secret counts without a restart. Look-ups happen only when a registry asks (401). A credential is
never part of a message, a log or a repr.

A look-up names the credentials that were refused meanwhile, by fingerprint: the next source, or the next of
several secrets for one registry, gets its turn, and whoever caches answers knows that this one went stale.

Formats: docker's config.json (`auths`, `credsStore`, `credHelpers`), podman's auth.json (the same, with
keys that may name a repository), and the docker-credential-NAME helpers' `get` over stdin and stdout.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Protocol

from imagefs import artifact, errors

_MAX_CONFIG_BYTES = 4 * 1024 * 1024
_HELPER_TIMEOUT_SECONDS = 30.0
_HELPER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_DOCKER_HUB = ("docker.io", "index.docker.io", "registry-1.docker.io")
_DOCKER_HUB_HELPER_KEY = "https://index.docker.io/v1/"
_TOKEN_USER = "<token>"  # noqa: S105  # how helpers mark an identity token


@dataclasses.dataclass(frozen=True, slots=True)
class Credential:
    """Name and password, or an identity token (OAuth2 refresh token), or a ready Bearer token."""

    username: str = ""
    password: str = dataclasses.field(default="", repr=False)
    identity_token: str = dataclasses.field(default="", repr=False)
    registry_token: str = dataclasses.field(default="", repr=False)

    @property
    def fingerprint(self) -> str:
        """Stands for this credential where it is only to be recognized."""
        return hashlib.sha256(json.dumps(dataclasses.astuple(self)).encode()).hexdigest()


def encode(credential: Credential) -> dict[str, str]:
    """A credential as a JSON object; for sockets that are this user's alone."""
    return dataclasses.asdict(credential)


def decode(document: object, where: str) -> Credential:
    """What `encode` made. InvalidInputError names the field, never a value."""
    fields = {field.name for field in dataclasses.fields(Credential)}
    if not isinstance(document, dict) or set(document) != fields:
        raise errors.InvalidInputError(f"{where}: not a credential")
    for name, value in document.items():
        if not isinstance(value, str):
            raise errors.InvalidInputError(f"{where}: {name} is not a string")
    return Credential(**document)


class Source(Protocol):
    """The credentials for one repository of one host. Thread-safe; may block while a helper runs."""

    def look_up(self, refused: Set[str] = frozenset()) -> Credential | None:
        """The credential to use now, none of those with a fingerprint in `refused`; None for anonymous.
        ConfigurationError if a file or helper is broken, UnavailableError if nobody can tell now."""

    def describe(self) -> str:
        """Where credentials are looked for, for messages."""


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """A parsed config file; the keys of `auths` and `helpers` are without scheme and trailing path `/v1/`."""

    auths: Mapping[str, Credential]
    helpers: Mapping[str, str]
    default_helper: str | None


def parse(data: bytes, where: str) -> Config:
    """Parse a config file. InvalidInputError names the file and the field, never a value."""
    document = artifact.parse_json_object(data, where)
    auths: dict[str, Credential] = {}
    for key, entry in _object(document, "auths", where).items():
        if not isinstance(entry, dict):
            raise errors.InvalidInputError(f"{where}: auths[{key!r}] is not an object")
        credential = _parse_entry(entry, f"{where}: auths[{key!r}]")
        if credential is not None:
            auths[_plain_key(key)] = credential
    helpers: dict[str, str] = {}
    for key, name in _object(document, "credHelpers", where).items():
        helpers[_plain_key(key)] = _helper_name(name, f"{where}: credHelpers[{key!r}]")
    default = document.get("credsStore")
    return Config(auths, helpers, _helper_name(default, f"{where}: credsStore") if default else None)


def choose(config: Config, host: str, repository: str) -> Credential | str | None:
    """What `config` has for a repository: a credential, the name of the helper to ask, or None.

    The longest key wins: HOST/a/b before HOST/a before HOST, as podman has it.
    """
    segments = repository.split("/")
    for end in range(len(segments), -1, -1):
        for name in names(host):
            key = "/".join([name, *segments[:end]])
            if key in config.helpers:
                return config.helpers[key]
            if key in config.auths:
                return config.auths[key]
    return config.default_helper


def names(host: str) -> tuple[str, ...]:
    """The names that credentials for a host go by: Docker Hub has three."""
    return _DOCKER_HUB if host in _DOCKER_HUB else (host,)


class Store:
    """A Source: looks into `files`, in order."""

    def __init__(self, files: Sequence[Path], host: str, repository: str) -> None:
        self._files = files
        self._host = host
        self._repository = repository

    def describe(self) -> str:
        """Where credentials are looked for, for messages."""
        return ", ".join(str(file) for file in self._files) or "no configuration file"

    def look_up(self, refused: Set[str] = frozenset()) -> Credential | None:
        """As Source.look_up: the credential as the files have it now."""
        for file in self._files:
            try:
                data = _read(file)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as exc:
                raise errors.ConfigurationError(f"cannot read credentials from {file}: {exc}") from exc
            try:
                found = choose(parse(data, str(file)), self._host, self._repository)
            except errors.InvalidInputError as exc:
                raise errors.ConfigurationError(str(exc)) from exc
            if isinstance(found, str):
                found = _ask_helper(found, self._host)
            if found is not None and found.fingerprint not in refused:
                return found
        return None


def config_files(explicit: Path | None, environment: Mapping[str, str]) -> list[Path]:
    """The files to look in: `explicit` (file or folder) alone if given, else docker's and podman's places."""
    if explicit is not None:
        return [explicit / "config.json" if explicit.is_dir() else explicit]
    files = []
    if environment.get("DOCKER_CONFIG"):
        files.append(Path(environment["DOCKER_CONFIG"]) / "config.json")
    elif environment.get("HOME"):
        files.append(Path(environment["HOME"]) / ".docker" / "config.json")
    if environment.get("XDG_RUNTIME_DIR"):
        files.append(Path(environment["XDG_RUNTIME_DIR"]) / "containers" / "auth.json")
    return files


def _read(file: Path) -> bytes:
    with file.open("rb") as stream:
        data = stream.read(_MAX_CONFIG_BYTES + 1)
    if len(data) > _MAX_CONFIG_BYTES:
        raise errors.ConfigurationError(f"{file} is larger than {_MAX_CONFIG_BYTES} bytes")
    return data


def _ask_helper(name: str, host: str) -> Credential | None:
    program = f"docker-credential-{name}"
    key = _DOCKER_HUB_HELPER_KEY if host in _DOCKER_HUB else host
    try:
        done = subprocess.run(
            [program, "get"],
            input=key.encode(),
            capture_output=True,
            timeout=_HELPER_TIMEOUT_SECONDS,
            check=False,
            env=dict(os.environ),
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise errors.ConfigurationError(f"credential helper {program} for {host}: {exc}") from exc
    if done.returncode != 0:
        # Helpers answer "credentials not found" on stdout with status 1; that is no error.
        if b"not found" in done.stdout.lower():
            return None
        raise errors.ConfigurationError(
            f"credential helper {program} for {host} failed with status {done.returncode}; "
            f"try: echo {key} | {program} get"
        )
    try:
        answer = json.loads(done.stdout)
        username, secret = answer["Username"], answer["Secret"]
    except (ValueError, LookupError, TypeError, RecursionError) as exc:
        raise errors.ConfigurationError(f"credential helper {program}: answer is not understood") from exc
    if not isinstance(username, str) or not isinstance(secret, str):
        raise errors.ConfigurationError(f"credential helper {program}: answer is not understood")
    if username == _TOKEN_USER:
        return Credential(identity_token=secret)
    return Credential(username=username, password=secret)


def _parse_entry(entry: Mapping[str, object], where: str) -> Credential | None:
    texts = {}
    for field in ("auth", "username", "password", "identitytoken", "registrytoken"):
        value = entry.get(field) or ""
        if not isinstance(value, str):
            raise errors.InvalidInputError(f"{where}.{field} is not a string")
        if field == "registrytoken" and not (value.isascii() and value.isprintable()):
            raise errors.InvalidInputError(f"{where}.{field} holds what no header field can")
        texts[field] = value
    username, password = texts["username"], texts["password"]
    if texts["auth"]:
        try:
            decoded = base64.b64decode(texts["auth"], validate=True).decode()
        except (binascii.Error, ValueError):
            raise errors.InvalidInputError(f"{where}.auth is not base64 of NAME:PASSWORD") from None
        username, colon, password = decoded.partition(":")
        password = password.rstrip("\0")
        if not colon:
            raise errors.InvalidInputError(f"{where}.auth is not base64 of NAME:PASSWORD")
    if not (password or texts["identitytoken"] or texts["registrytoken"]):
        return None  # what `docker login` with a credsStore leaves behind: {}
    return Credential(username, password, texts["identitytoken"], texts["registrytoken"])


def _object(document: Mapping[str, object], field: str, where: str) -> Mapping[str, object]:
    value = document.get(field) or {}
    if not isinstance(value, dict):
        raise errors.InvalidInputError(f"{where}: {field} is not an object")
    return value


def _helper_name(value: object, where: str) -> str:
    # It becomes part of a program's name: no path may come in with it.
    if not isinstance(value, str) or not _HELPER_NAME.match(value):
        raise errors.InvalidInputError(f"{where} is not the name of a credential helper")
    return value


def _plain_key(key: str) -> str:
    key = key.removeprefix("https://").removeprefix("http://")
    return re.sub(r"/v[12]/?\Z", "", key).rstrip("/")
