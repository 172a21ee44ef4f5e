"""Referrers on registries: the fallback tag with many writers at once, what others wrote into it, the API."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs import artifact, errors
from imagefs.artifact import Descriptor
from imagefs.origin import BytesSource, fallback, referrers, registry, retry, transport
from tests.fixtures import servers
from tests.fixtures.servers import Fault, FaultProxy, RegistryServer, Reply, Seen

SUBJECT = artifact.digest_of(b"the subject")
TAG = SUBJECT.replace(":", "-")
QUICK = retry.Policy(attempts=4, first_delay_seconds=0.001, max_delay_seconds=0.01)

DIGESTS = st.integers(0, 9).map(lambda number: artifact.digest_of(str(number).encode()))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
ENTRIES = st.lists(
    st.builds(
        lambda digest, rest: {**rest, "digest": digest}, DIGESTS, st.dictionaries(st.text(max_size=5), JSON)
    ),
    max_size=6,
)


def manifest(number: int | str) -> bytes:
    return artifact.canonical_json(
        {
            "schemaVersion": 2,
            "mediaType": artifact.OCI_MANIFEST,
            "artifactType": artifact.ARTIFACT_TYPE,
            "config": {"mediaType": artifact.OCI_CONFIG, "digest": artifact.digest_of(b"{}"), "size": 2},
            "layers": [],
            "subject": {"mediaType": artifact.OCI_MANIFEST, "digest": SUBJECT, "size": 11},
            "annotations": {"number": str(number)},
        }
    )


def connect(host: str, repository: str) -> registry.RegistryOrigin:
    # The default policy: while a tag is being written, docker-registry answers 500 to its readers.
    origin = registry.RegistryOrigin(host, repository, transport.Settings(), Path("/absent"))
    origin.put_blob(artifact.digest_of(b"{}"), 2, BytesSource(b"{}"))
    return origin


def add_one(host: str, repository: str, numbers: list[int]) -> list[str]:
    """What one converter process does; runs in processes of their own."""
    origin = connect(host, repository)
    with ThreadPoolExecutor(len(numbers)) as pool:
        return list(pool.map(lambda n: origin.put_manifest(manifest(n), artifact.OCI_MANIFEST), numbers))


class TestConcurrentWriters:
    def check(self, registry: RegistryServer, processes: int, threads: int) -> None:
        repository = servers.unique_name("many")
        origin = connect(registry.host, repository)
        foreign = {
            "schemaVersion": 2,
            "mediaType": artifact.OCI_INDEX,
            "x-foreign": {"kept": [1, None]},
            "manifests": [],
        }
        origin.put_manifest(json.dumps(foreign).encode(), artifact.OCI_INDEX, TAG)
        context = multiprocessing.get_context("forkserver")
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            jobs = [
                pool.submit(add_one, registry.host, repository, [p * threads + t for t in range(threads)])
                for p in range(processes)
            ]
            digests = {digest for job in jobs for digest in job.result()}
        assert len(digests) == processes * threads
        assert {d.digest for d in origin.referrers(SUBJECT)} == digests
        index = json.loads(origin.read_manifest(TAG).data)
        assert index["x-foreign"] == foreign["x-foreign"]
        assert len(index["manifests"]) == len(digests)

    def test_processes_and_threads_lose_nothing(self, registry: RegistryServer) -> None:
        self.check(registry, processes=4, threads=4)

    @pytest.mark.soak
    def test_again_and_again(self, registry: RegistryServer) -> None:
        for _ in range(20):
            self.check(registry, processes=6, threads=8)


class RacingTags:
    """Tags in memory where, at each write, another writer that read before it writes just after it."""

    def __init__(self, rivals: int) -> None:
        self.data: bytes | None = None
        self.rivals = rivals
        self.written: set[str] = set()

    def get(self, tag: str) -> bytes | None:
        return self.data

    def put(self, tag: str, data: bytes) -> None:
        before, self.data = self.data, data
        if self.rivals:
            self.rivals -= 1
            own = {"digest": artifact.digest_of(str(self.rivals).encode()), "mediaType": "x/y", "size": 1}
            self.written.add(str(own["digest"]))
            old = referrers.decode_fallback(before, "t") if before else referrers.EMPTY_FALLBACK
            self.data = old.with_entries([own]).encode()


class TestAdd:
    @pytest.fixture(autouse=True)
    def no_pause(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fallback, "MIN_PAUSE_SECONDS", 0.0)

    def test_overwritten_again_and_again(self) -> None:
        tags = RacingTags(rivals=10)
        own = Descriptor(artifact.OCI_MANIFEST, artifact.digest_of(b"own"), 3)
        fallback.add(tags, SUBJECT, own, QUICK, "here")
        assert tags.data is not None
        listed = referrers.decode_fallback(tags.data, "t").digests()
        assert own.digest in listed
        assert tags.written <= listed, "what was seen and lost was put back"

    def test_given_up(self) -> None:
        tags = RacingTags(rivals=1000)
        own = Descriptor(artifact.OCI_MANIFEST, artifact.digest_of(b"own"), 3)
        with pytest.raises(errors.UnavailableError, match=TAG):
            fallback.add(tags, SUBJECT, own, QUICK, "here")

    def test_there_already(self) -> None:
        own = Descriptor(artifact.OCI_MANIFEST, artifact.digest_of(b"own"), 3)
        tags = RacingTags(rivals=0)
        fallback.add(tags, SUBJECT, own, QUICK, "here")
        before = tags.data
        tags.put = None  # type: ignore[assignment, method-assign]
        fallback.add(tags, SUBJECT, own, QUICK, "here")
        assert tags.data == before

    def test_a_write_that_failed_starts_from_reading(
        self, fault_server: FaultProxy, registry: RegistryServer
    ) -> None:
        fault_server.upstream = registry.host
        origin = connect(fault_server.host, servers.unique_name("failing"))
        fault_server.add(Fault(method="PUT", path=TAG, status=503, times=2))
        digest = origin.put_manifest(manifest(1), artifact.OCI_MANIFEST)
        assert [d.digest for d in origin.referrers(SUBJECT)] == [digest]
        order = [seen.method for seen in fault_server.seen(path=TAG)]
        assert order[:6] == ["GET", "PUT", "GET", "PUT", "GET", "PUT"]

    @pytest.mark.parametrize("other", [b"{}", manifest(7), b'{"manifests": {}}', b'{"manifests": [{}]}'])
    def test_a_tag_that_holds_something_else_is_left_alone(
        self, fault_server: FaultProxy, other: bytes
    ) -> None:
        fault_server.serve(f"/v2/r/manifests/{TAG}", other, Content_Type=artifact.OCI_MANIFEST)
        fault_server.serve(f"/v2/r/blobs/{artifact.digest_of(b'{}')}", b"{}")
        fault_server.add(Fault(method="PUT", status=201, times=None))
        origin = connect(fault_server.host, "r")
        with pytest.raises(errors.InvalidInputError, match=TAG):
            origin.put_manifest(manifest(1), artifact.OCI_MANIFEST, "tagged")
        assert not fault_server.seen("PUT", f"{TAG}|tagged")


class TestFallbackIndex:
    @given(ENTRIES, ENTRIES, st.dictionaries(st.text(max_size=5), JSON))
    def test_merging_keeps_everything(
        self, have: list[dict[str, object]], more: list[dict[str, object]], rest: dict[str, object]
    ) -> None:
        document = {**rest, "manifests": have}
        index = referrers.decode_fallback(json.dumps(document).encode(), "t")
        merged = referrers.decode_fallback(index.with_entries(more).encode(), "t")
        assert merged.entries()[: len(have)] == have
        assert merged.digests() == {e["digest"] for e in have} | {e["digest"] for e in more}
        assert {k: v for k, v in merged.document.items() if k != "manifests"} == {
            k: v for k, v in rest.items() if k != "manifests"
        }
        assert merged.with_entries(more).encode() == merged.encode()

    @given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
    def test_anything_is_parsed_or_refused(self, data: bytes) -> None:
        for parse in (referrers.decode_fallback, referrers.listed, referrers.referrer):
            with contextlib.suppress(errors.InvalidInputError):
                parse(data, "t")

    def test_foreign_entries_are_listed(self) -> None:
        entry = {
            "mediaType": "a/b",
            "digest": SUBJECT,
            "size": 1,
            "artifactType": "sig/x",
            "new": {"field": 1},
        }
        [found] = referrers.listed(json.dumps({"manifests": [entry]}).encode(), "t")
        assert found.artifact_type == "sig/x"


class TestApi:
    def test_pages(self, fault_server: FaultProxy) -> None:
        entries = [
            artifact.encode_descriptor(Descriptor(artifact.OCI_MANIFEST, artifact.digest_of(bytes([n])), n))
            for n in range(5)
        ]
        pages = [entries[:2], entries[2:4], entries[4:]]

        def answer(seen: Seen) -> Reply:
            number = int(seen.path.rpartition("page=")[2] or 0) if "page=" in seen.path else 0
            fields = {"Content-Type": artifact.OCI_INDEX}
            if number + 1 < len(pages):
                fields["Link"] = f'</v2/r/referrers/{SUBJECT}?page={number + 1}>; rel="next"'
            return 200, fields, json.dumps({"manifests": pages[number]}).encode()

        fault_server.hook = answer
        origin = registry.RegistryOrigin(fault_server.host, "r", transport.Settings(), None, QUICK)
        assert [artifact.encode_descriptor(d) for d in origin.referrers(SUBJECT)] == entries

    def test_pages_without_end(self, fault_server: FaultProxy) -> None:
        link = f'</v2/r/referrers/{SUBJECT}>; rel="next"'
        fault_server.hook = lambda seen: (200, {"Link": link}, b'{"manifests": []}')
        origin = registry.RegistryOrigin(fault_server.host, "r", transport.Settings(), None, QUICK)
        with pytest.raises(errors.InvalidInputError, match="pages"):
            origin.referrers(SUBJECT)

    def test_a_registry_that_lists_subjects_gets_no_fallback_tag(self, fault_server: FaultProxy) -> None:
        fault_server.add(Fault(method="PUT", status=201, fields={"OCI-Subject": SUBJECT}, times=None))
        origin = registry.RegistryOrigin(fault_server.host, "r", transport.Settings(), None, QUICK)
        data = manifest(1)
        origin.put_manifest(data, artifact.OCI_MANIFEST, "tagged")
        paths = [seen.path for seen in fault_server.seen("PUT")]
        assert paths == [f"/v2/r/manifests/{artifact.digest_of(data)}", "/v2/r/manifests/tagged"]

    def test_the_api_is_asked_for_once_where_there_is_none(self, fault_server: FaultProxy) -> None:
        origin = registry.RegistryOrigin(fault_server.host, "r", transport.Settings(), None, QUICK)
        for _ in range(3):
            assert origin.referrers(SUBJECT) == []
        assert len(fault_server.seen(path="/referrers/")) == 1
        assert len(fault_server.seen(path=TAG)) == 3
