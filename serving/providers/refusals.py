"""What a cluster refuses, in the words of the endpoint document: the key that it is about, and the remedy.
Pure.

Called by `kubernetes`, at its boundary to the API.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from cluster import errors as cluster_errors
from serving import errors

_KEYS = {
    "securityContext": "kubernetes.security",
    "runtimeClassName": "kubernetes.runtime_class",
    "tolerations": "kubernetes.tolerations",
    "nodeSelector": "kubernetes.node_selector",
    "priorityClass": "kubernetes.priority_class",
    "serviceAccount": "kubernetes.service_account",
    "imagePullSecrets": "kubernetes.pull_secrets",
    "resources": "resources",
    "ports": "kubernetes.port",
    "image": "image",
}
"""Parts of a pod's field paths, and the document's keys that they come from."""


def explained(message: str) -> str:
    """Why pods cannot be made, with the remedy."""
    text = "".join(each if each.isprintable() else " " for each in message)
    if "exceeded quota" in text:
        return f"replicas: {text}; raise the ResourceQuota, or lower replicas.max"
    return f"{_key(text)}: pods are refused: {text}"


def _key(message: str) -> str:
    """The document's key that a message of the API server is about."""
    return next((key for field, key in _KEYS.items() if field in message), "kubernetes")


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
    """Errors of the API within the block as Provider's. `what` was tried."""
    try:
        yield
    except cluster_errors.InvalidError as exc:
        raise errors.DocumentError(f"{_key(str(exc))}: {what}: {exc}") from exc
    except cluster_errors.QuotaError as exc:
        raise errors.UnavailableError(f"{what}: {exc}; raise the ResourceQuota") from exc
    except (cluster_errors.ForbiddenError, cluster_errors.ConfigurationError) as exc:
        raise errors.ConfigurationError(f"{what}: {exc}") from exc
    except cluster_errors.NotFoundError as exc:
        raise errors.NotFoundError(f"{what}: {exc}") from exc
    except cluster_errors.ClusterError as exc:
        raise errors.UnavailableError(f"{what}: {exc}") from exc
