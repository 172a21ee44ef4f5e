"""The activator's two streams to the control plane: endpoints come, load goes. A gRPC adapter.

Runs in the activator's loop. What came last stays in force while the control plane is away; both streams are
opened again for ever, with growing pauses, and pinged, so that one that died silently in a long idle time is
found before it is needed. Load is said as a level, every interval and at once when the first request is held:
no single message that is lost can leave a request waiting for a replica that nobody starts.

Specs: envoy.service.discovery.v3 (state of the world, endpoints only), envoy.service.load_stats.v3.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
from collections.abc import Awaitable, Callable, Collection, Mapping

import grpc.aio
from envoy.config.core.v3 import base_pb2
from envoy.config.endpoint.v3 import endpoint_pb2, load_report_pb2
from envoy.service.discovery.v3 import ads_pb2_grpc, discovery_pb2
from envoy.service.load_stats.v3 import lrs_pb2, lrs_pb2_grpc
from google.protobuf import message

from serving.activator.choice import Place

_log = logging.getLogger(__name__)

ENDPOINTS = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
_ENDED = "the control plane ended the stream"
_EOF = grpc.aio.EOF  # type: ignore[attr-defined]  # its stubs lack it
_RETRY_SECONDS = 0.1
_RETRY_MAX_SECONDS = 3.0
_MAX_MESSAGE_BYTES = 16 << 20
_OPTIONS = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Held:
    """The load of one service here: requests in flight, held ones included, and counts since the process
    began."""

    in_flight: int
    issued: int
    errors: int


def channel(target: str, credentials: grpc.ChannelCredentials | None = None) -> grpc.aio.Channel:
    """A channel to the control plane: HOST:PORT or unix:PATH."""
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=_OPTIONS)
    return grpc.aio.secure_channel(target, credentials, options=_OPTIONS)


def places(assignment: endpoint_pb2.ClusterLoadAssignment) -> set[Place]:
    """The replicas in a service's endpoints: those of priority 0 (1 is activators, us among them)."""
    return {
        (address.address, address.port_value)
        for locality in assignment.endpoints
        if locality.priority == 0
        for address in (each.endpoint.address.socket_address for each in locality.lb_endpoints)
        if address.address and address.port_value
    }


async def follow_endpoints(
    over: grpc.aio.Channel,
    node: str,
    services: Collection[str],
    changed: Callable[[str, set[Place]], None],
) -> None:
    """Tell `changed` of each service's replicas, now and whenever they change. Runs until it is cancelled."""
    stub = ads_pb2_grpc.AggregatedDiscoveryServiceStub(over)

    async def once(began: Callable[[], None]) -> None:
        stream = stub.StreamAggregatedResources()
        ask = discovery_pb2.DiscoveryRequest(
            node=base_pb2.Node(id=node), type_url=ENDPOINTS, resource_names=sorted(services)
        )
        await stream.write(ask)
        async for response in stream:
            began()
            acknowledge = discovery_pb2.DiscoveryRequest(
                type_url=ENDPOINTS, resource_names=sorted(services), response_nonce=response.nonce
            )
            try:
                for assignment in _assignments(response):
                    if assignment.cluster_name in services:
                        changed(assignment.cluster_name, places(assignment))
                acknowledge.version_info = response.version_info
            except message.DecodeError as exc:
                acknowledge.error_detail.message = f"not a list of endpoints: {exc}"
                _log.error("the control plane sent endpoints that cannot be read: %s", exc)
            await stream.write(acknowledge)

    await _for_ever("endpoints", once)


async def report_load(
    over: grpc.aio.Channel,
    node: str,
    listens: Mapping[str, Place],
    load: Callable[[str], Held],
    woken: asyncio.Event,
) -> None:
    """Report each service's load under the place where we listen for it: as often as the control plane asks,
    and at once whenever `woken` is set. Runs until it is cancelled."""
    stub = lrs_pb2_grpc.LoadReportingServiceStub(over)

    async def once(began: Callable[[], None]) -> None:
        stream = stub.StreamLoadStats()
        await stream.write(lrs_pb2.LoadStatsRequest(node=base_pb2.Node(id=node)))
        answer = await stream.read()
        if answer is _EOF:
            raise ConnectionError(_ENDED)
        interval = answer.load_reporting_interval.ToNanoseconds() / 1e9 or 1.0
        began()
        said = {name: load(name) for name in listens}
        told_at = asyncio.get_running_loop().time() - interval
        while not stream.done():
            now = asyncio.get_running_loop().time()
            report = lrs_pb2.LoadStatsRequest()
            for name, place in listens.items():
                current = load(name)
                report.cluster_stats.append(_stats(name, place, current, said[name], now - told_at))
                said[name] = current
            told_at = now
            await stream.write(report)
            await _pause(woken, interval)

    await _for_ever("load reports", once)


def _assignments(response: discovery_pb2.DiscoveryResponse) -> list[endpoint_pb2.ClusterLoadAssignment]:
    return [endpoint_pb2.ClusterLoadAssignment.FromString(each.value) for each in response.resources]


def _stats(
    service: str, place: Place, now: Held, before: Held, seconds: float
) -> load_report_pb2.ClusterStats:
    stats = load_report_pb2.ClusterStats(cluster_name=service)
    stats.load_report_interval.FromNanoseconds(int(seconds * 1e9))
    locality = stats.upstream_locality_stats.add(priority=1)
    endpoint = locality.upstream_endpoint_stats.add(
        total_requests_in_progress=now.in_flight,
        total_issued_requests=now.issued - before.issued,
        total_error_requests=now.errors - before.errors,
    )
    endpoint.address.socket_address.address, endpoint.address.socket_address.port_value = place
    return stats


async def _pause(woken: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(woken.wait(), seconds)
    except TimeoutError:
        return
    woken.clear()


async def _for_ever(what: str, once: Callable[[Callable[[], None]], Awaitable[None]]) -> None:
    """Have `once` done again whenever it ends; it calls what it is given when its stream works."""
    failures = 0

    def began() -> None:
        nonlocal failures
        failures = 0

    while True:
        try:
            await once(began)
            reason = _ENDED
        except grpc.aio.AioRpcError as exc:
            reason = exc.details() or exc.code().name
        except (ConnectionError, grpc.aio.UsageError, asyncio.InvalidStateError) as exc:
            reason = str(exc) or _ENDED
        failures += 1
        pause = min(_RETRY_SECONDS * 2.0 ** min(failures, 8), _RETRY_MAX_SECONDS)
        if failures in (1, 10):  # or a control plane that is away fills the log
            _log.warning("%s: %s; trying again until it works", what, reason)
        await asyncio.sleep(pause * (0.5 + random.random() / 2))  # noqa: S311 - it spreads retries
