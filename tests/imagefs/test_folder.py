"""OCI layouts on disk: what other tools wrote and read, many writers of index.json, hostile folders."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from imagefs import artifact, errors, reference
from imagefs.origin import BytesSource, connect, folder

ABSENT = "sha256:" + "0" * 64


def run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def image(origin: folder.FolderOrigin, **fields: object) -> bytes:
    config = b'{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}'
    origin.put_blob(artifact.digest_of(config), len(config), BytesSource(config))
    descriptor = {"mediaType": artifact.OCI_CONFIG, "digest": artifact.digest_of(config), "size": len(config)}
    document = {
        "schemaVersion": 2,
        "mediaType": artifact.OCI_MANIFEST,
        "config": descriptor,
        "layers": [],
        **fields,
    }
    return artifact.canonical_json(document)


def subject(digest: str) -> dict[str, object]:
    return {"mediaType": artifact.OCI_MANIFEST, "digest": digest, "size": 1}


def index_of(path: Path) -> list[dict[str, object]]:
    entries = json.loads((path / "index.json").read_text())["manifests"]
    assert isinstance(entries, list)
    return entries


@pytest.fixture
def origin(tmp_path: Path) -> folder.FolderOrigin:
    return folder.FolderOrigin(tmp_path / "layout")


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    return tmp_path / "layout"


class TestOtherTools:
    @pytest.fixture
    def made_by_umoci(self, tmp_path: Path) -> Path:
        path, root = tmp_path / "umoci", tmp_path / "root"
        run("umoci", "init", "--layout", path)
        run("umoci", "new", "--image", f"{path}:v1")
        root.mkdir()
        (root / "file").write_text("content")
        run("umoci", "insert", "--rootless", "--image", f"{path}:v1", root, "/data")
        return path

    def check(self, path: Path, tag: str) -> None:
        origin = folder.FolderOrigin(path)
        manifest = origin.read_manifest(tag)
        assert manifest == origin.read_manifest("") == origin.read_manifest(manifest.digest)
        assert manifest.media_type == artifact.OCI_MANIFEST
        [layer] = json.loads(manifest.data)["layers"]
        assert sum(map(len, origin.stream_blob(layer["digest"], layer["size"]))) == layer["size"]

    def test_reads_what_umoci_made(self, made_by_umoci: Path) -> None:
        self.check(made_by_umoci, "v1")

    def test_reads_what_skopeo_made(self, made_by_umoci: Path, tmp_path: Path) -> None:
        copied = tmp_path / "skopeo"
        run("skopeo", "--insecure-policy", "copy", f"oci:{made_by_umoci}:v1", f"oci:{copied}:other")
        self.check(copied, "other")

    def test_both_read_what_we_wrote(
        self, made_by_umoci: Path, origin: folder.FolderOrigin, layout: Path, tmp_path: Path
    ) -> None:
        source = folder.FolderOrigin(made_by_umoci)
        manifest = source.read_manifest("v1")
        document = json.loads(manifest.data)
        for descriptor in (document["config"], *document["layers"]):
            assert origin.mount_blob(descriptor["digest"], source)
        origin.put_manifest(manifest.data, manifest.media_type, "v1")
        origin.put_manifest(
            image(origin, artifactType=artifact.ARTIFACT_TYPE, subject=subject(manifest.digest)),
            artifact.OCI_MANIFEST,
        )
        inspected = json.loads(run("skopeo", "inspect", "--raw", f"oci:{layout}:v1"))
        assert inspected == document
        run("umoci", "unpack", "--rootless", "--image", f"{layout}:v1", tmp_path / "bundle")
        assert (tmp_path / "bundle/rootfs/data/file").read_text() == "content"
        [found] = origin.referrers(manifest.digest)
        assert origin.read_manifest(found.digest).digest == found.digest


class TestIndex:
    def test_a_block_image_is_listed_with_its_type(self, origin: folder.FolderOrigin, layout: Path) -> None:
        source = image(origin)
        digest = origin.put_manifest(source, artifact.OCI_MANIFEST, "v1")
        data = image(origin, artifactType=artifact.ARTIFACT_TYPE, subject=subject(digest))
        for _ in range(2):
            origin.put_manifest(data, artifact.OCI_MANIFEST)
        assert json.loads((layout / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
        first, second = index_of(layout)
        assert first["annotations"] == {folder.REF_NAME: "v1"}
        assert second["artifactType"] == artifact.ARTIFACT_TYPE
        assert "annotations" not in second
        assert origin.read_manifest("").digest == digest, "the only image; its block image does not count"

    def test_block_images_of_one_source_alone_are_one_image(self, origin: folder.FolderOrigin) -> None:
        def block_image(note: str, of: str = ABSENT) -> bytes:
            return image(
                origin,
                artifactType=artifact.ARTIFACT_TYPE,
                subject=subject(of),
                annotations={"n": note},
            )

        # Beside it, as in any destination of a conversion: the layer index.
        layer = image(origin, artifactType="application/vnd.glowplug.layer.v1")
        origin.put_manifest(layer, artifact.OCI_MANIFEST, "glowplug-layer-1")
        with pytest.raises(errors.NotFoundError, match="no image"):
            origin.read_manifest("")
        digest = origin.put_manifest(block_image("1"), artifact.OCI_MANIFEST)
        assert origin.read_manifest("").digest == digest
        chosen = min(digest, origin.put_manifest(block_image("2"), artifact.OCI_MANIFEST))
        assert origin.read_manifest("").digest == chosen
        origin.put_manifest(block_image("3", of=digest), artifact.OCI_MANIFEST)
        with pytest.raises(errors.InvalidInputError, match="2 images"):
            origin.read_manifest("")
        source = origin.put_manifest(image(origin), artifact.OCI_MANIFEST)
        assert origin.read_manifest("").digest == source

    def test_retagging(self, origin: folder.FolderOrigin, layout: Path) -> None:
        one, two = image(origin), image(origin, annotations={"n": "2"})
        origin.put_manifest(one, artifact.OCI_MANIFEST)
        origin.put_manifest(one, artifact.OCI_MANIFEST, "a")
        origin.put_manifest(one, artifact.OCI_MANIFEST, "b")
        assert len(index_of(layout)) == 2
        origin.put_manifest(two, artifact.OCI_MANIFEST, "a")
        origin.put_manifest(two, artifact.OCI_MANIFEST, "b")
        assert {entry["digest"] for entry in index_of(layout)} == {artifact.digest_of(two)}

    def test_a_referrer_that_loses_its_tag_is_still_found(self, origin: folder.FolderOrigin) -> None:
        found = [
            origin.put_manifest(
                image(origin, subject=subject(ABSENT), annotations={"n": str(n)}), artifact.OCI_MANIFEST, "t"
            )
            for n in range(3)
        ]
        assert {d.digest for d in origin.referrers(ABSENT)} == set(found)
        assert origin.read_manifest("t").digest == found[-1]

    def test_what_others_wrote_is_kept(self, origin: folder.FolderOrigin, layout: Path) -> None:
        origin.put_manifest(image(origin), artifact.OCI_MANIFEST, "v1")
        index = json.loads((layout / "index.json").read_text())
        foreign = {"mediaType": "x/y", "digest": ABSENT, "size": 3, "annotations": {"a": "b"}, "new": [1]}
        index["manifests"].append(foreign)
        index["annotations"] = {"org.example": "kept"}
        (layout / "index.json").write_text(json.dumps(index))
        origin.put_manifest(image(origin, annotations={"n": "2"}), artifact.OCI_MANIFEST, "v2")
        after = json.loads((layout / "index.json").read_text())
        assert foreign in after["manifests"]
        assert after["annotations"] == {"org.example": "kept"}

    def test_which_image(self, origin: folder.FolderOrigin) -> None:
        with pytest.raises(errors.NotFoundError, match="no image"):
            origin.read_manifest("")
        origin.put_manifest(image(origin), artifact.OCI_MANIFEST, "a")
        origin.put_manifest(image(origin, annotations={"n": "2"}), artifact.OCI_MANIFEST, "b")
        with pytest.raises(errors.InvalidInputError, match="2 images"):
            origin.read_manifest("")
        with pytest.raises(errors.NotFoundError, match="a, b"):
            origin.read_manifest("c")

    @pytest.mark.parametrize(
        "index",
        ["", "[]", '{"manifests": 5}', '{"manifests": [{"mediaType": "a", "digest": "sha256:../x"}]}'],
    )
    def test_malformed(self, origin: folder.FolderOrigin, layout: Path, index: str) -> None:
        layout.mkdir()
        (layout / "index.json").write_text(index)
        with pytest.raises(errors.InvalidInputError, match=r"index\.json"):
            origin.read_manifest("v1")
        with pytest.raises(errors.InvalidInputError, match=r"index\.json"):
            origin.referrers(ABSENT)

    def test_many_processes_lose_nothing(self, origin: folder.FolderOrigin, layout: Path) -> None:
        image(origin)
        with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("forkserver")) as pool:
            digests = {
                d for job in [pool.submit(add_many, layout, n) for n in range(4)] for d in job.result()
            }
        assert len(digests) == 40
        assert {d.digest for d in origin.referrers(ABSENT)} == digests


def add_many(layout: Path, process: int) -> list[str]:
    """What one converter process does; runs in a process of its own."""
    origin = folder.FolderOrigin(layout)
    return [
        origin.put_manifest(
            image(origin, subject=subject(ABSENT), annotations={"n": f"{process}-{number}"}),
            artifact.OCI_MANIFEST,
        )
        for number in range(10)
    ]


class TestFiles:
    def test_nothing_temporary_is_left(self, origin: folder.FolderOrigin, layout: Path) -> None:
        class Interrupted:
            def open(self, offset: int) -> Iterator[bytes]:
                yield b"some"
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            origin.put_blob(ABSENT, 10, Interrupted())
        with pytest.raises(errors.IntegrityError):
            origin.put_blob(ABSENT, 4, BytesSource(b"some"))
        origin.put_manifest(image(origin), artifact.OCI_MANIFEST, "v1")
        names = {str(path.relative_to(layout)) for path in layout.rglob("*") if path.is_file()}
        assert {name for name in names if not name.startswith("blobs/sha256/")} == {
            "oci-layout",
            "index.json",
        }
        assert all(len(name) == len("blobs/sha256/") + 64 for name in names if name.startswith("blobs/"))

    def test_changed_blobs_are_noticed(self, origin: folder.FolderOrigin, layout: Path) -> None:
        digest = origin.put_manifest(image(origin), artifact.OCI_MANIFEST, "v1")
        path = layout / "blobs/sha256" / digest.removeprefix("sha256:")
        path.write_bytes(path.read_bytes().replace(b"layers", b"lasers"))
        for read in (
            lambda: origin.read_manifest("v1"),
            lambda: origin.read_blob(digest, 1 << 20),
            lambda: list(origin.stream_blob(digest, path.stat().st_size)),
        ):
            with pytest.raises(errors.IntegrityError, match=digest):
                read()

    def test_a_finished_file_is_taken_as_it_is(
        self, origin: folder.FolderOrigin, layout: Path, tmp_path: Path
    ) -> None:
        spool = tmp_path / "spool"
        spool.write_bytes(b"a whole layer blob")
        spool.chmod(0o600)
        digest = artifact.digest_of(b"a whole layer blob")
        with pytest.raises(errors.IntegrityError, match="expected 17"):
            origin.link_blob(digest, 17, spool)
        assert not origin.has_blob(digest)
        assert origin.link_blob(digest, 18, spool)
        stored = layout / "blobs" / digest.replace(":", "/")
        assert stored.samefile(spool)
        assert stored.stat().st_mode & 0o777 == 0o644, "as every blob here: others may read it"

    def test_a_file_elsewhere_is_left_to_copying(self, origin: folder.FolderOrigin, tmp_path: Path) -> None:
        digest = artifact.digest_of(b"elsewhere")
        with tempfile.NamedTemporaryFile(dir="/dev/shm") as other:
            other.write(b"elsewhere")
            other.flush()
            assert os.fstat(other.fileno()).st_dev != tmp_path.stat().st_dev
            assert not origin.links(Path("/dev/shm"))
            assert not origin.link_blob(digest, 9, Path(other.name))
        assert not origin.link_blob(digest, 9, tmp_path / "gone")
        assert not origin.has_blob(digest)

    def test_a_layout_out_of_reach_takes_no_files(self, tmp_path: Path) -> None:
        closed = tmp_path / "closed"
        (closed / "layout").mkdir(parents=True)
        closed.chmod(0)
        origin = folder.FolderOrigin(closed / "layout")
        assert origin.links(tmp_path) == (os.geteuid() == 0), "root may look everywhere"
        if os.geteuid() == 0:
            os.seteuid(65534)
            try:
                assert not origin.links(Path("/tmp"))
            finally:
                os.seteuid(0)
        closed.chmod(0o700)

    def test_not_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        origin = folder.FolderOrigin(tmp_path / "file")
        with pytest.raises(errors.ConfigurationError, match="file"):
            origin.put_blob(artifact.digest_of(b""), 0, BytesSource(b""))
        with pytest.raises(errors.ImagefsError, match="file"):
            origin.read_manifest("v1")
        with pytest.raises(errors.NotFoundError):
            origin.read_blob(ABSENT, 1)

    def test_a_full_disk(self, origin: folder.FolderOrigin, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(folder, "_write_all", fail_enospc)
        with pytest.raises(errors.ConfigurationError, match="No space left"):
            origin.put_blob(artifact.digest_of(b"x"), 1, BytesSource(b"x"))


def fail_enospc(fd: int, data: bytes) -> None:
    raise OSError(28, os.strerror(28))


class TestConnect:
    def test_options_survive_json(self) -> None:
        options = connect.Options(
            plain_http=True,
            ca_file=Path("/ca"),
            docker_config=Path("/c"),
            s3_endpoint_url="http://127.0.0.1:1",
            connections=3,
            connect_timeout_seconds=1.5,
            read_timeout_seconds=2,
        )
        for value in (options, connect.Options()):
            assert connect.Options.from_json(json.loads(json.dumps(value.to_json()))) == value

    @pytest.mark.parametrize(
        "document",
        [{"unknown": 1}, {"plain_http": 1}, {"connections": True}, {"ca_file": 5}, {"connections": "3"}],
    )
    def test_options_that_are_not_understood(self, document: dict[str, object]) -> None:
        with pytest.raises(errors.ConfigurationError, match=next(iter(document))):
            connect.Options.from_json(document)

    @pytest.mark.parametrize("text", ["docker-daemon:name:tag", "docker-archive:file.tar"])
    def test_sources_are_no_origins(self, text: str) -> None:
        with pytest.raises(errors.ConfigurationError, match="--to"):
            connect.connect(reference.parse(text), connect.Options())

    @pytest.mark.parametrize(
        ("text", "selector"),
        [
            ("oci:/d", ""),
            ("oci:/d:v1", "v1"),
            ("docker://h/r", "latest"),
            ("s3://bucket/p", "latest"),
            (f"docker://h/r@{ABSENT}", ABSENT),
        ],
    )
    def test_selector(self, text: str, selector: str) -> None:
        assert connect.selector(reference.parse(text)) == selector

    def test_s3_is_loaded_only_when_used(self) -> None:
        code = (
            "import sys; from imagefs import reference; from imagefs.origin import connect;"
            "[connect.connect(reference.parse(r), connect.Options()) for r in ('docker://h/r', 'oci:/d')];"
            "assert not {'boto3', 'botocore'} & set(sys.modules)"
        )
        run(sys.executable, "-c", code)


# -- what does not belong there ---------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["blob", "index.json"])
def test_a_fifo_in_place_of_a_file_is_an_error_and_holds_up_nobody(
    origin: folder.FolderOrigin, layout: Path, where: str
) -> None:
    digest = origin.put_manifest(image(origin), artifact.OCI_MANIFEST, "v1")
    path = layout / "index.json" if where == "index.json" else layout / "blobs" / digest.replace(":", "/")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(errors.UnavailableError, match="not a regular file"):
        origin.read_manifest("v1")


def test_what_a_killed_writer_left_is_removed_and_what_is_being_written_stays(
    origin: folder.FolderOrigin, layout: Path
) -> None:
    layout.mkdir()
    left, fresh, written = (layout / f".writing-{name}" for name in ("left", "fresh", "written"))
    for path in (left, fresh, written):
        path.write_bytes(b"half a blob")
    for path in (left, written):
        os.utime(path, (0, 0))
    os.mkfifo(layout / ".writing-fifo")
    with written.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        origin.put_manifest(image(origin), artifact.OCI_MANIFEST, "v1")
    assert sorted(path.name for path in layout.glob(".writing-*")) == [
        ".writing-fifo",
        ".writing-fresh",
        ".writing-written",
    ]
