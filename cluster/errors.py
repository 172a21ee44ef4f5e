"""What the Kubernetes API may answer that is no answer, split by who can act.

Every exception that leaves this package is a `ClusterError`. Made in `connection` from HTTP statuses and from
what urllib3 and the kubernetes library raise; callers map them to their own errors at their boundary.
"""

from __future__ import annotations


class ClusterError(Exception):
    """Root of the package's errors."""


class ConfigurationError(ClusterError):
    """No API server, or no way in: the message names the setting to change."""


class InvalidError(ClusterError):
    """The API server refuses what was sent (400, 422), or its answer makes no sense. Not retried."""


class ForbiddenError(ClusterError):
    """The service account may not do it (401, 403); the message names the verb and the resource."""


class QuotaError(ForbiddenError):
    """A ResourceQuota has no room left: fewer, or a bigger quota."""


class NotFoundError(ClusterError):
    """There is no such object, or no such resource in this cluster."""


class ConflictError(ClusterError):
    """Somebody else changed it, or it is there already: read again, decide again."""


class ExpiredError(ClusterError):
    """The version to watch from is too old (410): list again."""


class UnavailableError(ClusterError):
    """The API server cannot answer now; `retry_after_seconds` is its wish, where it said one."""

    def __init__(self, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class DisruptionError(UnavailableError):
    """An eviction that a PodDisruptionBudget does not allow now."""
