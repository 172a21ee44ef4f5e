"""Nodes held by placeholder pods, which the cluster's own autoscaler makes nodes for (`placeholders` says
how).

What is held is what is in the API server: a placeholder is a machine asked for, its node the machine. Nothing
here makes or deletes a node; a node that nothing runs on any longer is the autoscaler's to remove. Real pods
take nodes by evicting placeholders, so `serve` has nothing to do.

Pods of the whole cluster are watched, and reduced to what they take; nodes and placeholders are listed at
each look, so that an API server that is away shows as UnavailableError and not as a pool of yesterday.

Threads: the caller's, and the watcher's own.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from cluster import api, connection, objects, watching
from cluster import errors as cluster_errors
from cluster.objects import Object
from warmpool import errors, placeholders, provider
from warmpool.placeholders import Taker
from warmpool.provider import HELD, Machine, Stage
from warmpool.settings import KubernetesAccess, KubernetesProvider

_FIRST_LIST_SECONDS = 30.0


class Kubernetes:
    """`provider.Provider`. `pool` names this pool's placeholders."""

    def __init__(
        self,
        cluster: api.Api,
        settings: KubernetesProvider,
        pool: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._api = cluster
        self._settings = settings
        self._pool = pool
        self._clock = clock
        self._watcher: watching.Watcher[Taker] = watching.Watcher(
            cluster, objects.POD, lambda pod: placeholders.taker(settings, pod), everywhere=True
        )
        self._watching = False

    def observe(self) -> Sequence[Machine]:
        """See Provider."""
        with _ours("look at nodes and pods"):
            return self._machines()

    def wanted(self) -> dict[str, int]:
        """Nodes that real work has or waits for, by class."""
        with _ours("look at nodes and pods"):
            handed: dict[str, int] = {}
            for machine in self._machines():
                if machine.stage is Stage.HANDED:
                    handed[machine.node_class] = handed.get(machine.node_class, 0) + 1
            return placeholders.wanted(self._settings, handed, self._takers())

    def chances(self) -> dict[str, dict[str, float]]:
        """By class, the part of the pods there that run each image."""
        with _ours("look at pods"):
            return placeholders.chances(self._settings, self._takers())

    def hold(self, node_class: str, count: int, release: Collection[str] = ()) -> None:
        """See Provider."""
        self._check(node_class)
        with _ours(f"hold placeholders of {node_class}"):
            held = [each for each in self._machines() if each.node_class == node_class and each.stage in HELD]
            gone = {each.name for each in provider.surplus(held, count, release)}
            if gone:
                for pod in self._placeholders():
                    if pod.meta.name in gone or pod.text("spec", "nodeName") in gone:
                        self._delete(pod)
            for _ in range(count - len(held)):
                self._api.create(
                    objects.POD,
                    placeholders.body(self._settings, self._pool, node_class),
                    self._settings.namespace,
                )

    def serve(self, node_class: str, count: int) -> None:
        """Nothing: pods take nodes by themselves."""
        self._check(node_class)

    def admit(self, name: str) -> None:
        """Take the startup taint away."""
        with _ours(f"admit node {name}"):
            api.with_conflicts(lambda: self._without_taint(name))

    def replace(self, name: str) -> None:
        """See Provider. The node is closed before its placeholder goes, so that nothing comes onto it; its
        removal is the autoscaler's."""
        with _ours(f"replace {name}"):
            pods = [
                pod for pod in self._placeholders() if name in (pod.meta.name, pod.text("spec", "nodeName"))
            ]
            with contextlib.suppress(cluster_errors.NotFoundError):
                if not api.with_conflicts(lambda: self._close(name)):
                    return
            for pod in pods:
                self._delete(pod)

    def close(self) -> None:
        """See Provider."""
        if self._watching:
            self._watcher.stop()

    # -- inside ------------------------------------------------------------------------------------

    def _machines(self) -> list[Machine]:
        nodes = {
            name: self._api.list(objects.NODE, labels=each.node_selector).objects
            for name, each in self._settings.classes.items()
        }
        return placeholders.machines(
            self._settings, self._pool, self._placeholders(), nodes, self._takers(), self._clock()
        )

    def _placeholders(self) -> Sequence[Object]:
        labels = {placeholders.POOL_LABEL: self._pool}
        return self._api.list(objects.POD, self._settings.namespace, labels=labels).objects

    def _takers(self) -> list[Taker]:
        if not self._watching:
            self._watcher.start()
            self._watching = True
        if not self._watcher.wait(_FIRST_LIST_SECONDS):
            trouble = self._watcher.trouble()
            raise trouble or cluster_errors.UnavailableError(
                "the pods of the cluster could not be listed yet"
            )
        trouble = self._watcher.trouble()
        if trouble is not None:
            raise trouble
        return list(self._watcher.current().values())

    def _delete(self, pod: Object) -> None:
        with contextlib.suppress(cluster_errors.ConflictError):  # another pod has the name: ours has gone
            self._api.delete(
                objects.POD,
                pod.meta.name,
                self._settings.namespace,
                grace_seconds=0,
                uid=pod.meta.uid or None,
            )

    def _without_taint(self, name: str) -> None:
        node = self._api.get(objects.NODE, name)
        left = placeholders.taints_without(node, self._settings.startup_taint)
        if len(left) < len(node.items("spec", "taints")):
            self._api.patch(objects.NODE, name, {"spec": {"taints": left or None}}, version=node.meta.version)

    def _close(self, name: str) -> bool:
        """Whether the node may go: nobody's work is on it. NotFoundError if there is no such node."""
        node = self._api.get(objects.NODE, name)
        others = placeholders.taints_without(node, placeholders.RETIRED_TAINT)
        closed: list[objects.Body] = [*others, {"key": placeholders.RETIRED_TAINT, "effect": "NoSchedule"}]
        if len(others) == len(node.items("spec", "taints")):
            node = self._api.patch(
                objects.NODE, name, {"spec": {"taints": closed}}, version=node.meta.version
            )
        # A pod may have come between the last look and the taint.
        pods = self._api.list(objects.POD, everywhere=True, fields={"spec.nodeName": name}).objects
        if any(placeholders.taker(self._settings, pod) is not None for pod in pods):
            self._api.patch(
                objects.NODE, name, {"spec": {"taints": others or None}}, version=node.meta.version
            )
            return False
        return True

    def _check(self, node_class: str) -> None:
        if node_class not in self._settings.classes:
            raise errors.ConfigurationError(f"provider.classes: there is no class {node_class!r}; add it")


def connect(access: KubernetesAccess, namespace: str) -> api.Api:
    """The API server that the settings name. ConfigurationError."""

    def path(text: str | None) -> Path | None:
        return None if text is None else Path(text)

    with _ours("reach the Kubernetes API"):
        where = connection.Where(
            access.url, path(access.ca_file), path(access.token_file), path(access.kubeconfig), access.context
        )
        return api.Api(connection.Connection(where), namespace)


@contextlib.contextmanager
def _ours(what: str) -> Iterator[None]:
    """The cluster's errors as ours."""
    try:
        yield
    except cluster_errors.QuotaError as exc:
        raise errors.CapacityError(f"cannot {what}: {exc}") from exc
    except (
        cluster_errors.ForbiddenError,
        cluster_errors.InvalidError,
        cluster_errors.ConfigurationError,
    ) as exc:
        raise errors.ConfigurationError(f"cannot {what}: {exc}") from exc
    except cluster_errors.ConflictError as exc:
        raise errors.ConflictError(f"cannot {what}: {exc}") from exc
    except cluster_errors.NotFoundError as exc:
        raise errors.NotFoundError(f"cannot {what}: {exc}") from exc
    except cluster_errors.UnavailableError as exc:
        kind = errors.UnavailableError if exc.retry_after_seconds is None else errors.ThrottledError
        raise kind(f"cannot {what}: {exc}", exc.retry_after_seconds) from exc
    except cluster_errors.ClusterError as exc:
        raise errors.UnavailableError(f"cannot {what}: {exc}") from exc
