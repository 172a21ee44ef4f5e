"""What makes an Envoy begin or continue traces, and send its spans to a collector. Pure.

Used by `listeners` (what the connection manager is told) and `resources` (the collector's cluster). Spans go
by OTLP over HTTP, in batches, besides the requests. A caller's `traceparent` is continued and its decision
kept; where there is none, the listener's sample decides. Upstream requests carry the span of that very
attempt, so that an engine's spans are its children.
"""

from __future__ import annotations

import ipaddress
from typing import Any

from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.trace.v3 import opentelemetry_pb2
from envoy.extensions.tracers.opentelemetry.samplers.v3 import (
    parent_based_sampler_pb2,
    trace_id_ratio_based_sampler_pb2,
)
from google.protobuf import json_format

from serving import service as services

IN_ANY = (opentelemetry_pb2, parent_based_sampler_pb2, trace_id_ratio_based_sampler_pb2)
"""Named so that protobuf knows them when they stand in an Any."""

CLUSTER_PREFIX = "glowplug_traces/"
"""No service's name begins so: they have no slash."""
_TIMEOUT = "2s"
_SAMPLERS = "type.googleapis.com/envoy.extensions.tracers.opentelemetry.samplers.v3."
_MILLION = 1_000_000


def cluster_name(tracing: services.Tracing) -> str:
    return f"{CLUSTER_PREFIX}{tracing.host}:{tracing.port}"


def cluster(tracing: services.Tracing) -> cluster_pb2.Cluster:
    """The collector."""
    name = cluster_name(tracing)
    address = {"socket_address": {"address": tracing.host, "port_value": tracing.port}}
    document = {
        "name": name,
        "type": "STATIC" if _is_address(tracing.host) else "STRICT_DNS",
        "connect_timeout": "1s",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
        },
    }
    return json_format.ParseDict(document, cluster_pb2.Cluster())


def manager(tracing: services.Tracing) -> dict[str, Any]:
    """What is different in a connection manager that traces."""
    ratio = {
        "name": "envoy.tracers.opentelemetry.samplers.trace_id_ratio_based",
        "typed_config": {
            "@type": f"{_SAMPLERS}TraceIdRatioBasedSamplerConfig",
            "sampling_percentage": {
                "numerator": round(tracing.sample_percent / 100 * _MILLION),
                "denominator": "MILLION",
            },
        },
    }
    return {
        "tracing": {
            "provider": {
                "name": "envoy.tracers.opentelemetry",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig",
                    "service_name": tracing.service,
                    "http_service": {
                        "http_uri": {
                            "uri": f"http://{tracing.host}:{tracing.port}/v1/traces",
                            "cluster": cluster_name(tracing),
                            "timeout": _TIMEOUT,
                        }
                    },
                    "sampler": {
                        "name": "envoy.tracers.opentelemetry.samplers.parent_based",
                        "typed_config": {
                            "@type": f"{_SAMPLERS}ParentBasedSamplerConfig",
                            "wrapped_sampler": ratio,
                        },
                    },
                },
            },
            # What the connection manager leaves out, no sampler sees, not even a caller's own decision.
            "random_sampling": {"value": 100},
            "spawn_upstream_span": True,
        },
        # Envoy decides by the request's id whether to trace; a client's own is kept, as without tracing.
        "generate_request_id": True,
        "preserve_external_request_id": True,
        "always_set_request_id_in_response": False,
    }


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
