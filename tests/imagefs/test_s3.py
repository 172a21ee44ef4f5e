"""The S3 origin where it differs from the others: uploads in parts, error codes, presigned reads, keys."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

import boto3
import pytest

from imagefs import artifact, errors, reference
from imagefs.origin import BytesSource, connect, retry, s3, transport
from tests.fixtures import servers
from tests.fixtures.servers import Fault, FaultProxy, S3Server

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

QUICK = retry.Policy(attempts=3, first_delay_seconds=0.001, max_delay_seconds=0.01)
DATA = random.Random(9).randbytes(12 << 20)
DIGEST = artifact.digest_of(DATA)


@pytest.fixture(scope="module")
def shared(s3_server: S3Server) -> Iterator[tuple[FaultProxy, S3Client, transport.Transport]]:
    """One proxy, client and transport for all tests here: a client takes longer to make than a test."""
    proxy = FaultProxy(upstream=s3_server.endpoint_url.removeprefix("http://"))
    options = connect.Options(s3_endpoint_url=proxy.url, read_timeout_seconds=5)
    origin = s3.connect(s3_server.bucket, "shared", options)
    yield proxy, origin._client, origin._http
    origin.close()
    proxy.close()


@pytest.fixture
def proxy(shared: tuple[FaultProxy, S3Client, transport.Transport]) -> FaultProxy:
    shared[0].clear()
    return shared[0]


@pytest.fixture
def origin(
    shared: tuple[FaultProxy, S3Client, transport.Transport],
    proxy: FaultProxy,
    s3_server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
) -> s3.S3Origin:
    """An origin whose requests pass through `proxy`."""
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    return s3.S3Origin(s3_server.bucket, servers.unique_name("s3"), shared[1], shared[2], QUICK)


def keys(server: S3Server, origin: s3.S3Origin) -> set[str]:
    client = boto3.client("s3", endpoint_url=server.endpoint_url)
    listed = client.list_objects_v2(Bucket=server.bucket, Prefix=origin.prefix)
    return {entry["Key"].removeprefix(origin.prefix + "/") for entry in listed.get("Contents", [])}


def unfinished(server: S3Server) -> list[object]:
    client = boto3.client("s3", endpoint_url=server.endpoint_url)
    return list(client.list_multipart_uploads(Bucket=server.bucket).get("Uploads", []))


def test_key_layout(origin: s3.S3Origin, s3_server: S3Server) -> None:
    origin.put_blob(artifact.digest_of(b"{}"), 2, BytesSource(b"{}"))
    subject = {"mediaType": artifact.OCI_MANIFEST, "digest": DIGEST, "size": 1}
    data = artifact.canonical_json({"schemaVersion": 2, "subject": subject})
    digest = origin.put_manifest(data, artifact.OCI_MANIFEST, "v1")
    manifest_hex = digest.removeprefix("sha256:")
    assert keys(s3_server, origin) == {
        f"blobs/sha256/{artifact.digest_of(b'{}').removeprefix('sha256:')}",
        f"blobs/sha256/{manifest_hex}",
        "tags/v1",
        f"referrers/sha256/{DIGEST.removeprefix('sha256:')}/{manifest_hex}",
    }


class TestParts:
    def test_round_trip(self, origin: s3.S3Origin, proxy: FaultProxy) -> None:
        origin.put_blob(DIGEST, len(DATA), BytesSource(DATA))
        assert len(proxy.seen("PUT", "partNumber")) == 3
        assert b"".join(origin.stream_blob(DIGEST, len(DATA))) == DATA

    def test_a_part_that_failed_is_sent_again(self, origin: s3.S3Origin, proxy: FaultProxy) -> None:
        proxy.add(Fault(method="PUT", path="partNumber=2", status=503))
        proxy.add(Fault(method="PUT", path="partNumber=3", status=500, after=True))
        origin.put_blob(DIGEST, len(DATA), BytesSource(DATA))
        assert origin.read_blob(DIGEST, len(DATA)) == DATA

    @pytest.mark.parametrize("status", [503, 403])
    def test_given_up_and_aborted(
        self, origin: s3.S3Origin, proxy: FaultProxy, s3_server: S3Server, status: int
    ) -> None:
        proxy.add(Fault(method="PUT", path="partNumber=2", status=status, times=None))
        error = errors.UnavailableError if status == 503 else errors.DeniedError
        with pytest.raises(error, match=f"{DIGEST} at byte 5242880"):
            origin.put_blob(DIGEST, len(DATA), BytesSource(DATA))
        assert unfinished(s3_server) == []
        assert not origin.has_blob(DIGEST)

    def test_wrong_bytes_and_interrupts_are_aborted(self, origin: s3.S3Origin, s3_server: S3Server) -> None:
        with pytest.raises(errors.IntegrityError, match=DIGEST):
            origin.put_blob(DIGEST, len(DATA), BytesSource(DATA[:-1] + b"\0"))

        class Interrupted:
            def open(self, offset: int) -> Iterator[bytes]:
                yield DATA[: 6 << 20]
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            origin.put_blob(DIGEST, len(DATA), Interrupted())
        assert unfinished(s3_server) == []
        assert keys(s3_server, origin) == set()


class TestFaults:
    @pytest.mark.parametrize(
        ("status", "error", "requests"),
        [
            (403, errors.DeniedError, 1),
            (405, errors.InvalidInputError, 1),
            (429, errors.UnavailableError, 3),
            (500, errors.UnavailableError, 3),
            (503, errors.UnavailableError, 3),
        ],
    )
    @pytest.mark.parametrize("call", ["read", "has", "manifest", "referrers"])
    def test_statuses(
        self,
        origin: s3.S3Origin,
        proxy: FaultProxy,
        status: int,
        error: type[Exception],
        requests: int,
        call: str,
    ) -> None:
        proxy.add(Fault(status=status, times=None))
        with pytest.raises(error) as caught:
            {
                "read": lambda: origin.read_blob(DIGEST, 10),
                "has": lambda: origin.has_blob(DIGEST),
                "manifest": lambda: origin.read_manifest(DIGEST),
                "referrers": lambda: origin.referrers(DIGEST),
            }[call]()
        assert origin.name in str(caught.value)
        assert DIGEST in str(caught.value)
        assert len(proxy.seen()) == requests

    def test_ridden_out(self, origin: s3.S3Origin, proxy: FaultProxy) -> None:
        data = DATA[:500_000]
        digest = artifact.digest_of(data)
        proxy.add(Fault(method="HEAD", status=503))
        proxy.add(Fault(method="PUT", status=500))
        origin.put_blob(digest, len(data), BytesSource(data))
        for fault in (Fault(close_after_bytes=100_000), Fault(status=503), Fault(ignore_range=True)):
            proxy.add(fault)
            assert b"".join(origin.stream_range(digest, 1000, 400_000)) == data[1000:401_000]

    def test_presigned_urls_are_kept_and_renewed(self, origin: s3.S3Origin, proxy: FaultProxy) -> None:
        origin.put_blob(DIGEST, len(DATA), BytesSource(DATA))
        proxy.clear()
        for offset in range(3):
            list(origin.stream_range(DIGEST, offset, 10))
        assert len({seen.path for seen in proxy.seen("GET")}) == 1
        proxy.add(Fault(status=403))
        list(origin.stream_range(DIGEST, 0, 10))
        proxy.add(Fault(status=403, times=None))
        with pytest.raises(errors.DeniedError, match=DIGEST) as caught:
            list(origin.stream_range(DIGEST, 7, 10))
        assert "Signature" not in str(caught.value)
        assert "at byte 7" in str(caught.value)

    def test_a_manifest_whose_bytes_changed(self, origin: s3.S3Origin, s3_server: S3Server) -> None:
        digest = origin.put_manifest(b"{}", artifact.OCI_MANIFEST, "v1")
        boto3.client("s3", endpoint_url=s3_server.endpoint_url).put_object(
            Bucket=s3_server.bucket,
            Key=f"{origin.prefix}/blobs/{digest.replace(':', '/')}",
            Body=b'{"x":1}',
        )
        for name in ("v1", digest):
            with pytest.raises(errors.IntegrityError, match=digest):
                origin.read_manifest(name)

    @pytest.mark.parametrize("pointer", [b"", b"[]", b'{"digest": "sha256:../../x"}', b'{"digest": 5}'])
    def test_a_tag_that_points_nowhere(
        self, origin: s3.S3Origin, s3_server: S3Server, pointer: bytes
    ) -> None:
        boto3.client("s3", endpoint_url=s3_server.endpoint_url).put_object(
            Bucket=s3_server.bucket, Key=f"{origin.prefix}/tags/v1", Body=pointer
        )
        with pytest.raises(errors.InvalidInputError, match="v1"):
            origin.read_manifest("v1")


def test_no_bucket(s3_server: S3Server) -> None:
    options = connect.Options(s3_endpoint_url=s3_server.endpoint_url)
    origin = connect.connect(reference.parse("s3://no-such-bucket/p"), options)
    with pytest.raises(errors.NotFoundError, match="no-such-bucket"):
        origin.put_manifest(b"{}", artifact.OCI_MANIFEST)
    with pytest.raises(errors.NotFoundError, match="no-such-bucket"):
        origin.read_manifest("v1")


def test_no_credentials(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/absent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/absent")
    options = connect.Options(s3_endpoint_url=s3_server.endpoint_url)
    origin = connect.connect(reference.parse(f"s3://{s3_server.bucket}/p"), options)
    for read in (lambda: origin.has_blob(DIGEST), lambda: origin.read_blob(DIGEST, 1)):
        with pytest.raises(errors.ConfigurationError, match="redentials"):
            read()


@pytest.mark.parametrize("url", ["http://s3.example", "ftp://127.0.0.1", "nonsense"])
def test_endpoints_that_are_refused(url: str) -> None:
    with pytest.raises(errors.ConfigurationError):
        connect.connect(reference.parse("s3://bucket/p"), connect.Options(s3_endpoint_url=url))


def test_tag_pointer_is_a_descriptor(origin: s3.S3Origin, s3_server: S3Server) -> None:
    digest = origin.put_manifest(b"{}", artifact.OCI_MANIFEST, "v1")
    client = boto3.client("s3", endpoint_url=s3_server.endpoint_url)
    body = client.get_object(Bucket=s3_server.bucket, Key=f"{origin.prefix}/tags/v1")["Body"].read()
    assert json.loads(body) == {"mediaType": artifact.OCI_MANIFEST, "digest": digest, "size": 2}
