"""The snapshots API on its socket: every method and status code through a real gRPC channel."""

import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import empty_pb2

from agent import errors as agent_errors
from agent import observer, service, snapshotter, store
from agent.proto import snapshots_pb2 as messages
from agent.snapshots import Usage
from imagefs import errors, mount

METHODS: dict[str, tuple[Any, Any]] = {
    "Prepare": (messages.PrepareSnapshotRequest, messages.PrepareSnapshotResponse),
    "View": (messages.ViewSnapshotRequest, messages.ViewSnapshotResponse),
    "Mounts": (messages.MountsRequest, messages.MountsResponse),
    "Commit": (messages.CommitSnapshotRequest, empty_pb2.Empty),
    "Remove": (messages.RemoveSnapshotRequest, empty_pb2.Empty),
    "Stat": (messages.StatSnapshotRequest, messages.StatSnapshotResponse),
    "Update": (messages.UpdateSnapshotRequest, messages.UpdateSnapshotResponse),
    "Usage": (messages.UsageRequest, messages.UsageResponse),
    "Cleanup": (messages.CleanupRequest, empty_pb2.Empty),
}


class NoImages:
    """Nothing is lazy here, but `find_layer` does what a test says."""

    def __init__(self) -> None:
        self.find: Callable[[], snapshotter.Found | None] = lambda: None

    def find_layer(self, chain_id: str, labels: Mapping[str, str]) -> snapshotter.Found | None:
        return self.find()

    def may_serve(self, block_digest: str, labels: Mapping[str, str]) -> bool:
        return True

    def directory(self, block_digest: str, layer: int) -> Path:
        raise AssertionError

    def root_attributes(self, block_digest: str, layer: int) -> mount.RootAttributes | None:
        raise AssertionError

    def usage(self, block_digest: str, layer: int) -> Usage:
        raise AssertionError

    def released(self, block_digest: str) -> None:
        raise AssertionError


class Calls(observer.Observer):
    def __init__(self) -> None:
        self.answered: list[tuple[str, str]] = []

    def grpc(self, method: str, code: str, seconds: float) -> None:
        assert seconds >= 0
        self.answered.append((method, code))


class Client:
    """The service's client, by the names on the wire."""

    def __init__(self, socket: Path) -> None:
        self.channel = grpc.insecure_channel(f"unix:{socket}")

    def call(self, method: str, **fields: Any) -> Any:
        request, response = METHODS[method]
        call = self.channel.unary_unary(
            f"/{service.SERVICE}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response.FromString,
        )
        return call(request(snapshotter="glowplug", **fields), timeout=30)

    def list(self, *filters: str) -> list[list[messages.Info]]:
        call = self.channel.unary_stream(
            f"/{service.SERVICE}/List",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=messages.ListSnapshotsResponse.FromString,
        )
        return [list(each.info) for each in call(messages.ListSnapshotsRequest(filters=filters), timeout=30)]


class Fixture:
    def __init__(self, root: Path) -> None:
        self.rows = store.Store.open(root / "agent.db")
        self.images = NoImages()
        self.calls = Calls()
        self.snapshotter = snapshotter.Snapshotter(root, self.rows, self.images, self.calls)
        self.socket = root / "run" / "snapshotter.sock"
        self.server = service.serve(self.snapshotter, self.socket, self.calls)
        self.client = Client(self.socket)

    def close(self) -> None:
        self.client.channel.close()
        self.server.stop(5)
        self.rows.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Fixture]:
    fixture = Fixture(tmp_path)
    yield fixture
    fixture.close()


def refused(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["x" * 60_000, "caf\udce9", "ü" * 5000])
def test_any_message_reaches_containerd_with_its_code(served: Fixture, name: str) -> None:
    """A status is a header field: one that is too long, or no UTF-8, would come as another code."""

    def fail(chain_id: str, labels: Mapping[str, str]) -> None:
        raise errors.NotFoundError(f"no such thing: {name}")

    served.images.find_layer = fail  # type: ignore[method-assign,assignment]
    labels = {"containerd.io/snapshot.ref": "sha256:1"}
    parent = "gone"
    code, text = refused(lambda: served.client.call("Prepare", key="k", parent=parent, labels=labels))
    assert code is grpc.StatusCode.NOT_FOUND
    assert text
    code, text = refused(lambda: served.client.call("Stat", key="k" * 60_000))
    assert code is grpc.StatusCode.NOT_FOUND


