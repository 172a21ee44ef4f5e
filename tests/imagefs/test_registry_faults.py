"""What the registry client makes of registries and networks that misbehave; real connections throughout."""

from __future__ import annotations

import base64
import email.utils
import json
import logging
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from imagefs import artifact, errors
from imagefs.origin import BytesSource, ranges, registry, retry, transport
from tests.fixtures import servers
from tests.fixtures.servers import Fault, FaultProxy

DATA = random.Random(5).randbytes(300_000)
DIGEST = artifact.digest_of(DATA)
PASSWORD = "hunter2"
SECRETS = (PASSWORD, base64.b64encode(f"warm:{PASSWORD}".encode()).decode())
QUICK = retry.Policy(
    attempts=3, first_delay_seconds=0.001, max_delay_seconds=0.01, max_retry_after_seconds=0.05
)
BLOBS, MANIFESTS = "/v2/a/repo/blobs/", "/v2/a/repo/manifests/"


@pytest.fixture
def origin(fault_server: FaultProxy, tmp_path: Path) -> registry.RegistryOrigin:
    """A client of `fault_server`, which holds one blob and one manifest. Its credentials are sent."""
    fault_server.serve(f"{BLOBS}{DIGEST}", DATA, Content_Type="application/octet-stream")
    manifest = artifact.canonical_json({"schemaVersion": 2, "mediaType": artifact.OCI_MANIFEST})
    for name in ("v1", artifact.digest_of(manifest)):
        fault_server.serve(f"{MANIFESTS}{name}", manifest, Content_Type=artifact.OCI_MANIFEST)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"auths": {fault_server.host: {"username": "warm", "password": PASSWORD}}}))
    settings = transport.Settings(connect_timeout_seconds=1, read_timeout_seconds=0.3)
    made = registry.RegistryOrigin(fault_server.host, "a/repo", settings, config, QUICK)
    fault_server.add(Fault(status=401, fields={"WWW-Authenticate": 'Basic realm="r"'}))
    made.has_blob(DIGEST)
    assert fault_server.seen()[-1].fields["authorization"] == f"Basic {SECRETS[1]}"
    fault_server.clear()
    return made


def read_range(origin: registry.RegistryOrigin, offset: int = 1000, length: int = 200_000) -> bytes:
    return b"".join(origin.stream_range(DIGEST, offset, length))


