"""kubelet's image credential provider plugins, run as kubelet runs them.

`parse_config`, `matches`, `parse_response` and `entries_for` are pure; `Plugins` executes the programs, keeps
their answers for as long as they say, and runs one program once at a time for one question. Any thread.

A plugin gets a CredentialProviderRequest on stdin and answers a CredentialProviderResponse on stdout, within
a minute. What it prints is never quoted: it is what credentials are made of. Formats: the kinds of
kubelet.config.k8s.io and credentialprovider.kubelet.k8s.io, each in v1, v1beta1 and v1alpha1.
Plugins that want a pod's service account token are left out: a node's agent has none of its pods' tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import json
import logging
import os
import re
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from imagefs import artifact, duration, errors
from imagefs.origin import credentials

_log = logging.getLogger(__name__)

_CONFIG_VERSIONS = tuple(f"kubelet.config.k8s.io/{v}" for v in ("v1", "v1beta1", "v1alpha1"))
_API_VERSIONS = tuple(f"credentialprovider.kubelet.k8s.io/{v}" for v in ("v1", "v1beta1", "v1alpha1"))
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\Z")
_MAX_CONFIG_BYTES = 1 << 20
_MAX_ANSWER_BYTES = 1 << 20
_MAX_AUTH_ENTRIES = 1024
_MAX_KEPT = 1024
_EXEC_TIMEOUT_SECONDS = 60.0
_REFUSED_PAUSE_SECONDS = 10.0
"""A plugin whose fresh answer was refused is not run again for the same question before."""
_CONFIG_SUFFIXES = (".yaml", ".yml", ".json")


@dataclasses.dataclass(frozen=True, slots=True)
class Provider:
    """One plugin of the configuration. `environment` may hold secrets."""

    name: str
    match_images: tuple[str, ...]
    default_cache_seconds: float
    api_version: str
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Response:
    """A plugin's answer: `cache_key` Image, Registry or Global; `cache_seconds` None for the default."""

    cache_key: str
    cache_seconds: float | None
    entries: Mapping[str, credentials.Credential] = dataclasses.field(repr=False)


