"""containerd's snapshots API v1 over gRPC: messages to values and back, errors to status codes. No decisions.

`serve` is called by the daemon, last of all, since containerd begins to ask as soon as the socket is there.
Calls run in a bounded pool of threads. A message that is too large is refused by grpc itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import empty_pb2

from agent import errors as agent_errors
from agent import logs, snapshots
from agent.observer import Observer
from agent.proto import mount_pb2
from agent.proto import snapshots_pb2 as messages
from agent.snapshotter import Snapshotter
from imagefs import errors

SERVICE = "containerd.services.snapshots.v1.Snapshots"

MAX_MESSAGE_BYTES = 16 << 20
"""containerd's own limit on what it receives and sends."""

_LIST_CHUNK = 100
_MAX_STATUS_BYTES = 2 << 10
"""Three times that on the wire, at worst; a client may refuse a header of more than 8 KiB."""
_THREADS = 32
"""A Prepare may wait for a registry (images.lookup_deadline_seconds): as many images may start at once."""

_LOG = logging.getLogger(__name__)

_CODES: Sequence[tuple[type[errors.ImagefsError], grpc.StatusCode]] = (
    (errors.NotFoundError, grpc.StatusCode.NOT_FOUND),
    (agent_errors.AlreadyExistsError, grpc.StatusCode.ALREADY_EXISTS),
    (agent_errors.FailedPreconditionError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.BusyError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.InvalidInputError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.UnavailableError, grpc.StatusCode.UNAVAILABLE),
    (errors.DeniedError, grpc.StatusCode.PERMISSION_DENIED),
    (errors.IntegrityError, grpc.StatusCode.DATA_LOSS),
    (errors.ConfigurationError, grpc.StatusCode.INTERNAL),
)


class Server:
    """A listening service. `stop` ends it; the snapshots' mounts live on."""

    def __init__(self, server: grpc.Server, socket: Path) -> None:
        self._server = server
        self._socket = socket
        self._inode = socket.stat().st_ino

    def stop(self, grace_seconds: float) -> None:
        """Take no more calls, let those under way finish for at most so long. Idempotent."""
        with contextlib.suppress(OSError):
            if self._socket.stat().st_ino == self._inode:  # a successor may be listening there already
                self._socket.unlink()
        self._server.stop(grace_seconds).wait()


def serve(snapshotter: Snapshotter, socket: Path, observer: Observer) -> Server:
    """Listen on a unix socket with mode 0600, taking the place of one that is there. ConfigurationError."""
    server = grpc.server(
        futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="grpc"),
        options=[
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ],
    )
    adapter = _Adapter(snapshotter, observer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, adapter.handlers()),))
    # Bound in a folder that only we can enter, then moved: the socket is never there with another mode, nor
    # absent while one agent follows another.
    folder = socket.parent / f".{secrets.token_hex(4)}"
    try:
        socket.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
        try:
            server.add_insecure_port(f"unix:{folder / 's'}")
            server.start()
            os.chmod(folder / "s", 0o600)
            os.rename(folder / "s", socket)
        finally:
            folder.rmdir()
    except (OSError, RuntimeError) as exc:
        server.stop(None)
        raise errors.ConfigurationError(f"cannot listen on {socket}: {exc}") from exc
    return Server(server, socket)


