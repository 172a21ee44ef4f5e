"""Routes: which request goes to which service, and what is asked of it before. Pure.

Called by `resources`. Keys, tenants' shares, sizes and time-outs live here because routes change without any
connection noticing. `listeners` has the filters that these configure.

Keys are matched by routes, one for each: Envoy's own filter for keys says of itself that it is not covered by
its threat model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from envoy.config.route.v3 import route_pb2
from envoy.extensions.filters.http.buffer.v3 import buffer_pb2
from envoy.extensions.filters.http.local_ratelimit.v3 import local_rate_limit_pb2
from envoy.extensions.retry.host.previous_hosts.v3 import previous_hosts_pb2
from google.protobuf import json_format

from serving import service as services
from serving.router import clusters, tenants

IN_ANY = (buffer_pb2, local_rate_limit_pb2, previous_hosts_pb2)
"""Named so that protobuf knows them when they stand in an Any."""

RATE_FILTER, BUFFER_FILTER = "envoy.filters.http.local_ratelimit", "envoy.filters.http.buffer"

_TYPE = "type.googleapis.com/envoy.extensions."
_FILTERS = f"{_TYPE}filters.http."


def routes(
    name: str, there: Sequence[services.Service], rates: tenants.Rates
) -> route_pb2.RouteConfiguration:
    """One virtual host per host name; in it, longer prefixes first. `rates`: what tenants may have here,
    where that is not all of their rate."""
    by_host: dict[str, list[services.Service]] = {}
    for service in there:
        for host in service.hosts:
            by_host.setdefault(host, []).append(service)
    hosts = [
        {
            "name": host,
            "domains": [host] if host == "*" else [host, f"{host}:*"],
            "routes": [
                route
                for each in sorted(services_, key=lambda s: (-len(s.prefix), s.name))
                for route in _routes_of(each)
            ],
            "typed_per_filter_config": _shares(services_, rates),
        }
        for host, services_ in sorted(by_host.items())
    ]
    document = {"name": name, "virtual_hosts": hosts}
    return json_format.ParseDict(document, route_pb2.RouteConfiguration())


def _routes_of(service: services.Service) -> list[dict[str, Any]]:
    """One route; with keys, one for each key and header that it may come in, and a refusal for the rest."""
    action = _action(service)
    if not service.keys:
        return [_route(service, [], {"route": action, "request_headers_to_remove": [services.TENANT_HEADER]})]
    result = []
    for key in service.keys:
        tenant = {"header": {"key": services.TENANT_HEADER, "value": key.tenant}, "append_action": _OVERWRITE}
        limited = {"actions": [{"generic_key": {"descriptor_value": tenants.share_of(service, key)}}]}
        for header, value in (("authorization", f"Bearer {key.secret}"), ("x-api-key", key.secret)):
            admitted = {
                "route": action | ({"rate_limits": [limited]} if key.requests_per_second else {}),
                "request_headers_to_add": [tenant],
                "request_headers_to_remove": ["authorization", "x-api-key"],
            }
            match = [{"name": header, "string_match": {"exact": value}}]
            result.append(_route(service, match, admitted))
    return [*result, _route(service, [], _REFUSAL)]


def _route(service: services.Service, headers: list[dict[str, Any]], what: dict[str, Any]) -> dict[str, Any]:
    filters: dict[str, Any] = {}
    if service.settings.max_request_bytes is not None and "route" in what:
        filters[BUFFER_FILTER] = {
            "@type": f"{_FILTERS}buffer.v3.BufferPerRoute",
            "buffer": {"max_request_bytes": service.settings.max_request_bytes},
        }
    match = {"prefix": service.prefix, "headers": headers}
    return {"match": match, "typed_per_filter_config": filters} | what


def _action(service: services.Service) -> dict[str, Any]:
    settings = service.settings
    action: dict[str, Any] = {
        "cluster": service.name,
        "timeout": clusters.seconds(settings.request_timeout_seconds or 0),
        "idle_timeout": clusters.seconds(settings.stream_idle_seconds),
    }
    if settings.retries:
        action["retry_policy"] = {
            # Nothing that a backend may have begun to work on is sent twice.
            "retry_on": "connect-failure,refused-stream,reset-before-request",
            "num_retries": settings.retries,
            "retry_host_predicate": [_NOT_AGAIN],
            "host_selection_retry_max_attempts": 5,
        }
    if settings.balancing is services.Balancing.STICKY:
        action["hash_policy"] = [{"header": {"header_name": settings.sticky_header}}]
    return action


def _shares(there: Sequence[services.Service], rates: tenants.Rates) -> dict[str, Any]:
    """The tenants' buckets of one virtual host, which all its routes draw from: a tenant with two keys, while
    they rotate, has one share."""
    limits = {
        name: rates.get(name, key.requests_per_second)
        for service in there
        for key in service.keys
        if key.requests_per_second is not None
        for name in [tenants.share_of(service, key)]
    }
    if not limits:
        return {}
    return {
        RATE_FILTER: {
            "@type": f"{_FILTERS}local_ratelimit.v3.LocalRateLimit",
            "stat_prefix": "tenants",
            "token_bucket": _bucket(_ENOUGH),
            "filter_enabled": _ALWAYS,
            "filter_enforced": _ALWAYS,
            "response_headers_to_add": [{"header": {"key": "retry-after", "value": "1"}}],
            "descriptors": [
                {"entries": [{"key": "generic_key", "value": share}], "token_bucket": _bucket(limit)}
                for share, limit in sorted(limits.items())
            ],
        }
    }


def _bucket(requests_per_second: float) -> dict[str, Any]:
    """Whole requests, exactly at the rate: one of below one a second is filled less often."""
    tokens = max(1, math.floor(requests_per_second))
    return {
        "max_tokens": tokens,
        "tokens_per_fill": tokens,
        "fill_interval": clusters.seconds(tokens / requests_per_second),
    }


_ENOUGH = 1_000_000_000
_ALWAYS = {"default_value": {"numerator": 100, "denominator": "HUNDRED"}}
_OVERWRITE = "OVERWRITE_IF_EXISTS_OR_ADD"
_NOT_AGAIN = {
    "name": "envoy.retry_host_predicates.previous_hosts",
    "typed_config": {"@type": f"{_TYPE}retry.host.previous_hosts.v3.PreviousHostsPredicate"},
}
_REFUSAL = {
    "direct_response": {
        "status": 401,
        "body": {"inline_string": "a key is needed: Authorization: Bearer KEY, or x-api-key: KEY"},
    },
    "response_headers_to_add": [
        {"header": {"key": "www-authenticate", "value": "Bearer"}, "append_action": _OVERWRITE}
    ],
}
