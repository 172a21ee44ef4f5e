"""The Load Reporting Service: a gRPC adapter. Envoy's reports become `reports.Report`; nothing is decided
here.

Runs in the control plane's loop. Spec: envoy.service.load_stats.v3.
"""

from __future__ import annotations

import collections
from typing import Any, Protocol

import grpc.aio
from envoy.config.endpoint.v3 import load_report_pb2
from envoy.service.load_stats.v3 import lrs_pb2, lrs_pb2_grpc

from serving.router import bootstrap, reports, tracing

_EOF = grpc.aio.EOF  # type: ignore[attr-defined]  # its stubs lack it


class Listener(Protocol):
    """Who hears of loads: `control.Router`."""

    def reporting(self, node: str) -> None: ...
    def reported(self, report: reports.Report) -> None: ...
    def silent(self, node: str) -> None: ...


class Reporting(lrs_pb2_grpc.LoadReportingServiceServicer):  # type: ignore[misc]
    """Asks every Envoy for the load of every backend, once a second."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    async def StreamLoadStats(  # noqa: N802 (the protocol's name)
        self, _: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        first = await context.read()
        if first is _EOF:
            return
        node = first.node.id
        self._listener.reporting(node)
        try:
            answer = lrs_pb2.LoadStatsResponse(send_all_clusters=True, report_endpoint_granularity=True)
            answer.load_reporting_interval.FromNanoseconds(int(reports.INTERVAL_SECONDS * 1e9))
            await context.write(answer)
            while (message := await context.read()) is not _EOF:
                self._listener.reported(_report(node, message.cluster_stats))
        finally:
            self._listener.silent(node)


def _report(node: str, clusters: list[load_report_pb2.ClusterStats]) -> reports.Report:
    counts: dict[str, dict[reports.Place, reports.Counts]] = {}
    dropped: dict[str, int] = {}
    seconds = 0.0
    for cluster in clusters:
        name = cluster.cluster_name
        if name == bootstrap.CONTROL or name.startswith(tracing.CLUSTER_PREFIX):
            continue
        seconds = max(seconds, cluster.load_report_interval.ToNanoseconds() / 1e9)
        dropped[cluster.cluster_name] = cluster.total_dropped_requests
        there: dict[reports.Place, reports.Counts] = collections.defaultdict(reports.Counts)
        for locality in cluster.upstream_locality_stats:
            for each in locality.upstream_endpoint_stats:
                place = (each.address.socket_address.address, each.address.socket_address.port_value)
                before = there[place]  # a backend that changed its locality is in both for a while
                there[place] = reports.Counts(
                    before.in_flight + each.total_requests_in_progress,
                    before.issued + each.total_issued_requests,
                    before.errors + each.total_error_requests,
                )
        counts[cluster.cluster_name] = reports.without_dropped(there, cluster.total_dropped_requests)
    return reports.Report(node, seconds or reports.INTERVAL_SECONDS, counts, dropped)