CALLS: dict[str, tuple[Callable[[registry.RegistryOrigin], object], str]] = {
    "range": (read_range, f"{DIGEST} at byte 1000"),
    "read": (lambda origin: origin.read_blob(DIGEST, 1 << 20), f"{DIGEST} at byte 0"),
    "stream": (lambda origin: list(origin.stream_blob(DIGEST, len(DATA))), f"{DIGEST} at byte 0"),
    "has": (lambda origin: origin.has_blob(DIGEST), DIGEST),
    "manifest": (lambda origin: origin.read_manifest("v1"), "manifest v1"),
    "referrers": (lambda origin: origin.referrers(DIGEST), DIGEST),
    "put": (lambda origin: origin.put_blob(artifact.digest_of(b"x"), 1, BytesSource(b"x")), "upload of blob"),
    "put manifest": (lambda origin: origin.put_manifest(b"{}", artifact.OCI_MANIFEST, "new"), "manifest new"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("status", "error", "requests"),
    [
        (401, errors.DeniedError, 1),
        (403, errors.DeniedError, 1),
        (418, errors.InvalidInputError, 1),
        (429, errors.UnavailableError, 3),
        (500, errors.UnavailableError, 3),
        (502, errors.UnavailableError, 3),
        (503, errors.UnavailableError, 3),
        (504, errors.UnavailableError, 3),
    ],
)
def test_statuses(
    origin: registry.RegistryOrigin,
    fault_server: FaultProxy,
    call: str,
    status: int,
    error: type[Exception],
    requests: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    function, named = CALLS[call]
    method = "POST" if call == "put" else ""
    # A registry that repeats what it was sent, where it should say what is wrong.
    body = json.dumps({"errors": [{"code": "DENIED", "message": f"{SECRETS}"}, {"detail": PASSWORD}]})
    fault_server.add(Fault(status=status, method=method, times=None, body=body.encode()))
    with caplog.at_level(logging.DEBUG), pytest.raises(error) as caught:
        function(origin)
    message = str(caught.value)
    assert fault_server.host in message
    assert "a/repo" in message
    assert named in message
    assert str(status) in message
    for secret in SECRETS:
        assert secret not in message + caplog.text + repr(caught.value.__cause__)
    assert len(fault_server.seen(method)) == requests


@pytest.mark.parametrize("call", ["range", "read", "stream", "manifest"])
def test_not_found(origin: registry.RegistryOrigin, fault_server: FaultProxy, call: str) -> None:
    function, named = CALLS[call]
    fault_server.add(Fault(status=404, times=None))
    with pytest.raises(errors.NotFoundError, match=named) as caught:
        function(origin)
    assert f"{fault_server.host}/a/repo" in str(caught.value)
    assert not origin.has_blob(DIGEST)
    assert origin.referrers(DIGEST) == []


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "fault",
    [
        {"status": 503},
        {"status": 503, "after": True},
        {"status": 429, "fields": {"Retry-After": "0"}},
        {"hang": True},
        {"drop_upload_after": 0},
    ],
    ids=str,
)
def test_one_fault_is_ridden_out(
    origin: registry.RegistryOrigin, fault_server: FaultProxy, call: str, fault: dict[str, object]
) -> None:
    function, _ = CALLS[call]
    fault_server.hook = lambda seen: (
        (202 if seen.method == "POST" else 201, {"Location": "/v2/a/repo/blobs/uploads/1"}, b"")
        if seen.method in ("POST", "PUT")
        else None
    )
    fault_server.add(Fault(method="PUT" if call.startswith("put") else "", **fault))  # type: ignore[arg-type]
    function(origin)
    kind = "PUT" if call.startswith("put") else ""
    assert len(fault_server.seen(kind)) >= 2


HALF_WRITTEN = json.dumps({"errors": [{"code": "DIGEST_INVALID"}]}).encode()


@pytest.mark.parametrize("times", [2, None])
def test_a_blob_link_that_is_half_written(
    origin: registry.RegistryOrigin, fault_server: FaultProxy, times: int | None
) -> None:
    """docker-registry 2.8 reads the link of a blob that somebody else uploads at the same moment."""
    fault_server.hook = lambda seen: (201, {}, b"") if seen.method == "PUT" else None
    fault_server.add(Fault(method="PUT", path=MANIFESTS, times=times, status=400, body=HALF_WRITTEN))
    if times is None:
        with pytest.raises(errors.UnavailableError, match="DIGEST_INVALID"):
            origin.put_manifest(b"{}", artifact.OCI_MANIFEST, "new")
    else:
        origin.put_manifest(b"{}", artifact.OCI_MANIFEST, "new")
    assert len(fault_server.seen("PUT")) == QUICK.attempts


class TestBodies:
    @pytest.mark.parametrize("cut", [1, 70_000, 199_999])
    def test_resumed_where_they_broke(
        self, origin: registry.RegistryOrigin, fault_server: FaultProxy, cut: int
    ) -> None:
        fault_server.add(Fault(close_after_bytes=cut))
        assert read_range(origin) == DATA[1000:201_000]
        assert fault_server.seen()[-1].fields["range"] == f"bytes={1000 + cut}-200999"
        fault_server.add(Fault(close_after_bytes=cut))
        assert b"".join(origin.stream_blob(DIGEST, len(DATA))) == DATA
        assert fault_server.seen()[-1].fields["range"] == f"bytes={cut}-"
        fault_server.add(Fault(close_after_bytes=cut))
        assert origin.read_blob(DIGEST, len(DATA)) == DATA

    def test_as_often_as_it_gets_on(self, origin: registry.RegistryOrigin, fault_server: FaultProxy) -> None:
        fault_server.add(Fault(close_after_bytes=ranges._PROGRESS_BYTES, times=None))
        assert b"".join(origin.stream_blob(DIGEST, len(DATA))) == DATA
        assert len(fault_server.seen()) > QUICK.attempts

    def test_given_up_when_it_does_not(
        self, origin: registry.RegistryOrigin, fault_server: FaultProxy
    ) -> None:
        fault_server.add(Fault(close_after_bytes=10, times=None))
        with pytest.raises(errors.UnavailableError, match=f"{DIGEST} at byte 1020"):
            read_range(origin)
        assert len(fault_server.seen()) == QUICK.attempts

    def test_other_bytes(self, origin: registry.RegistryOrigin, fault_server: FaultProxy) -> None:
        fault_server.add(Fault(flip=True, times=None))
        for call in ("read", "stream", "manifest"):
            if call == "manifest":
                name = artifact.digest_of(fault_server.contents[f"{MANIFESTS}v1"][0])
                with pytest.raises(errors.IntegrityError, match=name):
                    origin.read_manifest(name)
            else:
                with pytest.raises(errors.IntegrityError, match=DIGEST) as caught:
                    CALLS[call][0](origin)
                assert f"{fault_server.host}/a/repo" in str(caught.value)

    def test_other_bytes_behind_a_tag(
        self, origin: registry.RegistryOrigin, fault_server: FaultProxy
    ) -> None:
        fault_server.add(Fault(fields={"Docker-Content-Digest": DIGEST}))
        with pytest.raises(errors.IntegrityError, match=DIGEST):
            origin.read_manifest("v1")

    def test_a_manifest_that_never_ends(
        self, origin: registry.RegistryOrigin, fault_server: FaultProxy
    ) -> None:
        fault_server.serve(f"{MANIFESTS}huge", bytes(5 << 20))
        with pytest.raises(errors.InvalidInputError, match="larger than"):
            origin.read_manifest("huge")

    def test_trickling_is_a_fault(self, origin: registry.RegistryOrigin, fault_server: FaultProxy) -> None:
        fault_server.add(Fault(bytes_per_second=50, times=None))
        with pytest.raises(errors.UnavailableError, match="stalled"):
            read_range(origin)

    def test_a_slow_consumer_is_not(self, origin: registry.RegistryOrigin) -> None:
        out = b""
        for piece in origin.stream_blob(DIGEST, len(DATA)):
            out += piece
            time.sleep(0.2)
        assert out == DATA

    def test_a_hang(self, origin: registry.RegistryOrigin, fault_server: FaultProxy) -> None:
        fault_server.add(Fault(hang=True, times=None))
        with pytest.raises(errors.UnavailableError, match="timed out") as caught:
            read_range(origin)
        assert f"{DIGEST} at byte 1000" in str(caught.value)


class TestRanges:
    def test_ignored(
        self, origin: registry.RegistryOrigin, fault_server: FaultProxy, caplog: pytest.LogCaptureFixture
    ) -> None:
        fault_server.add(Fault(ignore_range=True, times=None))
        for offset in (1000, 0, 99_999):
            assert read_range(origin, offset) == DATA[offset : offset + 200_000]
        said = [record.getMessage() for record in caplog.records if "Range" in record.getMessage()]
        assert len(said) == 1

    def test_ignored_far_into_a_blob(
        self, origin: registry.RegistryOrigin, fault_server: FaultProxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ranges, "MAX_SKIPPED_BYTES", 999)
        fault_server.add(Fault(ignore_range=True, times=None))
        with pytest.raises(errors.InvalidInputError, match="ignores Range"):
            read_range(origin)

    def test_ignored_while_a_stream_resumes(
        self, origin: registry.RegistryOrigin, fault_server: FaultProxy
    ) -> None:
        fault_server.add(Fault(close_after_bytes=100_000))
        fault_server.add(Fault(ignore_range=True))
        assert b"".join(origin.stream_blob(DIGEST, len(DATA))) == DATA

    @pytest.mark.parametrize(
        "place", ["bytes 1001-200999/300000", "bytes 5-4/3", "", "bytes 2000-3000/*", "pages 1-2/3"]
    )
    def test_another_range(
        self, origin: registry.RegistryOrigin, fault_server: FaultProxy, place: str
    ) -> None:
        fault_server.add(Fault(fields={"Content-Range": place}, times=None))
        with pytest.raises(errors.UnavailableError, match="another range"):
            read_range(origin)

    def test_a_range_that_begins_earlier(
        self, origin: registry.RegistryOrigin, fault_server: FaultProxy
    ) -> None:
        body, place = DATA[500:], f"bytes 500-{len(DATA) - 1}/{len(DATA)}"
        fault_server.add(Fault(status=206, fields={"Content-Range": place}, body=body))
        assert read_range(origin) == DATA[1000:201_000]

    def test_less_than_was_asked_for(self, origin: registry.RegistryOrigin, fault_server: FaultProxy) -> None:
        place = f"bytes 1000-1099/{len(DATA)}"
        fault_server.add(Fault(status=206, fields={"Content-Range": place}, body=DATA[1000:1100]))
        assert read_range(origin) == DATA[1000:201_000]

    def test_nothing_of_what_was_asked_for(
        self, origin: registry.RegistryOrigin, fault_server: FaultProxy
    ) -> None:
        place = f"bytes 1000-1099/{len(DATA)}"
        fault_server.add(Fault(status=206, fields={"Content-Range": place}, body=b"", times=None))
        with pytest.raises(errors.UnavailableError, match="empty"):
            read_range(origin)

    def test_a_shorter_blob(self, origin: registry.RegistryOrigin, fault_server: FaultProxy) -> None:
        fault_server.serve(f"{BLOBS}{DIGEST}", DATA[:2000])
        with pytest.raises(errors.IntegrityError, match="2000 bytes"):
            read_range(origin)
        with pytest.raises(errors.IntegrityError, match="2000 bytes"):
            list(origin.stream_blob(DIGEST, len(DATA)))


class TestWaiting:
    def test_retry_after_is_slept(
        self, origin: registry.RegistryOrigin, fault_server: FaultProxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        slept: list[float] = []
        monkeypatch.setattr(retry.time, "sleep", slept.append)
        date = email.utils.formatdate(time.time() + 3600, usegmt=True)
        for wish in ("0.03", "1000", date):
            fault_server.add(Fault(status=503, fields={"Retry-After": wish}))
            origin.has_blob(DIGEST)
        assert 0.03 <= slept[0] <= 0.033
        assert all(0.05 <= seconds <= 0.055 for seconds in slept[1:])

    def test_until_the_deadline(self, origin: registry.RegistryOrigin, fault_server: FaultProxy) -> None:
        fault_server.add(Fault(status=503, times=10))
        assert b"".join(origin.stream_range(DIGEST, 0, 10, time.monotonic() + 60)) == DATA[:10]
        assert len(fault_server.seen()) == 11, "more attempts than without a deadline"

    @pytest.mark.parametrize("fault", [{"status": 503}, {"hang": True}, {"bytes_per_second": 20}], ids=str)
    def test_not_past_the_deadline(
        self, origin: registry.RegistryOrigin, fault_server: FaultProxy, fault: dict[str, object]
    ) -> None:
        fault_server.add(Fault(times=None, **fault))  # type: ignore[arg-type]
        with pytest.raises(errors.UnavailableError, match=DIGEST):
            list(origin.stream_range(DIGEST, 0, 1000, time.monotonic() + 0.2))
        with pytest.raises(errors.UnavailableError, match=DIGEST):
            list(origin.stream_range(DIGEST, 0, 1000, time.monotonic() - 1))

    def test_the_wish_reaches_the_caller(
        self, origin: registry.RegistryOrigin, fault_server: FaultProxy
    ) -> None:
        fault_server.add(Fault(status=429, fields={"Retry-After": "7"}, times=None))
        with pytest.raises(errors.UnavailableError) as caught:
            origin.has_blob(DIGEST)
        assert caught.value.retry_after_seconds == 7


def test_nobody_listens() -> None:
    origin = registry.RegistryOrigin("127.0.0.1:1", "a/repo", transport.Settings(), None, QUICK)
    with pytest.raises(errors.UnavailableError, match=r"127\.0\.0\.1.*cannot connect"):
        origin.read_manifest("v1")


def test_connections_are_kept(origin: registry.RegistryOrigin, fault_server: FaultProxy) -> None:
    before = fault_server.connections
    for _ in range(10):
        read_range(origin)
        origin.has_blob(DIGEST)
        origin.read_blob(DIGEST, len(DATA))
        origin.read_manifest("v1")
        origin.referrers(DIGEST)
    assert fault_server.connections == before
    assert servers.unique_name() != servers.unique_name()
