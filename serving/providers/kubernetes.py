"""Replicas as pods: a Deployment, a Service and a ConfigMap for each version (`manifests`), seen by watches.

A Provider (see serving.replica), for a server anywhere that reaches the API server and the pods, and for the
operator. Called by one thread, `observe` and `logs` by any; two watchers and a pool for the engines' control
ports have threads of their own.

Who has the say: the number of a version's replicas lies in its Deployment's scale subresource, written only
as what was read (a conflict is read again), and only while `may_write` says so: two controllers never take
turns. What is not known changes nothing: with the API server away `observe` says what it last heard, and
every write is an UnavailableError.

Which pods go when there are fewer: not ready before ready, as Kubernetes has it, then by deletion costs,
which are written before the scale. A shrink that would end a pod to be kept, because that one is not ready,
waits until it is.

The limit goes to each engine's control port, over HTTP with the endpoint's token, as soon as it changes: a
ConfigMap that kubelet brings takes up to a minute, in which a cut would come too late. A pod that starts gets
it with its first look.
"""

from __future__ import annotations

import base64
import binascii
import concurrent.futures
import contextlib
import dataclasses
import logging
import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster import api as cluster_api
from cluster import errors as cluster_errors
from cluster import objects
from cluster import pods as pod_values
from cluster.api import Api
from cluster.connection import Connection, Where
from cluster.objects import Object, Owner
from cluster.pods import Pod
from cluster.watching import Watcher
from serving import changes, errors
from serving.endpoint import Endpoint
from serving.engine.state import Rations, Spent
from serving.placement import Kubernetes
from serving.providers import engineclient, enginecommand, manifests, pods, refusals
from serving.providers.pods import Heard
from serving.replica import Replica, State

_LISTED_SECONDS = 20.0
_HEARD_SECONDS = 5.0
_RETRY_SECONDS = 1.0
_REMOVE_AGAIN_SECONDS = 10.0
_TALKS_AT_ONCE = 16
_GOING = -1_000
"""The deletion cost of a pod that is to go."""
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class _Version:
    """What is known of a version's Deployment. `refused`: why its pods cannot be made."""

    version: str
    replicas: int
    refused: str


