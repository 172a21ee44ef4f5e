"""Models on a node: downloaded from a real S3 server over HTTP that fails on order, mounted from a real block
image, shared, and removed for the quota."""

from __future__ import annotations

import concurrent.futures
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import errors
from serving.models import listing, place, store
from tests.fixtures import block_images, images, servers
from tests.fixtures.servers import Fault, FaultProxy, S3Server

PIECE_BYTES = 64 << 10


class World:
    """A bucket with a checkpoint, behind a proxy, and a node's directory."""

    def __init__(self, server: S3Server, proxy: FaultProxy, directory: Path) -> None:
        self.proxy, self.directory = proxy, directory
        self.bucket, self.prefix = server.bucket, servers.unique_name("models")
        self.said: list[str] = []
        self.stop = threading.Event()
        self._s3: Any = boto3.client("s3", endpoint_url=server.endpoint_url)

    def put(self, name: str, data: bytes) -> None:
        self._s3.put_object(Bucket=self.bucket, Key=f"{self.prefix}/{name}", Body=data)

    def put_in_parts(self, name: str, parts: list[bytes]) -> None:
        place = {"Bucket": self.bucket, "Key": f"{self.prefix}/{name}"}
        upload = self._s3.create_multipart_upload(**place)["UploadId"]
        done = [
            {
                "PartNumber": number,
                "ETag": self._s3.upload_part(**place, UploadId=upload, PartNumber=number, Body=part)["ETag"],
            }
            for number, part in enumerate(parts, start=1)
        ]
        self._s3.complete_multipart_upload(**place, UploadId=upload, MultipartUpload={"Parts": done})

    def acquire(self, quota_bytes: int | None = None) -> store.Held:
        wanted = place.Bucket(self.bucket, self.prefix)
        return store.Store(self.directory, quota_bytes, self.said.append).acquire(wanted, self.stop)

    def ranges(self) -> list[str]:
        """What has been asked for since the last `clear`."""
        return [each.fields["range"] for each in self.proxy.seen("GET") if "range" in each.fields]


