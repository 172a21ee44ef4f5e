"""Kubernetes pull secrets as a source of registry credentials: watched, so that a rotated one counts at once.

`parse` is pure; `PullSecrets` owns one watcher for each namespace and type of secret. Only the two types of
pull secrets are asked for, and of each only the credentials are kept. A secret that cannot be understood is
left out and named, without a word of its contents. Which pod may use which secret is not decided here: the
operator names namespaces whose secrets this node may use (kubernetes.namespaces).

Secrets of the types kubernetes.io/dockerconfigjson and kubernetes.io/dockercfg; their keys may have wildcards
in the labels of the host, as kubelet has it.
"""

from __future__ import annotations

import base64
import binascii
import json
import time
from collections.abc import Callable, Iterable, Mapping, Set

from agent import kubelet, kubernetes
from cluster import objects
from cluster.api import Api
from cluster.objects import Object
from cluster.watching import Watcher
from imagefs import errors
from imagefs.origin import credentials

_TYPES = {
    "kubernetes.io/dockerconfigjson": ".dockerconfigjson",
    "kubernetes.io/dockercfg": ".dockercfg",
}
_FIRST_LIST_SECONDS = 5.0
"""So long after the start, questions wait for the first list; later a dead API server holds up no pull."""
_MAX_SECRET_CHARS = 4 << 20

Entries = Mapping[str, credentials.Credential]


def parse(secret: Object) -> Entries | None:
    """The credentials of a Secret, by registry; None if it is no pull secret. InvalidInputError if broken."""
    where = f"secret {secret.key}"
    kind, data = secret.at("type"), secret.at("data")
    field = _TYPES.get(kind) if isinstance(kind, str) else None
    if field is None:
        return None
    encoded = data.get(field) if isinstance(data, dict) else None
    if not isinstance(encoded, str) or len(encoded) > _MAX_SECRET_CHARS:
        raise errors.InvalidInputError(f"{where}: data[{field!r}] is missing")
    try:
        content = base64.b64decode(encoded, validate=True)
        if kind == "kubernetes.io/dockercfg":
            content = json.dumps({"auths": json.loads(content)}).encode()
        # Helpers that a secret names are nobody's order to run a program here: only `auths` count.
        return dict(credentials.parse(content, where).auths)
    except (binascii.Error, ValueError, RecursionError):
        raise errors.InvalidInputError(f"{where}: {field} is not base64 of JSON") from None
    except errors.InvalidInputError as exc:
        if "not JSON" in str(exc):
            raise errors.InvalidInputError(f"{where}: {field} is not JSON") from None
        raise


class PullSecrets:
    """The pull secrets of some namespaces (none named: all), as a credentials.Part."""

    def __init__(
        self,
        api: Api,
        namespaces: Iterable[str] = (),
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._now = now
        self._namespaces = tuple(namespaces)
        self._listed_by = 0.0
        self._watchers = [
            Watcher(
                api,
                objects.SECRET,
                kubernetes.parser(parse),
                namespace=name,
                fields={"type": kind},
                everywhere=name is None,
            )
            for name in self._namespaces or (None,)
            for kind in _TYPES
        ]

    def start(self) -> None:
        self._listed_by = self._now() + _FIRST_LIST_SECONDS
        for watcher in self._watchers:
            watcher.start()

    def stop(self) -> None:
        for watcher in self._watchers:
            watcher.stop()

    def describe(self) -> str:
        return f"the pull secrets of {', '.join(self._namespaces) or 'all namespaces'}"

    def candidates(self, host: str, repository: str, refused: Set[str]) -> Iterable[credentials.Credential]:
        """As credentials.Part: secrets by name, in each the more specific key first."""
        found: dict[str, Entries] = {}
        for watcher in self._watchers:
            watcher.wait(max(0.0, self._listed_by - self._now()))
            found |= watcher.current()
        for name in sorted(found):
            for host_name in credentials.names(host):
                yield from kubelet.entries_for(found[name], f"{host_name}/{repository}")
