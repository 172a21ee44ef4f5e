"""From an endpoint to what `glowplug engine` is given: its settings document, and the command. Pure.

Called by launchers. Paths are those that the engine sees, which in a container are not the server's.
"""

from __future__ import annotations

import json
import math
from pathlib import PurePath

from serving import endpoint
from serving.endpoint import Endpoint

SETTINGS, CONTROL, LOG = "settings.json", "engine.sock", "log"
"""Files of a replica's folder."""
EVENT = '{"time": '
"""How the supervisor's own lines in the log begin; the others are the engine's words."""


def settings(
    wanted: Endpoint, *, address: str, port: int, limit: int, folder: PurePath, cache: PurePath
) -> str:
    """The settings document of one replica (serving.engine.settings), JSON."""
    document = {
        "engine": wanted.engine.model_dump(mode="json"),
        "model": wanted.model,
        "model_name": wanted.model_name or wanted.name,
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
    }
    return json.dumps(document, indent=1)


def container(name: str, replica: str) -> str:
    """The name of a replica's container, for the provider that runs it in one."""
    return f"{name}-{replica}"


def start_timeout_seconds(wanted: Endpoint) -> float:
    """How long a replica may take to be ready."""
    assert not isinstance(wanted.engine, endpoint.ReservedEngine)  # refused by the document
    return wanted.engine.start_timeout_seconds