def test_what_containerd_shows_in_a_pods_events_holds_no_secret(served: Fixture) -> None:
    def fail(chain_id: str, labels: Mapping[str, str]) -> None:
        raise errors.UnavailableError("GET https://user:hunter22@r.example/v2/?token=abcdefghijkl: 503")

    served.images.find_layer = fail  # type: ignore[method-assign,assignment]
    labels = {"containerd.io/snapshot.ref": "sha256:1"}
    code, text = refused(lambda: served.client.call("Prepare", key="k", labels=labels))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "r.example" in text
    assert "hunter22" not in text
    assert "abcdefghijkl" not in text


def test_a_life(served: Fixture, tmp_path: Path) -> None:
    client = served.client
    (made,) = client.call("Prepare", key="a", parent="", labels={"l": "1"}).mounts
    assert (made.type, made.target, list(made.options)) == ("bind", "", ["rw", "rbind"])
    assert made.source == str(tmp_path / "snapshots" / "1" / "fs")
    info = client.call("Stat", key="a").info
    assert (info.name, info.parent, info.kind, info.labels) == ("a", "", messages.ACTIVE, {"l": "1"})
    assert info.created_at == info.updated_at
    assert info.created_at.ToNanoseconds() == served.rows.get("a").created_ns
    assert client.call("Commit", name="c", key="a", labels={"l": "2"}) == empty_pb2.Empty()
    assert client.call("Stat", key="c").info.kind == messages.COMMITTED
    (view,) = client.call("View", key="v", parent="c").mounts
    assert list(view.options) == ["ro", "rbind"]
    assert list(client.call("Mounts", key="v").mounts) == [view]
    update = messages.Info(name="c", labels={"m": "3"})
    updated = client.call("Update", info=update, update_mask={"paths": ["labels.m"]}).info
    assert updated.labels == {"l": "2", "m": "3"}
    used = client.call("Usage", key="c")
    assert (used.inodes, used.size) == (1, served.snapshotter.usage("c").size_bytes)
    client.call("Prepare", key="b")
    client.call("Commit", name="late", key="b", parent="c")
    assert client.call("Stat", key="late").info.parent == "c"
    for key in ("late", "v", "c"):
        client.call("Remove", key=key)
    client.call("Cleanup")
    assert client.list() == []
    assert os.listdir(tmp_path / "snapshots") == []
    assert ("Prepare", "OK") in served.calls.answered
    assert ("List", "OK") in served.calls.answered


def test_codes(served: Fixture) -> None:
    call, code = served.client.call, grpc.StatusCode
    call("Prepare", key="a")
    call("Commit", name="c", key="a")
    call("Prepare", key="a", parent="c")
    call("View", key="v", parent="c")
    for wanted, method, fields in [
        (code.NOT_FOUND, "Stat", {"key": "nobody"}),
        (code.NOT_FOUND, "Mounts", {"key": "nobody"}),
        (code.NOT_FOUND, "Usage", {"key": "nobody"}),
        (code.NOT_FOUND, "Remove", {"key": "nobody"}),
        (code.NOT_FOUND, "Commit", {"key": "nobody", "name": "x"}),
        (code.NOT_FOUND, "Update", {"info": {"name": "nobody"}}),
        (code.NOT_FOUND, "Prepare", {"key": "x", "parent": "nobody"}),
        (code.INVALID_ARGUMENT, "View", {"key": "x", "parent": "a"}),
        (code.INVALID_ARGUMENT, "Stat", {"key": ""}),
        (code.INVALID_ARGUMENT, "Update", {"info": {"name": "c"}, "update_mask": {"paths": ["parent"]}}),
        (code.INVALID_ARGUMENT, "Prepare", {"key": "x", "labels": {"k": "v" * 5000}}),
        (code.ALREADY_EXISTS, "Prepare", {"key": "a"}),
        (code.ALREADY_EXISTS, "View", {"key": "a"}),
        (code.ALREADY_EXISTS, "Commit", {"key": "a", "name": "c"}),
        (code.FAILED_PRECONDITION, "Commit", {"key": "v", "name": "x"}),
        (code.FAILED_PRECONDITION, "Mounts", {"key": "c"}),
        (code.FAILED_PRECONDITION, "Remove", {"key": "c"}),
    ]:
        assert refused(lambda method=method, fields=fields: call(method, **fields))[0] == wanted, (
            method,
            fields,
        )
        assert served.calls.answered[-1] == (method, wanted.name)
    assert refused(lambda: served.client.list("name=="))[0] == code.INVALID_ARGUMENT
    unknown = served.client.channel.unary_unary(f"/{service.SERVICE}/Unheard")
    assert refused(lambda: unknown(b"", timeout=30))[0] == code.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("raised", "code", "details"),
    [
        (agent_errors.AlreadyExistsError("it is here"), "ALREADY_EXISTS", "it is here"),
        (errors.UnavailableError("the disk is full"), "UNAVAILABLE", "the disk is full"),
        (errors.DeniedError("no"), "PERMISSION_DENIED", "no"),
        (errors.IntegrityError("wrong digest"), "DATA_LOSS", "wrong digest"),
        (store.CorruptStoreError("damaged"), "DATA_LOSS", "damaged"),
        (errors.BusyError("in use"), "FAILED_PRECONDITION", "in use"),
        (errors.ConfigurationError("no EROFS here"), "INTERNAL", "no EROFS here"),
        (RuntimeError("secret"), "INTERNAL", "log has the traceback"),
    ],
)
def test_codes_of_failures(served: Fixture, raised: Exception, code: str, details: str) -> None:
    def find() -> None:
        raise raised

    served.images.find = find
    labels = {"containerd.io/snapshot.ref": "sha256:1"}
    found, text = refused(lambda: served.client.call("Prepare", key="k", labels=labels))
    assert found.name == code
    assert details in text
    assert "secret" not in text
    served.images.find = lambda: None
    served.client.call("Prepare", key="k", labels=labels)


