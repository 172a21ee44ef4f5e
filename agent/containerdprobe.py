"""Asking containerd what it is: its version, the configuration that it would run with, whether it sees us.

Called by install.py and doctor.py, on their threads; starts the program for what only that can say, and talks
gRPC to the daemon for the rest. No state. Raises errors of imagefs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import empty_pb2
from google.protobuf.message import Message

from agent import containerdconfig, tomledit
from agent.containerdconfig import SNAPSHOTTER
from agent.proto import snapshots_pb2
from imagefs import errors

_PROGRAM_SECONDS = 30.0
_CALL_SECONDS = 10.0
_CHECK_KEY = "glowplug-install-check"
_SNAPSHOTTERS = "io.containerd.snapshotter.v1."
_SNAPSHOTS = "/containerd.services.snapshots.v1.Snapshots/"
_PLACES = ("/usr/local/bin", "/usr/bin", "/usr/local/sbin", "/usr/sbin", "/opt/bin")


def find_program(name: str = "containerd") -> Path:
    """The program, by name or path. ConfigurationError without one."""
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *_PLACES]))
    if found is None:
        raise errors.ConfigurationError(f"there is no program {name}: install containerd, or say where it is")
    return Path(found)


def line(program: Path) -> tuple[int, int]:
    """Which line of containerd this is."""
    return containerdconfig.line_of(_run([str(program), "--version"]))


def effective(program: Path, config: Path) -> dict[str, Any]:
    """The configuration as the daemon would have it: `config` (its defaults if there is no such file), with
    what it imports. ConfigurationError with the program's own words if it does not take it."""
    if config.exists():
        return tomledit.parse(_run([str(program), "--config", str(config), "config", "dump"]), str(config))
    with tempfile.NamedTemporaryFile(prefix="glowplug-", suffix=".toml") as empty:
        return tomledit.parse(_run([str(program), "--config", empty.name, "config", "dump"]), str(config))


def socket_of(effective_config: Mapping[str, Any]) -> Path:
    """Where the daemon of such a configuration listens."""
    found = effective_config.get("grpc")
    address = found.get("address") if isinstance(found, Mapping) else None
    return Path(str(address or "/run/containerd/containerd.sock"))


def image_filesystem(effective_config: Mapping[str, Any]) -> Path:
    """Where containerd 1.6 tells kubelet that our images lie: in a folder of its own, which it makes for
    built-in snapshotters only. kubelet looks up the filesystem of that path."""
    return Path(str(effective_config.get("root") or "/var/lib/containerd")) / f"{_SNAPSHOTTERS}{SNAPSHOTTER}"


def knows_us(socket: Path) -> str | None:
    """None if the running daemon has our proxy plugin; else why not. Whether an agent is behind it, it does
    not ask."""
    request = snapshots_pb2.StatSnapshotRequest(snapshotter=SNAPSHOTTER, key=_CHECK_KEY)
    code, details = _ask(socket, "Stat", request)
    return None if code in (None, grpc.StatusCode.NOT_FOUND) else f"containerd at {socket}: {details}"


def reaches_us(socket: Path) -> str | None:
    """None if the running daemon makes a snapshot with our agent; else why not. The snapshot is removed; on
    our side it goes with containerd's next garbage collection."""
    prepare = snapshots_pb2.PrepareSnapshotRequest(snapshotter=SNAPSHOTTER, key=_CHECK_KEY)
    code, details = _ask(socket, "Prepare", prepare)
    if code in (None, grpc.StatusCode.ALREADY_EXISTS):
        _ask(socket, "Remove", snapshots_pb2.RemoveSnapshotRequest(snapshotter=SNAPSHOTTER, key=_CHECK_KEY))
        return None
    return f"containerd at {socket}: {details}"


def _ask(socket: Path, method: str, request: Message) -> tuple[grpc.StatusCode | None, str]:
    """One call, its answer unread: None and "", or the code of the refusal and its words."""
    with grpc.insecure_channel(f"unix:{socket.absolute()}") as channel:
        call = channel.unary_unary(
            f"{_SNAPSHOTS}{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=empty_pb2.Empty.FromString,
        )
        try:
            call(request, timeout=_CALL_SECONDS, metadata=(("containerd-namespace", "default"),))
        except grpc.RpcError as exc:
            return exc.code(), f"{exc.code().name}: {exc.details()}"
    return None, ""


def serves_cri(socket: Path) -> bool:
    """Whether kubelet could use the running daemon."""
    with grpc.insecure_channel(f"unix:{socket.absolute()}") as channel:
        call = channel.unary_unary(
            "/runtime.v1.RuntimeService/Version",
            request_serializer=empty_pb2.Empty.SerializeToString,
            response_deserializer=empty_pb2.Empty.FromString,
        )
        try:
            call(empty_pb2.Empty(), timeout=_CALL_SECONDS)
        except grpc.RpcError:
            return False
    return True


def unfinished_snapshots(agent_socket: Path) -> list[str] | None:
    """The keys of the agent's snapshots that containers have (not committed); None if no agent answers."""
    with grpc.insecure_channel(f"unix:{agent_socket.absolute()}") as channel:
        call = channel.unary_stream(
            f"{_SNAPSHOTS}List",
            request_serializer=snapshots_pb2.ListSnapshotsRequest.SerializeToString,
            response_deserializer=snapshots_pb2.ListSnapshotsResponse.FromString,
        )
        try:
            answers = list(call(snapshots_pb2.ListSnapshotsRequest(), timeout=_CALL_SECONDS))
        except grpc.RpcError:
            return None
    infos = [info for answer in answers for info in answer.info]
    return [info.name for info in infos if info.kind != snapshots_pb2.COMMITTED and not is_check(info.name)]


def is_check(key: str) -> bool:
    """Whether a snapshot of the agent is what `reaches_us` made."""
    return key.endswith(f"/{_CHECK_KEY}")


def _run(command: list[str]) -> str:
    try:
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_PROGRAM_SECONDS,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise errors.ConfigurationError(f"{' '.join(command)}: {exc}") from exc
    if result.returncode:
        said = result.stderr.strip()[-1000:]
        raise errors.ConfigurationError(f"{' '.join(command)}: exit code {result.returncode}: {said}")
    return result.stdout
