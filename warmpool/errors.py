"""The errors of the warm pool, split by who can act on them.

Every exception that leaves this package descends from `WarmPoolError`. Adapters (Kubernetes, AWS, the agents'
HTTP, files) wrap foreign exceptions here, `from exc`; `glowplug/cli.py` maps each class to one exit code.
What is no error: a node that failed to come is an observation (`provider.Machine`), because the pool acts on
it.
"""

from __future__ import annotations


class WarmPoolError(Exception):
    """Root of the package's errors."""


class InvalidInputError(WarmPoolError):
    """A file or an answer given to us is wrong; the message names the file, line or key, and the remedy."""


class ConfigurationError(WarmPoolError):
    """The settings, the rights or the account cannot do what was asked; the message says what to change.
    Trying again changes nothing until a person has acted."""


class NotFoundError(WarmPoolError):
    """A name does not exist where it was looked for. Not retried."""


class UnavailableError(WarmPoolError):
    """Something that was asked cannot answer now; a later attempt may succeed. `retry_after_seconds` is what
    the other side asked for, None if it asked for nothing."""

    def __init__(self, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class ThrottledError(UnavailableError):
    """The provider counts our requests and had enough of them: the whole provider is left alone for a while,
    not one node class."""


class CapacityError(UnavailableError):
    """The provider has no such nodes to give now, or a quota is used up: another class may do."""


class ConflictError(WarmPoolError):
    """Somebody else changed what we were changing: look again, decide again."""