@pytest.fixture
def world(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    proxy = FaultProxy(s3_server.endpoint_url.removeprefix("http://"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setattr(listing, "PIECE_BYTES", PIECE_BYTES)
    yield World(s3_server, proxy, tmp_path / "models")
    proxy.close()


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def test_a_checkpoint_comes_in_pieces_whole_and_once(world: World) -> None:
    weights = noise(3 * PIECE_BYTES + 1)
    world.put("config.json", b"{}")
    world.put("deep/weights.safetensors", weights)
    world.put("empty", b"")
    world.put("deep/", b"")
    held = world.acquire()
    assert (held.path / "deep/weights.safetensors").read_bytes() == weights
    assert (held.path / "config.json").read_bytes() == b"{}"
    assert (held.path / "empty").read_bytes() == b""
    assert len(world.ranges()) == 5
    assert {each.fields["if-match"] for each in world.proxy.seen("GET") if "range" in each.fields}
    assert sorted(each.name for each in held.path.iterdir()) == [
        ".glowplug.json",
        "config.json",
        "deep",
        "empty",
    ]
    world.proxy.clear()
    again = world.acquire()
    assert again.path == held.path
    assert world.ranges() == []
    world.put("config.json", b'{"new": 1}')
    newer = world.acquire()
    assert newer.path != held.path
    assert (held.path / "config.json").read_bytes() == b"{}"  # who uses it keeps what it has


def test_what_was_cut_off_goes_on_and_what_was_spoiled_is_fetched_again(world: World) -> None:
    weights = noise(8 * PIECE_BYTES)
    world.put("weights", weights)
    world.proxy.add(Fault(path="weights", times=2, close_after_bytes=100))
    last = f"bytes={7 * PIECE_BYTES}-"

    def stopped(seen: servers.Seen) -> None:
        if seen.fields.get("range", "").startswith(last):
            world.stop.set()

    world.proxy.hook = stopped
    with pytest.raises(errors.UnavailableError):
        world.acquire()
    [part] = world.directory.glob("*.part")
    record = (part / "weights.pieces").read_bytes()
    come = record.count(1)
    world.stop.clear()
    world.proxy.hook = None
    world.proxy.clear()
    with (part / "weights").open("r+b") as file:  # a disk that lies
        file.seek(record.index(1) * PIECE_BYTES)
        file.write(b"spoiled")
    held = world.acquire()
    assert (held.path / "weights").read_bytes() == weights
    assert len(world.ranges()) == 8 - come + 8


def test_bytes_that_are_not_the_objects_are_never_served(world: World) -> None:
    world.put("weights", noise(PIECE_BYTES))
    world.proxy.add(Fault(path="weights", times=None, flip=True))
    with pytest.raises(errors.UnavailableError, match="not what its ETag says"):
        world.acquire()
    assert not [each for each in world.directory.glob("checkpoint-*") if each.is_dir()]
    world.proxy.clear()
    assert (world.acquire().path / "weights").read_bytes() == noise(PIECE_BYTES)


def test_an_object_put_in_parts_is_checked_as_such(world: World) -> None:
    parts = [noise(5 << 20, 1), noise(5 << 20, 2), noise(1_000, 3)]
    world.put_in_parts("weights", parts)
    world.proxy.add(Fault(path="weights", method="GET", flip=True))
    held = world.acquire()
    assert (held.path / "weights").read_bytes() == b"".join(parts)
    assert len(world.ranges()) == 2 * -(-sum(map(len, parts)) // PIECE_BYTES)


def test_engines_that_start_together_bring_it_once(world: World) -> None:
    world.put("weights", noise(4 * PIECE_BYTES))
    world.proxy.add(Fault(path="weights", delay_seconds=0.3))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        held = list(pool.map(lambda _: world.acquire(), range(4)))
    assert len({each.path for each in held}) == 1
    assert len(world.ranges()) == 4


def test_a_bucket_that_is_away_stops_no_model_that_is_here(world: World) -> None:
    world.put("config.json", b"{}")
    held = world.acquire()
    world.proxy.add(Fault(times=None, status=503))
    again = world.acquire()
    assert again.path == held.path
    assert "served from what is on this node" in world.said[-1]


def test_the_least_recently_used_goes_for_the_quota_and_what_is_used_stays(world: World) -> None:
    made = []
    for number in range(3):
        world.put("weights", noise(10 * PIECE_BYTES, number))
        held = world.acquire()
        os.utime(held.path / ".glowplug.json", (number, number))
        made.append(held)
    world.put("weights", noise(10 * PIECE_BYTES, 9))
    quota = 35 * PIECE_BYTES
    with pytest.raises(errors.ConfigurationError, match="quota_bytes"):
        world.acquire(quota)
    for each in made[1:]:
        each.close()
    world.acquire(quota)
    assert [each.path.exists() for each in made] == [True, False, True]


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault(times=None, status=503), errors.UnavailableError),
        (Fault(times=None, status=403), errors.ConfigurationError),
        (Fault(times=None, status=404), errors.NotFoundError),
        (Fault(times=None, method="GET", body=b"<no xml", status=200), errors.UnavailableError),
    ],
)
def test_a_server_that_says_no_is_an_error_of_ours(
    world: World, fault: Fault, error: type[errors.ServingError]
) -> None:
    world.proxy.add(fault)
    with pytest.raises(error, match="model: s3://"):
        world.acquire()


def test_an_empty_place_is_said(world: World) -> None:
    with pytest.raises(errors.NotFoundError, match="there is nothing"):
        world.acquire()


# -- block images ----------------------------------------------------------------------------------------


@pytest.mark.root
def test_a_block_image_is_mounted_for_all_and_gone_with_the_last(
    glowplug: block_images.Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in glowplug.environment.items():
        monkeypatch.setenv(name, value)
    tar = images.tar_of([("models", None), ("models/chat", None), ("models/chat/config.json", b"{}")])
    ref = block_images.make(tmp_path / "image", [tar])
    wanted = place.parse(f"{ref}#models/chat")
    assert isinstance(wanted, place.Image)
    node = store.Store(tmp_path / "models", None, lambda _: None)
    one = node.acquire(wanted, threading.Event())
    other = node.acquire(wanted, threading.Event())
    assert one.path == other.path
    one.close()
    assert (other.path / "config.json").read_bytes() == b"{}"
    other.close()
    assert glowplug.left() == []
    with pytest.raises(errors.DocumentError, match="glowplug convert"):
        node.acquire(place.Image(f"oci:{tmp_path}/nothing:latest", ""), threading.Event())


# -- what is decided without doing anything ------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ("/models/chat", place.Directory("/models/chat")),
        ("s3://models/a/b/", place.Bucket("models", "a/b")),
        ("oci:reg.example/models/chat:v1", place.Image("reg.example/models/chat:v1", "")),
        ("oci:reg.example/m@sha256:00#/chat/", place.Image("reg.example/m@sha256:00", "chat")),
        ("oci:/images/chat:latest#m", place.Image("oci:/images/chat:latest", "m")),
    ],
)
def test_a_model_is_one_of_three_kinds(model: str, found: place.Place) -> None:
    assert place.parse(model) == found


@pytest.mark.parametrize("model", ["s3://", "s3://bucket", "s3://B_D/x", "oci:", "oci:r/i#../x", "gs://b/x"])
def test_other_places_are_refused(model: str) -> None:
    with pytest.raises(ValueError, match=r"write|use"):
        place.parse(model)


KEYS = st.text(st.sampled_from("ab./\0é"), max_size=8).map(lambda name: f"p/{name}")


@given(st.lists(st.tuples(KEYS, st.integers(0, 2**40), st.text(max_size=40))))
def test_no_key_leaves_the_directory(found: list[tuple[str, int, str]]) -> None:
    try:
        snapshot = listing.snapshot("p", found)
    except ValueError:
        return
    for each in snapshot.objects:
        path = os.path.normpath(os.path.join("/node", each.name))
        assert path.startswith("/node/")
        assert path == os.path.join("/node", each.name)


@given(st.integers(0, 1 << 30))
def test_pieces_cover_an_object_once(size: int) -> None:
    found = list(listing.pieces(size))
    assert sum(each.size_bytes for each in found) == size
    assert [each.offset for each in found] == [n * listing.PIECE_BYTES for n in range(len(found))]


@given(st.text())
def test_any_etag_is_read(etag: str) -> None:
    assert listing.kind(etag) is None or len(etag) >= 32
