"""What a workload is before it is built, and after: values, and the seam between recipes and the builder.

Read by everything in e2e; `builder.py` turns a `Recipe` into a `Workload`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

SUITE = "bookworm"
PYTHON_VERSION = "3.11"
TAG = "latest"
READY = "ready"
"""What every workload's command prints, first word of a line, when it could serve. It then stays, as a server
would, until its standard input ends, where that is a pipe."""


class BuildError(Exception):
    """The image cannot be built here; the message says what to change."""


@dataclasses.dataclass(frozen=True, slots=True)
class Kitchen:
    """Where an image is made: `root` is the root filesystem so far, `cache` outlives the image (downloads,
    base systems), `say` tells the user what takes time."""

    root: Path
    cache: Path
    say: Callable[[str], None]


class Step(Protocol):
    """What one layer adds. A frozen dataclass: its `repr` says all that decides what it makes, because it is
    the key under which the built image is kept."""

    @property
    def title(self) -> str:
        """What the layer holds, for people."""

    def apply(self, kitchen: Kitchen) -> None:
        """Make it so in `kitchen.root`. It may add and replace files, not remove any that lie below."""


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """An image to be: `steps` from the bottom layer up, the command that starts it, what building costs."""

    name: str
    steps: tuple[Step, ...]
    command: tuple[str, ...]
    note: str
    url: str | None = None
    """A server's: what answers with 2xx once it is ready. It listens on all addresses of its namespace."""


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """A built image: an OCI layout with one tagged image in it, and the command that starts it."""

    name: str
    layout: Path
    command: tuple[str, ...]
    url: str | None
    compressed_bytes: int
    unpacked_bytes: int
    entries: int
    layers: tuple[str, ...]
    """What each layer holds, bottom first, for people."""

    @property
    def source(self) -> str:
        """The image as a REF."""
        return f"oci:{self.layout}:{TAG}"
