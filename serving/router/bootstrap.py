"""The configuration that an Envoy starts with: where its control plane is, and nothing of what it routes.
Pure.

Called by `envoy` for the Envoy of this machine, by `glowplug router bootstrap` for others.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from serving.router import resources, versions

_TLS = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"
_HTTP = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
CONTROL = "glowplug_router"
"""The cluster by which an Envoy reaches us."""
_IDENTITY, _AUTHORITY = "identity", "authority"

_KEPT_STATS = (
    "upstream_rq_total",
    "upstream_rq_active",
    "upstream_rq_2xx",
    "upstream_rq_4xx",
    "upstream_rq_5xx",
    "upstream_rq_retry",
    "upstream_rq_retry_overflow",
    "upstream_rq_pending_overflow",
    "upstream_rq_timeout",
    "upstream_cx_connect_fail",
    "upstream_cx_active",
    "membership_healthy",
    "membership_total",
    "update_rejected",
    "downstream_rq_total",
    "downstream_rq_active",
    "downstream_rq_2xx",
    "downstream_rq_4xx",
    "downstream_rq_5xx",
    "downstream_cx_active",
    "ejections_active",
    "connected_state",
    "upstream_rq_time",
)
"""A statistic that nobody reads costs on every request and, with thousands of endpoints, memory."""


@dataclasses.dataclass(frozen=True, slots=True)
class ClientTls:
    """Files at the Envoy: its certificate and key, and the CA of the control plane's. `directory` is watched
    for new ones. `server_name` must be among the names in the control plane's certificate. `secrets`: the
    directory of what `secrets()` returns, since Envoy watches only what it is told of in this way."""

    directory: str
    secrets: str
    certificate: str
    key: str
    server_ca: str
    server_name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """`control`: a unix socket's path, or (host, port). `admin`: a unix socket's path. `delta`: tell changes
    only; False is state of the world."""

    node: str
    control: str | tuple[str, int]
    admin: str
    zone: str = ""
    tls: ClientTls | None = None
    delta: bool = True
    max_connections: int = 50_000


def document(settings: Settings) -> dict[str, Any]:
    """Envoy's bootstrap, as JSON's values."""
    service = {
        "envoy_grpc": {
            "cluster_name": CONTROL,
            # When the control plane is back, its Envoys are: the default waits up to 30 s.
            "retry_policy": {"retry_back_off": {"base_interval": "0.2s", "max_interval": "2s"}},
        }
    }
    return {
        "node": {"id": settings.node, "cluster": "glowplug", "locality": {"zone": settings.zone}},
        "admin": {"address": {"pipe": {"path": settings.admin, "mode": 0o600}}},
        "dynamic_resources": {
            "ads_config": {
                "api_type": "DELTA_GRPC" if settings.delta else "GRPC",
                "transport_api_version": "V3",
                "grpc_services": [service],
                "set_node_on_first_message_only": True,
            },
            "cds_config": {"ads": {}, "resource_api_version": "V3"},
            "lds_config": {"ads": {}, "resource_api_version": "V3"},
        },
        "cluster_manager": {
            "load_stats_config": {
                "api_type": "GRPC",
                "transport_api_version": "V3",
                "grpc_services": [service],
            }
        },
        "static_resources": {"clusters": [_control_cluster(settings)]},
        "layered_runtime": {
            "layers": [
                {
                    "name": resources.RUNTIME_LAYER,
                    "rtds_layer": {
                        "name": resources.RUNTIME_LAYER,
                        "rtds_config": {"ads": {}, "resource_api_version": "V3"},
                    },
                }
            ]
        },
        "stats_config": {
            "stats_matcher": {
                "inclusion_list": {"patterns": [{"suffix": f".{name}"} for name in _KEPT_STATS]}
            }
        },
        "overload_manager": {
            "resource_monitors": [
                {
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": {
                        "@type": "type.googleapis.com/envoy.extensions.resource_monitors."
                        "downstream_connections.v3.DownstreamConnectionsConfig",
                        "max_active_downstream_connections": settings.max_connections,
                    },
                }
            ]
        },
    }


def _control_cluster(settings: Settings) -> dict[str, Any]:
    if isinstance(settings.control, str):
        address: dict[str, Any] = {"pipe": {"path": settings.control}}
    else:
        host, port = settings.control
        address = {"socket_address": {"address": host, "port_value": port}}
    cluster: dict[str, Any] = {
        "name": CONTROL,
        "type": "STATIC" if isinstance(settings.control, str) else "STRICT_DNS",
        "connect_timeout": "1s",
        "load_assignment": {
            "cluster_name": CONTROL,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
        },
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": _HTTP,
                "explicit_http_config": {
                    "http2_protocol_options": {
                        # A control plane whose host is gone closes nothing.
                        "connection_keepalive": {"interval": "5s", "timeout": "5s"}
                    }
                },
            }
        },
    }
    if settings.tls is not None:
        cluster["transport_socket"] = {
            "name": "envoy.transport_sockets.tls",
            "typed_config": _client_tls(settings.tls),
        }
    return cluster


def _client_tls(tls: ClientTls) -> dict[str, Any]:
    def secret(name: str) -> dict[str, Any]:
        source = {"path": f"{tls.secrets}/{name}.json", "watched_directory": {"path": tls.secrets}}
        return {"name": name, "sds_config": {"path_config_source": source, "resource_api_version": "V3"}}

    return {
        "@type": _TLS,
        "sni": tls.server_name,
        "common_tls_context": {
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
            "alpn_protocols": ["h2"],
            "tls_certificate_sds_secret_configs": [secret(_IDENTITY)],
            "combined_validation_context": {
                "default_validation_context": {
                    "match_typed_subject_alt_names": [
                        {"san_type": "DNS", "matcher": {"exact": tls.server_name}}
                    ]
                },
                "validation_context_sds_secret_config": secret(_AUTHORITY),
            },
        },
    }


def secrets(tls: ClientTls) -> dict[str, Any]:
    """What is to lie in `tls.secrets`, by file name: where certificates are, not the certificates."""
    watched = {"path": tls.directory}
    made = {
        _IDENTITY: {
            "tls_certificate": {
                "certificate_chain": {"filename": tls.certificate},
                "private_key": {"filename": tls.key},
                "watched_directory": watched,
            }
        },
        _AUTHORITY: {
            "validation_context": {
                "trusted_ca": {"filename": tls.server_ca},
                "watched_directory": watched,
            }
        },
    }
    return {
        f"{name}.json": {"resources": [{"@type": versions.SECRET, "name": name, **secret}]}
        for name, secret in made.items()
    }
