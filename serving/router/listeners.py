"""Listeners: what every request passes, whatever its service. Pure.

Called by `resources`. A changed listener drains its connections, so nothing here depends on a service:
filters sleep until a route configures them, and the certificate is a secret that has a life of its own.
"""

from __future__ import annotations

from typing import Any

from envoy.config.listener.v3 import listener_pb2
from envoy.extensions.access_loggers.stream.v3 import stream_pb2
from envoy.extensions.filters.http.router.v3 import router_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import http_connection_manager_pb2
from envoy.extensions.transport_sockets.tls.v3 import secret_pb2, tls_pb2
from google.protobuf import json_format

from serving import service as services
from serving.router import routes, tracing

IN_ANY = (http_connection_manager_pb2, router_pb2, stream_pb2, tls_pb2)
"""Named so that protobuf knows them when they stand in an Any."""

_TYPE = "type.googleapis.com/envoy.extensions."
_FILTERS = f"{_TYPE}filters.http."


def name_of(listen: services.Listen) -> str:
    """Also the name of its routes, and of its certificate."""
    return f"{listen.address}_{listen.port}".replace(":", "-").replace(".", "-")


def listener(listen: services.Listen) -> listener_pb2.Listener:
    """The listener at one place."""
    name = name_of(listen)
    chain: dict[str, Any] = {
        "filters": [
            {"name": "envoy.filters.network.http_connection_manager", "typed_config": _manager(name, listen)}
        ]
    }
    if listen.tls is not None:
        chain["transport_socket"] = {
            "name": "envoy.transport_sockets.tls",
            "typed_config": _downstream_tls(name, listen.tls),
        }
    document = {
        "name": name,
        "address": {"socket_address": {"address": listen.address, "port_value": listen.port}},
        "filter_chains": [chain],
        "per_connection_buffer_limit_bytes": 64 << 10,
    }
    return json_format.ParseDict(document, listener_pb2.Listener())


def _manager(name: str, listen: services.Listen) -> dict[str, Any]:
    traced = {} if listen.tracing is None else tracing.manager(listen.tracing)
    return {
        "@type": f"{_TYPE}filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": name,
        "rds": {
            "route_config_name": name,
            "config_source": {"ads": {}, "resource_api_version": "V3"},
        },
        "http_filters": _filters(),
        "use_remote_address": True,
        # Each costs on every request, and nobody here reads them.
        "generate_request_id": False,
        "server_header_transformation": "PASS_THROUGH",
        "request_headers_timeout": "10s",
        "common_http_protocol_options": {"idle_timeout": "3600s"},
        "http2_protocol_options": {"max_concurrent_streams": 1024},
        "normalize_path": True,
        "merge_slashes": True,
        "local_reply_config": _local_replies(),
        "access_log": [_access_log(name)],
    } | traced


def _filters() -> list[dict[str, Any]]:
    """All that a route may need, asleep until a route configures it, so that a listener need not change."""
    return [
        {
            "name": routes.RATE_FILTER,
            "disabled": True,
            "typed_config": {
                "@type": f"{_FILTERS}local_ratelimit.v3.LocalRateLimit",
                "stat_prefix": "tenants",
            },
        },
        {
            "name": routes.BUFFER_FILTER,
            "disabled": True,
            "typed_config": {"@type": f"{_FILTERS}buffer.v3.Buffer", "max_request_bytes": 32 << 20},
        },
        {
            "name": "envoy.filters.http.router",
            "typed_config": {
                "@type": f"{_FILTERS}router.v3.Router",
                "suppress_envoy_headers": True,
            },
        },
    ]


