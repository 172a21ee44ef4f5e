"""What a platform must be able to do to be put through the providers' conformance suite."""

from __future__ import annotations

import contextlib
from typing import Protocol

from warmpool.provider import Provider

CLASSES = ("gpu", "big")
"""The classes that every platform here has."""


class Platform(Protocol):
    """A cloud, or what stands in for one. `provider` gives a new one each time, as after a restart."""

    def provider(self) -> Provider: ...

    def settle(self) -> None:
        """What is asked for comes; what is let go of leaves."""

    def work(self, node_class: str, count: int) -> None:
        """Real work wants this many nodes of a class in all, and takes what it may have."""

    def finish(self, name: str) -> None:
        """The work on this machine is done."""

    def refuse(self, node_class: str) -> None:
        """There is no capacity for this class any more."""

    def accept(self, node_class: str) -> None:
        """There is again."""

    def throttled(self) -> contextlib.AbstractContextManager[None]:
        """The platform finds that it was asked too often."""

    def away(self) -> contextlib.AbstractContextManager[None]:
        """The platform does not answer."""
