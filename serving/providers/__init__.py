"""Where replicas come from: one module a kind of machine, all of them `serving.replica.Provider`s.

`create` is the only place that knows them all.
"""

from __future__ import annotations

from pathlib import Path

from serving.endpoint import Endpoint
from serving.providers.containerd import ContainerdLauncher
from serving.providers.fleet import Fleet, Launcher
from serving.providers.process import ProcessLauncher
from serving.replica import Provider


def create(document: Endpoint, directory: Path) -> Provider:
    """The provider that the document names, keeping its state in `directory`."""
    if document.provider == "kubernetes":
        # Only whoever asks for it needs the client of a Kubernetes API.
        from serving.providers import kubernetes

        return kubernetes.KubernetesProvider(document.name, kubernetes.connect(document.kubernetes))
    launcher: Launcher = ProcessLauncher(directory / "cache")
    if document.provider == "containerd":
        launcher = ContainerdLauncher(
            document.name, document.containerd, ProcessLauncher(directory / "cache")
        )
    return Fleet(directory, launcher)
