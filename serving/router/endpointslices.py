"""Kubernetes EndpointSlices, as backends. Pure.

Called by `sources` with the slices of one Service. An endpoint that terminates is draining, one that is not
ready is unhealthy: both leave Envoy's set at once, and finish what they have.

Spec: discovery.k8s.io/v1. An endpoint may stand in two slices for a moment; an absent `ready` means true.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from serving import errors
from serving import service as services

SERVICE_LABEL = "kubernetes.io/service-name"


def backends(
    slices: Iterable[Mapping[str, Any]], port: str | int | None, version: str
) -> tuple[services.Backend, ...]:
    """What cannot be a backend (host names, ports that nobody named) is left out."""
    found: dict[tuple[str, int], services.Backend] = {}
    for each in slices:
        if each.get("addressType") not in ("IPv4", "IPv6"):
            continue
        number = _port(each.get("ports") or [], port)
        if number is None:
            continue
        for endpoint in each.get("endpoints") or []:
            backend = _backend(endpoint, number, version)
            if backend is None:
                continue
            place = (backend.address, backend.port)
            if place not in found or _usable(backend):
                found[place] = backend
    return tuple(found[place] for place in sorted(found))


def _port(ports: list[Mapping[str, Any]], wanted: str | int | None) -> int | None:
    for each in ports:
        number = each.get("port")
        if wanted is None and len(ports) > 1:
            return None
        if isinstance(number, int) and wanted in (None, number, each.get("name")):
            return number
    return None


def _backend(endpoint: Mapping[str, Any], port: int, version: str) -> services.Backend | None:
    conditions = endpoint.get("conditions") or {}
    addresses = endpoint.get("addresses") or []
    if not addresses:
        return None
    try:
        return services.Backend(
            str(addresses[0]),  # the API says that others of one endpoint are not to be used
            port,
            version=version,
            zone=str(endpoint.get("zone") or ""),
            draining=conditions.get("terminating") is True,
            healthy=conditions.get("ready") is not False,
        )
    except errors.DocumentError:
        return None


def _usable(backend: services.Backend) -> bool:
    return not backend.draining and backend.healthy is not False
