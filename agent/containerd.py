"""What `glowplug pull` leaves in containerd: an image whose layers are lazy snapshots, as after an unpack.

    lease -> a snapshot per layer (Prepare with the chain id: the agent answers that it is there)
    -> manifests and config in the content store, labelled as containerd's own unpacker does -> image record

The layers' blobs are not there, and are not needed to run the image. containerd's garbage collector keeps
what the labels name: the image the manifests, they the config, the config the topmost snapshot. Called by the
verb, on its thread; talks containerd's gRPC API, any line from 1.6 on. Everything may be repeated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import empty_pb2
from google.protobuf.message import Message

from agent import lookup, snapshots
from agent.containerdconfig import SNAPSHOTTER
from agent.proto import containerd_pb2 as messages
from agent.proto import snapshots_pb2
from imagefs import artifact, errors

_GC = "containerd.io/gc."
_LEASE_HOURS = 1
_DEADLINE_SECONDS = 60.0
_BACK_OFF_SECONDS = 5.0
"""For up to three seconds containerd tries no new connection to an agent that it missed."""
_RETRY_SECONDS = 0.25


@dataclasses.dataclass(frozen=True, slots=True)
class Image:
    """An image to record. `manifests` leads from its target (an index, or the manifest) to the manifest;
    `chain_ids` are its layers', bottom first."""

    name: str
    manifests: tuple[artifact.Manifest, ...]
    config: bytes
    chain_ids: tuple[str, ...]


