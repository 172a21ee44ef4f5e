"""The Aggregated Discovery Service: a gRPC adapter, in both forms of the protocol.

Translates between messages and `versions`, which decides. Each Envoy's stream is a task of the control
plane's loop; `Discovery.notify` wakes them all. An Envoy gets nothing before there is a snapshot: an empty
answer from a control plane that has only just started would take away what the Envoy still routes.

Spec: envoy.service.discovery.v3.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, Protocol

import grpc.aio
from envoy.service.discovery.v3 import ads_pb2_grpc, discovery_pb2
from google.protobuf import any_pb2

from serving.router import versions

_log = logging.getLogger(__name__)

_EOF = grpc.aio.EOF  # type: ignore[attr-defined]  # its stubs lack it


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """A connected Envoy: which snapshot it has in full (None: not yet), and how it stands with each type."""

    id: str
    zone: str
    delta: bool
    current: bool
    standing: Mapping[str, versions.Standing]

    @property
    def refused(self) -> dict[str, str]:
        """What it refused, by type: why."""
        return {kind: each.error for kind, each in self.standing.items() if each.error is not None}


class Source(Protocol):
    """Where snapshots come from: `control.Router`."""

    def snapshot(self, node: str, zone: str) -> versions.Snapshot | None: ...
    def membership_changed(self) -> None: ...


class _Connection:
    def __init__(self, delta: bool) -> None:
        self.stream = versions.Stream(delta)
        self.delta = delta
        self.wake = asyncio.Event()
        self.closed = False
        self.id = ""
        self.zone = ""
        self.joined = False


class Discovery(ads_pb2_grpc.AggregatedDiscoveryServiceServicer):  # type: ignore[misc]
    """All streams. Every method runs in the control plane's loop."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._connections: set[_Connection] = set()

    def notify(self) -> None:
        """There is another snapshot."""
        for connection in self._connections:
            connection.wake.set()

    def zones(self) -> list[str]:
        """The zone of each that is connected; an activator, or an Envoy that was not told, has none."""
        return [each.zone for each in self._connections if each.joined]

    def ids(self) -> set[str]:
        """Of all that are connected."""
        return {each.id for each in self._connections if each.joined}

    def nodes(self) -> list[Node]:
        nodes = []
        for each in self._connections:
            if each.joined:
                snapshot = self._source.snapshot(each.id, each.zone)
                current = snapshot is not None and each.stream.settled(snapshot)
                nodes.append(Node(each.id, each.zone, each.delta, current, each.stream.standing()))
        return sorted(nodes, key=lambda node: node.id)

    async def StreamAggregatedResources(  # noqa: N802 (the protocol's name)
        self, _: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        await self._serve(_Connection(delta=False), context)

    async def DeltaAggregatedResources(  # noqa: N802 (the protocol's name)
        self, _: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        await self._serve(_Connection(delta=True), context)

    async def _serve(self, connection: _Connection, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self._connections.add(connection)
        reader = asyncio.create_task(self._read(connection, context))
        try:
            while True:
                await connection.wake.wait()
                connection.wake.clear()
                if connection.closed:
                    break
                snapshot = self._source.snapshot(connection.id, connection.zone)
                if snapshot is None or not connection.joined:
                    continue
                for response in connection.stream.due(snapshot):
                    await context.write(_encode(response, connection.delta))
        finally:
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError, grpc.aio.UsageError):
                await reader
            self._connections.discard(connection)
            if connection.joined:
                self._source.membership_changed()

    async def _read(self, connection: _Connection, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        try:
            while (message := await context.read()) is not _EOF:
                if not connection.joined:
                    connection.id = message.node.id
                    connection.zone = message.node.locality.zone
                    connection.joined = True
                    self._source.membership_changed()
                request = _decode(message, connection.delta)
                if request.error is not None:
                    _log.error(
                        "Envoy %s refused %s: %s",
                        connection.id,
                        request.type_url.rpartition(".")[2],
                        request.error,
                    )
                connection.stream.receive(request)
                connection.wake.set()
        finally:
            connection.closed = True
            connection.wake.set()


def _decode(message: Any, delta: bool) -> versions.Request:
    # The protocol marks a refusal by the field's presence; its code may be 0.
    error = message.error_detail.message if message.HasField("error_detail") else None
    if delta:
        return versions.Request(
            message.type_url,
            message.response_nonce,
            tuple(message.resource_names_subscribe),
            tuple(message.resource_names_unsubscribe),
            dict(message.initial_resource_versions),
            error,
        )
    return versions.Request(
        message.type_url, message.response_nonce, tuple(message.resource_names), error=error
    )


def _encode(response: versions.Response, delta: bool) -> Any:
    bodies = [any_pb2.Any(type_url=response.type_url, value=each.body) for each in response.resources]
    if not delta:
        return discovery_pb2.DiscoveryResponse(
            type_url=response.type_url,
            version_info=response.number,
            nonce=response.nonce,
            resources=bodies,
        )
    return discovery_pb2.DeltaDiscoveryResponse(
        type_url=response.type_url,
        system_version_info=response.number,
        nonce=response.nonce,
        resources=[
            discovery_pb2.Resource(name=each.name, version=each.version, resource=body)
            for each, body in zip(response.resources, bodies, strict=True)
        ],
        removed_resources=response.removed,
    )