class _Adapter:
    def __init__(self, snapshotter: Snapshotter, observer: Observer) -> None:
        self._snapshotter = snapshotter
        self._observer = observer

    def handlers(self) -> dict[str, Any]:
        unary: dict[str, tuple[Callable[[Any], Any], Any]] = {
            "Prepare": (self.prepare, messages.PrepareSnapshotRequest),
            "View": (self.view, messages.ViewSnapshotRequest),
            "Mounts": (self.mounts, messages.MountsRequest),
            "Commit": (self.commit, messages.CommitSnapshotRequest),
            "Remove": (self.remove, messages.RemoveSnapshotRequest),
            "Stat": (self.stat, messages.StatSnapshotRequest),
            "Update": (self.update, messages.UpdateSnapshotRequest),
            "Usage": (self.usage, messages.UsageRequest),
            "Cleanup": (self.cleanup, messages.CleanupRequest),
        }
        result: dict[str, Any] = {
            name: grpc.unary_unary_rpc_method_handler(
                self._answering(name, call),
                request_deserializer=request.FromString,
                response_serializer=lambda response: response.SerializeToString(),
            )
            for name, (call, request) in unary.items()
        }
        result["List"] = grpc.unary_stream_rpc_method_handler(
            self._listing,
            request_deserializer=messages.ListSnapshotsRequest.FromString,
            response_serializer=lambda response: response.SerializeToString(),
        )
        return result

    def prepare(self, request: messages.PrepareSnapshotRequest) -> messages.PrepareSnapshotResponse:
        made = self._snapshotter.prepare(request.key, request.parent, dict(request.labels))
        return messages.PrepareSnapshotResponse(mounts=_mounts(made))

    def view(self, request: messages.ViewSnapshotRequest) -> messages.ViewSnapshotResponse:
        made = self._snapshotter.view(request.key, request.parent, dict(request.labels))
        return messages.ViewSnapshotResponse(mounts=_mounts(made))

    def mounts(self, request: messages.MountsRequest) -> messages.MountsResponse:
        return messages.MountsResponse(mounts=_mounts(self._snapshotter.mounts(request.key)))

    def commit(self, request: messages.CommitSnapshotRequest) -> empty_pb2.Empty:
        self._snapshotter.commit(request.name, request.key, dict(request.labels), request.parent)
        return empty_pb2.Empty()

    def remove(self, request: messages.RemoveSnapshotRequest) -> empty_pb2.Empty:
        self._snapshotter.remove(request.key)
        return empty_pb2.Empty()

    def stat(self, request: messages.StatSnapshotRequest) -> messages.StatSnapshotResponse:
        return messages.StatSnapshotResponse(info=_info(self._snapshotter.stat(request.key)))

    def update(self, request: messages.UpdateSnapshotRequest) -> messages.UpdateSnapshotResponse:
        updated = self._snapshotter.update(
            request.info.name, dict(request.info.labels), list(request.update_mask.paths)
        )
        return messages.UpdateSnapshotResponse(info=_info(updated))

    def usage(self, request: messages.UsageRequest) -> messages.UsageResponse:
        used = self._snapshotter.usage(request.key)
        return messages.UsageResponse(size=used.size_bytes, inodes=used.inodes)

    def cleanup(self, request: messages.CleanupRequest) -> empty_pb2.Empty:
        self._snapshotter.cleanup()
        return empty_pb2.Empty()

    def _answering(self, name: str, call: Callable[[Any], Any]) -> Callable[[Any, grpc.ServicerContext], Any]:
        def answer(request: Any, context: grpc.ServicerContext) -> Any:
            with self._watched(name, context):
                return call(request)

        return answer

    def _listing(
        self, request: messages.ListSnapshotsRequest, context: grpc.ServicerContext
    ) -> Iterator[messages.ListSnapshotsResponse]:
        with self._watched("List", context):
            chunk: list[messages.Info] = []
            for info in self._snapshotter.walk(list(request.filters)):
                chunk.append(_info(info))
                if len(chunk) == _LIST_CHUNK:
                    yield messages.ListSnapshotsResponse(info=chunk)
                    chunk = []
            if chunk:
                yield messages.ListSnapshotsResponse(info=chunk)

    @contextlib.contextmanager
    def _watched(self, name: str, context: grpc.ServicerContext) -> Iterator[None]:
        """Turns an exception into the call's status, and tells the observer how it went."""
        code = grpc.StatusCode.OK
        begun = time.monotonic()
        message = ""
        try:
            yield
        except errors.ImagefsError as exc:
            code = next((code for kind, code in _CODES if isinstance(exc, kind)), grpc.StatusCode.UNKNOWN)
            message = str(exc)
        except Exception:
            _LOG.exception("snapshots: %s failed", name)
            code = grpc.StatusCode.INTERNAL
            message = f"{name} failed inside glowplug's agent; its log has the traceback"
        finally:
            self._observer.grpc(name, code.name, time.monotonic() - begun)
        if code is not grpc.StatusCode.OK:
            context.abort(code, _sendable(logs.masked(message)))


def _sendable(message: str) -> str:
    """A status goes into a header field, of bounded size and in UTF-8; a file's name need not be that."""
    return message.encode(errors="backslashreplace")[:_MAX_STATUS_BYTES].decode(errors="ignore")


def _mounts(made: Sequence[snapshots.Mount]) -> list[mount_pb2.Mount]:
    return [mount_pb2.Mount(type=each.type, source=each.source, options=each.options) for each in made]


def _info(info: snapshots.Info) -> messages.Info:
    message = messages.Info(
        name=info.name, parent=info.parent, kind=messages.Kind.Name(info.kind), labels=info.labels
    )
    message.created_at.FromNanoseconds(info.created_ns)
    message.updated_at.FromNanoseconds(info.updated_ns)
    return message
