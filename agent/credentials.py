"""Which registry credential this node uses for an image: docker's files, kubelet's plugins, pull secrets.

The one place of a node that knows all three; the registry clients of the agent and of the device server ask
it over the agent's socket (imagefs.origin.agentcredentials), and ask again when a registry refused what they
got. Any thread. A part that fails is logged, once for each reason, and the next one gets its turn: a broken
plugin does not stop a pull that needs none. Nothing here writes a credential anywhere but into the answer.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from agent import config, kubelet, pullsecrets
from cluster.api import Api
from imagefs import errors
from imagefs.origin import agentcredentials, credentials

if TYPE_CHECKING:
    from agent import api

_log = logging.getLogger(__name__)

_MAX_REFUSED = 64
_MAX_REMEMBERED = 256


class Part(Protocol):
    """One kind of source, for all registries. Thread-safe."""

    def candidates(self, host: str, repository: str, refused: Set[str]) -> Iterable[credentials.Credential]:
        """The credentials for a repository, the most fitting first. Those in `refused` (fingerprints) may be
        among them; a part that keeps answers asks anew when it sees its own there."""

    def describe(self) -> str:
        """Where it looks, for messages."""


class DockerFiles:
    """docker's and podman's files and helpers, as a Part."""

    def __init__(self, docker_config: Path | None) -> None:
        self._files = credentials.config_files(docker_config, os.environ)

    def candidates(self, host: str, repository: str, refused: Set[str]) -> Iterable[credentials.Credential]:
        found = credentials.Store(self._files, host, repository).look_up(refused)
        return [] if found is None else [found]

    def describe(self) -> str:
        return ", ".join(str(file) for file in self._files) or "no docker configuration"


class Chain:
    """All parts, in order."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = tuple(parts)
        self._lock = threading.Lock()
        self._said: set[str] = set()

    def look_up(
        self, host: str, repository: str, refused: Set[str] = frozenset()
    ) -> tuple[credentials.Credential | None, str]:
        """The first credential that was not refused, and where was looked, for messages."""
        for part in self._parts:
            try:
                for found in part.candidates(host, repository, refused):
                    if found.fingerprint not in refused:
                        return found, self.describe()
            except errors.ImagefsError as exc:
                self._say(str(exc))
        return None, self.describe()

    def describe(self) -> str:
        return ", ".join(part.describe() for part in self._parts) or "nowhere"

    def _say(self, what: str) -> None:
        with self._lock:
            if what in self._said:
                return
            if len(self._said) >= _MAX_REMEMBERED:
                self._said.clear()
            self._said.add(what)
        _log.warning("no credentials from there: %s", what)


def build(settings: config.Settings, client: Api | None) -> tuple[Chain, Callable[[], None]]:
    """The chain that the settings describe, watching already, and what ends that."""
    parts: list[Part] = [DockerFiles(settings.credentials.docker_config)]
    plugins, directory = (
        settings.credentials.kubelet_provider_config,
        settings.credentials.kubelet_provider_directory,
    )
    if (plugins is None) != (directory is None):
        raise errors.ConfigurationError(
            "credentials: kubelet_provider_config and kubelet_provider_directory go together"
        )
    if plugins is not None and directory is not None:
        parts.append(kubelet.Plugins(plugins, directory))
    if not settings.kubernetes.pull_secrets:
        return Chain(parts), lambda: None
    if client is None:
        raise errors.ConfigurationError("kubernetes.pull_secrets needs kubernetes.api_url or in_cluster")
    secrets = pullsecrets.PullSecrets(client, settings.kubernetes.namespaces)
    secrets.start()
    parts.append(secrets)
    return Chain(parts), secrets.stop


def handler(chain: Chain) -> Callable[[api.Request], dict[str, Any]]:
    """What answers POST agentcredentials.PATH; for the unix socket only."""

    def answer(request: api.Request) -> dict[str, Any]:
        host, repository = request.string("host"), request.string("repository")
        refused = request.json().get("refused") or []
        if not isinstance(refused, list) or not all(isinstance(entry, str) for entry in refused):
            raise errors.InvalidInputError(f"{agentcredentials.PATH}: refused must be a list of strings")
        found, sources = chain.look_up(host, repository, frozenset(refused[:_MAX_REFUSED]))
        return {"credential": None if found is None else credentials.encode(found), "sources": sources}

    return answer
