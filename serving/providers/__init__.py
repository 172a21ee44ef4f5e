"""Where replicas come from: one module a kind of machine, all of them `serving.replica.Provider`s.

`create` is the only place that knows them all.
"""

from __future__ import annotations

from pathlib import Path

from serving import errors
from serving.endpoint import Endpoint
from serving.replica import Provider


def create(document: Endpoint, directory: Path) -> Provider:
    """The provider that the document names, keeping its state in `directory`. ConfigurationError."""
    # Imported here: a machine has what its provider needs, and not what the others do.
    from serving.providers.fleet import Fleet

    match document.provider:
        case "process":
            from serving.providers.process import ProcessLauncher

            return Fleet(directory, ProcessLauncher(directory / "cache"))
        case "containerd":
            from serving.providers.containerd import ContainerdLauncher
            from serving.providers.process import ProcessLauncher

            processes = ProcessLauncher(directory / "cache")
            return Fleet(directory, ContainerdLauncher(document.name, document.containerd, processes))
    raise errors.ConfigurationError(
        f"provider: {document.provider} is not there yet; use process or containerd"
    )