class Containerd:
    """A client of one namespace. Raises errors of imagefs; use as a context."""

    def __init__(self, socket: Path, namespace: str) -> None:
        self._socket = socket
        self._metadata: list[tuple[str, str]] = [("containerd-namespace", namespace)]
        self._channel = grpc.insecure_channel(f"unix:{os.path.abspath(socket)}")

    def __enter__(self) -> Containerd:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def record(self, image: Image) -> None:
        """Make the snapshots and the image. UnavailableError when containerd, or the agent behind it, does
        not play its part."""
        with self._lease():
            self._make_snapshots(image)
            self._write_documents(image)
            self._name_image(image)

    # -- steps -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _lease(self) -> Iterator[None]:
        """What is made inside is safe from the garbage collector until the image names it."""
        name = f"glowplug-pull-{secrets.token_hex(8)}"
        expires = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=_LEASE_HOURS)
        labels = {f"{_GC}expire": expires.strftime("%Y-%m-%dT%H:%M:%SZ")}
        self._call("leases.v1.Leases/Create", messages.CreateLeaseRequest(id=name, labels=labels))
        plain = list(self._metadata)
        self._metadata.append(("containerd-lease", name))
        try:
            yield
        finally:
            self._metadata = plain
            self._call("leases.v1.Leases/Delete", messages.DeleteLeaseRequest(id=name))

    def _make_snapshots(self, image: Image) -> None:
        self._prepare(image)
        # An agent that lost its database knows nothing of what containerd still counts as there.
        lost = [chain_id for chain_id in image.chain_ids if not self._is_there(chain_id)]
        for chain_id in reversed(lost):
            request = snapshots_pb2.RemoveSnapshotRequest(snapshotter=SNAPSHOTTER, key=chain_id)
            self._call("snapshots.v1.Snapshots/Remove", request, allowed=grpc.StatusCode.NOT_FOUND)
        if lost:
            self._prepare(image)

    def _is_there(self, chain_id: str) -> bool:
        request = snapshots_pb2.StatSnapshotRequest(snapshotter=SNAPSHOTTER, key=chain_id)
        return self._call("snapshots.v1.Snapshots/Stat", request, allowed=grpc.StatusCode.NOT_FOUND)

    def _prepare(self, image: Image) -> None:
        chain_ids = image.chain_ids
        which = {lookup.REFERENCE_LABEL: image.name, lookup.MANIFEST_LABEL: image.manifests[-1].digest}
        for number, chain_id in enumerate(chain_ids):
            request = snapshots_pb2.PrepareSnapshotRequest(
                snapshotter=SNAPSHOTTER,
                key=f"glowplug-pull-{secrets.token_hex(8)} {chain_id}",
                parent=chain_ids[number - 1] if number else "",
                labels={**which, snapshots.REF_LABEL: chain_id},
            )
            if self._call("snapshots.v1.Snapshots/Prepare", request, allowed=grpc.StatusCode.ALREADY_EXISTS):
                remove = snapshots_pb2.RemoveSnapshotRequest(snapshotter=SNAPSHOTTER, key=request.key)
                self._call("snapshots.v1.Snapshots/Remove", remove)
                raise errors.UnavailableError(
                    f"the agent behind {self._socket} did not know layer {number} ({chain_id}); does "
                    f"containerd's snapshotter {SNAPSHOTTER!r} point to the agent that was asked?"
                )

    def _write_documents(self, image: Image) -> None:
        top = {f"{_GC}ref.snapshot.{SNAPSHOTTER}": image.chain_ids[-1]} if image.chain_ids else {}
        self._write(artifact.digest_of(image.config), image.config, top)
        for manifest in reversed(image.manifests):
            self._write(manifest.digest, manifest.data, _references(manifest))

    def _write(self, digest: str, data: bytes, labels: Mapping[str, str]) -> None:
        """Content is written in two messages, as containerd's own client does: another namespace may have it
        already, and then it only wants to be claimed."""
        begin = messages.WriteContentRequest(
            action=messages.STAT, ref=f"glowplug-{digest}", total=len(data), expected=digest
        )
        offset = self._exchange([begin])
        if offset is not None:
            left = data[min(offset, len(data)) :]
            commit = messages.WriteContentRequest(
                action=messages.COMMIT,
                ref=begin.ref,
                total=len(data),
                expected=digest,
                offset=len(data) - len(left),
                data=left,
                labels=labels,
            )
            self._exchange([begin, commit])
        request = messages.UpdateContentRequest(info=messages.Content(digest=digest, labels=labels))
        request.update_mask.paths.extend(f"labels.{name}" for name in labels)
        if labels:
            self._call("content.v1.Content/Update", request)

    def _name_image(self, image: Image) -> None:
        target = image.manifests[0]
        descriptor = messages.Descriptor(
            media_type=target.media_type, digest=target.digest, size=len(target.data)
        )
        request = messages.ImageRequest(image=messages.Image(name=image.name, target=descriptor))
        if not self._call("images.v1.Images/Create", request, allowed=grpc.StatusCode.ALREADY_EXISTS):
            self._call("images.v1.Images/Update", request)

    # -- gRPC --------------------------------------------------------------------------------------

    def _call(self, method: str, request: Message, allowed: grpc.StatusCode | None = None) -> bool:
        """One call, its answer unread. Whether it was carried out: False for the `allowed` refusal."""
        call = self._channel.unary_unary(
            f"/containerd.services.{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=empty_pb2.Empty.FromString,
        )
        until = time.monotonic() + _BACK_OFF_SECONDS
        while True:
            try:
                call(request, timeout=_DEADLINE_SECONDS, metadata=tuple(self._metadata))
                return True
            except grpc.RpcError as exc:
                if allowed is not None and exc.code() is allowed:
                    return False
                if not _agent_missed(exc) or time.monotonic() > until:
                    raise self._error(method, exc) from exc
            time.sleep(_RETRY_SECONDS)

    def _exchange(self, requests: Sequence[messages.WriteContentRequest]) -> int | None:
        """A write stream; the offset in its last answer, None when the content is there."""
        call: Any = self._channel.stream_stream(
            "/containerd.services.content.v1.Content/Write",
            request_serializer=messages.WriteContentRequest.SerializeToString,
            response_deserializer=messages.WriteContentResponse.FromString,
        )
        try:
            answers = list(call(iter(requests), timeout=_DEADLINE_SECONDS, metadata=tuple(self._metadata)))
        except grpc.RpcError as exc:
            if exc.code() is grpc.StatusCode.ALREADY_EXISTS:
                return None
            raise self._error("content.v1.Content/Write", exc) from exc
        return int(answers[-1].offset) if answers else 0

    def _error(self, method: str, exc: grpc.RpcError) -> errors.ImagefsError:
        code, text = exc.code(), f"containerd at {self._socket}: {method}: {exc.details()}"
        if code is grpc.StatusCode.INVALID_ARGUMENT and "not loaded" in str(exc.details()):
            return errors.ConfigurationError(
                f"{text}; its config has no proxy plugin {SNAPSHOTTER!r}: `glowplug agent install` writes it"
            )
        if _agent_missed(exc):
            return errors.UnavailableError(
                f"{text}; containerd does not reach the agent: the address of proxy plugin {SNAPSHOTTER!r} "
                "must be `socket` of the agent's settings"
            )
        if code is grpc.StatusCode.UNAVAILABLE and "connect" in str(exc.details()):
            return errors.UnavailableError(
                f"containerd does not answer on {self._socket}: is it running there? (--containerd-address)"
            )
        return errors.UnavailableError(text)


def _agent_missed(exc: grpc.RpcError) -> bool:
    """Whether it was containerd that could not connect to its proxy plugin."""
    return exc.code() is grpc.StatusCode.UNAVAILABLE and "error while dialing" in str(exc.details()).lower()


def _references(manifest: artifact.Manifest) -> dict[str, str]:
    """The garbage collector's labels of a manifest or index: what it needs."""
    document = artifact.parse_json_object(manifest.data, f"manifest {manifest.digest}")
    out = {}
    if "config" in document:
        out[f"{_GC}ref.content.config"] = str(document["config"]["digest"])
    for kind, field in (("l", "layers"), ("m", "manifests")):
        for number, entry in enumerate(document.get(field) or ()):
            out[f"{_GC}ref.content.{kind}.{number}"] = str(entry["digest"])
    return out
