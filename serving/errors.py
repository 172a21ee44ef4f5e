"""The errors of serving, split by who can act on them.

Every exception that leaves this package descends from `ServingError`. Adapters (gRPC, HTTP, processes, the
Kubernetes API) wrap foreign exceptions here, `from exc`; `glowplug/cli.py` maps each class to one exit code.
"""

from __future__ import annotations


class ServingError(Exception):
    """Root of the package's errors."""


class DocumentError(ServingError):
    """A document given to us is wrong; the message begins with the key's path and ends with the remedy."""


class ConfigurationError(ServingError):
    """This machine or its settings cannot do what was asked; the message says what to change."""


class NotFoundError(ServingError):
    """A name does not exist where it was looked for. Not retried."""


class UnavailableError(ServingError):
    """Something that was asked cannot answer now; a later attempt may succeed."""


class ConflictError(ServingError):
    """What was asked does not fit what is there already, or somebody else changes it; the message says it."""
