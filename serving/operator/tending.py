"""The loop of one ModelEndpoint: look, decide, remember, act. What `serving.server` is on one machine.

Made by `process` for each resource, and called by that resource's thread. What is decided is remembered in
the resource's status before it is acted on, so that the next operator goes on where this one was killed; an
operator that ends leaves everything as it is. A document that is refused changes nothing: the last good one,
which also lies in its version's ConfigMap, goes on being served, and the status says what is wrong with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from cluster import errors as cluster_errors
from cluster import events, objects
from cluster.api import Api
from cluster.events import About
from cluster.objects import Body, Owner
from serving import changes, controller, errors, routes, shares, statusdocument
from serving.autoscaler import shell
from serving.autoscaler.policy import Policy
from serving.endpoint import Endpoint
from serving.keyfile import KeyFile
from serving.operator import definition, resource
from serving.operator.board import Board
from serving.operator.resource import Condition, Memory, Wanted
from serving.providers import manifests
from serving.providers.kubernetes import KubernetesProvider
from serving.rationing import Rationing
from serving.replica import Replica, State
from serving.router.control import Router
from serving.traffic import Traffic

_STATUS_SECONDS = 1.0
_EVERY_INTERFACE = "0.0.0.0"  # noqa: S104  # of an Envoy's pod
ENVOY_LABELS = {"app.kubernetes.io/name": "glowplug-envoy"}
"""The pods that take an endpoint's requests."""

_log = logging.getLogger(__name__)


