"""The errors of imagefs, split by who can act on them.

Every exception that leaves this package descends from `ImagefsError`. Adapters (HTTP, S3, FUSE, mount)
wrap foreign exceptions here, `from exc`; the command maps each class to one exit code, the FUSE server
each to one errno.
"""

from __future__ import annotations


class ImagefsError(Exception):
    """Root of the package's errors."""


class InvalidInputError(ImagefsError):
    """Something given to us is malformed; the message says which field, byte or flag. Not retried."""


class NotFoundError(ImagefsError):
    """A name, digest or referrer does not exist where it was looked for. Not retried."""


class DeniedError(ImagefsError):
    """The origin refused our credentials (HTTP 401, 403). Not retried until the credentials change."""


class IntegrityError(ImagefsError):
    """Bytes differ from their digest or their declared size. Never served."""


class UnavailableError(ImagefsError):
    """An origin could not answer now; a later attempt may succeed.

    `retry_after_seconds` is the origin's own wish (Retry-After), or None.
    """

    def __init__(self, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class ConfigurationError(ImagefsError):
    """This machine or its settings cannot do what was asked; the message says what to change."""


class BusyError(ImagefsError):
    """Something still uses what was to be released; the message names who."""