class KubernetesProvider:
    """See the module. `owner`: whom the objects are deleted with; `dry_run`: everything is checked by the API
    server, nothing is changed."""

    def __init__(
        self,
        name: str,
        api: Api,
        *,
        owner: Owner | None = None,
        may_write: Callable[[], bool] = lambda: True,
        dry_run: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._name = name
        self._api = api
        self._owner = owner
        self._may_write = may_write
        self._dry_run = dry_run
        self._clock = clock
        self._current: Endpoint | None = None
        self._token = ""
        self._limit: int | None = None
        self._lock = threading.Lock()
        self._heard: dict[str, Heard] = {}
        self._talked_at: dict[str, float] = {}
        self._talks: dict[str, concurrent.futures.Future[None]] = {}
        self._left: set[str] = set()
        """Pods that were drained by name, until they are gone."""
        self._removed_at: dict[str, float] = {}
        chosen = {manifests.LABEL: name}
        self._pods = Watcher(api, objects.POD, pod_values.parse, labels=chosen)
        self._versions = Watcher(api, objects.DEPLOYMENT, _version, labels=chosen)
        self._pool = concurrent.futures.ThreadPoolExecutor(_TALKS_AT_ONCE, "engine-control")
        for watcher in (self._pods, self._versions):
            watcher.start()

    # -- Provider ----------------------------------------------------------------------------------

    def apply(self, endpoint: Endpoint) -> str:
        """See Provider."""
        version = changes.version(endpoint)
        if endpoint.model is not None and endpoint.model.startswith("oci:"):
            raise errors.DocumentError(
                "model: oci: needs the node's agent, which pods do not reach; put the model into the image, "
                "or use a directory of the nodes or s3://BUCKET/PREFIX"
            )
        self._listed()
        with refusals.translated(f"endpoint {self._name}"):
            self._require_say()
            self._token = self._secret(endpoint)
            self._make(endpoint, version)
        self._current = endpoint
        return version

    def observe(self) -> list[Replica]:
        """See Provider."""
        now = self._clock()
        found = sorted(self._pods.current().values(), key=lambda each: (each.meta.created_at, each.meta.name))
        with self._lock:
            names = {each.meta.name for each in found}
            self._left &= names
            for table in (self._heard, self._talked_at, self._talks):
                for gone in table.keys() - names:
                    del table[gone]
            heard, left = dict(self._heard), set(self._left)
        port = self._port()
        for each in found:
            if each.ready and each.address:
                self._talk_soon(each, now)
        replicas = [
            replica
            for each in found
            for replica in pods.replicas(each, port, heard.get(each.meta.name), each.meta.name in left)
        ]
        refused = [
            Replica(
                f"{self._name}-{each.version}", each.version, None, State.FAILED, now, reason=each.refused
            )
            for each in self._versions.current().values()
            if each.refused
        ]
        return [*replicas, *refused]

    def scale(self, n: int, keep: Collection[str] = (), version: str | None = None) -> None:
        """See Provider."""
        if version is None:
            version = changes.version(self._wanted())
        name = f"{self._name}-{version}"
        known = self._versions.current().get(f"{self._api.namespace}/{name}")
        if known is not None and known.replicas == n:
            return
        with refusals.translated(f"scale {name} to {n}"):
            self._require_say()
            if known is None and self._current is not None and changes.version(self._current) == version:
                self._make(self._current, version)  # somebody deleted it
            with contextlib.suppress(_WaitError):
                cluster_api.with_conflicts(lambda: self._rescale(name, version, n, keep))

    def set_limit(self, n: int) -> None:
        """See Provider."""
        self._limit = n

    def ration(self, rations: Mapping[str, Rations]) -> Mapping[str, Mapping[str, Spent]]:
        """See replica.Rationed. One that cannot be told is tried again by the caller, a second later."""
        places = {each.meta.name: each.address for each in self._pods.current().values() if each.address}

        def tell(name: str) -> Mapping[str, Spent] | None:
            try:
                return engineclient.ration(self._control(places[name]), rations[name])
            except errors.UnavailableError:
                return None

        told = [name for name in rations if name in places]
        answers = zip(told, self._pool.map(tell, told), strict=True)
        return {name: spent for name, spent in answers if spent is not None}

    def drain(self, names: Collection[str]) -> None:
        """See Provider."""
        versions: dict[str, list[Pod]] = {}
        for each in self._pods.current().values():
            if each.meta.name in names and each.meta.deleting_at is None and not self._is_leaving(each):
                versions.setdefault(_version_of(each), []).append(each)
        for version, chosen in versions.items():
            with refusals.translated(f"drain {', '.join(sorted(each.meta.name for each in chosen))}"):
                self._require_say()
                self._end(version, chosen)

    def remove(self, version: str) -> None:
        """See Provider."""
        name = f"{self._name}-{version}"
        if f"{self._api.namespace}/{name}" not in self._versions.current():
            self._removed_at.pop(version, None)
            return
        now = self._clock()
        if now - self._removed_at.get(version, float("-inf")) < _REMOVE_AGAIN_SECONDS:
            return
        with refusals.translated(f"remove {name}"):
            self._require_say()
            self._api.delete(objects.DEPLOYMENT, name, dry_run=self._dry_run)
        self._removed_at[version] = now

    def logs(self, name: str, lines: int) -> Sequence[str]:
        """See Provider."""
        pod, _, earlier = name.partition("/")
        if not any(each.meta.name == pod for each in self._pods.current().values()):
            known = ", ".join(each.meta.name for each in self._pods.current().values()) or "none"
            raise errors.NotFoundError(f"no replica is called {name}; there are: {known}")
        with refusals.translated(f"logs of {pod}"):
            text = self._api.logs(
                pod, container=manifests.ENGINE, lines=max(1, lines), previous=bool(earlier)
            )
        kept = text.splitlines()[-lines:] if lines > 0 else []
        return ["".join(each for each in line if each.isprintable() or each == "\t") for line in kept]

    def close(self) -> None:
        """See Provider."""
        for watcher in (self._pods, self._versions):
            watcher.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def trouble(self) -> str | None:
        """Why what is observed may be old, None while it is not."""
        found = self._pods.trouble() or self._versions.trouble()
        return None if found is None else str(found)

    # -- what a version is made of -------------------------------------------------------------------

    def _make(self, wanted: Endpoint, version: str) -> None:
        """All objects of a version that are not there yet; none, if one of them is refused."""
        name = manifests.name(wanted, version)
        body = manifests.deployment(wanted, version, self._owner)
        if self._dry_run:
            self._existing(objects.DEPLOYMENT, name) or self._api.create(
                objects.DEPLOYMENT, body, dry_run=True
            )
            return
        before = self._existing(objects.DEPLOYMENT, name)
        made = before or self._api.create(objects.DEPLOYMENT, body)
        owner = Owner(objects.DEPLOYMENT.group_version, "Deployment", name, made.meta.uid, controller=True)
        try:
            for kind, part in (
                (objects.SERVICE, manifests.service(wanted, version, owner)),
                (objects.CONFIG_MAP, manifests.config_map(wanted, version, owner)),
            ):
                if self._existing(kind, name) is None:
                    self._api.create(kind, part)
        except cluster_errors.ClusterError:
            if before is None:
                with contextlib.suppress(cluster_errors.ClusterError):
                    self._api.delete(objects.DEPLOYMENT, name, uid=made.meta.uid)
            raise

    def _secret(self, wanted: Endpoint) -> str:
        """The token of the engines' control ports, made with the first version."""
        name = manifests.control_secret(wanted)
        found = self._existing(objects.SECRET, name)
        if found is None:
            token = secrets.token_urlsafe(32)
            metadata: dict[str, object] = {"name": name, "labels": manifests.labels(wanted)}
            if self._owner is not None:
                metadata["ownerReferences"] = [self._owner.body()]
            body = {
                "metadata": metadata,
                "type": "Opaque",
                "data": {"token": base64.b64encode(token.encode()).decode()},
            }
            self._api.create(objects.SECRET, body, dry_run=self._dry_run)
            return token
        try:
            return base64.b64decode(found.text("data", "token"), validate=True).decode("ascii")
        except (binascii.Error, UnicodeDecodeError) as exc:
            raise errors.ConfigurationError(
                f"secret {name}: token is not readable; delete the secret"
            ) from exc

    def _existing(self, kind: objects.Kind, name: str) -> Object | None:
        try:
            return self._api.get(kind, name)
        except cluster_errors.NotFoundError:
            return None

    # -- how many ------------------------------------------------------------------------------------

    def _rescale(self, name: str, version: str, n: int, keep: Collection[str]) -> None:
        """One attempt. ConflictError where somebody else scaled meanwhile, _WaitError where it must wait."""
        read = self._api.scale(objects.DEPLOYMENT, name)
        if n < read.replicas:
            n = self._choose(version, n, keep)
        if n != read.replicas:
            self._api.set_scale(objects.DEPLOYMENT, name, n, version=read.version, dry_run=self._dry_run)
            _log.info(
                "%s: %d replicas, not %d%s", name, n, read.replicas, " (dry run)" if self._dry_run else ""
            )

    def _choose(self, version: str, n: int, keep: Collection[str]) -> int:
        """Mark the pods that are to go; how many stay."""
        here = [each for each in self._alive(version) if not self._is_leaving(each)]
        spare = sorted(
            (each for each in here if each.meta.name not in keep),
            key=lambda each: (each.ready, -each.meta.created_at, each.meta.name),
        )
        going = spare[: max(0, len(here) - n)]
        staying = [each for each in here if each not in going]
        if any(each.ready for each in going) and any(
            each.meta.name in keep and not each.ready for each in staying
        ):
            raise _WaitError
        for each in going:
            self._mark(each)
        return max(n, len(staying))

    def _end(self, version: str, chosen: Sequence[Pod]) -> None:
        """End these pods and have none in their place."""
        name = f"{self._name}-{version}"
        others = [each for each in self._alive(version) if each not in chosen and not self._is_leaving(each)]
        exact = all(each.ready for each in others)
        for each in chosen:
            self._mark(each)
            if not exact and not self._dry_run:
                # Kubernetes would end one that is not ready first. What it makes in this one's place before
                # the scale is the first to go with it.
                self._api.delete(objects.POD, each.meta.name, uid=each.meta.uid)

        def fewer() -> None:
            read = self._api.scale(objects.DEPLOYMENT, name)
            left = max(0, read.replicas - len(chosen))
            self._api.set_scale(objects.DEPLOYMENT, name, left, version=read.version, dry_run=self._dry_run)

        with contextlib.suppress(cluster_errors.NotFoundError):  # the version was removed
            cluster_api.with_conflicts(fewer)
        if not self._dry_run:
            with self._lock:
                self._left |= {each.meta.name for each in chosen}

    def _mark(self, pod: Pod) -> None:
        """Have this pod go before others that are as ready."""
        body = {"metadata": {"annotations": {manifests.DELETION_COST: str(_GOING)}}}
        if pod.meta.annotations.get(manifests.DELETION_COST) == str(_GOING):
            return
        with contextlib.suppress(cluster_errors.NotFoundError):
            self._api.patch(objects.POD, pod.meta.name, body, dry_run=self._dry_run)

    def _alive(self, version: str) -> list[Pod]:
        return [
            each
            for each in self._pods.current().values()
            if _version_of(each) == version
            and each.meta.deleting_at is None
            and each.phase not in ("Failed", "Succeeded")
        ]

    def _is_leaving(self, pod: Pod) -> bool:
        with self._lock:
            return pod.meta.name in self._left

    # -- engines -------------------------------------------------------------------------------------

    def _talk_soon(self, pod: Pod, now: float) -> None:
        """Ask its engine how it is, and tell it the limit; on a thread of the pool, not twice at once."""
        name = pod.meta.name
        with self._lock:
            before = self._talks.get(name)
            if before is not None and not before.done():
                return
            heard = self._heard.get(name)
            log = enginecommand.request_log(self._wanted())
            told = heard is not None and self._limit in (None, heard.limit) and heard.request_log == log
            if now - self._talked_at.get(name, float("-inf")) < (_HEARD_SECONDS if told else _RETRY_SECONDS):
                return
            self._talked_at[name] = now
            self._talks[name] = self._pool.submit(self._talk, name, pod.address, self._limit, log, heard)

    def _talk(
        self,
        name: str,
        address: str,
        limit: int | None,
        log: Mapping[str, Any] | None,
        before: Heard | None,
    ) -> None:
        control = self._control(address)
        try:
            if before is None or before.request_log != log:
                engineclient.set_request_log(control, log)
            said = engineclient.status(control)
            if limit is not None and said.get("limit") != limit:
                engineclient.set_limit(control, limit)
                said = {**said, "limit": limit}
        except errors.UnavailableError as exc:  # said again at the next look; probes are kubelet's
            _log.debug("replica %s: %s", name, exc)
            return
        vitals = engineclient.vitals(said, self._clock())
        heard = Heard(engineclient.phases(said), said.get("limit"), log, vitals)
        with self._lock:
            self._heard[name] = heard

    def _control(self, address: str) -> engineclient.Remote:
        return engineclient.Remote((address, self._wanted().kubernetes.control_port), self._token)

    # -- what else -----------------------------------------------------------------------------------

    def _listed(self) -> None:
        """Wait for the first list. UnavailableError, ConfigurationError."""
        for watcher in (self._pods, self._versions):
            deadline = time.monotonic() + _LISTED_SECONDS
            while not watcher.wait(0.05):
                trouble = watcher.trouble()
                if trouble is not None:
                    with refusals.translated(f"endpoint {self._name}"):
                        raise trouble
                if time.monotonic() > deadline:
                    raise errors.UnavailableError("kubernetes: the API server does not answer")

    def _port(self) -> int:
        return Kubernetes().port if self._current is None else self._current.kubernetes.port

    def _wanted(self) -> Endpoint:
        if self._current is None:
            raise errors.ConflictError("no endpoint document has been applied yet")
        return self._current

    def _require_say(self) -> None:
        if not self._may_write():
            raise errors.UnavailableError("kubernetes: another controller leads; this one changes nothing")


class _WaitError(Exception):
    """A shrink that must wait."""


def connect(place: Kubernetes) -> Api:
    """The API of the cluster that a document names. ConfigurationError."""
    kubeconfig = None if place.kubeconfig is None else Path(place.kubeconfig)
    with refusals.translated("kubernetes"):
        return Api(Connection(Where(kubeconfig=kubeconfig, context=place.context)), place.namespace)


def _version(found: Object) -> _Version:
    version = found.meta.labels.get(manifests.VERSION_LABEL, "")
    refused = ""
    for each in found.items("status", "conditions"):
        if each.get("type") == "ReplicaFailure" and each.get("status") == "True":
            refused = refusals.explained(str(each.get("message") or "no reason given"))
    return _Version(version, found.number("spec", "replicas"), refused)


def _version_of(pod: Pod) -> str:
    return pod.meta.labels.get(manifests.VERSION_LABEL, "")
