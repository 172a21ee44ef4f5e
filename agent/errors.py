"""What the agent raises beyond imagefs.errors: the state of a snapshot, in containerd's words.

`service.py` is the one place that turns both into gRPC status codes; `api.py` into HTTP's.
"""

from __future__ import annotations

from imagefs import errors


class AlreadyExistsError(errors.ImagefsError):
    """A snapshot, or what a Prepare was to make, is there already."""


class FailedPreconditionError(errors.ImagefsError):
    """The snapshot is not in a state in which this can be done: committed, or has children."""