def test_lists_come_in_pieces(served: Fixture) -> None:
    for number in range(250):
        served.rows.insert(f"s{number}", store.Kind.ACTIVE, "", {"even": str(number % 2 == 0)})
    chunks = served.client.list()
    assert [len(chunk) for chunk in chunks] == [100, 100, 50]
    assert [info.name for chunk in chunks for info in chunk] == [f"s{number}" for number in range(250)]
    assert [len(chunk) for chunk in served.client.list("labels.even==True", "name==s1")] == [100, 26]


def test_a_message_that_is_too_large(served: Fixture) -> None:
    key = "k" * (service.MAX_MESSAGE_BYTES + 1)
    assert refused(lambda: served.client.call("Stat", key=key))[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refused(lambda: served.client.call("Stat", key="k"))[0] == grpc.StatusCode.NOT_FOUND


def test_the_socket_is_ours_alone(served: Fixture) -> None:
    status = served.socket.stat()
    assert stat.S_ISSOCK(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert os.listdir(served.socket.parent) == [served.socket.name], "nothing else is left there"


def test_one_agent_follows_another(served: Fixture) -> None:
    """The successor takes the socket's place, and the first one's end does not take it away again."""
    second = service.serve(served.snapshotter, served.socket, observer.Observer())
    served.server.stop(5)
    client = Client(served.socket)
    client.call("Prepare", key="a")
    client.channel.close()
    second.stop(5)
    assert os.listdir(served.socket.parent) == []
    second.stop(5)


def test_a_stale_socket_is_no_obstacle(tmp_path: Path) -> None:
    first = Fixture(tmp_path)
    os.link(first.socket, first.socket.with_name("kept"))
    first.close()
    os.rename(first.socket.with_name("kept"), first.socket)
    again = Fixture(tmp_path)
    again.client.call("Prepare", key="a")
    again.close()


def test_a_place_where_nobody_can_listen(served: Fixture, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for socket in (tmp_path / "file" / "s.sock", tmp_path / ("x" * 200) / "s.sock"):
        with pytest.raises(errors.ConfigurationError, match="cannot listen"):
            service.serve(served.snapshotter, socket, observer.Observer())


def test_stop_lets_a_call_finish(served: Fixture) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def find() -> None:
        begun.set()
        assert go_on.wait(30)

    served.images.find = find
    answers: list[object] = []
    labels = {"containerd.io/snapshot.ref": "sha256:1"}
    caller = threading.Thread(
        target=lambda: answers.append(served.client.call("Prepare", key="k", labels=labels))
    )
    caller.start()
    assert begun.wait(30)
    stopper = threading.Thread(target=served.server.stop, args=(30,))
    stopper.start()
    go_on.set()
    caller.join()
    stopper.join()
    assert len(answers) == 1
    assert not served.socket.exists()