class Tender:
    """See the module. `folder`: for what the autoscaler remembers while this process lives."""

    def __init__(
        self,
        about: About,
        status: Body,
        api: Api,
        router: Router,
        board: Board,
        folder: Path,
        may_write: Callable[[], bool],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._about = about
        self._name = about.meta.name
        self._api = api
        self._router = router
        self._board = board
        self._may_write = may_write
        self.clock = clock
        meta = about.meta
        self._owner = Owner(
            definition.KIND.group_version, definition.KIND.name, meta.name, meta.uid, controller=True
        )
        self._provider = KubernetesProvider(meta.name, api, owner=self._owner, may_write=may_write)
        self._rationing = Rationing(self._provider)
        self._rationing.start()
        self.traffic = Traffic(meta.name)
        self._keys = KeyFile()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._autoscaler = shell.Autoscaler(folder, lambda text: self._event("Normal", "Autoscaling", text))
        self._spec: Body | None = None
        self._generation = meta.generation
        self._wanted: Wanted | None = None
        self._applied: Endpoint | None = None
        self._documents: dict[str, Endpoint] = {}
        self._memory = resource.memory(status)
        self._shown: Body = status
        self._shown_at = self._counted_at = float("-inf")
        self._valid = Condition("Valid", None, "Unknown", "not read yet")
        self._trouble = ""
        self._weights: dict[str, int] = {}
        self._replicas: list[Replica] = []
        self._size = shell.Size(0, 0)
        self.numbers: Mapping[str, Any] | None = None
        """For metrics (`statusdocument.numbers`), made anew each second and never changed; None before."""

    def turn(self, spec: Body, generation: int) -> None:
        """One round. What goes wrong is in the status, and tried again in the next."""
        trouble = ""
        try:
            self._read(spec, generation)
            if self._wanted is not None:
                self._act(self._wanted)
            else:
                self._board.withdraw(self._name)
            trouble = self._provider.trouble() or ""
        except (errors.ServingError, OSError) as exc:
            trouble = str(exc)
        if trouble and trouble != self._trouble:
            self._event("Warning", "NotControlled", trouble)
        self._trouble = trouble
        self._count()
        try:
            self._show()
        except errors.UnavailableError as exc:
            self._trouble = self._trouble or str(exc)

    def _count(self) -> None:
        now = self.clock()
        if self._wanted is not None and not 0 <= now - self._counted_at < _STATUS_SECONDS:
            self._counted_at = now
            self.numbers = statusdocument.numbers(
                self._name,
                self._weights,
                self._replicas,
                self.traffic,
                wanted=self._size.replicas,
                limit=self._size.limit,
                autoscaling=self._autoscaler.shown(),
            )

    def end(self) -> bool:
        """One round of taking everything down, once the resource is deleted; whether nothing is left."""
        try:
            self._board.withdraw(self._name)
            self._replicas = self._provider.observe()
            for version in {each.version for each in self._replicas}:
                self._provider.remove(version)
        except errors.ServingError as exc:
            _log.warning("%s: %s", self._name, exc)
            return False
        return not self._replicas and self._provider.trouble() is None

    def close(self) -> None:
        """Let go; replicas and routes stay."""
        self._rationing.stop()
        self._provider.close()

    # -- what is wanted ------------------------------------------------------------------------------

    def _read(self, spec: Body, generation: int) -> None:
        """Take over another spec. What is wrong with it is its condition, not an error."""
        if spec == self._spec and (self._wanted is not None or self._valid.holds is False):
            return
        try:
            wanted = resource.wanted(self._name, self._about.meta.namespace, spec)
            changes.plan(None if self._wanted is None else self._wanted.document, wanted.document)
            document = self._served(wanted.document)
            if document.limits.keys_file is not None:
                self._keys.check(document.limits.keys_file, units=document.units is not None)
            self._apply(document)
            self._serve_address(document)
        except (errors.DocumentError, errors.ConflictError, errors.ConfigurationError) as exc:
            self._refuse(str(exc))
        else:
            self._wanted = wanted
            if self._valid.holds is not True:
                self._event("Normal", "Valid", f"generation {generation} is served")
            self._valid = Condition("Valid", True, "Valid", "the document is served")
        self._spec, self._generation = spec, generation

    def _refuse(self, why: str) -> None:
        if why != self._valid.message:
            self._event("Warning", "Invalid", why)
        self._valid = Condition("Valid", False, "Invalid", why)
        stable = self._memory.rollout.stable
        if self._wanted is None and stable is not None:
            # The operator before this one served it.
            with contextlib.suppress(errors.NotFoundError):
                document = self._document(stable)
                self._apply(document)
                self._wanted = Wanted(document, None)

    def _served(self, document: Endpoint) -> Endpoint:
        """The document in force: not one whose version was rolled back, until the spec is another."""
        version = changes.version(document)
        if version != self._memory.refused:
            self._memory = dataclasses.replace(self._memory, refused=None)
            return document
        stable = self._memory.rollout.stable
        return document if stable is None else self._document(stable)

    def _apply(self, document: Endpoint) -> None:
        if document != self._applied:
            self._documents[self._provider.apply(document)] = document
            self._applied = document

    def _document(self, version: str) -> Endpoint:
        """What a version was made of. NotFoundError."""
        if version not in self._documents:
            try:
                found = self._api.get(objects.CONFIG_MAP, f"{self._name}-{version}")
            except cluster_errors.NotFoundError as exc:
                raise errors.NotFoundError(f"the document of version {version} is no longer known") from exc
            except cluster_errors.ClusterError as exc:
                raise errors.UnavailableError(str(exc)) from exc
            self._documents[version] = manifests.document(found)
        return self._documents[version]

    def _serve_address(self, document: Endpoint) -> None:
        """The Service by which clients find the endpoint, at the Envoys."""
        body = {
            "metadata": {"labels": manifests.labels(document), "ownerReferences": [self._owner.body()]},
            "spec": {
                "selector": ENVOY_LABELS,
                "ports": [{"name": "http", "port": 80, "targetPort": document.routing.port}],
            },
        }
        try:
            with contextlib.suppress(cluster_errors.NotFoundError):
                found = self._api.get(objects.SERVICE, self._name)
                if all(each.uid != self._owner.uid for each in found.meta.owners):
                    raise errors.ConflictError(
                        f"name: there is a Service {self._name} already, and not of this endpoint; rename one"
                    )
            self._api.apply(objects.SERVICE, self._name, body)
        except cluster_errors.ClusterError as exc:
            raise errors.UnavailableError(str(exc)) from exc

    # -- a round -------------------------------------------------------------------------------------

    def _act(self, wanted: Wanted) -> None:
        document = self._served(wanted.document)
        self._observe()
        self._size = self._sized(document, wanted.scaled)
        target = controller.Target(changes.version(document), self._size.replicas, document.update)
        seen = controller.Observation(self._replicas, self._traffic_counts(), self.traffic.reported_at())
        decision = controller.decide(self._memory.rollout, target, seen, self.clock())
        refused = self._memory.refused
        if decision.rolled_back is not None:
            refused = self._memory.rollout.candidate
            self._event("Warning", "RolledBack", f"version {refused}: {decision.rolled_back}")
        if decision.event is not None:
            self._event("Normal", "Update", decision.event)
        self._remember(Memory(decision.rollout, refused), dict(decision.weights))
        if decision.rolled_back is not None:
            document = self._served(wanted.document)
            self._apply(document)
        self._route(document)
        self._provider.set_limit(self._size.limit)
        for version, count in decision.scale.items():
            self._provider.scale(count, version=version)
        for version in decision.remove:
            self._provider.remove(version)

    def _traffic_counts(self) -> dict[str, controller.Count]:
        return dict(self.traffic.versions())

    def _observe(self) -> None:
        before = {each.name: each.state for each in self._replicas}
        self._replicas = self._provider.observe()
        self.traffic.settle(self._replicas)
        for each in self._replicas:
            if before.get(each.name) is each.state:
                continue
            if each.state is State.FAILED:
                self._event("Warning", "ReplicaFailed", f"{each.name}: {each.reason}")
            elif each.state is State.READY and before:
                took = (each.ready_at or each.created_at) - each.created_at
                self._event("Normal", "ReplicaReady", f"{each.name} is ready after {took:.0f} s")

    def _sized(self, document: Endpoint, scaled: int | None) -> shell.Size:
        """By the scale subresource, by the autoscaler, or else by the document."""
        mode = shell.Mode.OFF if scaled is not None else shell.Mode.of(document)
        look = shell.Look(
            pressure=lambda: self._router.pressure(self._name),
            replicas=self._replicas,
            version=self._memory.rollout.stable or changes.version(document),
            reference_units=document.reference_units,
        )
        size = self._autoscaler.turn(mode, Policy.of(document), look)
        if size is None:
            count = document.replicas.min if scaled is None else scaled
            size = shell.Size(count, document.replicas.limit)
        if self._size.replicas not in (0, size.replicas):
            self._event("Normal", "Scaled", f"{size.replicas} replicas, not {self._size.replicas}")
        return size

    def _route(self, document: Endpoint) -> None:
        outside = document.model_copy(
            update={"routing": document.routing.model_copy(update={"address": _EVERY_INTERFACE})}
        )
        keys = self._keys.read(document.limits.keys_file, units=document.units is not None)
        # Before the routes: a new replica is told before it is reached.
        self._rationing.update(shares.budget(document, keys), self._replicas)
        service = routes.service(outside, self._replicas, self._weights, document.routing.port, keys=keys)
        if not self._board.publish(service):
            return
        most = routes.max_requests(document)
        if shell.Mode.of(document) is shell.Mode.ON:
            most = routes.max_requests_at(document, self._size.replicas, self._size.limit)
        self._router.set_max_requests(self._name, most)

    # -- what is shown -------------------------------------------------------------------------------

    def _remember(self, memory: Memory, weights: dict[str, int]) -> None:
        """In the status, before anything is done about it."""
        changed = memory != self._memory
        self._memory, self._weights = memory, weights
        if changed:
            self._show(at_once=True)

    def _show(self, at_once: bool = False) -> None:
        now = self.clock()
        if not at_once and now - self._shown_at < _STATUS_SECONDS:
            return
        found = resource.status(self._facts(), self._shown, now)
        if found == self._shown:
            return
        if not self._may_write():
            raise errors.UnavailableError("another operator leads; this one changes nothing")
        try:
            self._api.apply(definition.KIND, self._name, {"status": found}, subresource="status")
        except cluster_errors.ClusterError as exc:
            raise errors.UnavailableError(str(exc)) from exc
        self._shown, self._shown_at = found, now

    def _facts(self) -> resource.Shown:
        conditions = [self._valid]
        document = None
        if self._wanted is not None:
            document = self._wanted.document
            conditions += resource.progress(self._memory.rollout, self._replicas, self._size.replicas)
        controlled = not self._trouble
        conditions.append(
            Condition("Controlled", controlled, "Controlled" if controlled else "Trouble", self._trouble)
        )
        return resource.Shown(
            generation=self._generation,
            memory=self._memory,
            version="" if document is None else changes.version(document),
            weights=self._weights,
            replicas=self._replicas,
            wanted_replicas=self._size.replicas,
            limit=self._size.limit,
            selector=objects.labels({manifests.LABEL: self._name}),
            conditions=conditions,
        )

    def _event(self, type_: Literal["Normal", "Warning"], reason: str, message: str) -> None:
        """For people; whoever cannot be told goes without."""
        _log.log(
            logging.WARNING if type_ == "Warning" else logging.INFO, "%s: %s: %s", self._name, reason, message
        )
        try:
            if self._may_write():
                body = events.body(self._about, type_, reason, message, self.clock())
                self._api.create(objects.EVENT, body)
        except cluster_errors.ClusterError as exc:
            _log.debug("%s: no event: %s", self._name, exc)