def _local_replies() -> dict[str, Any]:
    """What Envoy answers itself looks like what an engine of the OpenAI API answers; a full service is 429,
    and a 429 says which limit it was."""
    return {
        "mappers": [
            {
                # First: a retry that there were too many of has the flag of a full service as well.
                "filter": {"response_flag_filter": {"flags": ["UF", "UC", "UR"]}},
                "body_format_override": _error("router_error"),
            },
            {
                "filter": {"response_flag_filter": {"flags": ["UO"]}},
                "status_code": 429,
                "headers_to_add": [{"header": {"key": "retry-after", "value": "1"}}],
                "body_format_override": _error("rate_limit_exceeded", limit="in_flight"),
            },
            {
                # By status: the filter sets its flag only after it has answered.
                "filter": {"status_code_filter": {"comparison": _is(429, "local_reply.limited_status")}},
                "body_format_override": _error("rate_limit_exceeded", limit="requests_per_second"),
            },
        ],
        "body_format": _error("router_error"),
    }


def _is(status: int, runtime_key: str) -> dict[str, Any]:
    return {"op": "EQ", "value": {"default_value": status, "runtime_key": runtime_key}}


def _error(kind: str, **more: str) -> dict[str, Any]:
    error = {
        "message": "%LOCAL_REPLY_BODY%",
        "type": kind,
        "code": "%RESPONSE_CODE%",
        "reason": "%RESPONSE_CODE_DETAILS%",
        **more,
    }
    return {"json_format": {"error": error}}


def _access_log(name: str) -> dict[str, Any]:
    line = {
        "time": "%START_TIME%",
        "service": "%UPSTREAM_CLUSTER_RAW%",
        "method": "%REQ(:METHOD)%",
        "path": "%PATH(NQ)%",
        "status": "%RESPONSE_CODE%",
        "flags": "%RESPONSE_FLAGS%",
        "details": "%RESPONSE_CODE_DETAILS%",
        "bytes_in": "%BYTES_RECEIVED%",
        "bytes_out": "%BYTES_SENT%",
        "milliseconds": "%DURATION%",
        "backend": "%UPSTREAM_HOST%",
        "client": "%DOWNSTREAM_REMOTE_ADDRESS%",
        "tenant": f"%REQ({services.TENANT_HEADER})%",
        "trace": "%REQ(traceparent)%",
    }
    return {
        "name": "envoy.access_loggers.stdout",
        # Failures always, the rest where it is wanted: a runtime value, as a changed listener drains.
        "filter": {
            "or_filter": {
                "filters": [
                    {
                        "status_code_filter": {
                            "comparison": {
                                "op": "GE",
                                "value": {"default_value": 500, "runtime_key": "access_log.from_status"},
                            }
                        }
                    },
                    {"runtime_filter": {"runtime_key": f"access_log.{name}", "percent_sampled": {}}},
                ]
            }
        },
        "typed_config": {
            "@type": f"{_TYPE}access_loggers.stream.v3.StdoutAccessLog",
            "log_format": {"json_format": line},
        },
    }


def _downstream_tls(name: str, tls: services.Tls) -> dict[str, Any]:
    source = {"ads": {}, "resource_api_version": "V3"}
    common: dict[str, Any] = {
        "alpn_protocols": ["h2", "http/1.1"],
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
        "tls_certificate_sds_secret_configs": [{"name": name, "sds_config": source}],
    }
    if tls.client_ca_pem is not None:
        common["validation_context_sds_secret_config"] = {"name": f"{name}/clients", "sds_config": source}
    return {
        "@type": f"{_TYPE}transport_sockets.tls.v3.DownstreamTlsContext",
        "common_tls_context": common,
        "require_client_certificate": tls.client_ca_pem is not None,
    }


def secrets(listen: services.Listen) -> list[secret_pb2.Secret]:
    """Its certificate, and the CA of its clients, where it has them."""
    name = name_of(listen)
    tls = listen.tls
    if tls is None:
        return []
    own = secret_pb2.Secret(name=name)
    own.tls_certificate.certificate_chain.inline_bytes = tls.certificate_pem
    own.tls_certificate.private_key.inline_bytes = tls.key_pem
    if tls.client_ca_pem is None:
        return [own]
    clients = secret_pb2.Secret(name=f"{name}/clients")
    clients.validation_context.trusted_ca.inline_bytes = tls.client_ca_pem
    return [own, clients]
