"""Services, as Envoy's resources. Pure.

Called by `control`. A service becomes a cluster, its endpoints and a virtual host; services that listen at
the same place share a listener and its routes. What may change often is kept out of clusters and
listeners, because a changed cluster is warmed again and a changed listener drains its connections: limits
are runtime values, certificates are secrets, keys and time-outs are routes.

Spec: Envoy 1.40 API v3. The settings that look arbitrary were learned by trying; each has a test
(`tests/serving/router/test_envoy_traps.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from envoy.config.core.v3 import address_pb2, base_pb2
from envoy.config.endpoint.v3 import endpoint_components_pb2, endpoint_pb2
from envoy.service.runtime.v3 import rtds_pb2
from google.protobuf import message

from serving import errors
from serving import service as services
from serving.router import clusters, listeners, routes, tenants, tracing, versions, weights

RUNTIME_LAYER = "glowplug"
Resources = dict[str, dict[str, versions.Resource]]


def check(found: Sequence[services.Service]) -> None:
    """Refuse services that contradict one another. DocumentError."""
    names: set[str] = set()
    listens: dict[tuple[str, int], services.Service] = {}
    claims: dict[tuple[tuple[str, int], str, str], str] = {}
    for service in found:
        if service.name in names:
            raise errors.DocumentError(f"services: the name {service.name} is there twice; rename one")
        names.add(service.name)
        place = (service.listen.address, service.listen.port)
        other = listens.setdefault(place, service)
        if other.listen != service.listen:
            raise errors.DocumentError(
                f"services.{service.name}.listen.tls: {other.name} listens at {place[0]}:{place[1]} with "
                "other settings; give both the same, or another port to one"
            )
        for host in service.hosts:
            taken = claims.setdefault((place, host, service.prefix), service.name)
            if taken != service.name:
                raise errors.DocumentError(
                    f"services.{service.name}: host {host!r} with prefix {service.prefix} at port "
                    f"{place[1]} belongs to {taken}; give one another host, prefix or port"
                )


def cluster(service: services.Service) -> versions.Resource:
    """What depends on the settings of one service."""
    return _resource(service.name, clusters.cluster(service))


def collectors(found: Iterable[services.Service]) -> dict[str, versions.Resource]:
    """The clusters that spans are sent to."""
    result: dict[str, versions.Resource] = {}
    for service in found:
        if service.listen.tracing is not None:
            result |= _named(tracing.cluster(service.listen.tracing))
    return result


def of_listeners(found: Iterable[services.Service]) -> Resources:
    """Listeners and secrets: what services share. Call `check` before."""
    result: Resources = {versions.LISTENER: {}, versions.SECRET: {}}
    for listen in _by_listen(found):
        result[versions.LISTENER] |= _named(listeners.listener(listen))
        for secret in listeners.secrets(listen):
            result[versions.SECRET] |= _named(secret)
    return result


def of_routes(found: Iterable[services.Service], rates: tenants.Rates) -> dict[str, versions.Resource]:
    """The routes of every listener, as an Envoy with these shares of tenants' rates is to have them."""
    result: dict[str, versions.Resource] = {}
    for listen, there in _by_listen(found).items():
        result |= _named(routes.routes(listeners.name_of(listen), there, rates))
    return result


def _by_listen(found: Iterable[services.Service]) -> dict[services.Listen, list[services.Service]]:
    by_listen: dict[services.Listen, list[services.Service]] = {}
    for service in found:
        by_listen.setdefault(service.listen, []).append(service)
    return by_listen


def endpoints(
    service: services.Service, now: float, zone: str, zone_shares: Mapping[str, float]
) -> versions.Resource:
    """The endpoints of a service as an Envoy in `zone` is to see them."""
    assignment = endpoint_pb2.ClusterLoadAssignment(cluster_name=service.name)
    for group in (*weights.groups(service, now, zone, zone_shares), *weights.idle(service, now)):
        locality = assignment.endpoints.add(
            locality=base_pb2.Locality(
                region="glowplug", zone=group.zone, sub_zone=f"{group.version}/{group.step}"
            )
        )
        if group.weight > 0:  # Envoy refuses 0, and gives nothing to a locality without a weight
            locality.load_balancing_weight.value = group.weight
        for backend in sorted(group.backends, key=lambda each: (each.address, each.port)):
            locality.lb_endpoints.add(endpoint=_endpoint(backend.address, backend.port))
    if service.activator is not None:
        held = assignment.endpoints.add(
            priority=1, locality=base_pb2.Locality(region="glowplug", sub_zone="activator")
        )
        held.load_balancing_weight.value = 1
        there = _endpoint(*service.activator)
        there.health_check_config.disable_active_health_check = True
        held.lb_endpoints.add(endpoint=there)
        # Or a part of the requests goes to the activator as soon as a third of the backends is not healthy.
        assignment.policy.overprovisioning_factor.value = 200 * max(1, len(service.backends))
    return _resource(service.name, assignment)


def runtime(found: Iterable[services.Service], max_requests: Mapping[str, int]) -> versions.Resource:
    """The values that change without a new cluster or listener. `max_requests`: by service, instead of its
    settings'."""
    layer = rtds_pb2.Runtime(name=RUNTIME_LAYER)
    values: dict[str, float] = {}
    for service in found:
        limit = max_requests.get(service.name, service.settings.max_requests)
        values[f"circuit_breakers.{service.name}.default.max_requests"] = limit
        log = f"access_log.{listeners.name_of(service.listen)}"
        values[log] = max(values.get(log, 0), 100 if service.settings.access_log else 0)
    layer.layer.update(dict(sorted(values.items())))
    return _resource(RUNTIME_LAYER, layer)


def _endpoint(address: str, port: int) -> endpoint_components_pb2.Endpoint:
    return endpoint_components_pb2.Endpoint(
        address=address_pb2.Address(
            socket_address=address_pb2.SocketAddress(address=address, port_value=port)
        ),
        health_check_config=endpoint_components_pb2.Endpoint.HealthCheckConfig(),
    )


def _named(resource: message.Message) -> dict[str, versions.Resource]:
    name = str(resource.name)  # type: ignore[attr-defined]
    return {name: _resource(name, resource)}


def _resource(name: str, resource: message.Message) -> versions.Resource:
    body = resource.SerializeToString(deterministic=True)
    return versions.Resource(name, hashlib.sha256(body).hexdigest()[:16], body)