def parse_config(data: bytes, where: str) -> tuple[Provider, ...]:
    """The providers of a CredentialProviderConfig, YAML or JSON. InvalidInputError names the field."""
    try:
        document = yaml.load(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        mark = getattr(exc, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark is not None else ""
        raise errors.InvalidInputError(f"{where}: not YAML{line}") from None
    document = _mapping(document, where)
    if (
        document.get("apiVersion") not in _CONFIG_VERSIONS
        or document.get("kind") != "CredentialProviderConfig"
    ):
        raise errors.InvalidInputError(f"{where}: not a CredentialProviderConfig of a version that is known")
    out = []
    for number, entry in enumerate(_list(document.get("providers"), f"{where}: providers")):
        key = f"{where}: providers[{number}]"
        item = _mapping(entry, key)
        if item.get("tokenAttributes") is not None:
            _log.warning("%s: wants service account tokens of pods, which only kubelet has: left out", key)
            continue
        out.append(_provider(item, key))
    if len({provider.name for provider in out}) != len(out):
        raise errors.InvalidInputError(f"{where}: two providers of one name")
    return tuple(out)


def matches(pattern: str, image: str) -> bool:
    """Whether `image` (HOST[:PORT]/REPOSITORY) is meant by HOST[:PORT][/PATH], where each label of the host
    may have wildcards: the same number of labels, the same port, and the path a prefix."""
    try:
        wanted, found = _split(pattern), _split(image)
    except ValueError:
        return False
    if wanted[1] != found[1] or len(wanted[0]) != len(found[0]) or not found[2].startswith(wanted[2]):
        return False
    return all(fnmatch.fnmatchcase(label, glob) for glob, label in zip(wanted[0], found[0], strict=True))


def entries_for(entries: Mapping[str, credentials.Credential], image: str) -> list[credentials.Credential]:
    """The credentials whose key matches an image, the more specific first, as kubelet orders them."""
    return [entries[key] for key in sorted(entries, reverse=True) if matches(key, image)]


def parse_response(data: bytes, api_version: str, where: str) -> Response:
    """A CredentialProviderResponse. InvalidInputError names the field, never a value."""
    try:
        document = artifact.parse_json_object(data, where)
    except errors.InvalidInputError:
        raise errors.InvalidInputError(f"{where}: the answer is not a JSON object") from None
    if document.get("kind") != "CredentialProviderResponse" or document.get("apiVersion") != api_version:
        raise errors.InvalidInputError(f"{where}: not a CredentialProviderResponse of {api_version}")
    cache_key = document.get("cacheKeyType")
    if cache_key not in ("Image", "Registry", "Global"):
        raise errors.InvalidInputError(f"{where}: cacheKeyType is not Image, Registry or Global")
    cache = document.get("cacheDuration")
    seconds = None if cache is None else duration.parse(cache, f"{where}: cacheDuration")
    auth = document.get("auth")
    auth = _mapping({} if auth is None else auth, f"{where}: auth")
    if len(auth) > _MAX_AUTH_ENTRIES:
        raise errors.InvalidInputError(f"{where}: auth has more than {_MAX_AUTH_ENTRIES} entries")
    entries = {}
    for number, (key, value) in enumerate(auth.items()):
        item = _mapping(value, f"{where}: auth entry {number}")
        username, password = item.get("username", ""), item.get("password", "")
        if not isinstance(username, str) or not isinstance(password, str):
            raise errors.InvalidInputError(f"{where}: auth entry {number}: username or password is no string")
        entries[key] = credentials.Credential(username, password)
    return Response(cache_key, seconds, entries)


@dataclasses.dataclass(frozen=True, slots=True)
class _Kept:
    response: Response = dataclasses.field(repr=False)
    asked_at: float
    until: float


@dataclasses.dataclass(slots=True)
class _Question:
    """What is asked of a program now."""

    turn: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    askers: int = 0
    failure: errors.ImagefsError | None = None


class Plugins:
    """The plugins of one configuration, as a credentials.Part. The configuration is read again when its files
    change. `now` is a monotonic clock in seconds."""

    def __init__(
        self,
        config: Path,
        directory: Path,
        timeout_seconds: float = _EXEC_TIMEOUT_SECONDS,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._directory = directory
        self._timeout_seconds = timeout_seconds
        self._now = now
        self._lock = threading.Lock()
        self._questions: dict[tuple[str, str], _Question] = {}
        self._stamp: object = None
        self._providers: tuple[Provider, ...] = ()
        self._kept: dict[tuple[str, str], _Kept] = {}

    def describe(self) -> str:
        return f"the credential providers of {self._config}"

    def candidates(self, host: str, repository: str, refused: Set[str]) -> Iterable[credentials.Credential]:
        """As credentials.Part: of each plugin that matches, in the order of the configuration. A broken one
        is an error only after the others had their turn."""
        image = f"{host}/{repository}"
        failure: errors.ImagefsError | None = None
        for provider in self._configured():
            if not any(matches(pattern, image) for pattern in provider.match_images):
                continue
            try:
                response = self._answer(provider, host, image, refused)
            except errors.ImagefsError as exc:
                failure = failure or exc
                continue
            yield from entries_for(response.entries, image)
        if failure is not None:
            raise failure

    def _answer(self, provider: Provider, host: str, image: str, refused: Set[str]) -> Response:
        with self._asking(provider.name, image) as question:
            if question.failure is not None:
                raise question.failure
            keys = {"Image": image, "Registry": host, "Global": ""}
            for kind, key in keys.items():
                kept = self._kept.get((provider.name, f"{kind} {key}"))
                if kept is not None and self._counts(kept, image, refused):
                    return kept.response
            try:
                response = self._run(provider, image)
            except errors.ImagefsError as exc:
                question.failure = exc
                raise
            life = (
                provider.default_cache_seconds if response.cache_seconds is None else response.cache_seconds
            )
            if life > 0:
                if len(self._kept) >= _MAX_KEPT:
                    self._kept.clear()
                now = self._now()
                key = f"{response.cache_key} {keys[response.cache_key]}"
                self._kept[provider.name, key] = _Kept(response, now, now + life)
            return response

    @contextlib.contextmanager
    def _asking(self, name: str, image: str) -> Iterator[_Question]:
        """One at a time for one question: who waited has the answer, or the failure, of who went first. A
        program that hangs for one image holds up no other."""
        with self._lock:
            question = self._questions.setdefault((name, image), _Question())
            question.askers += 1
        try:
            with question.turn:
                yield question
        finally:
            with self._lock:
                question.askers -= 1
                if not question.askers:
                    del self._questions[name, image]

    def _counts(self, kept: _Kept, image: str, refused: Set[str]) -> bool:
        now = self._now()
        if now >= kept.until:
            return False
        stale = any(found.fingerprint in refused for found in entries_for(kept.response.entries, image))
        return not stale or now < kept.asked_at + _REFUSED_PAUSE_SECONDS

    def _run(self, provider: Provider, image: str) -> Response:
        where = f"credential provider {provider.name} for {image}"
        request = {"kind": "CredentialProviderRequest", "apiVersion": provider.api_version, "image": image}
        argv = [str(self._directory / provider.name), *provider.arguments]
        environment = {**os.environ, **provider.environment}
        data = _execute(argv, json.dumps(request).encode(), environment, self._timeout_seconds, where)
        return parse_response(data, provider.api_version, where)

    def _configured(self) -> tuple[Provider, ...]:
        with self._lock:
            try:
                files = _config_files(self._config)
                stamp = [(str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files]
                if stamp != self._stamp:
                    self._providers = tuple(p for f in files for p in parse_config(_read(f), str(f)))
                    self._kept.clear()
                    self._stamp = stamp
            except OSError as exc:
                raise errors.ConfigurationError(f"credential providers: {self._config}: {exc}") from exc
            except errors.InvalidInputError as exc:
                raise errors.ConfigurationError(str(exc)) from exc
            return self._providers


def _config_files(config: Path) -> list[Path]:
    if not config.is_dir():
        return [config]
    return sorted(file for file in config.iterdir() if file.suffix in _CONFIG_SUFFIXES)


def _read(file: Path) -> bytes:
    with file.open("rb") as stream:
        data = stream.read(_MAX_CONFIG_BYTES + 1)
    if len(data) > _MAX_CONFIG_BYTES:
        raise errors.InvalidInputError(f"{file} is larger than {_MAX_CONFIG_BYTES} bytes")
    return data


def _execute(
    argv: list[str], question: bytes, environment: Mapping[str, str], timeout_seconds: float, where: str
) -> bytes:
    """Run a plugin; its stdout. A plugin that hangs or floods is killed with all that it started."""
    until = time.monotonic() + timeout_seconds
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=dict(environment),
            start_new_session=True,
        )
    except OSError as exc:
        raise errors.ConfigurationError(f"{where}: cannot run {argv[0]}: {exc}") from exc
    with process:
        try:
            data = _converse(process, question, until)
            status = process.wait(max(0.0, until - time.monotonic()))
        except (TimeoutError, subprocess.TimeoutExpired):
            raise errors.UnavailableError(f"{where}: no answer in {timeout_seconds:.0f} s") from None
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
    if len(data) > _MAX_ANSWER_BYTES:
        raise errors.InvalidInputError(f"{where}: answered more than {_MAX_ANSWER_BYTES} bytes")
    if status != 0:
        raise errors.UnavailableError(f"{where}: {argv[0]} failed with status {status}")
    return data


def _converse(process: subprocess.Popen[bytes], question: bytes, until: float) -> bytes:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(question)  # less than a pipe holds: never blocks
        process.stdin.close()
    except BrokenPipeError:
        pass  # it answers without having read
    out = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while len(out) <= _MAX_ANSWER_BYTES:
            left = until - time.monotonic()
            if left <= 0 or not selector.select(left):
                raise TimeoutError
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                return bytes(out)
            out += piece
    os.killpg(process.pid, signal.SIGKILL)
    return bytes(out)


def _provider(item: Mapping[str, Any], where: str) -> Provider:
    name, api_version = item.get("name"), item.get("apiVersion")
    if not isinstance(name, str) or not _NAME.match(name):
        raise errors.InvalidInputError(f"{where}: name is not the name of a program")
    if api_version not in _API_VERSIONS:
        raise errors.InvalidInputError(f"{where}: apiVersion is none of {', '.join(_API_VERSIONS)}")
    images = _strings(item.get("matchImages"), f"{where}: matchImages")
    if not images:
        raise errors.InvalidInputError(f"{where}: matchImages is empty")
    environment = {}
    for number, entry in enumerate(_list(item.get("env"), f"{where}: env")):
        pair = _mapping(entry, f"{where}: env[{number}]")
        key, value = pair.get("name"), pair.get("value", "")
        if not isinstance(key, str) or not key or "=" in key or "\0" in key or not isinstance(value, str):
            raise errors.InvalidInputError(f"{where}: env[{number}]: not a name and a value")
        if "\0" in value:
            raise errors.InvalidInputError(f"{where}: env[{number}]: not a name and a value")
        environment[key] = value
    cache = item.get("defaultCacheDuration")
    if cache is None:
        raise errors.InvalidInputError(f"{where}: defaultCacheDuration is missing")
    return Provider(
        name,
        images,
        duration.parse(cache, f"{where}: defaultCacheDuration"),
        api_version,
        _strings(item.get("args"), f"{where}: args"),
        environment,
    )


def _split(text: str) -> tuple[list[str], str, str]:
    """Labels of the host, port, path."""
    parts = urlsplit(f"//{text.removeprefix('https://').removeprefix('http://')}")
    host, colon, port = parts.netloc.rpartition(":")
    if not colon or "]" in port:
        host, port = parts.netloc, ""
    return host.split("."), port, parts.path


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise errors.InvalidInputError(f"{where}: not an object")
    return value


def _list(value: object, where: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise errors.InvalidInputError(f"{where}: not a list")
    return value


def _strings(value: object, where: str) -> tuple[str, ...]:
    entries = _list(value, where)
    if not all(isinstance(entry, str) and "\0" not in entry for entry in entries):
        raise errors.InvalidInputError(f"{where}: not a list of strings")
    return tuple(entries)
