"""The cluster of a service: how its backends are checked, chosen among, limited and tried again. Pure.

Called by `resources`. Most of these settings were learned by trying: each has its reason here, and a test
with a real Envoy in `tests/serving/router/test_envoy_traps.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from envoy.config.cluster.v3 import cluster_pb2
from envoy.extensions.load_balancing_policies.least_request.v3 import least_request_pb2
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2
from google.protobuf import json_format

from serving import service as services

IN_ANY = (http_protocol_options_pb2, least_request_pb2)
"""Named so that protobuf knows them when they stand in an Any."""

_TYPE = "type.googleapis.com/envoy.extensions."
_UNLIMITED = 1_000_000_000
"""For Envoy's limits that default to 1,024 and count what is limited elsewhere."""

_FREE_RETRIES = 32
"""At once, whatever the budget's share is. Only what was never sent is tried again, so that a retry is no
second piece of work; with Envoy's own 3, some of 16 clients that met a dead replica got a 429."""


def cluster(service: services.Service) -> cluster_pb2.Cluster:
    """The cluster of a service, without its endpoints."""
    settings = service.settings
    document: dict[str, Any] = {
        "name": service.name,
        "type": "EDS",
        "eds_cluster_config": {"eds_config": {"ads": {}, "resource_api_version": "V3"}},
        "connect_timeout": seconds(settings.connect_timeout_seconds),
        "common_lb_config": {
            # Panic would send requests to backends that are known to fail, and none to the activator.
            "healthy_panic_threshold": {"value": 0},
            "locality_weighted_lb_config": {},
            "ignore_new_hosts_until_first_hc": settings.health_path is not None,
        },
        # Without it a backend that left goes on getting requests while its health checks pass.
        "ignore_health_on_host_removal": True,
        "circuit_breakers": {
            "thresholds": [
                {
                    "max_connections": _UNLIMITED,
                    "max_pending_requests": _UNLIMITED,
                    "max_requests": settings.max_requests,
                    "retry_budget": {
                        "budget_percent": {"value": settings.retry_budget_percent},
                        "min_retry_concurrency": _FREE_RETRIES,
                    },
                }
            ]
        },
        "outlier_detection": _outliers(settings),
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": _upstream(settings)
        },
        "upstream_connection_options": {"tcp_keepalive": {"keepalive_time": 30, "keepalive_interval": 10}},
    }
    document |= _BALANCING[settings.balancing]
    if settings.balancing is services.Balancing.FULL_SCAN:
        del document["common_lb_config"]["locality_weighted_lb_config"]  # its policy has one of its own
    if settings.balancing is services.Balancing.STICKY:
        document["common_lb_config"]["consistent_hashing_lb_config"] = {"hash_balance_factor": 125}
    if settings.health_path is not None:
        document["health_checks"] = [_health_check(settings)]
    return json_format.ParseDict(document, cluster_pb2.Cluster())


_BALANCING: Mapping[services.Balancing, dict[str, Any]] = {
    services.Balancing.P2C: {
        "lb_policy": "LEAST_REQUEST",
        "least_request_lb_config": {"choice_count": 2},
    },
    services.Balancing.FULL_SCAN: {
        "load_balancing_policy": {
            "policies": [
                {
                    "typed_extension_config": {
                        "name": "envoy.load_balancing_policies.least_request",
                        "typed_config": {
                            "@type": f"{_TYPE}load_balancing_policies.least_request.v3.LeastRequest",
                            "selection_method": "FULL_SCAN",
                            "locality_lb_config": {"locality_weighted_lb_config": {}},
                        },
                    }
                }
            ]
        }
    },
    services.Balancing.STICKY: {"lb_policy": "MAGLEV"},
    services.Balancing.ROUND_ROBIN: {"lb_policy": "ROUND_ROBIN"},
    services.Balancing.RANDOM: {"lb_policy": "RANDOM"},
}


def _upstream(settings: services.RouteSettings) -> dict[str, Any]:
    protocol = "http2_protocol_options" if settings.http2 else "http_protocol_options"
    return {
        "@type": f"{_TYPE}upstreams.http.v3.HttpProtocolOptions",
        # Below the engine's keep-alive, or a request meets a connection that the engine is closing.
        "common_http_protocol_options": {"idle_timeout": seconds(settings.upstream_idle_seconds)},
        "explicit_http_config": {protocol: {}},
    }


def _outliers(settings: services.RouteSettings) -> dict[str, Any]:
    """Eject what cannot be reached; never what answers, whatever it answers: overload is not failure."""
    return {
        "split_external_local_origin_errors": True,
        "consecutive_local_origin_failure": 3,
        "enforcing_consecutive_local_origin_failure": 100,
        "enforcing_consecutive_5xx": 0,
        "enforcing_consecutive_gateway_failure": 0,
        "enforcing_success_rate": 0,
        "enforcing_local_origin_success_rate": 0,
        "interval": "1s",
        "base_ejection_time": seconds(settings.eject_seconds),
        "max_ejection_time": seconds(max(30.0, settings.eject_seconds)),
        "max_ejection_percent": 50,
    }


def _health_check(settings: services.RouteSettings) -> dict[str, Any]:
    interval = seconds(settings.health_interval_seconds)
    return {
        "timeout": seconds(settings.health_timeout_seconds),
        "interval": interval,
        # The default is a minute while a cluster has had no request: a replica that fails its first check
        # would be found ready a minute late.
        "no_traffic_interval": interval,
        "interval_jitter": seconds(settings.health_interval_seconds / 10),
        "unhealthy_threshold": settings.unhealthy_after,
        "healthy_threshold": settings.healthy_after,
        "http_health_check": {"path": settings.health_path},
    }


def seconds(value: float) -> str:
    """A duration, as protobuf's JSON form has it."""
    return f"{value:.6f}s"
