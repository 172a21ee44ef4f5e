"""Uploads to the real registry through a proxy that breaks them: they resume, and leave nothing behind."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagefs import artifact, errors
from imagefs.origin import BytesSource, registry, retry, transport, upload
from tests.fixtures import servers
from tests.fixtures.servers import Fault, FaultProxy, RegistryServer, Reply, Seen

DATA = random.Random(3).randbytes(5 << 20)
DIGEST = artifact.digest_of(DATA)
CHUNK = 2 << 20
QUICK = retry.Policy(attempts=4, first_delay_seconds=0.001, max_delay_seconds=0.01)


class CountingSource:
    """DATA; remembers how much of it was read."""

    def __init__(self, data: bytes = DATA) -> None:
        self.data = data
        self.read_bytes = 0

    def open(self, offset: int) -> Iterator[bytes]:
        for piece in BytesSource(self.data).open(offset):
            self.read_bytes += len(piece)
            yield piece


@pytest.fixture
def origin(
    fault_server: FaultProxy, registry: RegistryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> registry.RegistryOrigin:
    monkeypatch.setattr(upload, "CHUNK_BYTES", CHUNK)
    fault_server.upstream = registry.host
    return connect_to(fault_server.host, tmp_path)


def connect_to(host: str, tmp_path: Path) -> registry.RegistryOrigin:
    settings = transport.Settings(read_timeout_seconds=5)
    return registry.RegistryOrigin(host, servers.unique_name("upload"), settings, tmp_path / "absent", QUICK)


def open_uploads(server: RegistryServer, origin: registry.RegistryOrigin) -> list[Path]:
    """What lies in unfinished uploads; an empty folder for each is all that this registry leaves itself."""
    root = server.storage / "docker/registry/v2/repositories" / origin.repository / "_uploads"
    return list(root.glob("*/data"))


def check(server: RegistryServer, origin: registry.RegistryOrigin) -> None:
    assert origin.read_blob(DIGEST, len(DATA)) == DATA
    assert open_uploads(server, origin) == []


def test_chunks(origin: registry.RegistryOrigin, fault_server: FaultProxy, registry: RegistryServer) -> None:
    origin.put_blob(DIGEST, len(DATA), BytesSource(DATA))
    sent = [seen.fields["content-range"] for seen in fault_server.seen("PATCH")]
    assert sent == ["0-2097151", "2097152-4194303", "4194304-5242879"]
    check(registry, origin)


def test_the_source_is_read_once_however_many_chunks(origin: registry.RegistryOrigin) -> None:
    """One that was opened for each chunk, and read from its start, made copies of large blobs quadratic."""
    source = CountingSource()
    origin.put_blob(DIGEST, len(DATA), source)
    assert source.read_bytes == len(DATA)


class ResumableUploads:
    """The uploads of a registry that keeps what a broken chunk brought and tells where it stands, as the
    specification has it. (docker-registry 2.8 keeps it, but answers 404 to the question.)"""

    def __init__(self, proxy: FaultProxy) -> None:
        self.stored = bytearray()
        self.finished = b""
        self.breaks: list[int] = []
        self.begun = 0
        proxy.hook = self.answer

    def answer(self, seen: Seen) -> Reply:
        place = {"Location": f"/up/{len(self.stored)}"}
        match seen.method:
            case "HEAD":
                return 404, {}, b""
            case "POST":
                self.stored.clear()
                self.begun += 1
                return 202, place, b""
            case "GET":
                return 204, {**place, "Range": f"0-{max(0, len(self.stored) - 1)}"}, b""
            case "PATCH":
                first = int(seen.fields["content-range"].partition("-")[0])
                if first != len(self.stored):
                    return 416, {}, b""
                if self.breaks:
                    self.stored += seen.body[: self.breaks.pop()]
                    return 502, {}, b""
                self.stored += seen.body
                return 202, {"Location": "/up/x", "Range": f"0-{len(self.stored) - 1}"}, b""
            case _:
                self.finished = bytes(self.stored)
                return 201, {}, b""


@pytest.mark.parametrize(
    "breaks", [[0], [1], [2], [1_500_000], [CHUNK - 1], [CHUNK], [5, 0, 7], [9] * 20], ids=str
)
def test_a_broken_chunk_resumes(
    origin: registry.RegistryOrigin, fault_server: FaultProxy, breaks: list[int]
) -> None:
    uploads = ResumableUploads(fault_server)
    uploads.breaks = list(breaks)
    source = CountingSource()
    origin.put_blob(DIGEST, len(DATA), source)
    assert uploads.finished == DATA
    # "0-0" may mean one byte or none: taken for none, answered by 416, begun again.
    assert uploads.begun == (2 if breaks == [1] else 1), "the upload went on, it did not start again"
    assert not uploads.breaks


@pytest.mark.parametrize("cut", [0, 1, 1_500_000, CHUNK - 1])
@pytest.mark.parametrize("chunk", [0, 1])
def test_a_broken_chunk_on_the_real_registry(
    origin: registry.RegistryOrigin, fault_server: FaultProxy, chunk: int, cut: int
) -> None:
    for _ in range(chunk):
        fault_server.add(Fault(method="PATCH", delay_seconds=0.001))
    fault_server.add(Fault(method="PATCH", drop_upload_after=cut))
    origin.put_blob(DIGEST, len(DATA), BytesSource(DATA))
    assert origin.read_blob(DIGEST, len(DATA)) == DATA
    assert len(fault_server.seen("POST")) == (1 if cut == 0 else 2)


@pytest.mark.parametrize("method", ["PATCH", "PUT", "POST"])
@pytest.mark.parametrize(
    "fault",
    [{"status": 503}, {"status": 502, "after": True}, {"status": 404}, {"status": 404, "after": True}],
    ids=str,
)
@pytest.mark.parametrize("size", [len(DATA), 1000])
def test_answers_that_are_lost_or_wrong(
    origin: registry.RegistryOrigin,
    fault_server: FaultProxy,
    method: str,
    fault: dict[str, object],
    size: int,
) -> None:
    if method == "POST" and fault["status"] == 404:
        fault = {**fault, "status": 500}
    data = DATA[:size]
    fault_server.add(Fault(method=method, **fault))  # type: ignore[arg-type]
    origin.put_blob(artifact.digest_of(data), size, BytesSource(data))
    assert origin.read_blob(artifact.digest_of(data), size) == data


def test_a_lost_confirmation_is_not_sent_again(
    origin: registry.RegistryOrigin, fault_server: FaultProxy, registry: RegistryServer
) -> None:
    fault_server.add(Fault(method="PUT", status=502, after=True))
    source = CountingSource()
    origin.put_blob(DIGEST, len(DATA), source)
    assert source.read_bytes == len(DATA)
    check(registry, origin)


def test_a_registry_that_restarted_gets_it_from_the_start(
    origin: registry.RegistryOrigin, fault_server: FaultProxy, registry: RegistryServer
) -> None:
    fault_server.add(Fault(method="PATCH", delay_seconds=0.001))
    fault_server.add(Fault(method="PATCH", status=404))
    origin.put_blob(DIGEST, len(DATA), BytesSource(DATA))
    assert len(fault_server.seen("POST")) == 2
    assert origin.read_blob(DIGEST, len(DATA)) == DATA


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"method": "PATCH", "status": 503}, errors.UnavailableError),
        ({"method": "PATCH", "status": 403}, errors.DeniedError),
        ({"method": "PATCH", "drop_upload_after": 0}, errors.UnavailableError),
        ({"method": "PUT", "status": 503}, errors.UnavailableError),
        (
            {"method": "PUT", "status": 400, "body": b'{"errors":[{"code":"DIGEST_INVALID"}]}'},
            errors.IntegrityError,
        ),
        ({"method": "POST", "status": 202}, errors.UnavailableError),
    ],
    ids=str,
)
def test_given_up_and_cancelled(
    origin: registry.RegistryOrigin,
    fault_server: FaultProxy,
    registry: RegistryServer,
    fault: dict[str, object],
    error: type[Exception],
) -> None:
    fault_server.add(Fault(times=None, **fault))  # type: ignore[arg-type]
    with pytest.raises(error, match=DIGEST) as caught:
        origin.put_blob(DIGEST, len(DATA), BytesSource(DATA))
    assert origin.name in str(caught.value)
    assert open_uploads(registry, origin) == []
    assert not origin.has_blob(DIGEST)


def test_wrong_bytes_are_cancelled(
    origin: registry.RegistryOrigin, fault_server: FaultProxy, registry: RegistryServer
) -> None:
    with pytest.raises(errors.IntegrityError, match=DIGEST):
        origin.put_blob(DIGEST, len(DATA), BytesSource(DATA[:-1] + b"\0"))
    assert open_uploads(registry, origin) == []
    assert not fault_server.seen("PUT"), "the digest was compared before the upload was closed"


def test_an_interrupt_cancels(origin: registry.RegistryOrigin, fault_server: FaultProxy) -> None:
    class Interrupted:
        def open(self, offset: int) -> Iterator[bytes]:
            yield DATA[: 1 << 20]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        origin.put_blob(DIGEST, len(DATA), Interrupted())
    assert fault_server.seen("DELETE", "/blobs/uploads/")


class TestMount:
    def test_no_bytes_move(
        self, origin: registry.RegistryOrigin, fault_server: FaultProxy, tmp_path: Path
    ) -> None:
        origin.put_blob(DIGEST, len(DATA), BytesSource(DATA))
        other = connect_to(fault_server.host, tmp_path)
        fault_server.clear()
        assert other.mount_blob(DIGEST, origin)
        assert not fault_server.seen("PATCH")
        assert not fault_server.seen("PUT")
        assert other.read_blob(DIGEST, len(DATA)) == DATA

    @pytest.mark.parametrize("status", [403, 404, 405])
    def test_not_permitted(
        self, origin: registry.RegistryOrigin, fault_server: FaultProxy, tmp_path: Path, status: int
    ) -> None:
        origin.put_blob(DIGEST, len(DATA), BytesSource(DATA))
        fault_server.add(Fault(method="POST", path="mount=", status=status))
        assert not connect_to(fault_server.host, tmp_path).mount_blob(DIGEST, origin)

    def test_an_upload_opened_instead_is_cancelled(
        self,
        origin: registry.RegistryOrigin,
        fault_server: FaultProxy,
        registry: RegistryServer,
        tmp_path: Path,
    ) -> None:
        other = connect_to(fault_server.host, tmp_path)
        assert not other.mount_blob(DIGEST, origin)
        assert fault_server.seen("DELETE", "/blobs/uploads/")
        assert open_uploads(registry, other) == []

    def test_another_registry(self, origin: registry.RegistryOrigin, tmp_path: Path) -> None:
        assert not connect_to("127.0.0.1:1", tmp_path).mount_blob(DIGEST, origin)
