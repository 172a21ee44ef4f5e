"""From an endpoint to what `glowplug engine` is given: its settings document, and the command. Pure.

Called by launchers. Paths are those that the engine sees, which in a container are not the server's.
"""

from __future__ import annotations

import json
import math
from pathlib import PurePath
from typing import Any

from serving import endpoint
from serving.endpoint import Endpoint

SETTINGS, CONTROL, LOG = "settings.json", "engine.sock", "log"
"""Files of a replica's folder."""
EVENT = '{"time": '
"""How the supervisor's own lines in the log begin; the others are the engine's words."""


def settings(
    wanted: Endpoint,
    *,
    address: str,
    port: int,
    limit: int,
    folder: PurePath,
    cache: PurePath,
    image: str | None = None,
) -> str:
    """The settings document of one replica (serving.engine.settings), JSON. `image`: containerd's name of
    the image that its program runs in, where the supervisor stays outside."""
    document = {
        "engine": wanted.engine.model_dump(mode="json"),
        "model": wanted.model,
        "model_name": wanted.model_name or wanted.name,
        "model_cache": wanted.model_cache.model_dump(mode="json"),
        "fp8": wanted.fp8.enabled,
        "address": address,
        "port": port,
        "control": str(folder / CONTROL),
        "run_directory": str(folder),
        "cache_directory": str(cache),
        "limit": limit,
        # The notice was given before: by the fleet, which tells an engine only when the routes have changed.
        "drain": {"notice_seconds": 0.0, "seconds": wanted.drain.seconds},
        "cpus": None if wanted.resources.cpus is None else math.ceil(wanted.resources.cpus),
        "memory_bytes": wanted.resources.memory_bytes,
        "cgroup": f"/{wanted.containerd.namespace}/{container(wanted.name, folder.name)}"
        if wanted.provider == "containerd"
        else None,
        "gpus": None if image is None else _gpus(wanted),
        "service": wanted.name,
        "instance": folder.name,
        "request_log": request_log(wanted),
        "traces_endpoint": wanted.tracing and wanted.tracing.url,
        "container": image and _container(wanted, folder.name, image),
    }
    return json.dumps(document, indent=1)


def request_log(wanted: Endpoint) -> dict[str, Any] | None:
    """As an engine is told it, also while it runs."""
    return None if wanted.request_log is None else wanted.request_log.model_dump(mode="json")


def ctr(place: endpoint.Containerd) -> list[str]:
    """The command that speaks to that containerd."""
    return ["ctr", "--address", place.address, "--namespace", place.namespace]


def _container(wanted: Endpoint, replica: str, image: str) -> dict[str, Any]:
    options: list[str] = []
    resources = wanted.resources
    if resources.cpus is not None:
        options += ["--cpus", f"{resources.cpus:g}"]
    if resources.memory_bytes is not None:
        options += ["--memory-limit", str(resources.memory_bytes)]
    for number in _gpus(wanted):
        options += ["--gpus", number]
    return {
        "ctr": ctr(wanted.containerd),
        "name": container(wanted.name, replica),
        "image": image,
        "snapshotter": wanted.containerd.snapshotter,
        "options": options,
    }


def _gpus(wanted: Endpoint) -> list[str]:
    """Of the machine, by number."""
    return [str(number) for number in range(wanted.resources.gpus)]


def container(name: str, replica: str) -> str:
    """The name of a replica's container, for the provider that runs it in one."""
    return f"{name}-{replica}"


def start_timeout_seconds(wanted: Endpoint) -> float:
    """How long a replica may take to be ready."""
    assert not isinstance(wanted.engine, endpoint.ReservedEngine)  # refused by the document
    return wanted.engine.start_timeout_seconds
